"""runtime/engine/cuda.py and libcuda.py with the real pycuda and driver.

Memory, copies, CUDA graphs.

A copy stands where an engine would: what is recorded is what decode records around one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "jetson"))

from runtime.engine.cuda import Gpu
from runtime.engine.libcuda import LIBRARY, this_gpu
from runtime.problems import BundleProblem, RunFailure

pytest.importorskip("pycuda", reason="not installed: pip install pycuda, which needs nvcc")


def has_gpu() -> bool:
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return cuda.cuInit(0) == 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="no CUDA device"),
]


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.close()
    gpu.close()


def test_facts_of_the_gpu() -> None:
    facts = this_gpu()
    assert facts.name and facts.sms > 0
    assert float(facts.compute_capability) >= 8.0 and float(facts.cuda) >= 12.0


def test_memory_and_copies(gpu: Gpu) -> None:
    host, back = gpu.pinned((1000,), np.int32), gpu.pinned((1000,), np.int32)
    host[:] = np.arange(1000)
    device = gpu.allocate(host.nbytes)
    assert device % 256 == 0 and gpu.bytes_taken > 0
    gpu.copy_in(device, host)
    gpu.copy_out(back, device)
    gpu.synchronize()
    assert (back == host).all()
    gpu.copy_in(device, host[500:])
    expected = np.concatenate([host[500:], host[500:]])
    assert (gpu.read(device, (1000,), np.dtype(np.int32)) == expected).all()
    gpu.zero(device, host.nbytes)
    assert not gpu.read(device, (10, 100), np.dtype(np.int32)).any()


def test_a_graph_reads_what_is_there_when_it_runs(gpu: Gpu) -> None:
    """Recorded once and not run; then run again and again on new contents of the same memory."""
    host, back = gpu.pinned((64,), np.float32), gpu.pinned((64,), np.float32)
    host[:], back[:] = 1, 0
    device = gpu.allocate(host.nbytes)

    def work() -> None:
        gpu.copy_in(device, host)
        gpu.copy_out(back, device)

    work()
    gpu.synchronize()
    back[:] = 0
    graph = gpu.capture(work)
    gpu.synchronize()
    assert not back.any()
    for value in (2, 3):
        host[:] = value
        graph.launch()
        gpu.synchronize()
        assert (back == value).all()
    graph.free()
    graph.free()


def test_what_cannot_be_recorded_leaves_the_stream_usable(gpu: Gpu) -> None:
    """Waiting inside a recording is refused by CUDA; so is work that raises by itself."""
    host = gpu.pinned((8,), np.int32)
    device = gpu.allocate(host.nbytes)
    host[:] = 7
    for work in (gpu.synchronize, lambda: 1 // 0):
        with pytest.raises((RunFailure, ZeroDivisionError)):
            gpu.capture(work)
        gpu.copy_in(device, host)
        assert (gpu.read(device, (8,), np.dtype(np.int32)) == 7).all()


def test_memory_that_runs_out_is_a_sentence(gpu: Gpu) -> None:
    with pytest.raises(BundleProblem, match=r"the GPU has no .* MiB left"):
        gpu.allocate(1 << 50)
