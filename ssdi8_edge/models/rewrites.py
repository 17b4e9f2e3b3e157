"""Exact rewrites of FP weights: fold norms into linears, rotate the residual stream.

Each keeps the FP output of the model (tested); they only change which tensors the quantizers see.
Source: SSDi8 and Quamba2, docs/method.md §4.2, §4.3 and §10.3.
"""

from __future__ import annotations

from torch import Tensor

from ssdi8_edge.models.block import IN_PROJ, NORM, OUT_BIAS, OUT_PROJ, Layer
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.hadamard import transform


def rotate_embedding(weight: Tensor) -> Tensor:
    """W_emb · H_D: the residual stream lives in the rotated basis from here on."""
    return transform(weight).float()


def rotate_head(weight: Tensor, norm_f: Tensor) -> Tensor:
    """(W · diag γ_f) · H_D: reads the rotated residual; γ_f becomes 1."""
    return transform(weight.double() * norm_f.double()).float()


def scale_output(layer: Layer, scale: float) -> Layer:
    """The same block, whose output is in units of a residual stream times `scale`."""
    return {**layer, **{k: layer[k] * scale for k in (OUT_PROJ, OUT_BIAS) if k in layer}}


def rotate_layer(layer: Layer) -> Layer:
    """One block in the rotated residual basis, its input still unrotated at out_proj.

    γ_pre goes into in_proj (a diagonal does not commute with a rotation), in_proj gets the input
    rotation H_D, out_proj and its bias the output rotation H_D.
    """
    rotated = dict(layer)
    rotated[IN_PROJ] = transform(layer[IN_PROJ].double() * layer[NORM].double()).float()
    rotated[NORM] = layer[NORM].new_ones(layer[NORM].shape)
    rotated[OUT_PROJ] = transform(layer[OUT_PROJ].double().t()).t().float().contiguous()
    if OUT_BIAS in layer:
        rotated[OUT_BIAS] = transform(layer[OUT_BIAS]).float()
    return rotated


def rotate_out_proj_input(weight: Tensor, rotation: InputRotation = "full") -> Tensor:
    """W_out · R: the input side, met at run time by the rotation in the last op of the block."""
    return hadamard.apply(weight, rotation).float()
