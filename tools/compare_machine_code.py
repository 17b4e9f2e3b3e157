"""Whether a change of the kernels' sources leaves their machine code as it was.

    python tools/compare_machine_code.py OLD NEW [--arch sm_87]

OLD and NEW are `plugins/kernels` folders, such as one that `git worktree` made. Every kernel is
compiled and disassembled (nvcc, cuobjdump) and compared by its name without namespaces and by its
instructions; files may be moved and split. Needs no GPU. Exit code 1 if a kernel differs, or is on
one side alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, or of NVIDIA's packages, where nvdisasm lies beside it."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")
    return shutil.which("cuobjdump") or next(map(str, wheels), None)


def machine_code(cubin: Path) -> dict[str, str]:
    """The SASS text of each kernel of a cubin, by its mangled name."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("no cuobjdump: install the CUDA toolkit, or nvidia-cuda-cuobjdump")
    command = [cuobjdump, "-sass", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = sass.split("Function : ")[1:]
    return {body.splitlines()[0].strip(): body.split("\n", 1)[1] for body in bodies}


def compile_kernels(folder: Path, architecture: str) -> Iterator[tuple[str, str]]:
    """The demangled name and the instructions of every kernel below `folder`."""

    def compile_file(source: Path) -> dict[str, str]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin"]
            subprocess.run([*command, "-o", cubin.name, str(source)], check=True)
            return machine_code(Path(cubin.name))

    with ThreadPoolExecutor(2) as pool:
        for kernels in pool.map(compile_file, sorted(folder.rglob("*.cu"))):
            yield from kernels.items()


def plain_names(mangled: list[str]) -> list[str]:
    """Without namespaces, since those of a file without name carry its path."""
    text = "\n".join(mangled)
    command = ["cu++filt"] if shutil.which("cu++filt") else ["c++filt"]
    shown = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    namespace = r"(<unnamed>|\(anonymous namespace\)|\b\w+)::"
    return [re.sub(namespace, "", name) for name in shown.splitlines()]


def hashes(folder: Path, architecture: str) -> dict[str, list[str]]:
    """SHA-256 of the instructions of each kernel, by plain name; files may share a name."""
    found = list(compile_kernels(folder, architecture))
    result: dict[str, list[str]] = {}
    for name, (_, code) in zip(plain_names([name for name, _ in found]), found, strict=True):
        result.setdefault(name, []).append(hashlib.sha256(code.encode()).hexdigest()[:16])
    return {name: sorted(several) for name, several in result.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--arch", default="sm_87")
    arguments = parser.parse_args()
    old, new = (hashes(folder, arguments.arch) for folder in (arguments.old, arguments.new))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in differing:
        print(f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}")
    count = sum(len(several) for several in new.values())
    print(f"{count} kernels for {arguments.arch}, {len(differing)} names differ")
    whole = hashlib.sha256(repr(sorted(new.items())).encode()).hexdigest()
    print(f"SHA-256 over all of them: {whole}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
