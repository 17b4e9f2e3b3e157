"""The layout of transformers' Mamba2ForCausalLM: config.json has hidden_size, num_heads, ....

Values that it leaves out are the defaults of `Mamba2Config`; names are those of state-spaces, but
for the embedding. `expand` and `norm_before_gate` are not read: heads say the inner width, and the
code that Codestral Mamba was trained by gates before the norm, whatever its config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.config import dt_limit, flag, layers, norm_eps, require, size
from ssdi8_edge.checkpoints.layout import Layout, renamed
from ssdi8_edge.checkpoints.layouts.state_spaces import canonical_name, mamba2_model, stored_name
from ssdi8_edge.models.description import Description

FIXED = {"hidden_act": "silu"}


def recognises(config: Mapping[str, Any]) -> bool:
    """By its model type, or by a key where that is left out."""
    model_type = config.get("model_type")
    ours = "hidden_size" in config if model_type is None else model_type == "mamba2"
    return ours and "d_model" not in config


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    require(config, FIXED)
    heads, headdim = size(config, "num_heads", 128), size(config, "head_dim", 64)
    return mamba2_model(
        d_model=size(config, "hidden_size"),
        n_layer=layers(config, "num_hidden_layers", 64),
        vocab_size=size(config, "vocab_size", 32768),
        d_inner=heads * headdim,
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
        bias=flag(config, "use_bias", False),
    )


MAMBA2_HF = Layout(
    "Hugging Face",
    recognises,
    describe,
    renamed(stored_name, lambda config: flag(config, "use_conv_bias", True)),
    canonical_name,
)
