"""The engine `kernels` without a GPU: emulated kernels, memory and a stream of a fake one."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fake_cuda import Cuda, CudaMisuse, FakeCtypes, Stream

from runtime.backends.kernels import library
from runtime.engine import libcuda

QUERIES = ("_sizeof_", "_workspace", "_abi_version", "_last_error")


class EmulatedLibrary:
    """libssdi8_kernels.so, whose launchers keep the order of the fake stream."""

    def __init__(self, path: str, cuda: Cuda) -> None:
        self._real = ctypes.CDLL(path)
        self._cuda = cuda
        self._launchers: dict[str, Launcher] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if any(query in name for query in QUERIES):
            return real
        return self._launchers.setdefault(name, Launcher(real, self._cuda))


class Launcher:
    """One launcher: runs behind what waits on the stream, or is recorded."""

    argtypes: Any = None

    def __init__(self, real: Any, cuda: Cuda) -> None:
        self._real = real
        self._cuda = cuda

    def __call__(self, params: Any, stream: int) -> int:
        if stream != Stream.handle:
            raise CudaMisuse(f"a kernel was launched on {stream}, which is no stream")
        given = params._obj
        own = type(given).from_buffer_copy(given)
        self._require_memory(own)

        def run() -> None:
            if self._real(ctypes.byref(own), None):
                raise CudaMisuse("a recorded kernel was refused")

        if self._cuda.stream.capturing is not None:
            self._cuda.stream.put(run)
            return 0
        self._cuda.stream.flush()
        return int(self._real(ctypes.byref(own), None))

    def _require_memory(self, params: ctypes.Structure) -> None:
        """Every pointer is into memory that is there."""
        for name, kind in params._fields_:  # type: ignore[misc]
            pointer = getattr(params, name)
            if kind is ctypes.c_void_p and pointer is not None:
                self._cuda.view(pointer, 1)


@contextmanager
def emulated_gpu() -> Iterator[Cuda]:
    """Inside, the driver is a fake one and kernel libraries are emulated ones."""
    cuda = Cuda()
    libcuda.ctypes = FakeCtypes(cuda)  # type: ignore[assignment]
    names = {name: getattr(ctypes, name) for name in dir(ctypes) if not name.startswith("_")}
    library.ctypes = types.SimpleNamespace(  # type: ignore[assignment]
        **(names | {"CDLL": lambda path: EmulatedLibrary(path, cuda)})
    )
    try:
        yield cuda
    finally:
        libcuda.ctypes = library.ctypes = ctypes
