"""Exact rewrites of FP weights: fold norms into linears, rotate the residual stream.

Each keeps the FP output of the model (tested); they only change which tensors the quantizers see.
Source: SSDi8 and Quamba2, docs/method.md §4.2, §4.3 and §10.3.
"""

from __future__ import annotations

from torch import Tensor

from ssdi8_edge.models.block import IN_PROJ, NORM, OUT_PROJ, Layer
from ssdi8_edge.numerics.hadamard import transform


def rotate_embedding(weight: Tensor) -> Tensor:
    """W_emb · H_D: the residual stream lives in the rotated basis from here on."""
    return transform(weight).float()


def rotate_head(weight: Tensor, norm_f: Tensor) -> Tensor:
    """(W · diag γ_f) · H_D: reads the rotated residual; γ_f becomes 1."""
    return transform(weight.double() * norm_f.double()).float()


def scale_output(layer: Layer, scale: float) -> Layer:
    """The same block, whose output is in units of a residual stream times `scale`."""
    return {**layer, OUT_PROJ: layer[OUT_PROJ] * scale}


def rotate_layer(layer: Layer) -> Layer:
    """One block in the rotated residual basis, its input still unrotated at out_proj.

    γ_pre goes into in_proj (a diagonal does not commute with a rotation), in_proj gets the input
    rotation H_D, out_proj the output rotation H_D.
    """
    rotated = dict(layer)
    rotated[IN_PROJ] = transform(layer[IN_PROJ].double() * layer[NORM].double()).float()
    rotated[NORM] = layer[NORM].new_ones(layer[NORM].shape)
    rotated[OUT_PROJ] = transform(layer[OUT_PROJ].double().t()).t().float().contiguous()
    return rotated


def rotate_out_proj_input(weight: Tensor) -> Tensor:
    """W_out · H_E: the input side, met at run time by the transform inside the gated norm."""
    return transform(weight).float()
