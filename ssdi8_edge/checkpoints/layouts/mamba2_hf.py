"""The layout of transformers' Mamba2ForCausalLM: config.json has hidden_size, num_heads, ....

Values that it leaves out are the defaults of `Mamba2Config`; names are those of state-spaces, but
for the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.config import dt_limit, flag, norm_eps, require, size
from ssdi8_edge.checkpoints.layout import Layout
from ssdi8_edge.checkpoints.layouts.state_spaces import canonical_name, mamba2_model, stored_name
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.description import Description

FIXED = {
    "model_type": "mamba2",
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether transformers wrote it; `describe` says what is wrong with another model type."""
    return config.get("model_type") is not None or "hidden_size" in config


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    require(config, FIXED)
    d_model, expand = size(config, "hidden_size"), size(config, "expand", 2)
    heads, headdim = size(config, "num_heads", 128), size(config, "head_dim", 64)
    if heads * headdim != expand * d_model:
        raise CheckpointError(
            f"config.json sets num_heads * head_dim = {heads * headdim}, "
            f"but expand * hidden_size = {expand * d_model}."
        )
    return mamba2_model(
        d_model=d_model,
        n_layer=size(config, "num_hidden_layers", 64),
        vocab_size=size(config, "vocab_size", 32768),
        d_inner=expand * d_model,
        sizes={
            "d_state": size(config, "state_size", 128),
            "d_conv": size(config, "conv_kernel", 4),
            "headdim": headdim,
            "ngroups": size(config, "n_groups", 8),
            "chunk_size": size(config, "chunk_size", 256),
        },
        dt_limit=dt_limit(config.get("time_step_limit"), "time_step_limit"),
        norm_eps=norm_eps(config, "layer_norm_epsilon"),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


MAMBA2_HF = Layout("Hugging Face", recognises, describe, stored_name, canonical_name, fallback=True)
