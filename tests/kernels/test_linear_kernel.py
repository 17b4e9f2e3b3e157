"""The CUDA kernels of INT8 linear layers against their references: exact."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    integer_scales,
    ones_of_tokens,
    random_int8,
    scale_and_bias,
    scale_of_tokens,
    w4_weight,
)
from kernel_compare import (
    assert_close,
    compare,
    kernel_of,
)
from kernel_fixtures import (
    CUDA,
    DEVICE,
    GPU,
    skip_unless_affordable,
)

from ssdi8_edge.ops.linear import unpack_w4

pytestmark = CUDA

# Of a weight whose every value is looked at.
EXPANDED = 4096 if GPU else 128
LINEAR_ROWS = [
    # batch, length, n_in, n_out
    (1, 5, 768, 3352),
    (1, 1, 768, 3352),  # tokens
    (1, 8, 768, 3352),
    (1, 9, 768, 3352),
    (1, 64, 768, 3352),
    (1, 255, 768, 3352),
    (1, 256, 768, 3352),
    (1, 257, 768, 3352),
    (1, 515, 768, 3352),
    (2, 5, 768, 3352),
    (1, 5, 32, 3352),  # inputs; 32 and 96 end inside a step of 64
    (1, 130, 32, 3352),
    (1, 5, 96, 3352),
    (1, 130, 96, 3352),
    (1, 130, 1536, 3352),
    (1, 5, 768, 1),  # outputs
    (1, 130, 768, 1),
    (1, 5, 768, 17),
    (1, 130, 768, 17),
    (1, 130, 768, 50),
    (1, 1, 2560, 10576),  # 2.7b: in_proj, out_proj
    (1, 515, 2560, 10576),
    (1, 1, 5120, 2560),
    (1, 257, 5120, 2560),
]
VARIANTS = [0, 1, 2, 3, 4]


def linear_work(tokens: int, n_in: int, n_out: int, variant: int) -> int:
    """Multiplications: of eight tokens, or of whole tiles."""
    if variant == 1 or (variant == 0 and tokens <= 8):
        return 8 * n_in * n_out
    return -(-tokens // 128) * 128 * n_in * -(-n_out // 128) * 128


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear(
    generator: torch.Generator, batch: int, length: int, n_in: int, n_out: int, variant: int
) -> None:
    if variant == 1 and batch * length > 8:
        return
    skip_unless_affordable(linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    weight = random_int8(generator, n_out, n_in)
    of_tokens = scale_of_tokens(generator, x)
    compare("Ssdi8Linear", x, of_tokens, weight, *scale_and_bias(generator, n_out), variant=variant)


@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize(
    ("x_value", "weight_value"), [(-128, -128), (-128, 127), (127, 127), (0, 1)]
)
def test_linear_extremes(
    generator: torch.Generator, length: int, x_value: int, weight_value: int
) -> None:
    x = torch.full((1, length, 5120), x_value, dtype=torch.int8, device=DEVICE)
    weight = torch.full((48, 5120), weight_value, dtype=torch.int8, device=DEVICE)
    of_tokens = scale_of_tokens(generator, x)
    scale, bias = scale_and_bias(generator, 48)
    compare("Ssdi8Linear", x, of_tokens, weight, scale, bias)
    compare("Ssdi8Linear", x, of_tokens, weight, scale * 1e4, bias)  # overflows FP16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear_w4(
    generator: torch.Generator,
    batch: int,
    length: int,
    n_in: int,
    n_out: int,
    group_size: int,
    variant: int,
) -> None:
    if (variant == 1 and batch * length > 8) or n_in % group_size:
        return
    if group_size != 128 and n_in >= 1536:
        return  # the small shapes cover the other groups
    # To expand a weight takes the emulation as long as to multiply it.
    skip_unless_affordable(2 * linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    packed, group_scale = w4_weight(generator, n_out, n_in, group_size, 18.1)
    compare(
        "Ssdi8LinearW4",
        x,
        scale_of_tokens(generator, x),
        packed,
        group_scale,
        *scale_and_bias(generator, n_out),
        group_size=group_size,
        variant=variant,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear_w4_with_integer_scales(
    generator: torch.Generator,
    batch: int,
    length: int,
    n_in: int,
    n_out: int,
    group_size: int,
    variant: int,
) -> None:
    if (variant == 1 and batch * length > 8) or n_in % group_size:
        return
    skip_unless_affordable(linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    if length == 1:
        x.fill_(-128)  # the largest sums
    packed = random_int8(generator, n_out, n_in // 2)
    scales = integer_scales(generator, n_out, n_in, group_size)
    scales[0], scales[-1] = 16, -15
    inputs = (x, scale_of_tokens(generator, x), packed, scales, *scale_and_bias(generator, n_out))
    compare("Ssdi8LinearW4", *inputs, group_size=group_size, variant=variant)


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear_w4_expands_every_value_with_integer_scales(
    generator: torch.Generator, group: int, length: int
) -> None:
    packed = random_int8(generator, EXPANDED, 64)
    scales = integer_scales(generator, EXPANDED, 128, group)
    eye = torch.eye(128, dtype=torch.int8, device=DEVICE)[None]
    one, zero = torch.ones(EXPANDED, device=DEVICE), torch.zeros(EXPANDED, device=DEVICE)
    kernel = kernel_of("Ssdi8LinearW4")
    rows = [
        kernel(part, ones_of_tokens(part), packed, scales, one, zero, group_size=group)[0]
        for part in eye.split(length, 1)
    ]
    assert_close(torch.cat(rows).t().to(torch.int8), unpack_w4(packed, scales, group))


@pytest.mark.parametrize("sigma", [1e-6, 0.1, 15.0, 16.0, 18.2, 40.0, 6e4])
@pytest.mark.parametrize("length", [1, 64])
def test_linear_w4_expands_every_value(
    generator: torch.Generator, length: int, sigma: float
) -> None:
    """With the identity as x, the output is the expanded weight itself."""
    n_in = 64
    packed, group_scale = w4_weight(generator, EXPANDED, n_in, 32, sigma)
    eye = torch.eye(n_in, dtype=torch.int8, device=DEVICE)[None]
    one, zero = torch.ones(EXPANDED, device=DEVICE), torch.zeros(EXPANDED, device=DEVICE)
    kernel = kernel_of("Ssdi8LinearW4")
    rows = [
        kernel(part, ones_of_tokens(part), packed, group_scale, one, zero, group_size=32)[0]
        for part in eye.split(length, 1)
    ]
    assert_close(torch.cat(rows).t().to(torch.int8), unpack_w4(packed, group_scale, 32))
