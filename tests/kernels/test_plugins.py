"""The TensorRT plugins: found, created, asked and called as TensorRT does, without a GPU.

Types and shapes are compared with what the references return for the nodes of a real `model.onnx`.
NVIDIA's runtime registers the library, NVIDIA's parser makes the plugins; what their Python modules
do not show of a C++ plugin goes through `plugin_harness`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from plugin_calls import (
    MODELS,
    PLUGIN_OPS,
    Call,
    create,
    record_calls,
    ssd_call,
    valid_fields,
)
from plugin_harness import LIBRARY, TYPE_NAMES, Harness, Plugin, Value, open_plugins

from ssdi8_edge.compile.export import IR_VERSION, OPSET
from ssdi8_edge.ops import OPS, kernel_library
from ssdi8_edge.ops.kernel_header import parameter_structs
from ssdi8_edge.ops.op import DOMAIN


@pytest.fixture(scope="module")
def plugins() -> Harness:
    return open_plugins()


@pytest.fixture
def harness(plugins: Harness) -> Iterator[Harness]:
    """Every refusal is explained, and nothing that succeeds complains."""
    yield plugins
    assert plugins.messages() == ""


@pytest.fixture(scope="module", params=list(MODELS.values()), ids=list(MODELS))
def calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    return record_calls(tmp_path_factory.mktemp("model"), *request.param)


# ------------------------------------------------------------------------------------------------
# The library itself
# ------------------------------------------------------------------------------------------------


def test_one_file_is_enough(harness: Harness) -> None:
    """It needs no TensorRT library to load, holds the kernels, and shows nothing else."""
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    command = ["nm", "-D", "--defined-only", str(harness.library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {"getCreators", "setLoggerFinder", "ssdi8_ssd_scan"} <= names
    assert {n for n in names if not n.startswith("ssdi8_")} == {"getCreators", "setLoggerFinder"}
    library = kernel_library.load(harness.library)  # the C ABI, as the host's mirror knows it
    assert library.ssdi8_tensorrt_major() == harness.version[0]


def test_every_op_registers_in_the_order_of_names(harness: Harness) -> None:
    """Tables register themselves, in an order that the linker chooses."""
    assert harness.creators == PLUGIN_OPS


def test_a_wrong_tensorrt_root_is_an_error(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("no cmake or no nvcc")
    plugins = Path(__file__).parents[2] / "plugins"
    command = ["cmake", "-S", str(plugins), "-B", str(tmp_path), f"-DTENSORRT_ROOT={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"There is no NvInfer.h in TENSORRT_ROOT={tmp_path} or its include/." in message


# ------------------------------------------------------------------------------------------------
# NVIDIA's registry and parser
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime() -> Any:
    return pytest.importorskip(
        "tensorrt_lean",
        reason="NVIDIA's runtime is not installed: pip install tensorrt-lean-cu13",
    )


@pytest.fixture(scope="module")
def registry(
    runtime: Any, plugins: Harness, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The plugin registry with the library loaded, from a folder where it lies alone."""
    major = int(runtime.__version__.split(".")[0])
    if plugins.version[0] != major:
        headers = "{}.{}".format(*plugins.version)
        pytest.skip(f"TensorRT headers {headers} do not serve tensorrt_lean {runtime.__version__}")
    copy = Path(shutil.copy(plugins.library, tmp_path_factory.mktemp("deployed") / LIBRARY))
    registry = runtime.get_plugin_registry()
    handle = registry.load_library(str(copy))
    yield registry
    registry.deregister_library(handle)
    assert registry.get_creator("Ssdi8Linear", "1", "") is None


def create_by_registry(
    runtime: Any, registry: Any, op: str, fields: dict[str, Value], phase: str = "BUILD"
) -> Any:
    kinds = runtime.PluginFieldType
    made, kept = [], []  # a field only points to its data
    for name, value in fields.items():
        if isinstance(value, str):
            data, kind = np.frombuffer(value.encode(), np.int8), kinds.CHAR
        elif isinstance(value, float):
            data, kind = np.array([value], np.float32), kinds.FLOAT32
        else:
            data, kind = np.array([value], np.int32), kinds.INT32
        made.append(runtime.PluginField(name, data, kind))
        kept.append(data)
    creator = registry.get_creator(op, "1", "")
    collection = runtime.PluginFieldCollection(made)
    return creator.create_plugin("node", collection, getattr(runtime.TensorRTPhase, phase))


def test_registry_finds_every_op(registry: Any) -> None:
    found = {c.name: c for c in registry.all_creators if c.name.startswith("Ssdi8")}
    assert sorted(found) == PLUGIN_OPS
    assert {(c.plugin_version, c.plugin_namespace) for c in found.values()} == {("1", "")}
    for name, creator in found.items():
        assert {field.name for field in creator.field_names} == set(OPS[name].attributes)


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_registry_creates_every_node(
    runtime: Any, registry: Any, calls: list[Call], phase: str
) -> None:
    """What NVIDIA's runtime sees of a plugin: its name and the versions of its interfaces."""
    kinds = runtime.PluginCapabilityType
    for call in calls:
        plugin = create_by_registry(runtime, registry, call.op, call.fields, phase)
        assert plugin is not None
        core = plugin.get_capability_interface(kinds.CORE)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (call.op, "1", "")
        build_part = plugin.get_capability_interface(kinds.BUILD)
        assert build_part.num_outputs == len(call.outputs)
        assert build_part.timing_cache_id in (None, "")
        info = build_part.interface_info
        assert (info.kind, info.major) == ("PLUGIN_V3ONE_BUILD", 2)
        info = plugin.get_capability_interface(kinds.RUNTIME).interface_info
        assert (info.kind, info.major) == ("PLUGIN_V3ONE_RUNTIME", 1)


def test_registry_gets_nothing_from_a_wrong_field(runtime: Any, registry: Any) -> None:
    fields = valid_fields("Ssdi8RmsNorm")
    assert create_by_registry(runtime, registry, "Ssdi8RmsNorm", fields) is not None
    for change in ({"eps": float("nan")}, {"scaling": "none"}):
        wrong = {**fields, **change}
        assert create_by_registry(runtime, registry, "Ssdi8RmsNorm", wrong) is None


PARSE = """
import sys
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def log(self, severity, message):
        print(severity, message, flush=True)

logger = Logger()
assert trt.get_plugin_registry().load_library(sys.argv[1])
network = trt.Builder(logger).create_network()
trt.OnnxParser(network, logger).parse_from_file(sys.argv[2])
"""


def one_node_model(call: Call) -> onnx.ModelProto:
    """A graph of this node alone, as the lowering writes it."""
    elements = {
        "FP32": onnx.TensorProto.FLOAT,
        "FP16": onnx.TensorProto.FLOAT16,
        "INT8": onnx.TensorProto.INT8,
        "INT64": onnx.TensorProto.INT64,
    }
    inputs, outputs = (
        [
            onnx.helper.make_tensor_value_info(f"{prefix}{i}", elements[kind], shape)
            for i, (kind, shape) in enumerate(tensors)
        ]
        for prefix, tensors in (("input", call.inputs), ("output", call.outputs))
    )
    attributes: dict[str, Any] = {**call.fields, "plugin_version": "1", "plugin_namespace": ""}
    names = [v.name for v in inputs], [v.name for v in outputs]
    node = onnx.helper.make_node(call.op, *names, domain=DOMAIN, **attributes)
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def test_parser_creates_the_plugins(harness: Harness, calls: list[Call], tmp_path: Path) -> None:
    """NVIDIA's parser turns a node's attributes into fields that the creator takes.

    TensorRT-RTX has no plugin layers: having made the plugin, it may end the process.
    """
    pytest.importorskip(
        "tensorrt_rtx", reason="NVIDIA's parser is not installed: pip install tensorrt-rtx-cu13"
    )
    if harness.version < (10, 16):
        pytest.skip("TensorRT headers {}.{} do not serve tensorrt_rtx".format(*harness.version))
    for op, call in {call.op: call for call in calls}.items():
        path = tmp_path / f"{op}.onnx"
        onnx.save(one_node_model(call), path)
        command = [sys.executable, "-c", PARSE, str(harness.library), str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"Successfully created plugin: {op}" in result.stdout, result.stdout
        assert "ERROR" not in result.stdout, result.stdout


# ------------------------------------------------------------------------------------------------
# Types, shapes, formats
# ------------------------------------------------------------------------------------------------


def test_the_models_have_every_op(tmp_path: Path) -> None:
    calls = [c for name, model in MODELS.items() for c in record_calls(tmp_path / name, *model)]
    assert {call.op for call in calls} == set(PLUGIN_OPS)


def test_types_and_shapes_are_the_references(harness: Harness, calls: list[Call]) -> None:
    for call in calls:
        plugin = create(harness, call)
        assert plugin.name == call.op
        assert plugin.output_forms(call.inputs) == call.outputs
        assert plugin.configure(call.inputs, call.outputs)
        assert plugin.on_shape_change(call.inputs, call.outputs)


def allowed_types(call: Call) -> dict[int, set[str]]:
    """Tensor position -> the types that the graph may give it."""
    allowed = {i: {kind} for i, (kind, _) in enumerate([*call.inputs, *call.outputs])}
    names = [*OPS[call.op].inputs[: len(call.inputs)], *OPS[call.op].outputs]
    for i, name in enumerate(names):
        if name == "ssm_state":
            allowed[i] = {"FP16", "FP32"}
        if name == "group_scale":
            allowed[i] = {"FP16", "INT8"}
    return allowed


def test_supported_and_unsupported_formats(harness: Harness, calls: list[Call]) -> None:
    """At every position, every data type and every format that the headers know."""
    names = {harness.number(name): name for name in TYPE_NAMES.values()}
    linear = harness.number("linear")
    for call in calls:
        plugin = create(harness, call)
        tensors = [*call.inputs, *call.outputs]
        n, allowed = len(call.inputs), allowed_types(call)
        for position, (_, shape) in enumerate(tensors):
            for kind in range(harness.number("data types")):
                changed = [*tensors[:position], (kind, shape), *tensors[position + 1 :]]
                described = plugin.describe(changed)  # type: ignore[arg-type]
                wanted = names.get(kind) in allowed[position]
                assert plugin.supports(position, described, n) == wanted, (call.op, position, kind)
            for layout in range(harness.number("formats")):
                layouts = [linear] * len(tensors)
                layouts[position] = layout
                described = plugin.describe(tensors, layouts)
                assert plugin.supports(position, described, n) == (layout == linear)
        for position in (-1, len(tensors)):
            assert not plugin.supports(position, plugin.describe(tensors), n)


@pytest.mark.parametrize("op", ["Ssdi8StatePassing", "Ssdi8SsdScan"])
def test_the_state_keeps_its_type(harness: Harness, op: str) -> None:
    call = ssd_call(op)
    plugin = create(harness, call)
    at = OPS[op].inputs.index("ssm_state")
    for kind, other in (("FP16", "FP32"), ("FP32", "FP16")):
        inputs = [*call.inputs]
        inputs[at] = (kind, inputs[at][1])
        outputs = plugin.output_forms(inputs)
        assert outputs is not None and outputs[-1] == inputs[at]
        last = len(inputs) + len(outputs) - 1
        assert plugin.supports(last, plugin.describe([*inputs, *outputs]), len(inputs))
        outputs[-1] = (other, outputs[-1][1])
        assert not plugin.supports(last, plugin.describe([*inputs, *outputs]), len(inputs))


# Axes that are bound to nothing else: tokens that one input alone has, and row strides.
FREE = {
    "Ssdi8CausalConv1d": {("zxbcdt", 1), ("zxbcdt", 2)},
    "Ssdi8RmsNormGated": {("zxbcdt", 2)},
    "Ssdi8NormThenGate": {("zxbcdt", 2)},
    "Ssdi8Activation": {("x", 2), ("gate", 2)},
    "Ssdi8Attention": {("projected", 1), ("projected", 2)},
    "Ssdi8ChunkCumsum": {("zxbcdt", 0), ("zxbcdt", 1), ("zxbcdt", 2)},
    "Ssdi8StatePassing": {("a", 2)},
    "Ssdi8SsdScan": {("zxbcdt", 2)},
}


def test_shapes_that_do_not_fit_are_refused(harness: Harness, calls: list[Call]) -> None:
    """Each axis of each input, one longer: what the kernel could not see would be read past."""
    for call in {call.op: call for call in calls}.values():
        plugin = create(harness, call)
        for i, (kind, shape) in enumerate(call.inputs):
            name = OPS[call.op].inputs[i]
            for axis in range(len(shape)):
                free = (name, axis) in FREE.get(call.op, set())
                for size in (shape[axis] + 1, 0, -1, 2**31):
                    changed = (*shape[:axis], size, *shape[axis + 1 :])
                    inputs = [*call.inputs[:i], (kind, changed), *call.inputs[i + 1 :]]
                    wanted = free and size == shape[axis] + 1
                    assert plugin.on_shape_change(inputs, call.outputs) == wanted, (name, changed)
                    if not wanted:
                        message = harness.messages()
                        assert message.startswith(f"{call.op}: ") and "axis" in message
            for changed in {shape[1:], (*shape, 1)} - {shape}:
                inputs = [*call.inputs[:i], (kind, changed), *call.inputs[i + 1 :]]
                assert not plugin.on_shape_change(inputs, call.outputs)
                assert f"input {name} has {len(changed)} axes" in harness.messages()
            wrong = "FP16" if kind == "FP32" else "FP32"
            if wrong not in allowed_types(call)[i]:
                inputs = [*call.inputs[:i], (wrong, shape), *call.inputs[i + 1 :]]
                assert not plugin.on_shape_change(inputs, call.outputs)
                assert plugin.output_forms(inputs) is None
                assert f"input {name} is {wrong}, not" in harness.messages()


# Inputs that are read with scaling "static" alone.
STATIC_SCALES = ("scale", "x_scale", "state_scale")


def unread_scales(call: Call) -> int:
    """How many of the last inputs the kernel does not read."""
    if call.fields.get("scaling") in ("dynamic", "none"):
        return sum(name in STATIC_SCALES for name in OPS[call.op].inputs)
    return 0


def test_numbers_of_tensors(harness: Harness, calls: list[Call]) -> None:
    for call in {call.op: call for call in calls}.values():
        plugin = create(harness, call)
        names = OPS[call.op].inputs
        fewest = len(names) - unread_scales(call)
        padded = [*call.inputs, *[("FP32", (1,))] * (len(names) + 2 - len(call.inputs))]
        for count in range(len(padded) + 1):
            inputs, takes = padded[:count], fewest <= count <= len(names)
            assert (plugin.output_forms(inputs) is not None) == takes
            assert takes == ("are expected" not in harness.messages())
        assert not plugin.configure(call.inputs, call.outputs[1:])
        assert "outputs" in harness.messages()


# ------------------------------------------------------------------------------------------------
# Scratch memory and calls
# ------------------------------------------------------------------------------------------------

WITH_WORKSPACE = ["Ssdi8ChunkScan", "Ssdi8ChunkState", "Ssdi8SsdScan"]


@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_workspace_of_the_largest_shapes(harness: Harness, op: str) -> None:
    """What the kernel asks for at the profile's maximum, which serves every call below it."""
    plugin = create(harness, ssd_call(op))
    launcher = re.sub("([A-Z])", r"_\1", op.removeprefix("Ssdi8")).lower().removeprefix("_")
    library = kernel_library.load(harness.library)
    struct = parameter_structs()[launcher]
    sizes = []
    for batch, length in ((1, 1), (1, 255), (1, 256), (1, 257), (1, 2048), (2, 2048), (4, 2048)):
        call = ssd_call(op, batch, length)
        fields = {k: v for k, v in call.fields.items() if not isinstance(v, str)}
        params = struct(batch=batch, length=length, **fields)
        params.scaling = 1
        wanted = getattr(library, f"ssdi8_{launcher}_workspace")(params)
        assert plugin.configure(call.inputs, call.outputs)
        assert plugin.workspace(call.inputs, call.outputs) == wanted
        sizes.append(wanted)
    assert sizes == sorted(sizes) and sizes[1] > 0


@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_bounds_that_differ_between_inputs(harness: Harness, op: str) -> None:
    """A builder may bound an inner tensor less tightly than another: the largest counts."""
    plugin = create(harness, ssd_call(op))
    low, high = ssd_call(op, 1, 512), ssd_call(op, 2, 2048)
    inputs = [high.inputs[0], *low.inputs[1:]]
    assert plugin.configure(inputs, low.outputs)
    assert plugin.workspace(inputs, low.outputs) == plugin.workspace(high.inputs, high.outputs)
    assert not plugin.on_shape_change(inputs, low.outputs)
    assert "axis" in harness.messages()


def test_which_ops_need_workspace(harness: Harness, calls: list[Call]) -> None:
    for call in calls:
        needed = create(harness, call).workspace(call.inputs, call.outputs)
        if call.op not in WITH_WORKSPACE:
            assert (needed > 0) == (call.op == "Ssdi8Attention")


def enqueue_nothing(plugin: Plugin, call: Call) -> bool:
    """For calls that are refused before anything is read."""
    nowhere = [0] * len(call.inputs), [0] * len(call.outputs)
    return plugin.enqueue(call.inputs, call.outputs, *nowhere, None, 0)


def test_enqueue_says_why_it_refuses(harness: Harness) -> None:
    call = ssd_call("Ssdi8SsdScan")
    plugin = create(harness, call)
    assert not enqueue_nothing(plugin, call)  # not configured
    assert "0 inputs; with these attributes 11 to 13 are expected" in harness.messages()
    assert plugin.configure(call.inputs, call.outputs)
    longer = ssd_call(call.op, 1, 301).inputs[0]
    torn = dataclasses.replace(call, inputs=[longer, *call.inputs[1:]])
    for configured in (plugin, plugin.clone(), plugin.attach()):
        assert not enqueue_nothing(configured, torn)
        assert "axis 1 of input b_q is 300, not 301" in harness.messages()
    unfit = dataclasses.replace(call, fields={**call.fields, "chunk_size": 512})
    plugin = create(harness, unfit)
    assert plugin.on_shape_change(call.inputs, call.outputs)
    assert not enqueue_nothing(plugin, unfit)
    assert harness.messages().startswith("Ssdi8SsdScan: ssd_scan: chunk_size 512")
