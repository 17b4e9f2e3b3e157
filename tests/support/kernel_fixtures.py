"""What every test of a CUDA kernel needs: a GPU and the built library, or else the emulation.

`pytestmark = CUDA` is all that a test file says of it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import kernel_emulator
import pytest
import torch

from ssdi8_edge.ops import kernel_library

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The marks of a test that runs a kernel.
CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        GPU and kernel_library.find_library() is None, reason="libssdi8_kernels.so is not built"
    ),
    pytest.mark.skipif(
        not GPU and kernel_emulator.COMPILER is None,
        reason="no CUDA device, and no g++ to emulate one",
    ),
    pytest.mark.usefixtures("kernels", "order"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
needs_emulation = pytest.mark.skipif(GPU, reason="shown by the emulation alone")
# Of multiplications, roughly; half a second of one core.
MOST_EMULATED = 70e6


@pytest.fixture(scope="session")
def emulated_library(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The emulated kernels, built once for all files and workers."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one of several, whose folders lie side by side
        folder = folder.parent
    folder = folder / "emulator"
    folder.mkdir(exist_ok=True)
    library = folder / kernel_library.LIBRARY_NAME
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            kernel_emulator.build(folder)
    return library


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The built library on a GPU, else the emulated one."""
    if GPU:
        yield
        return
    with kernel_emulator.emulated_kernels(request.getfixturevalue("emulated_library")):
        yield


@pytest.fixture
def order(request: pytest.FixtureRequest, kernels: None) -> None:
    """Emulated, every test runs the threads of a block in an order of its own."""
    if not GPU:
        kernel_emulator.configure(seed=crc32(request.node.name.encode()))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)


def skip_unless_affordable(work: float) -> None:
    if not GPU and work > MOST_EMULATED:
        pytest.skip("no CUDA device, and too much to emulate")


@contextmanager
def threads_in_order(seed: int) -> Iterator[None]:
    """Emulated, the threads of a block take turns in this order; on a GPU as they come."""
    if not GPU:
        kernel_emulator.configure(seed=seed)
    yield
    if not GPU:
        kernel_emulator.configure()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()
