"""The layout of Falcon-H1 (transformers' FalconH1ForCausalLM).

A layer is two blocks: Mamba-2 beside attention with rotary positions, then SwiGLU. Values that
config.json leaves out are the defaults of `FalconH1Config`. The multipliers of the model go into
weights when they are read, in FP32:

    embedding_multiplier                        embedding
    ssm_in_multiplier, ssm_multipliers          rows of in_proj: z, x, B, C, dt; a bias takes the
                                                latter alone
    attention_in_multiplier                     weights of q, k and v
    key_multiplier                              k, with its bias
    ssm_out_multiplier, attention_out_multiplier   out_proj and o_proj, with their biases
    mlp_multipliers                             gate_proj and down_proj, with their biases
    lm_head_multiplier                          the weight of the last norm
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ssdi8_edge.checkpoints.config import (
    dt_limit,
    flag,
    layers,
    norm_eps,
    number,
    numbers,
    require,
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
    Linear,
    attention,
    flattened,
    heads_of_mamba,
    in_block,
    linears,
    mamba_own,
    qkv,
    require_whole_context,
)
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.models.kinds.parallel import Parallel

FIXED = {"hidden_act": "silu"}


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    require(config, FIXED)
    require_whole_context(config, rotary=True)
    d_model = size(config, "hidden_size", 4096)
    eps = norm_eps(config, "rms_norm_eps")
    if "mamba_d_ssm" in config and config["mamba_d_ssm"] is None:
        channels = size(config, "mamba_expand", 2) * d_model
    else:
        channels = size(config, "mamba_d_ssm", 1024)
    heads, headdim = heads_of_mamba(config, channels)
    normed = flag(config, "mamba_rms_norm", False)
    norm_first = flag(config, "mamba_norm_before_gate", True)
    mamba = Mamba2(
        d_inner=heads * headdim,
        d_state=size(config, "mamba_d_state", 256),
        d_conv=size(config, "mamba_d_conv", 4),
        headdim=headdim,
        ngroups=size(config, "mamba_n_groups", 1),
        chunk_size=size(config, "mamba_chunk_size", 256),
        dt_limit=dt_limit(config.get("time_step_limit"), "time_step_limit"),
        norm_eps=eps,
        gate_norm="none" if not normed else "norm_first" if norm_first else "grouped",
    )
    plain = attention({**config, "hidden_size": d_model}, heads=32, kv=8)
    attention_bias = flag(config, "attention_bias", False)
    parallel = Parallel(
        mamba,
        replace(plain, rope_theta=_rope_theta(config)),
        in_bias=attention_bias or flag(config, "mamba_proj_bias", False),
        out_bias=attention_bias or flag(config, "projectors_bias", False),
    )
    bias = flag(config, "mlp_bias", False)
    hidden = size(config, "intermediate_size", 14336)
    mlp = Mlp(hidden, "swiglu", in_bias=bias, out_bias=bias)
    return Description(
        d_model=d_model,
        vocab_size=size(config, "vocab_size", 128000),
        blocks=(parallel, mlp) * layers(config, "num_hidden_layers", 32),
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    found = parameters if parameters.get("rope_theta") is not None else config
    return norm_eps(found, "rope_theta", 10000.0)


def sources(config: Mapping[str, Any], model: Description) -> Sources:
    """What each tensor of ours is made of."""

    def factor(name: str) -> float:
        return number(config, f"{name}_multiplier", 1.0)

    conv_bias = flag(config, "mamba_conv_bias", True)
    in_bias, out_bias = (
        flag(config, "mamba_proj_bias", False),
        flag(config, "projectors_bias", False),
    )
    attention_bias = flag(config, "attention_bias", False)
    rows_factors = numbers(config, "ssm_multipliers", 5)
    gate, down = numbers(config, "mlp_multipliers", 2)
    found = [
        {
            EMBEDDING: whole("model.embed_tokens.weight", factor("embedding")),
            NORM_F: whole("model.final_layernorm.weight", factor("lm_head")),
            HEAD: whole(HEAD),
        }
    ]
    for i, block in enumerate(model.blocks):
        stored = f"model.layers.{i // 2}"
        if isinstance(block, Parallel):
            mamba, heads = block.mamba, block.attention
            at = f"{stored}.self_attn"
            inputs = [
                Linear(
                    f"{stored}.mamba.in_proj",
                    tuple(mamba.parts.values()),
                    rows_factors,
                    factor("ssm_in"),
                    in_bias,
                ),
                *qkv(
                    at,
                    heads,
                    attention_bias,
                    k=factor("key"),
                    input_factor=factor("attention_in"),
                ),
            ]
            outputs = [
                Linear(
                    f"{stored}.mamba.out_proj",
                    (mamba.width,),
                    (factor("ssm_out"),),
                    bias=out_bias,
                ),
                Linear(
                    f"{at}.o_proj",
                    (heads.width,),
                    (factor("attention_out"),),
                    bias=attention_bias,
                ),
            ]
            own, norm = mamba_own(f"{stored}.mamba", mamba, conv_bias), "input_layernorm"
        else:
            at, width, bias = f"{stored}.feed_forward", (block.width,), block.in_bias
            inputs = [
                Linear(f"{at}.gate_proj", width, (gate,), bias=bias),
                Linear(f"{at}.up_proj", width, bias=bias),
            ]
            outputs = [Linear(f"{at}.down_proj", width, (down,), bias=bias)]
            own, norm = {}, "pre_ff_layernorm"
        found.append(in_block(i, f"{stored}.{norm}.weight", {**own, **linears(inputs, outputs)}))
    return flattened(found)


def canonical(stored: str) -> str:
    """The name of a stored tensor without what training did to it."""
    return unwrapped(stored, "model", ("embed_tokens", "layers", "final_layernorm"))


FALCON_H1 = Layout(
    "Falcon-H1",
    lambda config: config.get("model_type") == "falcon_h1",
    describe,
    sources,
    canonical,
    prefixes=("model",),
)
