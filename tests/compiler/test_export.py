"""The exported graphs: onnxruntime against the torch reference, and what TensorRT is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from case_table import (
    CHUNK,
    Quantized,
    apply_recipe,
    first_difference,
    fp16_steps,
    random_ids,
    session,
    tiny_recipe,
    write_checkpoint,
)
from conftest import make_config, mamba
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from runtime.files import WEIGHTS
from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from ssdi8_edge.compile import lowering
from ssdi8_edge.compile.export import IR_VERSION, OPSET, GraphBuilder, export_model, nested_nodes
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.windows import read_tokens
from ssdi8_edge.models.block import States
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import DOMAIN, Op
from ssdi8_edge.recipes.presets import METHODS

LENGTHS = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
# The head is an FP16 linear summed in FP32: another order of the sum, then one FP16 rounding.
LOGIT_TOLERANCE = 1e-3


class Exported:
    """A quantized model on disk beside its graphs."""

    def __init__(self, made: Quantized, folder: Path) -> None:
        self.made = made
        self.folder = folder
        folder.mkdir(parents=True)
        writer = SafetensorsWriter(folder / WEIGHTS)
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
        writer.close()
        self.portable = self.graph("cpu")
        onnx.save(self.portable, self.path)
        self.session = session(self.path)

    @property
    def path(self) -> Path:
        return self.folder / "model.portable.onnx"

    def graph(self, form: Any) -> onnx.ModelProto:
        made = self.made
        return export_model(self.folder / WEIGHTS, made.config, made.recipe, form)

    def run(
        self,
        ids: Tensor,
        states: list[States],
        keep: int,
        runner: ort.InferenceSession | None = None,
        names: list[str] | None = None,
    ) -> list[np.ndarray]:
        feed: dict[str, np.ndarray] = {
            "input_ids": ids.to(torch.int32).numpy(),
            "logits_to_keep": np.array(keep, np.int64),
        }
        for i, state in enumerate(states):
            feed[f"conv_state.{i}"] = state[0].numpy()
            feed[f"ssm_state.{i}"] = state[1].numpy()
        outputs: list[np.ndarray] = (runner or self.session).run(names, feed)
        return outputs


Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Factory: a preset, changes to it and a number of groups to an exported tiny model."""
    made: dict[str, Exported] = {}

    def make(
        name: str, ngroups: int = 1, *, config: dict[str, Any] | None = None, **changes: Any
    ) -> Exported:
        recipe = tiny_recipe(name, **changes)
        key = f"{ngroups} {config} {recipe}"
        if key not in made:
            folder = tmp_path_factory.mktemp("export")
            checkpoint, _ = write_checkpoint(
                folder / "source", make_config(ngroups, **(config or {}))
            )
            quantized = apply_recipe(checkpoint, recipe, random_ids(8, 48))
            made[key] = Exported(quantized, folder / "onnx")
        return made[key]

    return make


def assert_logits(got: np.ndarray, want: Tensor) -> None:
    assert got.shape == tuple(want.shape) and got.dtype == np.float32
    difference = np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy())
    assert difference < LOGIT_TOLERANCE


def assert_states(got: list[np.ndarray], want: list[States], *, exact: bool) -> None:
    """conv and ssm of each layer, in the order of the graph's outputs."""
    flat = [part for state in want for part in state]
    assert len(got) == len(flat)
    for i, (found, tensor) in enumerate(zip(got, flat, strict=True)):
        expected = tensor.numpy()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if exact:
            assert np.array_equal(found, expected), f"{i}: {first_difference(found, expected)}"
        else:
            # FP16 linears: sums of another order, half a step of FP16, carried over two layers.
            np.testing.assert_allclose(
                found, expected, rtol=4e-3, atol=2e-3 * np.abs(expected).max()
            )


VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "edge-w8a8": ("edge-w8a8", 1, {}),
    "edge-w8a8 modular": ("edge-w8a8", 1, {"ssd_ops": "modular"}),
    "edge-w8a8 fp32 state": ("edge-w8a8", 1, {"state_dtype": "fp32"}),
    "edge-w8a8 2 groups": ("edge-w8a8", 2, {}),
    "edge-w8a8 2 groups modular": ("edge-w8a8", 2, {"ssd_ops": "modular"}),
    "edge-w8a8 int8 head": ("edge-w8a8", 1, {"lm_head": "w8_row"}),
    "edge-w4a8 tables": ("edge-w4a8", 1, {"lm_head": "w4", "embedding": "int8_row"}),
    "edge-w8a8 q0.7": ("edge-w8a8", 1, {"gate": "q0.7", "scaling": "static"}),
    "edge-w8a8 FP16 SSD": ("edge-w8a8", 1, {"scaling": "none"}),
    "edge-w8a8 2 groups FP16 SSD modular": (
        *("edge-w8a8", 2),
        {"scaling": "none", "ssd_ops": "modular"},
    ),
    "edge-w4a8": ("edge-w4a8", 1, {}),
    "edge-w4a8 2 groups modular": ("edge-w4a8", 2, {"ssd_ops": "modular"}),
    "ssdi8-w8a8": ("ssdi8-w8a8", 1, {}),
    "ssdi8-w4a8 2 groups": ("ssdi8-w4a8", 2, {}),
    "fp16": ("fp16", 1, {}),
    "fp16 2 groups": ("fp16", 2, {}),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@variants
@pytest.mark.parametrize("batch", [1, 2])
def test_graph_equals_reference(
    export: Export, variant: tuple[str, int, dict[str, Any]], batch: int
) -> None:
    """All lengths around a chunk, from zero and from a carried state: states bit for bit.

    Each length continues from the reference's states of the one before it. An INT8 head has
    nothing that depends on an order: its logits are equal too.
    """
    name, ngroups, changes = variant
    exported = export(name, ngroups, **changes)
    model = exported.made.model
    exact = exported.made.recipe.quantized
    states = model.zero_states(batch)
    for zero in (True, False):
        for length in LENGTHS:
            ids = random_ids(batch, length, seed=length)
            entering = model.zero_states(batch) if zero else states
            keep = min(3, length)
            logits, states = model.forward(ids, entering, keep)
            got_logits, *got = exported.run(ids, entering, keep)
            assert_states(got, states, exact=exact)
            assert_logits(got_logits, logits)
            if exported.made.recipe.lm_head != "fp16":
                assert np.array_equal(got_logits, logits.numpy())


@pytest.mark.parametrize("ssd_ops", ["fused", "modular"])
@pytest.mark.parametrize("name", ["edge-w8a8", "fp16"])
def test_dt_limits(export: Export, name: str, ssd_ops: str) -> None:
    """A model with bounds on dt: they must survive as attributes, also on padded positions."""
    exported = export(name, config={"dt_limit": (0.05, 0.2)}, ssd_ops=ssd_ops)
    model, ids = exported.made.model, random_ids(2, 21, seed=1)
    logits, states = model.forward(ids, None, 21)
    got_logits, *got = exported.run(ids, model.zero_states(2), 21)
    assert_states(got, states, exact=name != "fp16")
    assert_logits(got_logits, logits)
    unlimited, _ = export(name, ssd_ops=ssd_ops).made.model.forward(ids, None, 21)
    assert not torch.allclose(unlimited, logits, rtol=0.01)


# ------------------------------------------------------------------------------------------------
# Every value inside
# ------------------------------------------------------------------------------------------------


def recorded(
    exported: Exported, ids: Tensor, states: list[States], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, tuple[Tensor, ...]]]:
    """Op and outputs of every call that the reference makes at its top level, in order."""
    calls: list[tuple[str, tuple[Tensor, ...]]] = []
    depth = 0
    original = Op.__call__

    def spy(self: Op, *inputs: Any, **attributes: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            outputs = original(self, *inputs, **attributes)
        finally:
            depth -= 1
        if depth == 0:
            calls.append((self.name, outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    monkeypatch.setattr(Op, "__call__", spy)
    exported.made.model.forward(ids, states, 1)
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("length", [1, 2 * CHUNK + 3])
@pytest.mark.parametrize(
    ("name", "ssd_ops"),
    [
        ("edge-w8a8", "fused"),
        ("edge-w8a8", "modular"),
        ("edge-w4a8", "fused"),
        ("ssdi8-w8a8", "modular"),
    ],
)
def test_every_value_inside(
    export: Export, name: str, ssd_ops: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every output of every node: a wrong value cannot hide behind a saturating one.

    Integers, residuals, x, y and states bit for bit; only the FP16 head has a tolerance.
    """
    exported = export(name, ssd_ops=ssd_ops)
    model = exported.made.model
    _, states = model.forward(random_ids(2, 21, seed=3))
    ids = random_ids(2, length, seed=4)
    calls = recorded(exported, ids, states, monkeypatch)
    graph = onnx.ModelProto()
    graph.CopyFrom(exported.portable)
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [name for name, _ in calls]
    outputs = [output for node in nodes for output in node.output]
    types = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.int8: TensorProto.INT8,
    }
    values = [tensor for _, tensors in calls for tensor in tensors]
    for output, tensor in zip(outputs, values, strict=True):
        shape: list[None] = [None] * tensor.dim()
        info = helper.make_tensor_value_info(output, types[tensor.dtype], shape)
        graph.graph.output.append(info)
    path = exported.folder / f"inside-{length}.onnx"
    onnx.save(graph, path)
    got = exported.run(ids, states, 1, session(path), outputs)
    integers = 0
    for output, found, tensor in zip(outputs, got, values, strict=True):
        want = tensor.numpy()
        assert found.dtype == want.dtype and found.shape == want.shape, output
        if output.startswith(("head/Linear", "head/Logits")):
            assert_logits(found.astype(np.float32), tensor.float())
            continue
        assert np.array_equal(found, want), f"{output}: {first_difference(found, want)}"
        integers += want.dtype == np.int8
    assert integers >= 8  # u, B, C and r of two layers


def test_fp16_values_inside(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline node by node in its own inputs' company: the first layer within 1 FP16 step."""
    exported = export("fp16")
    ids = random_ids(2, 19, seed=4)
    states = exported.made.model.zero_states(2)
    calls = recorded(exported, ids, states, monkeypatch)
    graph = onnx.ModelProto()
    graph.CopyFrom(exported.portable)
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    wanted = {}
    for node, (name, tensors) in zip(nodes, calls, strict=True):
        assert node.op_type == name
        if (
            name in ("Embedding", "RmsNorm", "Linear", "CausalConv1d")
            and "layers.1" not in node.name
        ):
            wanted |= {
                o: t for o, t in zip(node.output, tensors, strict=True) if t.dtype is torch.float16
            }
    wanted = {k: v for k, v in wanted.items() if not k.startswith("head/") and "Linear.1" not in k}
    for output, tensor in wanted.items():
        shape: list[None] = [None] * tensor.dim()
        info = helper.make_tensor_value_info(output, TensorProto.FLOAT16, shape)
        graph.graph.output.append(info)
    path = exported.folder / "inside.onnx"
    onnx.save(graph, path)
    got = exported.run(ids, states, 1, session(path), list(wanted))
    assert len(wanted) >= 6
    for (output, tensor), found in zip(wanted.items(), got, strict=True):
        steps = np.abs(fp16_steps(found) - fp16_steps(tensor.numpy()))
        steps[np.abs(found) < 1e-2 * np.abs(found).max()] = 0
        assert steps.max() <= 2, output
        assert (steps > 0).mean() < 0.03, output


# ------------------------------------------------------------------------------------------------
# The shipped model
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ssd_ops"),
    [("edge-w8a8", "modular"), ("edge-w4a8", "fused"), ("fp16", "fused")],
)
def test_demo_graph(tmp_path: Path, name: str, ssd_ops: str) -> None:
    """Real sizes and a trained model: 259 tokens (a chunk and 3) and then one more."""
    checkpoint = open_checkpoint("demo")
    recipe = dataclasses.replace(METHODS[name], ssd_ops=ssd_ops)
    tokenizer = DEMO_FOLDER / "tokenizer.json"
    calibration = read_tokens(DEMO_FOLDER / "calibration.txt", tokenizer, 512, 2)
    exported = Exported(apply_recipe(checkpoint, recipe, calibration), tmp_path / "onnx")
    model = exported.made.model
    ids = read_tokens(DEMO_FOLDER / "evaluation.txt", tokenizer, 260, 1)
    states = model.zero_states(1)
    for part in (ids[:, :259], ids[:, 259:]):
        logits, after = model.forward(part, states, 1)
        got_logits, *got = exported.run(part, states, 1)
        assert_states(got, after, exact=recipe.quantized)
        assert_logits(got_logits, logits)
        states = after


# ------------------------------------------------------------------------------------------------
# The form of the graphs
# ------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
def test_checker(export: Export, variant: tuple[str, int, dict[str, Any]], form: str) -> None:
    """onnx.checker accepts the file, external data included; opset and IR are what they must be."""
    name, ngroups, changes = variant
    exported = export(name, ngroups, **changes)
    path = exported.folder / f"checked-{form}.onnx"
    onnx.save(exported.graph(form), path)
    onnx.checker.check_model(str(path), full_check=form == "cpu")
    loaded = onnx.load(path, load_external_data=False)
    assert loaded.ir_version == IR_VERSION == 9
    assert {o.domain: o.version for o in loaded.opset_import} == {"": OPSET, DOMAIN: 1}
    assert OPSET == 18


@variants
def test_interface(export: Export, variant: tuple[str, int, dict[str, Any]]) -> None:
    """Names, types and shapes of inputs and outputs: what the board's runtime relies on."""
    name, ngroups, changes = variant
    exported = export(name, ngroups, **changes)
    config, graph = exported.made.config, exported.portable.graph
    wide = exported.made.recipe.state_dtype == "fp32"
    ssm = TensorProto.FLOAT if wide else TensorProto.FLOAT16
    block = mamba(config)
    conv_shape = ["batch", 3, block.conv_dim]
    ssm_shape = ["batch", block.nheads, block.headdim, block.d_state]

    def described(values: Any) -> dict[str, tuple[int, list[int | str]]]:
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    inputs: dict[str, tuple[int, list[int | str]]] = {
        "input_ids": (TensorProto.INT32, ["batch", "tokens"]),
        "logits_to_keep": (TensorProto.INT64, []),
    }
    outputs: dict[str, tuple[int, list[int | str]]] = {
        "logits": (TensorProto.FLOAT, ["batch", "positions", config.vocab_size]),
    }
    for i in range(config.n_layer):
        for end, table in (("", inputs), ("_out", outputs)):
            table[f"conv_state{end}.{i}"] = (TensorProto.FLOAT16, list(conv_shape))
            table[f"ssm_state{end}.{i}"] = (ssm, list(ssm_shape))
    assert described(graph.input) == inputs
    assert described(graph.output) == outputs


@variants
def test_external_data(export: Export, variant: tuple[str, int, dict[str, Any]]) -> None:
    """Each initializer is the tensor of its name, at its offset in model.safetensors."""
    name, ngroups, changes = variant
    exported = export(name, ngroups, **changes)
    tensors = load_file(exported.folder / WEIGHTS)
    content = (exported.folder / WEIGHTS).read_bytes()
    made = exported.portable.graph.initializer
    assert {i.name for i in made} == {k for k, v in tensors.items() if v.dim()}
    for initializer in made:
        assert initializer.data_location == TensorProto.EXTERNAL
        where = {entry.key: entry.value for entry in initializer.external_data}
        assert where["location"] == WEIGHTS
        begin, length = int(where["offset"]), int(where["length"])
        want = tensors[initializer.name]
        assert list(initializer.dims) == list(want.shape)
        assert content[begin : begin + length] == want.numpy().tobytes()
    loaded = onnx.load(exported.path)  # the onnx library finds the same bytes
    for initializer in loaded.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(initializer), tensors[initializer.name].numpy())


def test_graph_holds_no_weights(export: Export) -> None:
    """The graph file stays small: weights are in one place only."""
    exported = export("edge-w8a8")
    assert exported.path.stat().st_size < (exported.folder / WEIGHTS).stat().st_size


@variants
def test_names_are_unique(export: Export, variant: tuple[str, int, dict[str, Any]]) -> None:
    """Every value is defined once, every node has a name of its own that says its layer."""
    name, ngroups, changes = variant
    graph = export(name, ngroups, **changes).portable.graph
    values = [v.name for v in (*graph.input, *graph.initializer)]
    values += [output for node in graph.node for output in node.output]
    assert len(values) == len(set(values))
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names)) and all(names)
    blocks = [n for n in names if n.startswith("layers.1/")]
    assert len(blocks) >= 6


@variants
def test_lowered_model(export: Export, variant: tuple[str, int, dict[str, Any]]) -> None:
    """What TensorRT gets: standard ops and plugin nodes that every parser version understands."""
    name, ngroups, changes = variant
    exported = export(name, ngroups, **changes)
    model = lowering.lower(exported.graph("tensorrt"))
    assert not model.functions
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    assert "logits_to_keep" not in {v.name for v in model.graph.input}
    nodes = list(nested_nodes(model.graph.node))
    assert "logits_to_keep" not in {i for node in nodes for i in node.input} or any(
        i.name == "logits_to_keep" for i in model.graph.initializer
    )
    plugins = [node for node in nodes if node.op_type.startswith("Ssdi8")]
    assert {node.domain for node in nodes} <= {"", DOMAIN}
    assert all(node in plugins for node in nodes if node.domain == DOMAIN)
    for node in plugins:
        op = OPS[node.op_type]
        attributes = {a.name: a for a in node.attribute}
        assert op.plugin and set(attributes) == {
            *(*op.attributes, "plugin_version", "plugin_namespace")
        }
        assert attributes["plugin_version"].s == b"1"
        assert attributes["plugin_namespace"].s == b""
        for attribute in node.attribute:
            assert attribute.type in (
                onnx.AttributeProto.INT,
                onnx.AttributeProto.FLOAT,
                onnx.AttributeProto.STRING,
            )
            assert -(2**31) <= attribute.i < 2**31
            assert np.isfinite(attribute.f)
    quantized = exported.made.recipe.quantized
    per_layer = {"fused": 6, "modular": 9}[exported.made.recipe.ssd_ops]
    head = 2 if exported.made.recipe.lm_head != "fp16" else 0
    assert len(plugins) == (2 * per_layer + head if quantized else 0)


def test_lowered_graph_returns_the_last_position(export: Export) -> None:
    """The baseline has no plugins, so its lowered graph runs anywhere: one position of logits."""
    exported = export("fp16")
    path = exported.folder / "lowered.onnx"
    onnx.save(lowering.lower(exported.graph("tensorrt")), path)
    model, ids = exported.made.model, random_ids(2, 21, seed=6)
    states = model.zero_states(2)
    feed = {"input_ids": ids.to(torch.int32).numpy()}
    for i, state in enumerate(states):
        feed |= {f"conv_state.{i}": state[0].numpy(), f"ssm_state.{i}": state[1].numpy()}
    got_logits, *got = session(path).run(None, feed)
    logits, after = model.forward(ids, states, 1)
    # FP32 inside instead of FP64, and FP16 products: ten times the tolerance of the other form.
    difference = np.linalg.norm(got_logits - logits.numpy()) / np.linalg.norm(logits.numpy())
    assert got_logits.shape == (2, 1, 256) and difference < 10 * LOGIT_TOLERANCE
    for found, state in zip(got[1::2], after, strict=True):
        want = state[1].float().numpy()
        assert np.linalg.norm(found - want) < 1e-2 * np.linalg.norm(want)


def test_inlined_graph_is_the_graph(export: Export) -> None:
    """All functions inlined: standard ops alone, and the same values."""
    exported = export("edge-w8a8")
    inlined = lowering.inline_all(exported.portable)
    assert not inlined.functions
    assert {node.domain for node in nested_nodes(inlined.graph.node)} <= {"", "ai.onnx"}
    path = exported.folder / "inlined.onnx"
    onnx.save(inlined, path)
    model, ids = exported.made.model, random_ids(2, 35, seed=6)
    logits, states = model.forward(ids, None, 2)
    got_logits, *got = exported.run(ids, model.zero_states(2), 2, session(path))
    assert_states(got, states, exact=True)
    assert_logits(got_logits, logits)


def test_other_attributes_are_another_body() -> None:
    """In a domain of its own under the same name; the same attributes share one."""
    graph = GraphBuilder("cpu")
    shape: list[int | str] = ["b", "l", 64]
    hidden = graph.input("hidden", TensorProto.FLOAT16, shape)
    residual = graph.input("residual", TensorProto.FLOAT, shape)
    norm = OPS["Ssdi8RmsNorm"]
    roundings = ("half_even", "half_even", "half_away")
    x = hidden, residual
    for rounding in roundings:
        norm(*x, eps=1e-5, scaling="dynamic", rounding=rounding)
    model = graph.model()
    assert [node.domain for node in model.graph.node] == [DOMAIN, DOMAIN, f"{DOMAIN}.2"]
    assert [(f.domain, f.name) for f in model.functions] == [
        *((DOMAIN, norm.name), (f"{DOMAIN}.2", norm.name))
    ]
    assert {each.domain for each in model.opset_import} == {"", DOMAIN, f"{DOMAIN}.2"}


def test_missing_and_unknown_attributes_are_refused() -> None:
    """A node carries all attributes of its op and no other."""
    graph = GraphBuilder("cpu")
    hidden = graph.input("hidden", TensorProto.FLOAT16, ["b", "l", 64])
    residual = graph.input("residual", TensorProto.FLOAT, ["b", "l", 64])
    norm = OPS["Ssdi8RmsNorm"]
    for wrong in ({"eps": 1e-5}, {**dict.fromkeys(norm.attributes, 0.1), "more": 1}):
        with pytest.raises(ValueError, match="Ssdi8RmsNorm takes"):
            norm(hidden, residual, **wrong)


@pytest.mark.parametrize("scaling", ["static", "dynamic"])
def test_static_scales_are_inputs(export: Export, scaling: str) -> None:
    """One function body for all layers, and each layer's own static scales at its nodes."""
    exported = export("edge-w8a8", input_scaling=scaling)
    for op, scale in (("Ssdi8RmsNorm", "u_scale"), ("Ssdi8RmsNormGated", "r_scale")):
        nodes = [n for n in exported.portable.graph.node if n.op_type == op]
        given = [n.input[-1] for n in nodes if n.input[-1].endswith("_scale")]
        want = [f"layers.{i}.{scale}" for i in range(2)] if scaling == "static" else []
        assert given == want
