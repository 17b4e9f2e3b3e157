"""Linear layers: references against loops, bodies against references."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from op_bodies import compare_body, random_int8
from slow_ops import (
    assert_same,
    f32,
)

from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.linear import pack_w4, unpack_w4


@pytest.mark.parametrize("extreme", [False, True])
def test_linear_against_loops(extreme: bool) -> None:
    """Exact integer sum, two FP32 products, one FP32 sum, one FP16 rounding; bias and scales."""
    g = torch.Generator().manual_seed(3)
    x, weight = random_int8(g, 2, 3, 96), random_int8(g, 10, 96)
    if extreme:
        x, weight = torch.full_like(x, -128), torch.full_like(weight, -128)
    of_tokens = torch.rand(2, 3, 1, generator=g) * 0.1
    scale, bias = torch.rand(10, generator=g) * 1e-2, torch.randn(10, generator=g)
    want = np.zeros((2, 3, 10), np.float16)
    for b, i, row in np.ndindex(2, 3, 10):
        exact = sum(
            int(u) * int(v) for u, v in zip(x[b, i].tolist(), weight[row].tolist(), strict=True)
        )
        scaled = f32(exact) * scale[row].numpy() * of_tokens[b, i, 0].numpy()
        want[b, i, row] = scaled + bias[row].numpy()
    assert_same(OPS["Ssdi8Linear"](x, of_tokens, weight, scale, bias), want)


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("group_size", [8, 32])
def test_w4_against_loops(group_size: int, integer: bool) -> None:
    """Four low nibbles first, offset 8, group scale, INT8 saturation; then the INT8 linear."""
    g = torch.Generator().manual_seed(4)
    rows, columns = 6, 64
    packed = random_int8(g, rows, columns // 2)
    packed[0, :4] = torch.tensor([-128, 127, 0, -1], dtype=torch.int8)
    sigma = (torch.rand(rows, columns // group_size, generator=g) * 20).half()
    sigma[1, 0] = 0.5  # products with ties
    if integer:
        sigma = torch.randint(1, 17, sigma.shape, generator=g, dtype=torch.int8)
        sigma[0, 0] = 16
    weight = np.zeros((rows, columns), np.int64)
    for row, j in np.ndindex(rows, columns):
        byte = int(packed[row, j // 8 * 4 + j % 4]) + 128
        nibble = byte // 16 if j % 8 >= 4 else byte % 16
        real = f32(nibble - 8) * f32(float(sigma[row, j // group_size]))
        weight[row, j] = max(-128, min(127, round(Fraction(float(real)))))
    assert int(np.abs(weight).max()) >= 127
    assert_same(unpack_w4(packed, sigma, group_size), weight)
    q4 = unpack_w4(packed, torch.ones_like(sigma), group_size) + 8
    assert torch.equal(pack_w4(q4), packed)
    x = random_int8(g, 2, 3, columns)
    of_tokens = torch.rand(2, 3, 1, generator=g) * 0.1
    scale, bias = torch.rand(rows, generator=g) * 1e-2, torch.randn(rows, generator=g)
    got = OPS["Ssdi8LinearW4"](x, of_tokens, packed, sigma, scale, bias, group_size=group_size)
    product = x.numpy().astype(np.int64) @ weight.T
    want = product.astype(f32) * scale.numpy() * of_tokens.numpy() + bias.numpy()
    assert_same(got, want.astype(np.float16))


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 64, 40), (1, 1, 64, 40), (2, 5, 64, 40), (1, 3, 256, 1)])
def test_linear_bodies(shape: tuple[int, int, int, int], extreme: bool) -> None:
    """W8 and W4 exactly, also where every product is (-128)²; the FP16 linear sums in FP32."""
    batch, length, columns, rows = shape
    g = torch.Generator().manual_seed(6)
    x, weight = random_int8(g, batch, length, columns), random_int8(g, rows, columns)
    packed = random_int8(g, rows, columns // 2)
    if extreme:
        x, weight = torch.full_like(x, -128), torch.full_like(weight, -128)
    of_tokens = torch.rand(batch, length, 1, generator=g) * 0.1
    scale, bias = torch.rand(rows, generator=g) * 1e-2, torch.randn(rows, generator=g)
    compare_body("Ssdi8Linear", [x, of_tokens, weight, scale, bias], {})
    sigma = (torch.rand(rows, columns // 16, generator=g) * 20).half()
    compare_body("Ssdi8LinearW4", [x, of_tokens, packed, sigma, scale, bias], {"group_size": 16})
    # Another order of the FP32 sum moves a few results across an FP16 rounding boundary.
    values = torch.randn(batch, length, columns, generator=g).half()
    matrix = torch.randn(rows, columns, generator=g).half()
    compare_body("Linear", [values, matrix], {}, fp16_fraction=0.02)
    compare_body("LinearBias", [values, matrix, bias], {}, fp16_fraction=0.02)
