"""The layout of state-spaces/mamba: state-spaces/mamba2-*, NVIDIA's converted 8B, ours.

config.json has d_model, n_layer, ssm_cfg, ...; values that it leaves out are the class defaults of
`MambaConfig` and `Mamba2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssdi8_edge.checkpoints.config import dt_limit, flag, layers, require, size
from ssdi8_edge.checkpoints.layout import CONV_BIAS, EMBEDDING, HEAD, Layout, renamed, unwrapped
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import IN_BIAS, IN_PROJ, OUT_BIAS, OUT_PROJ
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2

STATE_SPACES_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
SSM_CFG_FIXED = {
    "layer": "Mamba2",
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "activation": "silu",
    "d_ssm": None,
}
SSM_CFG_FLAGS = {"bias": False, "conv_bias": True}
SSM_CFG_SIZES = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "chunk_size": 256,
}
# Initialisation and implementation: they do not change what a trained model computes.
SSM_CFG_IRRELEVANT = {
    *("A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor", "dt_limit"),
    *("use_mem_eff_path", "sequence_parallel", "process_group"),
}


def describe(config: Mapping[str, Any]) -> Description:
    """The model of a config.json."""
    require(config, STATE_SPACES_FIXED)
    ssm = config.get("ssm_cfg")
    if not isinstance(ssm, dict) or "layer" not in ssm:
        raise CheckpointError('config.json lacks ssm_cfg.layer = "Mamba2": a Mamba-1 model.')
    require(ssm, SSM_CFG_FIXED, "ssm_cfg.")
    known = {*SSM_CFG_FIXED, *SSM_CFG_FLAGS, *SSM_CFG_SIZES, *SSM_CFG_IRRELEVANT}
    for key in ssm:
        if key not in known:
            raise CheckpointError(f"config.json sets ssm_cfg.{key}, which is not supported.")
    multiple = size(config, "pad_vocab_size_multiple", 8)
    sizes = {key: size(ssm, key, default) for key, default in SSM_CFG_SIZES.items()}
    d_model = size(config, "d_model")
    return mamba2_model(
        d_model=d_model,
        n_layer=layers(config, "n_layer"),
        vocab_size=math.ceil(size(config, "vocab_size") / multiple) * multiple,
        d_inner=sizes.pop("expand") * d_model,
        sizes=sizes,
        dt_limit=dt_limit(ssm.get("dt_limit"), "ssm_cfg.dt_limit"),
        norm_eps=1e-5,
        tie_embeddings=flag(config, "tie_embeddings", True),
        bias=_ssm_flag(config, "bias"),
    )


def _ssm_flag(config: Mapping[str, Any], key: str) -> bool:
    return flag(config["ssm_cfg"], key, SSM_CFG_FLAGS[key])


def mamba2_model(
    *,
    d_model: int,
    n_layer: int,
    vocab_size: int,
    d_inner: int,
    sizes: Mapping[str, int],
    dt_limit: tuple[float, float],
    norm_eps: float,
    tie_embeddings: bool,
    bias: bool,
) -> Description:
    """A model of equal Mamba-2 blocks, of `sizes` d_state, d_conv, headdim, ngroups, chunk_size.

    `bias`: both linear layers of a block have one.

    Raises:
        CheckpointError: heads and groups do not divide d_inner.
    """
    headdim, ngroups = sizes["headdim"], sizes["ngroups"]
    if d_inner % headdim or d_inner // headdim % ngroups:
        raise CheckpointError(
            f"config.json does not fit together: d_inner {d_inner}, headdim {headdim}, "
            f"ngroups {ngroups}."
        )
    block = Mamba2(
        d_inner=d_inner,
        d_state=sizes["d_state"],
        d_conv=sizes["d_conv"],
        headdim=headdim,
        ngroups=ngroups,
        chunk_size=sizes["chunk_size"],
        dt_limit=dt_limit,
        norm_eps=norm_eps,
        in_bias=bias,
        out_bias=bias,
    )
    return Description(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=(block,) * n_layer,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
    )


# Local names of ours that differ from the stored ones.
_MIXER = (IN_PROJ, IN_BIAS, "conv1d.weight", CONV_BIAS, "dt_bias", "A_log", "D", OUT_PROJ, OUT_BIAS)
_STORED = {
    **{name: f"mixer.{name}" for name in _MIXER},
    "gate_norm.weight": "mixer.norm.weight",
}


def stored_name(name: str) -> str:
    """layers.0.D -> backbone.layers.0.mixer.D"""
    if name == HEAD:
        return name
    if not name.startswith("layers."):
        return f"backbone.{name}"
    _, index, local = name.split(".", 2)
    return f"backbone.layers.{index}.{_STORED.get(local, local)}"


# What names begin with where the model was saved without its head, and so without `backbone.`.
BACKBONE_PARTS = ("embedding", "embeddings", "layers", "norm_f")


def canonical_name(stored: str) -> str:
    """The name of a stored tensor without what training, or saving a part, did to it."""
    name = unwrapped(stored, "backbone", BACKBONE_PARTS)
    # transformers writes "embeddings" where state-spaces writes "embedding".
    return stored_name(EMBEDDING) if name == "backbone.embeddings.weight" else name


STATE_SPACES = Layout(
    "state-spaces",
    lambda config: "d_model" in config,
    describe,
    renamed(stored_name, lambda config: _ssm_flag(config, "conv_bias")),
    canonical_name,
)
