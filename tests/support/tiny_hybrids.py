"""Tiny models of the hybrid families, in memory, and what recipes make of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from case_table import Quantized, apply_recipe, random_ids, tiny_recipe
from conftest import make_model
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.models.kinds.parallel import Parallel

SSM: dict[str, Any] = {"d_state": 16, "chunk_size": 16}
# Heads of 80 in 3 groups, E apart from 2 D and of no Hadamard order; grouped queries.
NEMOTRON = Description(
    d_model=64,
    vocab_size=256,
    blocks=(
        Mamba2(d_inner=240, headdim=80, ngroups=3, **SSM),
        Mlp(hidden=144, activation="relu2"),
        Attention(n_heads=6, n_kv_heads=2, head_dim=16),
    ),
    tie_embeddings=False,
)
# Heads of 32, a tied head.
GRANITE = Description(
    d_model=64,
    vocab_size=256,
    blocks=(
        Mamba2(d_inner=96, headdim=32, **SSM),
        Mlp(hidden=96, activation="swiglu"),
        Attention(n_heads=4, n_kv_heads=1, head_dim=16),
        Mlp(hidden=96, activation="swiglu"),
    ),
)
# Both mixers side by side, rotary positions; each form of the gate that the others have not.
FALCON = Description(
    d_model=64,
    vocab_size=256,
    blocks=tuple(
        Parallel(
            mamba=Mamba2(d_inner=64, headdim=32, gate_norm=gate_norm, **SSM),
            attention=Attention(n_heads=4, n_kv_heads=2, head_dim=16, rope_theta=1e4),
        )
        for gate_norm in ("none", "norm_first")
    ),
    tie_embeddings=False,
)
# The gates alone, where they write INT8 themselves.
GATES = Description(
    d_model=64,
    vocab_size=256,
    blocks=tuple(
        Mamba2(d_inner=80, headdim=16, gate_norm=gate_norm, **SSM)
        for gate_norm in ("none", "norm_first")
    ),
)
FAMILIES = {"nemotron": NEMOTRON, "granite": GRANITE, "falcon": FALCON, "gates": GATES}


def with_biases(description: Description) -> Description:
    """The same with biases of every linear layer."""
    blocks = tuple(
        dataclasses.replace(block, in_bias=True, out_bias=True) for block in description.blocks
    )
    return dataclasses.replace(description, blocks=blocks)


class MemoryCheckpoint:
    """A model in memory, as the stages read a checkpoint."""

    folder = Path("a model in memory")

    def __init__(self, model: FloatModel) -> None:
        self.description = model.description
        self._tensors = {name: value.detach() for name, value in model.state_dict().items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"layers.{index}."
        return {k[len(prefix) :]: v for k, v in self._tensors.items() if k.startswith(prefix)}

    def stored_name(self, name: str) -> str:
        return name


def hybrid(description: Description) -> FloatModel:
    """Random weights; states that matter within tens of tokens, and outlive a chunk."""
    model = make_model(description)
    with torch.no_grad():
        model.embedding.weight.mul_(25)
        for layer in model.layers:
            if hasattr(layer, "dt_bias"):
                layer.dt_bias.add_(1.0)
                layer.A_log.sub_(3.0)
    return model


def quantized(model: FloatModel, method: str, **changes: Any) -> Quantized:
    """`model` by a preset, groups of 32 columns where they fit."""
    checkpoint = cast(Checkpoint, MemoryCheckpoint(model))
    return apply_recipe(checkpoint, tiny_recipe(method, **changes), random_ids(8, 48))
