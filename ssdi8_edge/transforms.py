"""Exact rewrites of FP weights: fold norms into linears, rotate the residual stream.

Each keeps the FP output of the model (tested); they only change which tensors the quantizers see.
Source: SSDi8 and Quamba2, docs/method.md §4.2, §4.3 and §10.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.hadamard import transform

# Layer-local tensor names, as in the state-spaces checkpoint.
NORM = "norm.weight"
IN_PROJ = "mixer.in_proj.weight"
GATE_NORM = "mixer.norm.weight"
OUT_PROJ = "mixer.out_proj.weight"


def rotate_embedding(weight: Tensor) -> Tensor:
    """W_emb · H_D: the residual stream lives in the rotated basis from here on."""
    return transform(weight).float()


def rotate_head(weight: Tensor, norm_f: Tensor) -> Tensor:
    """(W · diag γ_f) · H_D: reads the rotated residual; γ_f becomes 1."""
    return transform(weight.double() * norm_f.double()).float()


def scale_output(layer: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same block, whose output is in units of a residual stream times `scale`."""
    return {**layer, OUT_PROJ: layer[OUT_PROJ] * scale}


def rotate_layer(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """One block in the rotated residual basis, its input still unrotated at out_proj.

    γ_pre goes into in_proj (a diagonal does not commute with a rotation), in_proj gets the input
    rotation H_D, out_proj the output rotation H_D.
    """
    rotated = dict(layer)
    rotated[IN_PROJ] = transform(layer[IN_PROJ].double() * layer[NORM].double()).float()
    rotated[NORM] = layer[NORM].new_ones(layer[NORM].shape)
    rotated[OUT_PROJ] = transform(layer[OUT_PROJ].double().t()).t().float().contiguous()
    return rotated


def permute_layer(layer: dict[str, Tensor], heads: Tensor, channels: Tensor) -> dict[str, Tensor]:
    """The same block with its heads, and the channels of each, in another order.

    Args:
        heads: (H) the old index of each new head; heads must stay in their SSD group.
        channels: (H, P) the old index inside the head of each new channel.
    """
    headdim = channels.shape[1]
    inner = (heads[:, None] * headdim + channels).flatten()
    d_inner, conv_dim = len(inner), len(layer["mixer.conv1d.bias"])
    # z, x, then B and C as they are, then dt.
    middle = torch.arange(2 * d_inner, d_inner + conv_dim)
    rows = torch.cat([inner, d_inner + inner, middle, d_inner + conv_dim + heads])
    conv = torch.cat([inner, torch.arange(d_inner, conv_dim)])
    order = {
        IN_PROJ: rows,
        "mixer.conv1d.weight": conv,
        "mixer.conv1d.bias": conv,
        **dict.fromkeys(("mixer.A_log", "mixer.D", "mixer.dt_bias"), heads),
        GATE_NORM: inner,
    }
    permuted = {k: v[order[k].to(v.device)] if k in order else v for k, v in layer.items()}
    permuted[OUT_PROJ] = layer[OUT_PROJ][:, inner.to(layer[OUT_PROJ].device)]
    return permuted


def rotate_out_proj_input(weight: Tensor) -> Tensor:
    """W_out · H_E: the input side, met at run time by the transform inside the gated norm."""
    return transform(weight).float()
