"""NVIDIA's own ONNX parser and builder read the graphs, without a GPU.

TensorRT-RTX shares its parser with the TensorRT of the boards and builds for a compute capability
that the machine need not have. The INT8 ops have no plugin here: their Q/DQ bodies are inlined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from case_table import Quantized, apply_recipe, random_ids, tiny_recipe, write_checkpoint
from conftest import make_config
from tiny_hybrids import FAMILIES, hybrid, quantized

from runtime.files import WEIGHTS
from ssdi8_edge.compile import lowering
from ssdi8_edge.compile.export import export_model
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ops.op import BodyForm

trt = pytest.importorskip(
    "tensorrt_rtx", reason="NVIDIA's parser is not installed: pip install tensorrt-rtx-cu13"
)

MAX_TOKENS = 64


class _Errors(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, drops the rest. TensorRT takes one logger per process: the first."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.messages.append(message)


LOGGER = _Errors()

VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "edge-w8a8": ("edge-w8a8", 1, {}),
    "edge-w8a8 modular 2 groups": ("edge-w8a8", 2, {"ssd_ops": "modular"}),
    # The parser takes an INT8 constant for nothing but a quantized weight.
    "edge-w4a8": ("edge-w4a8", 1, {"group_scales": "fp16"}),
    "edge-w8a8 tables": ("edge-w8a8", 1, {"lm_head": "w8_row", "embedding": "int8_row"}),
    "ssdi8-w8a8": ("ssdi8-w8a8", 1, {}),
    "fp16": ("fp16", 1, {}),
}


class Graphs:
    """The graphs of one recipe, beside their weights."""

    def __init__(self, folder: Path, made: Quantized) -> None:
        self.made, self.folder = made, folder
        writer = SafetensorsWriter(folder / WEIGHTS)
        for key, tensor in self.made.tensors.items():
            writer.add(key, tensor)
        writer.close()

    def lowered(self) -> Path:
        """model.onnx, as a bundle holds it."""
        return self._save(lowering.lower(self._export("tensorrt")), "model.onnx")

    def standard(self, form: BodyForm) -> Path:
        """Standard ops alone; logits_to_keep is the constant 1, as in model.onnx."""
        graph = gs.import_onnx(lowering.inline_all(self._export(form)))
        keep = next(tensor for tensor in graph.inputs if tensor.name == "logits_to_keep")
        graph.inputs.remove(keep)
        keep.to_constant(np.array(1, dtype=np.int64))
        return self._save(gs.export_onnx(graph), f"standard.{form}.onnx")

    def _export(self, form: BodyForm) -> onnx.ModelProto:
        return export_model(self.folder / WEIGHTS, self.made.config, self.made.recipe, form)

    def _save(self, model: onnx.ModelProto, name: str) -> Path:
        onnx.save(model, self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    name, ngroups, changes = request.param
    return graphs_of(tmp_path_factory.mktemp("parser"), name, ngroups, **changes)


def graphs_of(folder: Path, name: str, ngroups: int = 1, **changes: Any) -> Graphs:
    checkpoint, _ = write_checkpoint(folder / "source", make_config(ngroups))
    return Graphs(folder, apply_recipe(checkpoint, tiny_recipe(name, **changes), random_ids(8, 48)))


@pytest.mark.parametrize("changes", [{}, {"kv": "fp16"}], ids=["int8 cache", "fp16 cache"])
@pytest.mark.parametrize("name", ["nemotron", "granite", "falcon"])
def test_parses_hybrids(name: str, changes: dict[str, str], tmp_path: Path) -> None:
    """Attention and activations in standard ops, until they have plugins."""
    made = quantized(hybrid(FAMILIES[name].with_context(64)), "edge-w8a8", **changes)
    _, network, parsed = parser()
    path = Graphs(tmp_path, made).standard("tensorrt")
    assert parsed.parse_from_file(str(path)), errors(parsed)
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    assert "position" in inputs


def parser() -> tuple[Any, Any, Any]:
    """A builder, an empty network and a parser that fills it."""
    LOGGER.messages.clear()
    builder = trt.Builder(LOGGER)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    return builder, network, trt.OnnxParser(network, LOGGER)


def errors(parsed: Any) -> list[str]:
    return [parsed.get_error(i).desc() for i in range(parsed.num_errors)]


def test_parses_and_builds(graphs: Graphs) -> None:
    """The whole graph becomes a network and, shapes left open, an engine for an Ampere GPU.

    8.6 is the compute capability nearest to a board's 8.7 that TensorRT-RTX builds for.
    """
    builder, network, parsed = parser()
    assert parsed.parse_from_file(str(graphs.standard("tensorrt"))), errors(parsed)
    config = graphs.made.config
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    states = {f"{k}_state.{i}" for k in ("conv", "ssm") for i in range(config.n_layer)}
    assert inputs.keys() == {"input_ids", *states}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    assert outputs == {"logits", *(s.replace("state", "state_out") for s in states)}

    settings = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, tensor in inputs.items():
        shape = list(tensor.shape)
        low = [1 if d == -1 else d for d in shape]
        high = [(2 if i == 0 else MAX_TOKENS) if d == -1 else d for i, d in enumerate(shape)]
        assert profile.set_shape(name, low, high, high) is None
    settings.add_optimization_profile(profile)
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, settings)
    assert engine is not None, LOGGER.messages
    weights = (graphs.folder / WEIGHTS).stat().st_size
    assert engine.nbytes > weights // 4
    assert LOGGER.messages == []


def test_only_plugins_are_missing(graphs: Graphs) -> None:
    """model.onnx: the parser names every Ssdi8 node as lacking its plugin, and nothing else.

    So all of its other nodes are ones that TensorRT reads; the baseline needs no plugin at all.
    """
    assert_only_plugins_missing(graphs)


@pytest.mark.parametrize("method", ["edge-w8a8", "fp16"])
@pytest.mark.parametrize("name", ["nemotron", "granite", "falcon"])
def test_only_plugins_of_hybrids_are_missing(name: str, method: str, tmp_path: Path) -> None:
    """The same of attention, MLPs and parallel blocks."""
    assert_only_plugins_missing(
        Graphs(tmp_path, quantized(hybrid(FAMILIES[name].with_context(64)), method))
    )


def assert_only_plugins_missing(graphs: Graphs) -> None:
    path = graphs.lowered()
    plugins = {
        node.name: node.op_type
        for node in onnx.load(path, load_external_data=False).graph.node
        if node.op_type.startswith("Ssdi8")
    }
    _, _, parsed = parser()
    supported = parsed.supports_model_v2(path.read_bytes(), str(path))
    assert supported == (not plugins)
    assert bool(plugins) == graphs.made.recipe.quantized
    found = [parsed.get_error(i) for i in range(parsed.num_errors)]
    assert {e.node_name(): e.node_operator() for e in found} == plugins
    assert len(found) == len(plugins)
    assert all("Plugin not found" in e.desc() for e in found)


def test_the_parser_does_refuse(tmp_path: Path) -> None:
    """The CPU form of the same graph computes in FP64, which TensorRT lacks: not parsed.

    Without this, a parser that accepts everything would make the tests above worthless.
    """
    graphs = graphs_of(tmp_path, "edge-w8a8")
    _, _, parsed = parser()
    assert not parsed.parse_from_file(str(graphs.standard("cpu")))
    assert parsed.num_errors > 0
