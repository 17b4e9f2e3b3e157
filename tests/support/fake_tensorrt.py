"""A stand-in for TensorRT on the fake GPU: strict about the protocol, and onnxruntime computes.

A "plan" names an ONNX file. Builder and parser are loose, since tests of the builder use NVIDIA's
own; runtime, engine and contexts check every call: memory, profile, shapes and addresses before a
run, a run before a capture, nothing changed in a context whose run was captured.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import Cuda, CudaMisuse, FakeCtypes, make_driver

VERSION = "10.3.0"
MAGIC = b"FAKEPLAN"
SCRATCH = 4096
TYPES = {
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.FLOAT16: np.float16,
}
INSPECTED = {  # before TensorRT 11: Bindings
    "Layers": [{"Name": "layers.0/SsdScan", "LayerType": "PluginV3"}],
    "Bindings": ["input_ids"],
}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class Plan(bytes):
    """What the builder gives: a buffer that names the graph and its profiles."""

    @classmethod
    def of(cls, graph: str, profiles: list[dict[str, Any]], version: str) -> Plan:
        text = json.dumps({"graph": graph, "profiles": profiles, "version": version})
        return cls(MAGIC + text.encode() + MAGIC)

    @staticmethod
    def read(data: bytes) -> dict[str, Any] | None:
        if not (data.startswith(MAGIC) and data.endswith(MAGIC) and len(data) > 2 * len(MAGIC)):
            return None
        return json.loads(data[len(MAGIC) : -len(MAGIC)])


class Faults:
    """What shall go wrong."""

    def __init__(self) -> None:
        self.no_context = False
        self.refuse_address = False
        self.refuse_in_capture = False
        self.enqueues = 0
        self.captured_enqueues = 0


class Context:
    """An execution context; `engine` is the fake engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory: int | None = None
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._runs_as_bound = 0
        self._captured: list[Any] | None = None  # the recording that a run of this went into
        self._unreported = 0
        self.profiler: Any = None
        self.enqueue_emits_profile = True

    def _changed(self) -> None:
        graphs = self._engine.cuda.graphs.values()
        if any(work is self._captured for work in graphs):
            raise CudaMisuse("a context was changed whose run is in a graph")
        self._runs_as_bound = 0

    def set_device_memory(self, pointer: int, size: int) -> None:
        if size < SCRATCH:
            raise CudaMisuse("too little scratch memory")
        self._engine.cuda.view(pointer, size)
        self._memory = pointer

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._engine.cuda.stream.handle
        self._changed()
        self._profile = profile
        self._shapes.clear()
        return 0 <= profile < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._changed()
        if self._profile is None:
            raise CudaMisuse("a shape was set before the profile")
        low, _, high = self._engine.profiles[self._profile][name]
        fits = len(shape) == len(low) and all(
            a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
        )
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._changed()
        if self._engine.faults.refuse_address or name not in self._engine.tensors:
            return False
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, faults = self._engine.cuda, self._engine.faults
        cuda.require_context()
        assert stream == cuda.stream.handle
        if self._memory is None or self._profile is None:
            raise CudaMisuse("run without memory or profile")
        inputs = {name for name, (_, is_input) in self._engine.tensors.items() if is_input}
        inputs -= self._engine.scalars  # nothing is to be said of their shape
        if self._shapes.keys() != inputs or self._addresses.keys() != self._engine.tensors.keys():
            raise CudaMisuse("run with a shape or an address not set")
        faults.enqueues += 1
        if cuda.stream.capturing is not None:
            if faults.refuse_in_capture or not self._runs_as_bound:
                return False
            faults.captured_enqueues += 1
            self._captured = cuda.stream.capturing
        self._runs_as_bound += 1
        shapes = dict.fromkeys(self._engine.scalars, ()) | self._shapes
        addresses = dict(self._addresses)
        cuda.stream.put(lambda: self._engine.compute(shapes, addresses))
        self._unreported += 1
        if self.profiler is not None and self.enqueue_emits_profile:
            self.report_to_profiler()
        return True

    def report_to_profiler(self) -> bool:
        if self._engine.cuda.stream.queue:
            raise CudaMisuse("times were asked for before the run was over")
        if self._unreported != 1:
            return False
        self._unreported = 0
        for name in self._engine.layer_names:
            self.profiler.report_layer_time(name, 0.5)
        return True


class Engine:
    """A loaded plan."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, plan: dict[str, Any], cuda: Cuda, faults: Faults) -> None:
        self.cuda = cuda  # TensorRT takes the primary context by itself where there is none
        self.faults = faults
        self.profiles = plan["profiles"]
        graph = onnx.load(plan["graph"], load_external_data=False).graph
        # tensor -> (dtype, is an input)
        self.tensors = {
            tensor.name: (TYPES.get(tensor.type.tensor_type.elem_type, np.float32), is_input)
            for tensors, is_input in ((graph.input, True), (graph.output, False))
            for tensor in tensors
        }
        self.scalars = {t.name for t in graph.input if not t.type.tensor_type.shape.dim}
        self.layer_names = [node.name for node in graph.node]
        self._session = onnxruntime.InferenceSession(
            plan["graph"], providers=["CPUExecutionProvider"]
        )

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for name, shape in shapes.items():
            dtype = np.dtype(self.tensors[name][0])
            nbytes = int(np.prod(shape)) * dtype.itemsize
            feed[name] = self.cuda.view(addresses[name], nbytes).view(dtype).reshape(shape).copy()
        outputs = [name for name, (_, is_input) in self.tensors.items() if not is_input]
        for name, value in zip(outputs, self._session.run(outputs, feed), strict=True):
            self.cuda.view(addresses[name], value.nbytes)[:] = value.view(np.uint8).reshape(-1)

    def create_execution_context(self, strategy: str) -> Context | None:
        assert strategy == "user managed"
        self.cuda.require_context()
        return None if self.faults.no_context else Context(self)

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda _: json.dumps(INSPECTED))


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        dims = value.type.tensor_type.shape.dim
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        self.allowed_formats = 0
        self.is_shape_tensor = False  # set by tests


class _Network:
    def __init__(self) -> None:
        self.graph: Any = None
        self.path = ""

    @property
    def num_inputs(self) -> int:
        return len(self.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.graph.output)

    def get_input(self, i: int) -> _Tensor:
        return _Tensor(self.graph.input[i])

    def get_output(self, i: int) -> _Tensor:
        return _Tensor(self.graph.output[i])


class _OnnxParser:
    num_errors = 0

    def __init__(self, network: _Network, _: ILogger) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.graph = onnx.load(path, load_external_data=False).graph
        self._network.path = path
        return True


class _Config:
    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []
        self._cache: Any = None

    def set_memory_pool_limit(self, _: str, limit: int) -> None:
        self.limit = limit

    def clear_flag(self, flag: str) -> None:
        assert flag == "tf32"

    def create_timing_cache(self, data: bytes) -> Any:
        return types.SimpleNamespace(serialize=lambda: data or b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *dims: Sequence[int]) -> None:
        self.shapes[name] = [list(d) for d in dims]


class _PluginRegistry:
    """Finds plugins in files that begin with "fake plugins"."""

    def __init__(self) -> None:
        self.all_creators: list[Any] = []

    def load_library(self, path: str) -> None:
        if Path(path).read_bytes().startswith(b"fake plugins"):
            self.all_creators.append(types.SimpleNamespace(name="Ssdi8SsdScan"))


def make_tensorrt(cuda: Cuda, faults: Faults, version: str = VERSION) -> types.ModuleType:
    """The module `tensorrt` on `cuda`."""
    trt = types.ModuleType("tensorrt")

    class Runtime:
        def __init__(self, log: ILogger) -> None:
            self._log = log

        def deserialize_cuda_engine(self, data: Any) -> Engine | None:
            plan = Plan.read(bytes(data))
            if plan is None or plan["version"] != version:
                self._log.log(ILogger.ERROR, "the plan is\nof another version or not whole")
                return None
            return Engine(plan, cuda, faults)

    class Builder:
        def __init__(self, log: ILogger) -> None:
            log.log(ILogger.VERBOSE, "not shown")
            log.log(ILogger.INFO, "building")

        def create_network(self, flags: int) -> _Network:
            assert flags == 1 << 1
            return _Network()

        create_builder_config = staticmethod(_Config)
        create_optimization_profile = staticmethod(_Profile)

        def build_serialized_network(self, network: _Network, config: _Config) -> Plan:
            return Plan.of(network.path, config.profiles, version)

    registry = _PluginRegistry()
    names: dict[str, Any] = {
        "get_plugin_registry": lambda: registry,
        "__version__": version,
        "ILogger": ILogger,
        "IProfiler": IProfiler,
        "Runtime": Runtime,
        "Builder": Builder,
        "OnnxParser": _OnnxParser,
        "ExecutionContextAllocationStrategy": types.SimpleNamespace(USER_MANAGED="user managed"),
        "NetworkDefinitionCreationFlag": types.SimpleNamespace(STRONGLY_TYPED=1),
        "MemoryPoolType": types.SimpleNamespace(WORKSPACE="workspace"),
        "ProfilingVerbosity": types.SimpleNamespace(DETAILED="detailed"),
        "BuilderFlag": types.SimpleNamespace(TF32="tf32"),
        "TensorFormat": types.SimpleNamespace(LINEAR=0),
        "LayerInformationFormat": types.SimpleNamespace(JSON="json"),
    }
    for name, value in names.items():
        setattr(trt, name, value)
    return trt


def _load(path: str) -> Any:
    """What ctypes shows of a file that begins with "fake plugins", and may end with a version."""
    data = Path(path).read_bytes()
    if not data.startswith(b"fake"):
        raise OSError(f"{path}: invalid ELF header")
    if not data.startswith(b"fake plugins"):
        return types.SimpleNamespace()
    major = 11 if data.endswith(b"11") else 10
    return types.SimpleNamespace(ssdi8_tensorrt_major=lambda: major)


@contextmanager
def installed(version: str = VERSION) -> Iterator[tuple[Cuda, Faults]]:
    """`import tensorrt`, `import pycuda` and libcuda.so.1 give the fakes."""
    from runtime.engine import libcuda, tensorrt_api

    cuda, faults = Cuda(), Faults()
    pycuda = types.ModuleType("pycuda")
    pycuda.VERSION_TEXT = "2026.1"  # type: ignore[attr-defined]
    pycuda.driver = make_driver(cuda)  # type: ignore[attr-defined]
    modules = {"tensorrt": make_tensorrt(cuda, faults, version), "pycuda": pycuda}
    modules["pycuda.driver"] = pycuda.driver  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    libcuda.ctypes = FakeCtypes(cuda)  # type: ignore[assignment]
    tensorrt_api.ctypes = types.SimpleNamespace(CDLL=_load)  # type: ignore[assignment]
    try:
        yield cuda, faults
    finally:
        libcuda.ctypes = tensorrt_api.ctypes = ctypes
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def main() -> None:
    """`python fake_tensorrt.py SCRIPT …`: run a script of jetson/ on the fakes, then say leaks."""
    script = Path(sys.argv[1])
    sys.path.insert(0, str(script.parent))
    sys.argv = sys.argv[1:]
    from run_engine import start

    program = script.stem
    with installed() as (cuda, _):
        try:
            start(program, "run" if program == "run_engine" else "run_build")
        finally:
            if cuda.leaks():
                print(f"LEAKS: {cuda.leaks()}", file=sys.stderr)


if __name__ == "__main__":
    main()
