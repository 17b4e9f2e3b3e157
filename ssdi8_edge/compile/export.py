"""ONNX graphs from ops: nodes of domain `ssdi8`, each with a function body of standard ops.

The graph is what `models.network.run_model` does when it runs on graph values. Weights stay where
they are: the graph refers to them inside the safetensors file of the quantized checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, helper, parser

from runtime.files import WEIGHTS
from ssdi8_edge.compile.program import Program
from ssdi8_edge.compile.safetensors_writer import data_start, header_of
from ssdi8_edge.models.block import Context, StateSpec, linear
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.network import run_model
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import DOMAIN, Attributes, BodyForm, GraphValue, Op
from ssdi8_edge.ops.sizes import symbol
from ssdi8_edge.recipes.recipe import QuantConfig

# The newest opset that TensorRT 10.3 (JetPack 6.2) reads, and its IR version.
OPSET = 18
IR_VERSION = 9


class _Body(NamedTuple):
    """An op's function for these attributes and so many inputs."""

    attributes: dict[str, Any]
    n_inputs: int
    function: onnx.FunctionProto


class GraphBuilder:
    """Collects nodes while the forward runs on `GraphValue`s; implements `ops.op.Emitter`.

    `program` is the same recording for a runtime that knows no ONNX.
    """

    def __init__(self, form: BodyForm, name: str = "graph") -> None:
        self.form = form
        self.name = name
        self.program = Program()
        self._scope: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._functions: dict[str, list[_Body]] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes and values made inside the block."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, elem_type: int, shape: list[int | str]) -> GraphValue:
        self._inputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        sizes = tuple(symbol(size) if isinstance(size, str) else size for size in shape)
        known = None if None in sizes else sizes  # tests leave sizes open
        value = GraphValue(name, self, _TORCH_TYPES.get(elem_type), known)
        self.program.input(value)
        return value

    def output(self, value: GraphValue, name: str, elem_type: int, shape: list[int | str]) -> None:
        self._nodes.append(helper.make_node("Identity", [value.name], [name], name=f"{name}/out"))
        self._outputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        self.program.output(value, name)

    def initializer(self, tensor: onnx.TensorProto) -> GraphValue:
        """A constant; `tensor` carries its data or says in which file they lie."""
        self._initializers.append(tensor)
        return GraphValue(tensor.name, self, _TORCH_TYPES.get(tensor.data_type), tuple(tensor.dims))

    def emit(
        self, op: Op, inputs: tuple[GraphValue, ...], attributes: Attributes
    ) -> tuple[GraphValue, ...]:
        """Append one node of `op`; returns its outputs."""
        if set(attributes) != set(op.attributes):
            raise ValueError(f"{op.name} takes {op.attributes}, got {tuple(attributes)}")
        domain = self._define(op, len(inputs), attributes)
        prefix = "/".join(self._scope)
        index = sum(node.name.startswith(f"{prefix}/{op.name}") for node in self._nodes[-64:])
        name = f"{prefix}/{op.name}" + (f".{index}" if index else "")
        outputs = [f"{name}.{output}" for output in op.outputs]
        node = helper.make_node(
            op.name, [v.name for v in inputs], outputs, name=name, domain=domain
        )
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self._nodes.append(node)
        made = [GraphValue(output, self) for output in outputs]
        return self.program.record(op, inputs, attributes, made)

    def _define(self, op: Op, n_inputs: int, attributes: Attributes) -> str:
        """Have the op's function in the graph; returns its domain.

        An op that blocks use with other attributes has another body, in a domain of its own: the
        name stays the same, since it is the name of a plugin.
        """
        known = self._functions.setdefault(op.name, [])
        for body in known:
            if (body.attributes, body.n_inputs) == (attributes, n_inputs):
                return str(body.function.domain)
        function = parser.parse_function(op.function_text(n_inputs, attributes, self.form, OPSET))
        if known:
            function.domain = f"{DOMAIN}.{len(known) + 1}"
        # Inference libraries keep these names, so that times can be added up by op.
        for i, node in enumerate(nested_nodes(function.node)):
            node.name = f"{op.name}/{node.op_type}.{i}"
        known.append(_Body(dict(attributes), n_inputs, function))
        for node in nested_nodes(function.node):
            if node.domain == DOMAIN:
                values = {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute}
                node.domain = self._define(OPS[node.op_type], len(node.input), values)
                if node.domain not in {each.domain for each in function.opset_import}:
                    function.opset_import.append(helper.make_opsetid(node.domain, 1))
        return str(function.domain)

    def model(self) -> onnx.ModelProto:
        """The recording as ONNX."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=self._initializers
        )
        functions = [body.function for bodies in self._functions.values() for body in bodies]
        domains = dict.fromkeys([DOMAIN, *(function.domain for function in functions)])
        own = [helper.make_opsetid(domain, 1) for domain in domains]
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), *own],
            functions=functions,
            ir_version=IR_VERSION,
            producer_name="ssdi8-edge",
        )


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs, depth first."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nested_nodes(attribute.g.node)


# As kernel calls know them.
_TORCH_TYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT8: torch.int8,
}
_ELEMENT_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "I32": TensorProto.INT32,
    "I8": TensorProto.INT8,
}


class _ExternalParameters:
    """The tensors of a safetensors file as initializers with external data, made when asked for."""

    def __init__(self, weights: Path, graph: GraphBuilder) -> None:
        self._header = header_of(weights)
        self._start = data_start(weights)
        self._graph = graph
        self._made: dict[str, GraphValue] = {}

    def names(self) -> list[str]:
        return list(self._header)

    def get(self, name: str) -> GraphValue:
        if name not in self._made:
            self._made[name] = self._graph.initializer(self._external(name))
        return self._made[name]

    def _external(self, name: str) -> onnx.TensorProto:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        tensor = TensorProto(
            name=name,
            data_type=_ELEMENT_TYPES[entry["dtype"]],
            dims=entry["shape"],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", WEIGHTS),
            ("offset", self._start + begin),
            ("length", end - begin),
        ):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class _Scoped(Mapping[str, Any]):
    """The parameters below a prefix, looked up lazily."""

    def __init__(self, parameters: _ExternalParameters, prefix: str) -> None:
        self._parameters = parameters
        self._prefix = prefix
        self._names = [n[len(prefix) :] for n in parameters.names() if n.startswith(prefix)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._parameters.get(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Top(_Scoped):
    """Parameters outside the blocks; a tied lm_head is the embedding."""

    def __init__(self, parameters: _ExternalParameters) -> None:
        super().__init__(parameters, "")

    def __getitem__(self, name: str) -> Any:
        if name == "lm_head.weight" and name not in self._names:
            name = "embedding.weight"
        return super().__getitem__(name)


STATE_TYPES = {
    "fp16": TensorProto.FLOAT16,
    "fp32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
}


def output_name(state: str) -> str:
    """conv_state.3 -> conv_state_out.3: the output that is the input of the next call."""
    name, index = state.split(".")
    return f"{name}_out.{index}"


def export_model(
    weights: Path, model: Description, recipe: QuantConfig, form: BodyForm
) -> onnx.ModelProto:
    """The graph of `record_model`."""
    return record_model(weights, model, recipe, form).model()


def record_model(
    weights: Path, model: Description, recipe: QuantConfig, form: BodyForm
) -> GraphBuilder:
    """The recording of prefill, chunked prefill and decode, with function bodies in `form`.

    Inputs: input_ids (B, L) INT32; logits_to_keep () INT64, how many final positions get logits;
    the states of every block, as `Description.states` names them; where one of them grows,
    position () INT64, how many tokens came before. Outputs: logits (B, logits_to_keep, V) FP32 and
    the next states, see `output_name`.

    Args:
        model: with a context where a state grows.
        weights: model.safetensors of a quantized checkpoint; the graph refers to it by file name,
            so it must lie beside the graph.

    Raises:
        UsageError: no op computes what the recipe asks for.
    """
    recipe.require_exportable()
    graph = GraphBuilder(form, "-".join(sorted({block.kind for block in model.blocks})))
    parameters = _ExternalParameters(weights, graph)
    ids = graph.input("input_ids", TensorProto.INT32, ["batch", "tokens"])
    keep = graph.input("logits_to_keep", TensorProto.INT64, [])
    states = [
        tuple(
            graph.input(f"{spec.name}.{i}", STATE_TYPES[spec.dtype], _state_shape(spec))
            for spec in block.states(recipe)
        )
        for i, block in enumerate(model.blocks)
    ]
    position = graph.input("position", TensorProto.INT64, []) if model.grows(recipe) else None
    logits, new_states = run_model(
        model.blocks,
        lambda i: _Scoped(parameters, f"layers.{i}."),
        _Top(parameters),
        Context(recipe, model.d_model, model.residual_eps, linear, position),
        ids,
        states,
        keep,
        graph.scope,
    )
    vocabulary: list[int | str] = ["batch", "positions", model.vocab_size]
    graph.output(logits, "logits", TensorProto.FLOAT, vocabulary)
    flat = (state for of_block in new_states for state in of_block)
    for (name, spec), state in zip(model.states(recipe), flat, strict=True):
        graph.output(state, output_name(name), STATE_TYPES[spec.dtype], _state_shape(spec))
    return graph


def _state_shape(spec: StateSpec) -> list[int | str]:
    return ["batch", *spec.shape]
