"""SSD of the methods that keep its tensors in INT8 for storage only: Quamba, Quamba2, HAD.

Their kernels read INT8, multiply by the scale and compute in FP16 (docs/method.md §10.1). That is
done here on tensors that went through INT8, for comparing accuracy; there is no op, no graph and no
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssdi8_edge.numerics.int8 import quantize
from ssdi8_edge.ops import baseline
from ssdi8_edge.recipes.recipe import QuantConfig


def through_int8(v: Tensor, scale: Tensor, recipe: QuantConfig, site: str) -> Tensor:
    """`v` as it comes back from INT8, in its own type; `scale` broadcasts against it."""
    return (quantize(v, scale, recipe.rounding, site).float() * scale).to(v.dtype)


def dequantized_ssd(
    p: Mapping[str, Any],
    recipe: QuantConfig,
    conv: Mapping[str, int],
    heads: Mapping[str, Any],
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """in_proj's output to SSD's.

    Args:
        p: with `in_proj_scale` (2E + 2GN + H), `x_scale` (E), `b_scale` and `c_scale` (G).
        conv, heads: node attributes of the FP16 ops.
        zxbcdt: (B, L, 2E + 2GN + H) FP16.

    Returns:
        y (B, L, E) FP16, zxbcdt through INT8, and the two states.
    """
    zxbcdt = through_int8(zxbcdt, p["in_proj_scale"], recipe, "in_proj")
    x, b, c, conv_state = baseline.CAUSAL_CONV1D.reference(
        *(zxbcdt, conv_state, p["conv1d.weight"], p["conv1d.bias"]), **conv
    )
    x = through_int8(x, p["x_scale"], recipe, "x")
    b, c = (
        through_int8(v, p[scale].repeat_interleave(v.shape[-1] // len(p[scale])), recipe, site)
        for v, scale, site in ((b, "b_scale", "B"), (c, "c_scale", "C"))
    )
    y, ssm_state = baseline.SSD_SCAN.reference(
        *(x, b, c, zxbcdt, ssm_state, p["dt_bias"], p["A"], p["D"]), **heads
    )
    return y, zxbcdt, conv_state, ssm_state
