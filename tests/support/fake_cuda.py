"""Stand-ins for pycuda and libcuda.so.1, without a GPU: strict about the rules of CUDA.

What is put on a stream runs when the stream is waited
for, so that a forgotten wait shows; what is put there while a graph is recorded does not run at
all. Memory that is not there, or not any more, is an error, and so is a call without a context.
Addresses on the GPU are those of host memory, so that emulated kernels can run on them.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from typing import Any

import numpy as np

ALIGNMENT = 512  # of allocations
HANDLES = 9000  # of events
TOTAL_MEMORY = 8 << 30
Work = Callable[[], None]
# Results of the driver.
OUT_OF_MEMORY, LOST = 2, 719


class CudaMisuse(AssertionError):
    """A rule of CUDA was broken."""


class CudaError(Exception):
    """What pycuda raises as driver.Error."""


class Cuda:
    """All state of one fake GPU."""

    def __init__(self) -> None:
        self.name = "Fake Orin"
        self.capability = (8, 7)
        self.sms = 8
        self.driver_version = 12060
        self.allocations: dict[int, np.ndarray] = {}
        self.pinned: set[int] = set()  # ids of live PinnedMemory
        self.contexts = 0  # pushed
        self.retained = 0
        self.stream = Stream(self)
        self.graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self.interrupt_next_wait = False
        self.refuse_capture = False
        self.refuse_stream = False
        self.refuse_pinned = False
        self.memory_limit = TOTAL_MEMORY
        self.lost = False  # every wait fails from now on
        self.largest_allocation = 0
        self.events: dict[int, int] = {}  # handle -> the number of its last record
        self.recorded_events = 0

    def require_context(self) -> None:
        if self.contexts != 1:
            raise CudaMisuse(f"called with {self.contexts} contexts")

    def allocate(self, nbytes: int) -> int:
        self.require_context()
        if nbytes <= 0:
            raise CudaError("invalid value")
        if self.used() + nbytes > self.memory_limit:
            raise CudaError("out of memory")
        memory = np.full(nbytes + ALIGNMENT, 0xAB, np.uint8)  # never zero by luck
        start = -memory.ctypes.data % ALIGNMENT
        pointer = memory.ctypes.data + start
        self.allocations[pointer] = memory[start : start + nbytes]
        self.largest_allocation = max(self.largest_allocation, nbytes)
        return pointer

    def used(self) -> int:
        return sum(memory.nbytes for memory in self.allocations.values())

    def view(self, pointer: int, nbytes: int) -> np.ndarray:
        """The bytes at `pointer`, which must lie in one live allocation."""
        for base, memory in self.allocations.items():
            if base <= pointer and pointer + nbytes <= base + memory.nbytes:
                return memory[pointer - base : pointer - base + nbytes]
        raise CudaMisuse(f"{nbytes} bytes at {pointer:#x} are not allocated")

    def leaks(self) -> list[str]:
        """What is still held."""
        held = {
            "allocations": len(self.allocations),
            "pinned": len(self.pinned),
            "contexts": self.contexts,
            "retained": self.retained,
            "graphs": len(self.graphs),
            "events": len(self.events),
        }
        return [f"{count} {what}" for what, count in held.items() if count]


class Stream:
    """Work in order; `capturing` collects it instead of running it."""

    handle = 77

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.queue: list[Work] = []
        self.capturing: list[Work] | None = None

    def put(self, work: Work) -> None:
        self._cuda.require_context()
        (self.queue if self.capturing is None else self.capturing).append(work)

    def synchronize(self) -> None:
        self._cuda.require_context()
        if self.capturing is not None:
            raise CudaMisuse("waited for a stream that is being recorded")
        if self._cuda.interrupt_next_wait:
            self._cuda.interrupt_next_wait = False
            raise KeyboardInterrupt
        self.flush()

    def flush(self) -> None:
        """Run what is waiting."""
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class PinnedMemory(bytearray):
    """Base of a page-locked array."""

    def register(self, cuda: Cuda) -> None:
        self._cuda = cuda
        cuda.pinned.add(id(self))

    def free(self) -> None:
        if id(self) not in self._cuda.pinned:
            raise CudaMisuse("pinned memory freed twice")
        self._cuda.pinned.remove(id(self))


class _Allocation:
    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda = cuda
        self._pointer = cuda.allocate(nbytes)

    def __int__(self) -> int:
        return self._pointer

    def free(self) -> None:
        if self._cuda.allocations.pop(self._pointer, None) is None:
            raise CudaMisuse("GPU memory freed twice")


class _Context:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        cuda.retained += 1

    def push(self) -> None:
        self._cuda.contexts += 1

    def pop(self) -> None:
        self._cuda.contexts -= 1

    def detach(self) -> None:
        self._cuda.retained -= 1


def make_driver(cuda: Cuda) -> types.ModuleType:
    """pycuda.driver on `cuda`."""
    driver = types.ModuleType("pycuda.driver")

    def pinned_bytes(array: np.ndarray) -> np.ndarray:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, PinnedMemory) or id(base) not in cuda.pinned:
            raise CudaMisuse("an asynchronous copy needs page-locked memory")
        if not array.flags.c_contiguous:
            raise CudaMisuse("a copy needs contiguous memory")
        return array.view(np.uint8).reshape(-1)

    def pagelocked_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        cuda.require_context()
        if cuda.refuse_pinned:
            raise CudaError("out of memory")
        memory = PinnedMemory(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        memory.register(cuda)
        return np.ndarray(shape, dtype, buffer=memory)

    def memcpy_htod_async(target: int, source: np.ndarray, stream: Stream) -> None:
        data = pinned_bytes(source)

        def copy() -> None:
            pinned_bytes(source)
            cuda.view(target, data.nbytes)[:] = data

        stream.put(copy)

    def memcpy_dtoh_async(target: np.ndarray, source: int, stream: Stream) -> None:
        data = pinned_bytes(target)

        def copy() -> None:
            pinned_bytes(target)
            data[:] = cuda.view(source, data.nbytes)

        stream.put(copy)

    def memcpy_dtoh(target: np.ndarray, source: int) -> None:
        cuda.require_context()
        target.view(np.uint8).reshape(-1)[:] = cuda.view(source, target.nbytes)

    def memcpy_htod(target: int, source: np.ndarray) -> None:
        cuda.require_context()
        if cuda.stream.queue:
            raise CudaMisuse("a copy that does not wait for the stream")
        cuda.view(target, source.nbytes)[:] = source.view(np.uint8).reshape(-1)

    def memset_d8_async(target: int, value: int, nbytes: int, stream: Stream) -> None:
        def fill() -> None:
            cuda.view(target, nbytes)[:] = value

        stream.put(fill)

    def make_stream() -> Stream:
        cuda.require_context()
        if cuda.refuse_stream:
            raise CudaError("out of memory")
        return cuda.stream

    class Device:
        def __init__(self, number: int) -> None:
            assert number == 0

        def retain_primary_context(self) -> _Context:
            return _Context(cuda)

    driver.Error = CudaError  # type: ignore[attr-defined]
    driver.init = lambda: None  # type: ignore[attr-defined]
    driver.Device = Device  # type: ignore[attr-defined]
    driver.Stream = make_stream  # type: ignore[attr-defined]
    driver.mem_alloc = lambda nbytes: _Allocation(cuda, nbytes)  # type: ignore[attr-defined]
    driver.mem_get_info = lambda: (TOTAL_MEMORY - cuda.used(), TOTAL_MEMORY)  # type: ignore[attr-defined]
    for function in (
        *(pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async),
        *(memcpy_dtoh, memcpy_htod, memset_d8_async),
    ):
        setattr(driver, function.__name__, function)
    return driver


class LibCuda:
    """The functions of libcuda.so.1 that engine/libcuda.py calls; arguments are ctypes values."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._recorded: dict[int, list[Work]] = {}

    def cuInit(self, _: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, _: int) -> int:
        device._obj.value = 0
        return 0

    def cuDeviceGetName(self, name: Any, length: int, _: Any) -> int:
        name.value = self._cuda.name.encode()[: length - 1]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._cuda.driver_version
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, _: Any) -> int:
        major, minor = self._cuda.capability
        value._obj.value = {16: self._cuda.sms, 75: major, 76: minor}[number]
        return 0

    def cuGetErrorString(self, result: int, text: Any) -> int:
        text._obj.value = f"fake error {result}".encode()
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert stream.value == Stream.handle and mode in (0, 1, 2)
        if self._cuda.refuse_capture:
            return 900
        assert self._cuda.stream.capturing is None
        self._cuda.stream.capturing = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert stream.value == Stream.handle
        work, self._cuda.stream.capturing = self._cuda.stream.capturing, None
        assert work is not None
        graph._obj.value = 1000 + len(self._recorded)
        self._recorded[graph._obj.value] = work
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        assert flags.value == 0
        executable._obj.value = 5000 + graph.value
        self._cuda.graphs[executable._obj.value] = self._recorded[graph.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        assert graph.value in self._recorded
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        assert stream.value == Stream.handle and self._cuda.stream.capturing is None
        self._cuda.launches += 1
        for work in self._cuda.graphs[executable.value]:
            self._cuda.stream.put(work)
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self._cuda.graphs[executable.value]
        return 0


class DriverMemory(LibCuda):
    """With the functions of engine/driver.py: memory, the stream and its events."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda)
        self._host: dict[int, Any] = {}  # address of page-locked memory -> what holds it

    def _page_locked(self, pointer: Any, count: int) -> np.ndarray:
        """The bytes there, which must be page-locked."""
        for base, memory in self._host.items():
            if base <= pointer.value and pointer.value + count <= base + len(memory):
                return np.frombuffer(memory, np.uint8)[pointer.value - base :][:count]
        raise CudaMisuse("an asynchronous copy needs page-locked memory")

    def cuDevicePrimaryCtxRetain(self, context: Any, _: Any) -> int:
        context._obj.value = 1
        self._cuda.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, _: Any) -> int:
        self._cuda.retained -= 1
        self._cuda.contexts = 0
        return 0

    def cuCtxSetCurrent(self, _: Any) -> int:
        self._cuda.contexts = 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        self._cuda.require_context()
        free._obj.value = self._cuda.memory_limit - self._cuda.used()
        total._obj.value = TOTAL_MEMORY
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        self._cuda.require_context()
        if self._cuda.refuse_stream:
            return OUT_OF_MEMORY
        stream._obj.value = Stream.handle
        return 0

    def cuStreamDestroy_v2(self, _: Any) -> int:
        return 0

    def cuStreamSynchronize(self, _: Any) -> int:
        if self._cuda.lost:
            return LOST
        self._cuda.stream.synchronize()
        return 0

    def cuMemAlloc_v2(self, pointer: Any, nbytes: Any) -> int:
        try:
            pointer._obj.value = self._cuda.allocate(nbytes.value)
        except CudaError:
            return OUT_OF_MEMORY
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        if self._cuda.allocations.pop(pointer.value, None) is None:
            raise CudaMisuse("GPU memory freed twice")
        return 0

    def cuMemHostAlloc(self, pointer: Any, nbytes: Any, _: Any) -> int:
        if self._cuda.refuse_pinned:
            return OUT_OF_MEMORY
        memory = (ctypes.c_char * nbytes.value)()
        pointer._obj.value = ctypes.addressof(memory)
        self._host[pointer._obj.value] = memory
        self._cuda.pinned.add(pointer._obj.value)
        return 0

    def cuMemFreeHost(self, pointer: Any) -> int:
        del self._host[pointer.value]
        self._cuda.pinned.remove(pointer.value)
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, count: Any, _: Any) -> int:
        data = self._page_locked(source, count.value)

        def copy() -> None:
            self._cuda.view(target.value, count.value)[:] = data

        self._cuda.stream.put(copy)
        return 0

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, count: Any, _: Any) -> int:
        data = self._page_locked(target, count.value)

        def copy() -> None:
            data[:] = self._cuda.view(source.value, count.value)

        self._cuda.stream.put(copy)
        return 0

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, count: Any) -> int:
        self._cuda.require_context()
        data = ctypes.string_at(source.value, count.value)
        self._cuda.view(target.value, count.value)[:] = np.frombuffer(data, np.uint8)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, count: Any) -> int:
        self._cuda.require_context()
        data = self._cuda.view(source.value, count.value).tobytes()
        ctypes.memmove(target.value, data, count.value)
        return 0

    def cuMemsetD8Async(self, target: Any, value: Any, count: Any, _: Any) -> int:
        def fill() -> None:
            self._cuda.view(target.value, count.value)[:] = value.value

        self._cuda.stream.put(fill)
        return 0

    def cuEventCreate(self, event: Any, flags: Any) -> int:
        event._obj.value = HANDLES + len(self._cuda.events)
        self._cuda.events[event._obj.value] = 0
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        del self._cuda.events[event.value]
        return 0

    def cuEventRecord(self, event: Any, _: Any) -> int:
        def pass_by() -> None:
            self._cuda.recorded_events += 1
            self._cuda.events[event.value] = self._cuda.recorded_events

        self._cuda.stream.put(pass_by)
        return 0

    def cuEventElapsedTime(self, passed: Any, first: Any, second: Any) -> int:
        """A millisecond for each event between."""
        passed._obj.value = self._cuda.events[second.value] - self._cuda.events[first.value]
        return 0


class FakeCtypes(types.SimpleNamespace):
    """ctypes, with libcuda.so.1 there."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(**{n: getattr(ctypes, n) for n in dir(ctypes) if not n.startswith("_")})
        self._libraries = DriverMemory(cuda)
        self.CDLL = lambda name: self._libraries
