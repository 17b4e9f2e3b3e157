"""GPU memory and one stream, through pycuda; nothing else of this runtime imports pycuda.

The primary context is retained, not a new one made: TensorRT uses the primary context, and memory
of one context is of no use in another. To run on cuda-python instead, rewrite this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from runtime.engine.libcuda import Graph
from runtime.problems import BundleProblem, MemoryRanOut, RunFailure


class Gpu:
    """The first GPU's primary context, a stream on it, and all that was allocated through it."""

    def __init__(self) -> None:
        try:
            import pycuda
            import pycuda.driver as driver
        except ImportError as error:
            raise BundleProblem(
                f"pycuda cannot be imported ({error})",
                f"run setup.sh, or install it with: {sys.executable} -m pip install pycuda",
            ) from error
        self._driver = driver
        self._pinned: list[Any] = []
        self._allocations: list[Any] = []
        self.version: str = pycuda.VERSION_TEXT
        try:
            driver.init()
            self._context = driver.Device(0).retain_primary_context()
        except driver.Error as error:
            raise BundleProblem(
                f"no usable NVIDIA GPU here ({error})",
                "check that its driver is loaded and that this user may use it (group video)",
            ) from error
        self._stream: Any = None
        self._context.push()
        try:
            self._free_at_start = self._free_memory()
            self._stream = driver.Stream()
        except BaseException as error:
            self.close()
            if not isinstance(error, driver.Error):
                raise
            raise MemoryRanOut(
                f"the GPU has no room for a stream ({error})", "end other programs that use it"
            ) from error

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.handle

    @property
    def bytes_taken(self) -> int:
        """Memory that is no longer free since this was opened; other programs count in."""
        return max(0, self._free_at_start - self._free_memory())

    def _free_memory(self) -> int:
        return self._driver.mem_get_info()[0]

    def allocate(self, nbytes: int) -> int:
        """Pointer to memory on the GPU, aligned to 256 bytes; freed by `close`."""
        try:
            allocation = self._driver.mem_alloc(max(1, nbytes))
        except self._driver.Error as error:
            raise MemoryRanOut(
                f"the GPU has no {nbytes / 2**20:.0f} MiB left ({error})",
                "end other programs, or pack the bundle for a smaller batch",
            ) from error
        self._allocations.append(allocation)
        return int(allocation)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Page-locked host memory, which a graph can copy from and to; freed by `close`."""
        try:
            array = self._driver.pagelocked_empty(shape, dtype)
        except self._driver.Error as error:
            raise MemoryRanOut(
                f"there is no page-locked memory left ({error})", "end other programs"
            ) from error
        self._pinned.append(array)
        return array

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """Host to GPU, on the stream; `source` is pinned and contiguous."""
        self._driver.memcpy_htod_async(target, source, self._stream)

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """GPU to host, on the stream; `target` is pinned and contiguous."""
        self._driver.memcpy_dtoh_async(target, source, self._stream)

    def read(self, source: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A copy on the host, once all work before it is done."""
        self.synchronize()
        array = np.empty(shape, dtype)
        self._driver.memcpy_dtoh(array, source)
        return array

    def write(self, target: int, source: np.ndarray) -> None:
        """Host to GPU, once all work before it is done; `source` is contiguous."""
        self.synchronize()
        self._driver.memcpy_htod(target, source)

    def zero(self, target: int, nbytes: int) -> None:
        """Clear memory, on the stream."""
        self._driver.memset_d8_async(target, 0, nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            RunFailure: a kernel failed.
        """
        try:
            self._stream.synchronize()
        except self._driver.Error as error:
            raise RunFailure(f"the GPU failed ({error})", "run --verify") from error

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Graph.of`."""
        return Graph.of(work, self.stream)

    def close(self) -> None:
        """Wait, then free everything; may be called again."""
        if self._context is None:
            return
        if self._stream is not None:
            with suppress(self._driver.Error):  # it was said when the GPU failed
                self._stream.synchronize()
        for array in self._pinned:
            array.base.free()
        for allocation in self._allocations:
            allocation.free()
        self._pinned, self._allocations = [], []
        self._stream = None
        self._context.pop()
        self._context.detach()
        self._context = None
