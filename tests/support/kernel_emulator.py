"""The CUDA kernels compiled by g++ and run on the CPU, called on CPU tensors.

What that proves and what it cannot is said in docs/kernels.md. `emulator/` is their CUDA.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ssdi8_edge.ops import kernel_library

COMPILER = shutil.which("g++")
EMULATOR = Path(__file__).parent / "emulator"
KERNELS = sorted((Path(__file__).parents[2] / "plugins" / "kernels").rglob("*.cu"))
# Of an Orin Nano, so that the launchers choose as they do there.
PROCESSORS = 8

FLAGS = ["-std=c++17", "-fPIC", "-march=native", f"-I{EMULATOR}"]
# Every FP32 operation is rounded; the kernels name their fused ones.
FLAGS += ["-ffp-contract=off"]
# The kernels see memory through other types, as nvcc allows.
FLAGS += ["-fno-strict-aliasing"]
# longjmp from one stack to another is what the emulator is made of.
FLAGS += ["-U_FORTIFY_SOURCE"]
FLAGS += ["-fvisibility=hidden"]
# nvcc is who warns of the kernels; g++ does not even know their pragmas.
FLAGS += ["-w"]
# gpu.cuh takes the place of the kernels' own.
KERNEL_FLAGS = ["-O1", "-include", str(EMULATOR / "gpu.cuh"), "-x", "c++"]
# Traps, which the emulator makes a message of.
KERNEL_FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]


def build(folder: Path, kernels: Sequence[Path] = KERNELS) -> Path:
    """Compile the kernels and the emulator, two files at a time; the library's path."""

    def compile_file(source: Path) -> str:
        target = folder / f"{source.name}.o"
        own = KERNEL_FLAGS if source.suffix == ".cu" else ["-O3"]
        run([*FLAGS, *own, "-c", str(source), "-o", str(target)])
        return str(target)

    # The largest first: the others fill the gaps.
    sources = [*kernels, EMULATOR / "emulator.cpp"]
    sources.sort(key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, sources))
    library = folder / kernel_library.LIBRARY_NAME
    run(["-shared", *objects, "-o", str(library)])
    return library


def run(arguments: list[str]) -> None:
    assert COMPILER is not None
    result = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def configure(processors: int = PROCESSORS, seed: int = 0) -> None:
    """What the launchers take for the number of multiprocessors; the seed of the order in which the
    threads of a block take turns, 0 for that of their numbers."""
    kernel_library.load().emulator_configure(processors, ctypes.c_uint(seed))


@contextmanager
def emulated_kernels(library: Path) -> Iterator[None]:
    """Inside, `kernel_library` runs the emulated kernels."""

    @contextmanager
    def no_stream(_: object) -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_library, "find_library", lambda: library)
        patch.setattr(kernel_library, "available", lambda: True)
        patch.setattr(kernel_library, "_current_stream", no_stream)
        kernel_library.load.cache_clear()
        configure()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small tensors gain nothing from more
        yield
        torch.set_num_threads(threads)
    kernel_library.load.cache_clear()
