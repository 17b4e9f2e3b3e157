"""The layout of Nemotron-H (transformers' NemotronHForCausalLM): Nemotron Nano v2, Nemotron 3 Nano.

A block is Mamba-2, attention without positions or an MLP, in the order of a list or of a pattern.
Values that config.json leaves out are the defaults of `NemotronHConfig`. Not read, since they
change nothing that a dense model computes: num_hidden_layers, expand, rope_theta, the keys of
experts, and time_step_min, which only initialises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.config import dt_limit, flag, norm_eps, require, respelled, size
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
    in_block,
    linears,
    mamba_own,
    qkv,
    require_whole_context,
    words,
)
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import Block
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp

# Where two stand, transformers takes the first.
SPELLINGS = {
    "layers_block_type": ("layers_block_type", "layer_types", "hybrid_override_pattern"),
    "n_groups": ("mamba_n_groups", "n_groups"),
    "conv_kernel": ("mamba_d_conv", "conv_kernel"),
    "chunk_size": ("mamba_chunk_size", "chunk_size"),
    "use_conv_bias": ("mamba_conv_bias", "use_conv_bias"),
    "time_step_limit": ("mamba_dt_limit", "time_step_limit"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "layer_norm_epsilon": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
}
FIXED = {"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "attention_bias": False}
BLOCKS = {
    **dict.fromkeys(("linear_attention", "mamba", "M"), "mamba"),
    **dict.fromkeys(("full_attention", "attention", "*"), "attention"),
    **dict.fromkeys(("mlp", "-"), "mlp"),
}
EXPERTS = ("moe", "E")


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    config = respelled(config, SPELLINGS)
    types = _types(config)
    require(config, FIXED)
    require_whole_context(config)
    eps = norm_eps(config, "layer_norm_epsilon")
    kinds: dict[str, Block] = {}
    if "mamba" not in types:
        raise CheckpointError("config.json describes a model without a Mamba-2 block.")
    headdim = size(config, "mamba_head_dim", 64)
    bias, mlp_bias = flag(config, "use_bias", False), flag(config, "mlp_bias", False)
    kinds["mamba"] = Mamba2(
        d_inner=size(config, "mamba_num_heads", 128) * headdim,
        d_state=size(config, "ssm_state_size", 128),
        d_conv=size(config, "conv_kernel", 4),
        headdim=headdim,
        ngroups=size(config, "n_groups", 8),
        chunk_size=size(config, "chunk_size", 128),
        dt_limit=dt_limit(config.get("time_step_limit"), "time_step_limit"),
        norm_eps=eps,
        in_bias=bias,
        out_bias=bias,
    )
    if "attention" in types:
        kinds["attention"] = attention(config, heads=32, kv=8, head_dim=128)
    if "mlp" in types:
        hidden = size(config, "intermediate_size", 21504)
        kinds["mlp"] = Mlp(hidden, "relu2", in_bias=mlp_bias, out_bias=mlp_bias)
    return Description(
        d_model=size(config, "hidden_size", 4096),
        vocab_size=size(config, "vocab_size", 131072),
        blocks=tuple(kinds[each] for each in types),
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


def _types(config: Mapping[str, Any]) -> list[str]:
    key = "layers_block_type"
    given = config.get(key)
    if isinstance(given, str | list) and any(word in given for word in EXPERTS):
        raise CheckpointError(f"config.json describes a mixture of experts; {MIXTURE}")
    found = words(config, key, BLOCKS)
    if found is None:
        raise CheckpointError("config.json lacks layers_block_type and hybrid_override_pattern.")
    return found


def sources(config: Mapping[str, Any], model: Description) -> Sources:
    """What each tensor of ours is made of."""
    conv_bias = flag(respelled(config, SPELLINGS), "use_conv_bias", True)
    blocks = [
        in_block(i, f"backbone.layers.{i}.norm.weight", _block(i, block, conv_bias))
        for i, block in enumerate(model.blocks)
    ]
    ends = {
        EMBEDDING: whole("backbone.embeddings.weight"),
        NORM_F: whole("backbone.norm_f.weight"),
        HEAD: whole(HEAD),
    }
    return flattened([ends, *blocks])


def _block(index: int, block: Block, conv_bias: bool) -> Sources:
    stored = f"backbone.layers.{index}.mixer"
    own: Sources = {}
    rows = (sum(block.parts.values()),)
    if isinstance(block, Attention):
        inputs, output = qkv(stored, block, block.in_bias), "o_proj"
    elif isinstance(block, Mamba2):
        own = mamba_own(stored, block, conv_bias)
        inputs, output = [Linear(f"{stored}.in_proj", rows, bias=block.in_bias)], "out_proj"
    else:
        inputs, output = [Linear(f"{stored}.up_proj", rows, bias=block.in_bias)], "down_proj"
    last = Linear(f"{stored}.{output}", (block.width,), bias=block.out_bias)
    return {**own, **linears(inputs, [last])}


def canonical(stored: str) -> str:
    """NVIDIA writes `backbone.`, transformers of today `model.`."""
    return unwrapped(stored, "backbone", ("embeddings", "layers", "norm_f"))


NEMOTRON_H = Layout(
    "Nemotron-H",
    lambda config: config.get("model_type") == "nemotron_h",
    describe,
    sources,
    canonical,
    prefixes=("backbone", "model"),
    left_out=(("mtp.", "the heads that predict further tokens are left out."),),
)
