"""GPU memory, one stream and its events through the CUDA driver library: ctypes and numpy alone.

What `engine.cuda` does with pycuda for TensorRT. The primary context is the one that the CUDA
runtime inside the kernel library uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from runtime.engine.libcuda import Graph, check, driver_library, this_gpu
from runtime.problems import BundleProblem, MemoryRanOut, RunFailure

OUT_OF_MEMORY = "(2)"  # how the message of `check` ends for CUDA_ERROR_OUT_OF_MEMORY
MILLISECOND = 1e-3


class Device:
    """The first GPU, a stream on it, and all that was allocated through it."""

    def __init__(self) -> None:
        """Raises BundleProblem where there is no driver or GPU, or no room for a context."""
        self.facts = this_gpu()
        self._cuda = driver_library()
        self._memory: dict[int, int] = {}  # address -> bytes
        self._pinned: list[ctypes.c_void_p] = []
        self._events: list[ctypes.c_void_p] = []
        self._stream = ctypes.c_void_p()
        self._number = ctypes.c_int()
        self._retained = False
        try:
            self._call("cuDeviceGet", ctypes.byref(self._number), 0)
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._number)
            self._retained = True
            self._call("cuCtxSetCurrent", context)
            self._free_at_start = self.free_bytes
            self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(0))
        except BaseException as error:
            self.close()
            if not isinstance(error, RunFailure):
                raise
            if error.message.endswith(OUT_OF_MEMORY):
                raise MemoryRanOut(
                    f"the GPU has no room for a stream ({error.message})",
                    "end other programs that use it",
                ) from error
            raise BundleProblem(
                f"no usable NVIDIA GPU here ({error.message})",
                "check that its driver is loaded and that this user may use it (group video)",
            ) from error

    def _call(self, function: str, *arguments: Any) -> None:
        """Raises RunFailure with the driver's own words."""
        check(self._cuda, getattr(self._cuda, function)(*arguments), function)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.value or 0

    @property
    def free_bytes(self) -> int:
        """Memory that is free now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    @property
    def bytes_taken(self) -> int:
        """Memory that is no longer free since this was opened; other programs count in."""
        return max(0, self._free_at_start - self.free_bytes)

    def allocate(self, nbytes: int) -> int:
        """Address of memory on the GPU, aligned to 256 bytes.

        Raises:
            MemoryRanOut: there is not so much in one piece.
        """
        address = ctypes.c_uint64()
        size = max(1, nbytes)
        try:
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        except RunFailure as failure:
            raise MemoryRanOut(
                f"the GPU has no {size / 2**20:.0f} MiB left in one piece ({failure.message})",
                "end other programs",
            ) from failure
        self._memory[address.value] = size
        return address.value

    def release(self, address: int) -> None:
        """Give memory from `allocate` back; work that uses it has ended."""
        del self._memory[address]
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def pinned(self, count: int, dtype: Any) -> np.ndarray:
        """(count) page-locked host memory, which a graph can copy from and to; freed by `close`."""
        nbytes = max(1, count * np.dtype(dtype).itemsize)
        pointer = ctypes.c_void_p()
        try:
            self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0)
        except RunFailure as failure:
            raise MemoryRanOut(
                f"there is no page-locked memory left ({failure.message})", "end other programs"
            ) from failure
        self._pinned.append(pointer)
        assert pointer.value is not None
        raw = (ctypes.c_char * nbytes).from_address(pointer.value)
        return np.frombuffer(raw, np.uint8)[: count * np.dtype(dtype).itemsize].view(dtype)

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """Host to GPU, on the stream; `source` is pinned and contiguous."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            *(ctypes.c_uint64(target), _address(source), ctypes.c_size_t(source.nbytes)),
            self._stream,
        )

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """GPU to host, on the stream; `target` is pinned and contiguous."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            *(_address(target), ctypes.c_uint64(source), ctypes.c_size_t(target.nbytes)),
            self._stream,
        )

    def upload(self, target: int, source: np.ndarray) -> None:
        """Host to GPU at once, from any contiguous memory."""
        self._call(
            "cuMemcpyHtoD_v2",
            *(ctypes.c_uint64(target), _address(source), ctypes.c_size_t(source.nbytes)),
        )

    def read(self, source: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A copy on the host, once all work before it is done."""
        self.synchronize()
        array = np.empty(shape, dtype)
        self._call(
            "cuMemcpyDtoH_v2",
            *(_address(array), ctypes.c_uint64(source), ctypes.c_size_t(array.nbytes)),
        )
        return array

    def zero(self, target: int, nbytes: int) -> None:
        """Clear memory, on the stream."""
        self._call(
            "cuMemsetD8Async",
            *(ctypes.c_uint64(target), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), self._stream),
        )

    def record(self, nth: int) -> None:
        """Mark the stream's present end as event `nth`; events are made in their order."""
        if nth == len(self._events):
            event = ctypes.c_void_p()
            self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
            self._events.append(event)
        self._call("cuEventRecord", self._events[nth], self._stream)

    def seconds_between(self, first: int, second: int) -> float:
        """From event `first` to event `second`, both passed."""
        passed = ctypes.c_float()
        self._call(
            "cuEventElapsedTime", ctypes.byref(passed), self._events[first], self._events[second]
        )
        return passed.value * MILLISECOND

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            RunFailure: a kernel failed, or the GPU is gone.
        """
        try:
            self._call("cuStreamSynchronize", self._stream)
        except RunFailure as failure:
            raise RunFailure(f"the GPU failed ({failure.message})", "run --verify") from failure

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Graph.of`."""
        return Graph.of(work, self.stream)

    def close(self) -> None:
        """Wait, then free everything; may be called again, also when the GPU is lost."""
        if not self._retained:
            return
        self._retained = False
        with suppress(RunFailure):  # it was said when the GPU failed
            if self._stream:
                self._call("cuStreamSynchronize", self._stream)
        for function, handles in (
            ("cuEventDestroy_v2", self._events),
            ("cuMemFreeHost", self._pinned),
            ("cuMemFree_v2", [ctypes.c_uint64(address) for address in self._memory]),
            ("cuStreamDestroy_v2", [self._stream] if self._stream else []),
            ("cuDevicePrimaryCtxRelease_v2", [self._number]),
        ):
            for handle in handles:
                with suppress(RunFailure):
                    self._call(function, handle)
        self._events, self._pinned = [], []
        self._memory.clear()


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
