"""Both norms: references against loops, bodies against references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from op_bodies import compare_body, token_scaling
from slow_ops import (
    ROUNDINGS,
    assert_same,
    f32,
    quantized_token,
    slow_silu,
)

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import Scaling
from ssdi8_edge.numerics.int8 import Rounding
from ssdi8_edge.ops import OPS


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("magnitude", [1.0, 0.0, 1e4, 1e-7])
def test_rms_norm_against_loops(magnitude: float, rounding: Rounding, scaling: Scaling) -> None:
    """Residual in FP32, mean of squares exact to FP64, one FP32 factor, one FP32 reciprocal."""
    batch, length, width, eps = 2, 3, 40, 1e-5
    g = torch.Generator().manual_seed(1)
    hidden = (torch.randn(batch, length, width, generator=g) * magnitude).half()
    residual = torch.randn(batch, length, width, generator=g) * magnitude
    scale = 0.017
    got_residual, got, got_scale = OPS["Ssdi8RmsNorm"](
        *(hidden, residual, *token_scaling(scaling, scale)),
        eps=eps,
        rounding=rounding,
        scaling=scaling,
    )
    for b, i in np.ndindex(batch, length):
        total = residual[b, i].numpy() + hidden[b, i].numpy().astype(f32)
        mean = math.fsum(float(v) ** 2 for v in total) / width
        rstd = f32(1 / math.sqrt(mean + eps))
        assert_same(got_residual[b, i], total)
        want, want_scale = quantized_token(total * rstd, scaling, scale, rounding)
        assert_same(got[b, i], want)
        assert got_scale[b, i].tolist() == [want_scale]


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("e", "ngroups", "magnitude"),
    [(64, 1, 1.0), (48, 2, 1.0), (64, 8, 1.0), (20, 1, 1e3), (64, 1, 0.0), (72, 3, 1.0)],
)
@pytest.mark.parametrize("op", ["Ssdi8RmsNormGated", "Ssdi8NormThenGate"])
def test_gated_norm_against_loops(
    op: str, e: int, ngroups: int, magnitude: float, rounding: Rounding, scaling: Scaling
) -> None:
    """Gate and norm in their order, RMS per group, weight, rotation as a dense product of blocks
    (72: 3 of 24), quantization."""
    first = op == "Ssdi8NormThenGate"
    batch, length, eps, scale = 2, 3, 1e-5, 0.021
    g = torch.Generator().manual_seed(2)
    y = (torch.randn(batch, length, e, generator=g) * magnitude).half()
    zxbcdt = (torch.randn(batch, length, 2 * e + 7, generator=g) * 2).half()
    weight = torch.rand(e, generator=g) + 0.5
    got, got_scale = OPS[op](
        *(y, zxbcdt, weight, *token_scaling(scaling, scale)),
        eps=eps,
        d_inner=e,
        ngroups=ngroups,
        rounding=rounding,
        scaling=scaling,
    )
    order = e if hadamard.exists(e) else hadamard.block_order(e)
    h = torch.block_diag(*[torch.kron(*hadamard.factors(order))] * (e // order)).numpy()
    size = e // ngroups
    for b, i in np.ndindex(batch, length):
        gate = np.array([slow_silu(float(v)) for v in zxbcdt[b, i, :e]], f32)
        v = y[b, i].numpy().astype(f32) * (f32(1) if first else gate)
        r = np.zeros(e, f32)
        for start in range(0, e, size):
            part = slice(start, start + size)
            mean = math.fsum(float(value) ** 2 for value in v[part]) / size
            r[part] = v[part] * f32(1 / math.sqrt(mean + eps)) * weight[part].numpy()
        r = r * gate if first else r
        spread = [math.fsum(r.astype(np.float64) * h[:, j]) * order**-0.5 for j in range(e)]
        want, want_scale = quantized_token(np.array(spread, f32), scaling, scale, rounding)
        assert_same(got[b, i], want)
        assert got_scale[b, i].tolist() == [want_scale]


# batch, length, width, magnitude, scale, rounding
NORM_ROWS = {
    "base": (1, 5, 64, 1.0, 0.03, "half_even"),
    "L=1": (1, 1, 64, 1.0, 0.03, "half_even"),
    "L=35": (1, 35, 64, 1.0, 0.03, "half_even"),
    "batch=2": (2, 5, 64, 1.0, 0.03, "half_even"),
    "width=48": (1, 5, 48, 1.0, 0.03, "half_even"),
    "width=20": (1, 5, 20, 1.0, 0.03, "half_even"),
    "width=768": (1, 5, 768, 1.0, 0.03, "half_even"),
    "half_away": (1, 35, 64, 1.0, 0.03, "half_away"),
    "zeros": (1, 5, 64, 0.0, 0.03, "half_even"),
    "large": (1, 5, 64, 1e4, 0.03, "half_even"),
    "small": (1, 5, 64, 1e-7, 0.03, "half_even"),
    "saturating": (1, 5, 64, 1.0, 0.001, "half_even"),
    "saturating half_away": (1, 5, 64, 1.0, 0.001, "half_away"),
}
norm_rows = pytest.mark.parametrize(
    ("batch", "length", "width", "magnitude", "scale", "rounding"),
    NORM_ROWS.values(),
    ids=NORM_ROWS.keys(),
)


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@norm_rows
def test_norm_bodies(
    batch: int,
    length: int,
    width: int,
    magnitude: float,
    scale: float,
    rounding: Rounding,
    scaling: Scaling,
) -> None:
    """Both norms, 1, 2 and 4 groups, INT8 exactly; the FP16 ones exactly too (FP64 inside)."""
    g = torch.Generator().manual_seed(5)
    hidden = (torch.randn(batch, length, width, generator=g) * magnitude).half()
    residual = torch.randn(batch, length, width, generator=g) * magnitude
    weight = torch.rand(width, generator=g) + 0.5
    scales = token_scaling(scaling, scale)
    quantization = {"eps": 1e-5, "rounding": rounding, "scaling": scaling}
    compare_body("Ssdi8RmsNorm", [hidden, residual, *scales], quantization)
    compare_body("RmsNorm", [hidden, residual, weight], {"eps": 1e-5})
    zxbcdt = (torch.randn(batch, length, 2 * width + 9, generator=g) * 3).half()
    for ngroups in (1, 2, 4):
        sizes = {"d_inner": width, "ngroups": ngroups}
        inputs = [hidden, zxbcdt, weight]
        compare_body("Ssdi8RmsNormGated", [*inputs, *scales], {**quantization, **sizes})
        compare_body("RmsNormGated", inputs, {"eps": 1e-5, **sizes})
        compare_body("Ssdi8NormThenGate", [*inputs, *scales], {**quantization, **sizes})
        compare_body("NormThenGate", inputs, {"eps": 1e-5, **sizes})
