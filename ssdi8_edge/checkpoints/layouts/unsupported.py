"""Models of other families: what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.layout import Layout, renamed
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.description import Description

MAMBA_1 = "this model is made of Mamba-1 blocks; only Mamba-2 is supported."
SENTENCES = {
    "zamba2": "Zamba2 shares one attention block between layers, which is not supported.",
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), MAMBA_1),
    "bamba": "Bamba is not supported; Granite 4.0 H continues it and is.",
}


def describe(config: Mapping[str, Any]) -> Description:
    """Raises CheckpointError."""
    model_type = config["model_type"]
    raise CheckpointError(
        SENTENCES.get(model_type)
        or f'config.json sets model_type = "{model_type}"; only mamba2, nemotron_h, '
        "granitemoehybrid and falcon_h1 are supported."
    )


UNSUPPORTED = Layout(
    "unsupported",
    lambda config: config.get("model_type") is not None,
    describe,
    renamed(str),
    str,
    fallback=True,
)
