"""A layout of Mamba-2 and MLP blocks in any order; tensors have our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.config import size
from ssdi8_edge.checkpoints.layout import Layout, renamed
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds import kind_named


def describe(config: Mapping[str, Any]) -> Description:
    return Description(
        d_model=size(config, "width"),
        vocab_size=size(config, "vocabulary"),
        blocks=tuple(kind_named(run["kind"]).from_dict(run) for run in config["toy_blocks"]),
        tie_embeddings=True,
    )


TOY = Layout(
    "toy", lambda c: "toy_blocks" in c, describe, renamed(lambda name: name), lambda name: name
)
