"""compile/interface.py: what the manifest says of a graph, for runtimes that know no model."""

from __future__ import annotations

import pytest
from conftest import make_config

from ssdi8_edge.compile.interface import interface
from ssdi8_edge.recipes.presets import METHODS


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("conv_state.0", "EmbeddingInt8", "layers.0/Linear (in_proj)"),
        ("ssm_state.0", "layers.0/CausalConv1d", "layers.0/StatePassing"),
        ("conv_state.1", "layers.0/ChunkScan", "layers.1/Linear (in_proj)"),
    ],
)
def test_suspects_are_the_ops_since_the_state_before(name: str, first: str, last: str) -> None:
    said = interface(make_config(), METHODS["edge-w8a8"])
    (suspects,) = (state["suspects"] for state in said["states"] if state["name"] == name)
    assert (suspects[0], suspects[-1]) == (first, last)
    assert said["logits_suspects"][0] == "layers.1/ChunkScan"
    assert said["logits_suspects"][-1] == "head/Linear (lm_head)"


def test_states_are_declared_in_the_order_of_the_data() -> None:
    """Names, shapes without the batch, types; the first three pass through every op once."""
    said = interface(make_config(2, n_layer=3), METHODS["fp16"])
    assert [state["name"] for state in said["states"]] == [
        f"{kind}_state.{i}" for i in range(3) for kind in ("conv", "ssm")
    ]
    conv, ssm = said["states"][:2]
    assert (conv["shape"], conv["dtype"]) == ([3, 192], "fp16")
    assert (ssm["shape"], ssm["dtype"]) == ([8, 16, 16], METHODS["fp16"].state_dtype)
    assert [state["shallow"] for state in said["states"]] == [True] * 3 + [False] * 3
    assert {state["update"] for state in said["states"]} == {"replace"}
    assert (said["vocab_size"], said["prompt_multiple"]) == (256, 16)
