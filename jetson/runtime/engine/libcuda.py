"""The CUDA driver library through ctypes: which GPU this is, and CUDA graphs.

The builder asks for the GPU and has no pycuda; pycuda (2026.1) has no CUDA graphs; `engine.driver`
has only this. All need functions whose C interface has not changed since CUDA 11.4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from runtime.problems import BundleProblem, RunFailure

LIBRARY = "libcuda.so.1"
MULTIPROCESSOR_COUNT = 16
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76
# Other threads, such as a library's own, may go on calling the driver while this one records.
CAPTURE_THREAD_LOCAL = 1
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU. Its SM count depends on the power mode; `cuda` is what its driver offers."""

    name: str
    compute_capability: str
    sms: int
    cuda: str


def driver_library() -> ctypes.CDLL:
    """The driver itself.

    Raises:
        BundleProblem: it is not installed.
    """
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BundleProblem(
            f"{LIBRARY} cannot be loaded ({error})",
            "run this on the board, or where an NVIDIA driver is installed",
        ) from error


def this_gpu() -> Gpu:
    """Ask the driver.

    Raises:
        BundleProblem: there is no driver or no GPU.
    """
    cuda = driver_library()
    try:
        check(cuda, cuda.cuInit(0), "cuInit")
        device = ctypes.c_int()
        check(cuda, cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
        name = ctypes.create_string_buffer(NAME_BYTES)
        check(cuda, cuda.cuDeviceGetName(name, NAME_BYTES, device), "cuDeviceGetName")
        version = ctypes.c_int()
        check(cuda, cuda.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")

        def attribute(number: int) -> int:
            value = ctypes.c_int()
            result = cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
            check(cuda, result, "cuDeviceGetAttribute")
            return value.value

        major = attribute(COMPUTE_CAPABILITY_MAJOR)
        minor = attribute(COMPUTE_CAPABILITY_MINOR)
        sms = attribute(MULTIPROCESSOR_COUNT)
    except RunFailure as failure:
        raise BundleProblem(
            f"no usable NVIDIA GPU here ({failure.message})",
            "check that its driver is loaded and that this user may use it (group video)",
        ) from failure
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        sms=sms,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


class Graph:
    """Work recorded on a stream, to be repeated with one call."""

    def __init__(self, stream: int) -> None:
        """Begin to record what is put on the stream with this handle."""
        self._cuda = driver_library()
        self._stream = ctypes.c_void_p(stream)
        self._executable = ctypes.c_void_p()
        result = self._cuda.cuStreamBeginCapture_v2(self._stream, CAPTURE_THREAD_LOCAL)
        check(self._cuda, result, "cuStreamBeginCapture")

    @classmethod
    def of(cls, work: Callable[[], None], stream: int) -> Graph:
        """Record what `work` puts on the stream, without running it.

        Raises:
            RunFailure: it cannot be recorded, or `work` raised it.
        """
        graph = cls(stream)
        try:
            work()
        except BaseException:
            graph.abandon()
            raise
        graph.finish()
        return graph

    def finish(self) -> None:
        """End the recording and make it ready to run.

        Raises:
            RunFailure: something in it cannot be recorded.
        """
        graph = self._end_capture()
        try:
            result = self._cuda.cuGraphInstantiateWithFlags(
                ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
            )
            check(self._cuda, result, "cuGraphInstantiate")
        finally:
            self._cuda.cuGraphDestroy(graph)

    def abandon(self) -> None:
        """End the recording and drop what it holds."""
        try:
            graph = self._end_capture()
        except RunFailure:  # the driver has dropped it already
            return
        self._cuda.cuGraphDestroy(graph)

    def _end_capture(self) -> ctypes.c_void_p:
        graph = ctypes.c_void_p()
        result = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        check(self._cuda, result, "cuStreamEndCapture")
        return graph

    def launch(self) -> None:
        """Put the recorded work on its stream once more."""
        result = self._cuda.cuGraphLaunch(self._executable, self._stream)
        check(self._cuda, result, "cuGraphLaunch")

    def free(self) -> None:
        """Drop it; may be called again."""
        if self._executable:
            self._cuda.cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()


def check(cuda: ctypes.CDLL, result: int, function: str) -> None:
    """Raises RunFailure, which names `function`, unless its result is 0."""
    if result == 0:
        return
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(result, ctypes.byref(text))
    reason = text.value.decode(errors="replace") if text.value else "unknown error"
    raise RunFailure(f"{function} failed: {reason} ({result})", "run --verify")
