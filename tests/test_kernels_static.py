"""What the compiler says about each CUDA file for sm_87: no GPU needed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "plugins" / "kernels"
# The most that every chip from sm_86 on grants one block.
MAX_SHARED_BYTES = 99 * 1024
# The matrix instructions.
INT8, FP16 = "IMMA.16832.S8.S8", "HMMA.16816.F32"
FILES = sorted(path.name for path in KERNELS.glob("*.cu"))


def find_cuobjdump() -> str:
    """Of the CUDA toolkit, or of NVIDIA's packages, where nvdisasm lies beside it."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")
    found = shutil.which("cuobjdump") or next(map(str, wheels), None)
    if found is None:
        pytest.skip("no cuobjdump (CUDA toolkit, or pip install nvidia-cuda-cuobjdump)")
    return found


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc (CUDA toolkit)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """File name -> (what ptxas reports, the cubin), compiled once."""
    folder = tmp_path_factory.mktemp("cubin")

    @functools.cache
    def compile_file(name: str) -> tuple[str, Path]:
        cubin = folder / f"{name}.cubin"
        command = ["nvcc", "-std=c++17", "-arch=sm_87", "-cubin", "-Xptxas", "-v", "-Werror"]
        command += ["all-warnings", "-o", str(cubin), str(KERNELS / name)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr, cubin

    return compile_file


@pytest.mark.parametrize("name", FILES)
def test_no_local_memory_and_little_shared_memory(compiled, name: str) -> None:  # type: ignore[no-untyped-def]
    report = compiled(name)[0]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert len(frames) == len(re.findall("Compiling entry function", report))
    assert all(frame == ("0", "0", "0") for frame in frames), report
    assert not re.search(r"bytes lmem", report)
    assert all(int(n) <= MAX_SHARED_BYTES for n in re.findall(r"(\d+) bytes smem", report))


@pytest.mark.parametrize(
    ("name", "kernel", "instruction"),
    [
        ("linear.cu", "", INT8),
        ("chunk_state.cu", "18chunk_state_kernel", INT8),
        ("chunk_state.cu", "23fp16_chunk_state_kernel", FP16),
        ("chunk_scan.cu", "17chunk_scan_kernel", INT8),
        ("chunk_scan.cu", "9cb_kernel", INT8),
        ("chunk_scan.cu", "22fp16_chunk_scan_kernel", FP16),
        ("ssd_scan.cu", "11scan_kernel", INT8),
        ("ssd_scan_fp16.cu", "14prepare_kernel", INT8),  # CB
        ("ssd_scan_fp16.cu", "11scan_kernel", FP16),
    ],
)
def test_tensor_cores_are_used(  # type: ignore[no-untyped-def]
    compiled, name: str, kernel: str, instruction: str
) -> None:
    command = [find_cuobjdump(), "-sass", str(compiled(name)[1])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = [b for b in sass.split("Function : ")[1:] if kernel in b.splitlines()[0]]
    assert bodies
    for body in bodies:
        assert instruction in body, body.splitlines()[0]
        assert not re.search(r"\b(LDL|STL)\b", body), body.splitlines()[0]
