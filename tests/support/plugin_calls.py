"""What plugins are tried with: the nodes of a real model.onnx, and one valid call of every op."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from case_table import random_ids
from conftest import make_config
from plugin_harness import Form, Harness, Plugin, Value, forms
from tiny_hybrids import GATES, NEMOTRON, hybrid, quantized

from runtime.files import WEIGHTS
from ssdi8_edge.compile import lowering
from ssdi8_edge.compile.export import export_model
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.models.description import Description
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import Op

PLUGIN_OPS = sorted(name for name, op in OPS.items() if op.plugin and op.kernel)

# Models and recipes that between them have every op, and every choice that an attribute or a type
# states.
MODELS: dict[str, tuple[Description, str, dict[str, Any]]] = {
    "edge-w8a8": (make_config(), "edge-w8a8", {}),
    "modular": (make_config(2), "edge-w8a8", {"ssd_ops": "modular", "state_dtype": "fp32"}),
    "released": (make_config(), "ssdi8-w8a8", {"ssd_ops": "modular"}),
    "fp16 ssd": (make_config(), "edge-w8a8", {"ssd_ops": "modular", "scaling": "none"}),
    "w4": (make_config(), "edge-w4a8", {}),
    "nemotron": (NEMOTRON, "edge-w8a8", {}),
    "gates": (GATES, "ssdi8-w8a8", {}),
}
BATCH, LENGTH = 2, 19  # more than a chunk of 16


@dataclass(frozen=True)
class Call:
    """A node of model.onnx: its fields, and the tensors that its reference took and gave."""

    op: str
    fields: dict[str, Value]
    inputs: list[Form]
    outputs: list[Form]


def record_calls(
    folder: Path, description: Description, method: str, changes: dict[str, Any]
) -> list[Call]:
    made = quantized(hybrid(description.with_context(LENGTH)), method, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(folder / WEIGHTS)
    for key, tensor in made.tensors.items():
        writer.add(key, tensor)
    writer.close()
    exported = export_model(folder / WEIGHTS, made.config, made.recipe, "tensorrt")
    nodes = [n for n in lowering.lower(exported).graph.node if n.op_type in PLUGIN_OPS]

    recorded: list[tuple[str, list[Form], list[Form]]] = []
    inside = False

    def record(op: Op, *inputs: Any, **attributes: Any) -> Any:
        nonlocal inside
        if inside or not op.plugin:  # the fused op's reference calls the modules
            return op.reference(*inputs, **attributes)
        inside = True
        outputs = op.reference(*inputs, **attributes)
        inside = False
        recorded.append((op.name, forms(inputs), forms(outputs)))
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", record)
        made.model.forward(random_ids(BATCH, LENGTH))
    assert [name for name, _, _ in recorded] == [node.op_type for node in nodes]
    return [
        Call(op, node_fields(node), inputs, outputs)
        for node, (op, inputs, outputs) in zip(nodes, recorded, strict=True)
    ]


def node_fields(node: onnx.NodeProto) -> dict[str, Value]:
    """The attributes that a parser passes on: it reads its own two itself."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values.pop("plugin_version") == b"1"
    assert values.pop("plugin_namespace") == b""
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def create(harness: Harness, call: Call) -> Plugin:
    plugin = harness.create(call.op, call.fields)
    assert plugin is not None, harness.messages()
    return plugin


# A valid set of fields for every op, at sizes that the kernels run.
SSD_FIELDS: dict[str, Value] = {
    "chunk_size": 256,
    "nheads": 24,
    "headdim": 64,
    "ngroups": 1,
    "d_state": 128,
    "dt_column": 3328,
    "dt_min": 0.0,
    "dt_max": 3.4e38,
    "gate": "fp32",
    "rounding": "half_even",
    "scaling": "dynamic",
}
OTHER_FIELDS: dict[str, Value] = {
    "eps": 1e-5,
    "rotation": "hadamard",
    "rounding": "half_even",
    "scaling": "dynamic",
    "group_size": 128,
    "d_inner": 1536,
    "conv_dim": 1792,
    "d_conv": 4,
    "ngroups": 1,
    "width": 1536,
    "activation": "silu_gate",
    "x_column": 1536,
    "n_heads": 12,
    "n_kv_heads": 4,
    "head_dim": 64,
    "first_column": 0,
    "rope_theta": 1e4,
}
# Of the input of a linear layer, where an op has several.
INPUT_FIELDS = OTHER_FIELDS | {"rotation": "signs"}


def valid_fields(op: str) -> dict[str, Value]:
    values = INPUT_FIELDS if op in ("Ssdi8Activation", "Ssdi8Quantize") else OTHER_FIELDS
    if op.startswith(("Ssdi8Chunk", "Ssdi8S")):
        values = SSD_FIELDS
    return {name: values[name] for name in OPS[op].attributes}


def ssd_call(op: str, batch: int = 1, length: int = 300) -> Call:
    """An SSD op at the sizes of `SSD_FIELDS`."""
    heads, headdim, d_state, chunks = 24, 64, 128, -(-length // 256)
    tokens, decay, channels = (batch, length), (batch, heads, length), (heads, headdim)
    shapes: dict[str, Form] = {
        "x": ("FP16", (*tokens, heads * headdim)),
        "y": ("FP16", (*tokens, heads * headdim)),
        "b_q": ("INT8", (*tokens, d_state)),
        "c_q": ("INT8", (*tokens, d_state)),
        "zxbcdt": ("FP16", (*tokens, 3352)),
        "ssm_state": ("FP16", (batch, heads, headdim, d_state)),
        "ssm_state_out": ("FP16", (batch, heads, headdim, d_state)),
        "states": ("FP32", (batch, chunks, heads, headdim, d_state)),
        "passed": ("INT8", (batch, chunks, heads, headdim, d_state)),
        "passed_scale": ("FP32", (batch, chunks, heads, headdim)),
        "dt": ("FP32", decay),
        "a": ("FP32", decay),
        **{name: ("FP32", (heads,)) for name in ("dt_bias", "A", "D")},
        **{name: ("FP32", (1,)) for name in ("b_scale", "c_scale", "cb_scale")},
        **{name: ("FP32", channels) for name in ("x_scale", "state_scale")},
    }
    inputs, outputs = ([shapes[n] for n in names] for names in (OPS[op].inputs, OPS[op].outputs))
    return Call(op, valid_fields(op), inputs, outputs)
