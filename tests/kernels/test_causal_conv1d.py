"""The convolution: reference against loops, body against reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_bodies import compare_body
from slow_ops import (
    ROUNDINGS,
    assert_same,
    f32,
    saturated,
    slow_silu,
)

from ssdi8_edge.numerics.formats import Rotation
from ssdi8_edge.numerics.int8 import Rounding
from ssdi8_edge.ops import OPS


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("length", "batch", "ngroups", "magnitude"),
    [
        (5, 1, 1, 1.0),
        (1, 1, 1, 1.0),
        (2, 2, 2, 1.0),
        (5, 2, 8, 1.0),
        (5, 1, 1, 0.0),
        (5, 1, 2, 3e3),
    ],
)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_conv_against_loops(
    length: int, batch: int, ngroups: int, magnitude: float, rounding: Rounding, rotation: Rotation
) -> None:
    """Taps in FP32 from the oldest, bias first; SiLU in FP64; x FP16, B and C INT8, new state."""
    e, n, taps = 16, 4, 4
    gn = ngroups * n
    e2 = e + 2 * gn
    g = torch.Generator().manual_seed(length)
    zxbcdt = (torch.randn(batch, length, 2 * e + 2 * gn + 3, generator=g) * magnitude).half()
    conv_state = (torch.randn(batch, taps - 1, e2, generator=g) * magnitude).half()
    weight, bias = torch.randn(e2, taps, generator=g), torch.randn(e2, generator=g)
    b_scale, c_scale = (torch.rand(ngroups, generator=g) * 0.03 + 0.01 for _ in range(2))
    got_x, got_b, got_c, got_state = OPS["Ssdi8CausalConv1d"](
        *(zxbcdt, conv_state, weight, bias, b_scale, c_scale),
        d_inner=e,
        conv_dim=e2,
        d_conv=taps,
        ngroups=ngroups,
        rotation=rotation,
        rounding=rounding,
    )
    rows = np.concatenate([conv_state.numpy(), zxbcdt[..., e : e + e2].numpy()], 1).astype(f32)
    activated = np.zeros((batch, length, e2), f32)
    for b, i, channel in np.ndindex(batch, length, e2):
        total = f32(bias[channel])
        for w in range(taps):
            total = total + rows[b, i + w, channel] * weight[channel, w].numpy()
        activated[b, i, channel] = slow_silu(float(total))
    assert_same(got_x, activated[..., :e].astype(np.float16))
    for got, start, scale in ((got_b, e, b_scale), (got_c, e + gn, c_scale)):
        want = np.zeros((batch, length, gn), np.int64)
        for j in range(gn):
            value = activated[..., start + j]
            if rotation == "hadamard":  # of order 4, and the first four signs
                group = activated[..., start + j // n * n :][..., :n].astype(np.float64)
                row = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]][j % n]
                value = ((group * [1, 1, 1, -1] * row).sum(-1) / 2).astype(f32)
            inverse = f32(1) / scale[j // n].numpy()
            want[..., j] = saturated(value * inverse, rounding)
        assert got.dtype is torch.int8
        assert_same(got, want)
    assert_same(got_state, rows[:, length:].astype(np.float16))


def test_conv_state_of_pieces() -> None:
    """Pieces of 1, 2 and 7 tokens with a carried state equal one call, bit for bit."""
    g = torch.Generator().manual_seed(0)
    sizes = {"d_inner": 8, "conv_dim": 16, "d_conv": 4, "ngroups": 1, "rounding": "half_even"}
    sizes["rotation"] = "hadamard"
    zxbcdt = torch.randn(2, 10, 26, generator=g).half()
    fixed = (torch.randn(16, 4, generator=g), torch.randn(16, generator=g))
    scales = (torch.tensor([0.02]), torch.tensor([0.03]))
    conv = OPS["Ssdi8CausalConv1d"]
    state = torch.randn(2, 3, 16, generator=g).half()
    whole = conv(zxbcdt, state, *fixed, *scales, **sizes)
    pieces = []
    for part in zxbcdt.split([1, 2, 7], 1):
        *outputs, state = conv(part, state, *fixed, *scales, **sizes)
        pieces.append(outputs)
    for got, want in zip(zip(*pieces, strict=True), whole[:3], strict=True):
        assert torch.equal(torch.cat(list(got), 1), want)
    assert torch.equal(state, whole[3])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize(
    ("length", "batch", "magnitude", "d_conv"),
    [
        (5, 1, 1.0, 4),
        (1, 1, 1.0, 4),
        (2, 1, 1.0, 4),
        (35, 1, 1.0, 4),
        (5, 2, 1.0, 4),
        (5, 1, 0.0, 4),
        (5, 1, 6e4, 4),
        (5, 1, 1.0, 2),
    ],
)
def test_conv_bodies(
    length: int,
    batch: int,
    magnitude: float,
    d_conv: int,
    ngroups: int,
    rotation: Rotation,
    rounding: Rounding,
) -> None:
    """x, B, C and the state exactly, with few tokens, no tokens to spare and saturating ones."""
    e, n = 32, 8
    gn = ngroups * n
    e2 = e + 2 * gn
    g = torch.Generator().manual_seed(7)
    zxbcdt = (
        torch.randn(batch, length, 2 * e + 2 * gn + 3, generator=g).clamp(-1, 1) * magnitude
    ).half()
    state = torch.randn(batch, d_conv - 1, e2, generator=g).half()
    # Sums inside FP16's range: x leaves the op in FP16.
    weight = (torch.rand(e2, d_conv, generator=g) - 0.5) / d_conv
    bias = torch.randn(e2, generator=g)
    scales = [torch.rand(ngroups, generator=g) * 0.01 + 0.01 for _ in range(2)]
    sizes = {"d_inner": e, "conv_dim": e2, "d_conv": d_conv}
    compare_body(
        "Ssdi8CausalConv1d",
        [zxbcdt, state, weight, bias, *scales],
        {**sizes, "ngroups": ngroups, "rotation": rotation, "rounding": rounding},
    )
    compare_body("CausalConv1d", [zxbcdt, state, weight, bias], sizes)
