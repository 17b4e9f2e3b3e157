"""What the emulator of the kernels notices, by kernels that do it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import kernel_emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(kernel_emulator.COMPILER is None, reason="no g++")

INTEGERS = 256
GARBAGE = 0x7F7F7F7F

Run = Callable[..., tuple[str, list[int]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel of faults.cu on 0, 1, 2, ...; gives the error and what is there then."""
    folder = tmp_path_factory.mktemp("faults")
    source = kernel_emulator.EMULATOR / "faults.cu"
    library = ctypes.CDLL(str(kernel_emulator.build(folder, [source])))
    library.run_kernel.restype = ctypes.c_char_p

    def run(name: str, seed: int = 0) -> tuple[str, list[int]]:
        library.emulator_configure(8, ctypes.c_uint(seed))
        memory = torch.arange(INTEGERS, dtype=torch.int32)
        error = library.run_kernel(name.encode(), ctypes.c_void_p(memory.data_ptr()))
        return error.decode(), memory.tolist()

    return run


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "stand_still",
            "no thread can go on: of 64 threads 48 in __syncthreads, 16 in __syncwarp",
        ),
        ("wait_for_ended_lane", "__syncwarp waits for a lane that ended"),
        ("mix_instructions", "lanes meet in shfl.xor with mask ffffffff and __syncwarp"),
        ("wait_for_later_block", "waits for what no block before this one has done"),
        ("read_behind_shared", "0 bytes behind the 128 bytes of shared memory, thread 31 of block"),
        ("read_misaligned", "misaligned address or index out of bounds, thread 1 of block"),
        ("leave_array", "misaligned address or index out of bounds, thread 31 of block"),
        ("ask_too_much", "invalid argument"),
    ],
)
def test_a_fault_ends_the_launch(run: Run, kernel: str, message: str) -> None:
    for _ in range(2):  # and leaves nothing behind
        assert message in run(kernel)[0]
        assert run("exchange")[0] == "no error"


def test_shared_memory_starts_as_garbage_in_every_block(run: Run) -> None:
    assert run("read_what_none_has_written")[1][:64] == [GARBAGE] * 64


def test_order_of_threads_shows_a_missing_barrier(run: Run) -> None:
    want = [*range(1, 64), 0]
    for seed in range(5):
        assert run("exchange", seed)[1][:64] == want
        assert run("exchange_without_barrier", seed)[1][:64] != want


def test_copies_land_when_they_are_waited_for(run: Run) -> None:
    assert run("copy")[1] == list(range(INTEGERS))
    half = INTEGERS // 2
    assert run("copy_without_last_wait")[1] == [*range(half), *[GARBAGE] * half]
