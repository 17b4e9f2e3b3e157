"""One execution context of an engine: a profile, shapes, addresses, and the times of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from runtime.backends.protocol import LayerTimes
from runtime.engine.cuda import Gpu
from runtime.engine.tensorrt_api import LogLines
from runtime.problems import RunFailure

MILLISECOND = 1e-3


class Context:
    """Runs one optimization profile; contexts of an engine may share scratch memory in turns."""

    def __init__(
        self,
        trt: ModuleType,
        engine: Any,
        profile: int,
        scratch: int,
        gpu: Gpu,
        lines: LogLines,
        profiling: bool,
    ) -> None:
        """`scratch`: pointer to as many bytes as the engine asks for."""
        self._gpu = gpu
        self._lines = lines
        self._context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise RunFailure(
                f"TensorRT cannot create an execution context{lines.last()}",
                "end other programs if memory ran out, else build the engine again",
            )
        self._context.set_device_memory(scratch, engine.device_memory_size_v2)
        self._expect(
            self._context.set_optimization_profile_async(profile, gpu.stream), f"profile {profile}"
        )
        gpu.synchronize()
        self._bound: object = None
        self._profiler = _profiler(trt) if profiling else None
        if self._profiler:
            self._context.profiler = self._profiler
            self._context.enqueue_emits_profile = False

    def is_bound(self, key: object) -> bool:
        """Whether `bind` was last called with this key."""
        return self._bound == key

    def bind(
        self, key: object, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> None:
        """Set the shape of every input and the address of every tensor, `key` naming the set."""
        self._bound = None
        for name, shape in shapes.items():
            self._expect(self._context.set_input_shape(name, shape), f"{name} of shape {shape}")
        for name, address in addresses.items():
            self._expect(self._context.set_tensor_address(name, address), f"the address of {name}")
        self._bound = key

    def enqueue(self) -> None:
        """Put one run on the GPU's stream.

        Raises:
            RunFailure: TensorRT refuses; while a graph is recorded this would record nothing.
        """
        self._expect(self._context.execute_async_v3(self._gpu.stream), "the run")

    def take_times(self) -> LayerTimes:
        """Layers of the run that just ended, and their seconds."""
        assert self._profiler is not None
        self._expect(self._context.report_to_profiler(), "to report layer times")
        times, self._profiler.times = self._profiler.times, []
        return times

    def _expect(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise RunFailure(f"TensorRT refuses {what}{self._lines.last()}", "run --verify")


def _profiler(trt: ModuleType) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: LayerTimes = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms * MILLISECOND))

    return Profiler()
