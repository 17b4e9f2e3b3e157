"""program.json: the graph's calls, with all that a kernel is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from case_table import apply_recipe, random_ids, tiny_recipe, write_checkpoint
from conftest import make_config

from runtime.files import WEIGHTS
from ssdi8_edge.compile.export import GraphBuilder, record_model
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter, header_of
from ssdi8_edge.ops.kernel_header import abi_version, parameter_structs


def recorded(folder: Path, method: str, **changes: Any) -> GraphBuilder:
    checkpoint, _ = write_checkpoint(folder / "source", make_config(2))
    made = apply_recipe(checkpoint, tiny_recipe(method, **changes), random_ids(4, 48))
    with SafetensorsWriter(folder / WEIGHTS) as writer:
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
    return record_model(folder / WEIGHTS, made.config, made.recipe, "cpu")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fp16", {}),
        ("edge-w8a8", {"ssd_ops": "modular"}),
        ("edge-w4a8", {"lm_head": "w4"}),
        ("ssdi8-w8a8", {}),
    ],
)
def test_every_call_has_a_launch(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    """The calls are the nodes of the graph; fields are those of the header; every tensor is an
    input, a weight, or made by a call before; the states of the outputs have their shapes."""
    graph = recorded(tmp_path, method, **changes)
    program = json.loads(json.dumps(graph.program.data(), allow_nan=False))
    nodes = [node for node in graph.model().graph.node if node.op_type != "Identity"]
    calls = program["calls"]
    assert [(c["name"], c["op"]) for c in calls] == [(n.name, n.op_type) for n in nodes]
    assert [c["inputs"] for c in calls] == [list(n.input) for n in nodes]
    assert program["abi"] == abi_version()
    known = {*program["inputs"], *header_of(tmp_path / WEIGHTS)}
    for call in calls:
        kernel, fields = call["launch"]["kernel"], call["launch"]["fields"]
        types = program["structs"][kernel]
        assert list(types) == [field[0] for field in parameter_structs()[kernel]._fields_]
        assert {*fields} == {*types} - {"workspace"}
        known |= {*call["outputs"]}
        pointers = {v for name, v in fields.items() if types[name] == "pointer" and v is not None}
        assert pointers <= known and {*call["outputs"]} <= pointers
    for output, value in program["outputs"].items():
        if output != "logits":
            given = program["inputs"][output.replace("_out", "")]
            assert program["values"][value] == given


def test_sizes_stay_open(tmp_path: Path) -> None:
    """Products of the symbols; chunks are rounded up."""
    program = recorded(tmp_path, "edge-w8a8", ssd_ops="modular").program.data()
    values = program["values"]
    states = next(kind for name, kind in values.items() if name.endswith("ChunkState.states"))
    assert states["shape"] == ["batch", "tokens/16", 8, 16, 16]
    assert values["head/Logits.logits"]["shape"] == ["batch", "logits_to_keep", 256]
    launches = {call["launch"]["kernel"]: call["launch"]["fields"] for call in program["calls"]}
    assert launches["rms_norm"]["tokens"] == "batch*tokens"
    assert launches["logits"]["tokens"] == "batch*logits_to_keep"
    assert launches["chunk_state"]["length"] == "tokens"
