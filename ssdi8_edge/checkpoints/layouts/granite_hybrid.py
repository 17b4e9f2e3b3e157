"""The layout of Granite 4.0 H (transformers' GraniteMoeHybridForCausalLM).

A layer is two blocks: Mamba-2 or attention without positions, then SwiGLU. Values that config.json
leaves out are the defaults of `GraniteMoeHybridConfig`. Four multipliers of the model go into
weights when they are read, in FP32:

    embedding_multiplier    embedding
    residual_multiplier     the last linear layer of each block, with its bias
    attention_multiplier    times √head_dim: q, so that scores keep their 1/√head_dim
    logits_scaling          the weight of the last norm is divided by it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ssdi8_edge.checkpoints.config import (
    dt_limit,
    flag,
    layers,
    norm_eps,
    number,
    require,
    respelled,
    size,
)
from ssdi8_edge.checkpoints.layout import (
    EMBEDDING,
    HEAD,
    NORM_F,
    Layout,
    Sources,
    unwrapped,
    whole,
)
from ssdi8_edge.checkpoints.layouts.hybrids import (
    MIXTURE,
    Linear,
    attention,
    flattened,
    heads_of_mamba,
    in_block,
    linears,
    mamba_own,
    qkv,
    refuse_positions,
    require_whole_context,
    words,
)
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import Block
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp

SPELLINGS = {"layer_types": ("layer_types", "layers_block_type")}
FIXED = {"hidden_act": "silu", "normalization_function": "rmsnorm"}
BLOCKS = {
    **dict.fromkeys(("linear_attention", "mamba"), "mamba"),
    **dict.fromkeys(("full_attention", "attention"), "attention"),
}


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    config = respelled(config, SPELLINGS)
    _require_dense(config)
    types = _types(config)
    require(config, FIXED)
    if config.get("position_embedding_type") not in (None, "nope"):
        refuse_positions(config["position_embedding_type"])
    require_whole_context(config)
    d_model = size(config, "hidden_size", 4096)
    eps = norm_eps(config, "rms_norm_eps", 1e-6)
    heads, headdim = heads_of_mamba(config, size(config, "mamba_expand", 2) * d_model)
    bias = flag(config, "mamba_proj_bias", False)
    kinds: dict[str, Block] = {
        "mamba": Mamba2(
            d_inner=heads * headdim,
            d_state=size(config, "mamba_d_state", 256),
            d_conv=size(config, "mamba_d_conv", 4),
            headdim=headdim,
            ngroups=size(config, "mamba_n_groups", 1),
            chunk_size=size(config, "mamba_chunk_size", 256),
            dt_limit=dt_limit(config.get("time_step_limit"), "time_step_limit"),
            norm_eps=eps,
            in_bias=bias,
            out_bias=bias,
        )
    }
    if "attention" in types:
        bias = flag(config, "attention_bias", False)
        plain = attention({**config, "hidden_size": d_model}, heads=32)
        kinds["attention"] = replace(plain, in_bias=bias, out_bias=bias)
    mlp = Mlp(size(config, "shared_intermediate_size", 1024), "swiglu")
    return Description(
        d_model=d_model,
        vocab_size=size(config, "vocab_size", 32000),
        blocks=tuple(block for each in types for block in (kinds[each], mlp)),
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


def _require_dense(config: Mapping[str, Any]) -> None:
    experts = config.get("num_local_experts")
    if experts == 0:
        return
    said = "" if experts is not None else " (num_local_experts is left out, and so 8)"
    raise CheckpointError(f"config.json describes a mixture of experts{said}; {MIXTURE}")


def _types(config: Mapping[str, Any]) -> list[str]:
    """Of each layer; all are Mamba-2 where config.json does not say."""
    found = words(config, "layer_types", BLOCKS)
    count = layers(config, "num_hidden_layers", 32 if found is None else len(found))
    types = ["mamba"] * count if found is None else found
    if len(types) != count:
        raise CheckpointError(
            f"config.json sets num_hidden_layers = {count}, but layer_types has {len(types)}."
        )
    if "mamba" not in types:
        raise CheckpointError(
            "this model has no Mamba-2 block; its H variant has, and is supported."
        )
    return types


def sources(config: Mapping[str, Any], model: Description) -> Sources:
    """What each tensor of ours is made of."""
    conv_bias = flag(config, "mamba_conv_bias", True)
    added = number(config, "residual_multiplier", 1.0)
    scores = number(config, "attention_multiplier", 1.0)
    logits = number(config, "logits_scaling", 1.0)
    if logits == 0:
        raise CheckpointError("config.json sets logits_scaling = 0; expected another number.")
    found = [
        {
            EMBEDDING: whole(
                "model.embed_tokens.weight", number(config, "embedding_multiplier", 1.0)
            ),
            NORM_F: whole("model.norm.weight", 1 / logits),
            HEAD: whole(HEAD),
        }
    ]
    for i, block in enumerate(model.blocks):
        stored = f"model.layers.{i // 2}"
        own: Sources = {}
        rows = (sum(block.parts.values()),)
        if isinstance(block, Mamba2):
            own = mamba_own(f"{stored}.mamba", block, conv_bias)
            inputs = [Linear(f"{stored}.mamba.in_proj", rows, bias=block.in_bias)]
            output = "mamba.out_proj"
        elif isinstance(block, Attention):
            inputs = qkv(
                f"{stored}.self_attn",
                block,
                block.in_bias,
                q=scores * math.sqrt(block.head_dim),
            )
            output = "self_attn.o_proj"
        else:
            inputs = [Linear(f"{stored}.shared_mlp.input_linear", rows)]
            output = "shared_mlp.output_linear"
        last = Linear(f"{stored}.{output}", (block.width,), (added,), bias=block.out_bias)
        norm = "post_attention_layernorm" if i % 2 else "input_layernorm"
        found.append(in_block(i, f"{stored}.{norm}.weight", {**own, **linears(inputs, [last])}))
    return flattened(found)


def canonical(stored: str) -> str:
    """The name of a stored tensor without what training did to it."""
    return unwrapped(stored, "model", ("embed_tokens", "layers", "norm"))


GRANITE_HYBRID = Layout(
    "Granite 4.0 H",
    lambda config: config.get("model_type") == "granitemoehybrid",
    describe,
    sources,
    canonical,
    prefixes=("model",),
)
