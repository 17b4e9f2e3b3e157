"""The numeric contract against exact arithmetic: nothing here trusts a float sum."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ssdi8_edge.numerics import int8
from ssdi8_edge.numerics.int8 import Rounding

ROUNDINGS: tuple[Rounding, ...] = ("half_even", "half_away")
LOWEST = {"half_even": -128, "half_away": -127}
FP32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
NEAR_INT8 = st.floats(-140, 140, width=32)
TIES = st.integers(-300, 300).map(lambda n: n / 2)


def exact_rounding(v: float, rounding: Rounding) -> int:
    """Rounded by rational arithmetic; half_away adds its half in FP32, as the contract says."""
    if rounding == "half_even":
        return round(Fraction(v))
    magnitude = math.floor(Fraction(float(np.float32(abs(v)) + np.float32(0.5))))
    return magnitude if v > 0 else -magnitude


def exact_int8(v: float, rounding: Rounding) -> int:
    return max(LOWEST[rounding], min(127, exact_rounding(v, rounding)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(v=NEAR_INT8 | TIES | FP32)
@example(v=0.5)
@example(v=-0.5)
@example(v=-2.5)
@example(v=126.5)
@example(v=-127.5)
@example(v=127.49999)
@example(v=-128.5)
@example(v=-0.0)
@example(v=float(np.finfo(np.float32).max))
@example(v=float(-np.finfo(np.float32).max))
def test_round_to_int8_is_exact(rounding: Rounding, v: float) -> None:
    """Ties of both signs, both ends of the range, values far outside it: equal to the rationals."""
    assert int8.round_to_int8(torch.tensor([v]), rounding).item() == exact_int8(v, rounding)


@pytest.mark.parametrize(
    ("rounding", "table"),
    [
        (
            "half_even",
            {0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, -2.5: -2, 126.5: 126, -127.5: -128},
        ),
        (
            "half_away",
            {0.5: 1, 1.5: 2, 2.5: 3, -0.5: -1, -1.5: -2, -2.5: -3, 126.5: 127, -127.5: -127},
        ),
    ],
)
def test_ties_by_hand(rounding: Rounding, table: dict[float, int]) -> None:
    """The exact reference above could share a mistake with the code; these numbers cannot."""
    got = int8.round_to_int8(torch.tensor(list(table)), rounding)
    assert got.dtype is torch.int8
    assert got.tolist() == list(table.values())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_representable_tie(rounding: Rounding) -> None:
    """All k + 1/2 in [-200, 200] and their FP32 neighbours on both sides."""
    ties = torch.arange(-200, 200, dtype=torch.float32) + 0.5
    below = torch.nextafter(ties, torch.tensor(-math.inf))
    above = torch.nextafter(ties, torch.tensor(math.inf))
    values = torch.cat([ties, below, above])
    want = [exact_int8(v, rounding) for v in values.tolist()]
    assert int8.round_to_int8(values, rounding).tolist() == want


def test_half_away_adds_in_fp32() -> None:
    """|v| + 1/2 is an FP32 sum: the one value below 1/2 that it lifts to 1 is part of the contract.

    The graph and the kernels add in FP32 too; a reference with another idea would differ from both.
    """
    below_half = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert int8.round_to_int8(torch.tensor([below_half, -below_half]), "half_away").tolist() == [
        1,
        -1,
    ]
    assert int8.round_to_int8(torch.tensor([below_half]), "half_even").item() == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_infinities_saturate(rounding: Rounding) -> None:
    """An overflowed product must not wrap around in the cast."""
    got = int8.round_to_int8(torch.tensor([math.inf, -math.inf]), rounding)
    assert got.tolist() == [127, LOWEST[rounding]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rounding_leaves_its_argument_alone(rounding: Rounding, dtype: torch.dtype) -> None:
    """The clamp is in place: it must work on a copy, in every float type."""
    v = torch.tensor([-1000.0, -1.5, 0.0, 3.0, 1000.0], dtype=dtype)
    before = v.clone()
    q = int8.round_to_int8(v, rounding)
    assert torch.equal(v, before)
    assert q.tolist() == [exact_int8(x, rounding) for x in before.tolist()]


@given(value=st.floats(-1e4, 1e4, width=32), scale=st.floats(2.0**-20, 1e3, width=32))
def test_quantize_multiplies_by_the_fp32_reciprocal(value: float, scale: float) -> None:
    """x · FP32(1/s), not x / s: the two round differently, and kernels use the first."""
    inverse = np.float32(1) / np.float32(scale)
    scaled = float(np.float32(value) * inverse)
    got = int8.quantize(torch.tensor([value]), torch.tensor(scale), "half_even")
    assert got.item() == exact_int8(scaled, "half_even")


def test_scaling_of_linear_inputs_that_cannot_be() -> None:
    """A static scale has to be there; the scaling "none" is of SSD alone."""
    x = torch.ones(1, 2, 8)
    for scaling, scale in (("static", None), ("none", torch.ones(1))):
        with pytest.raises(ValueError, match=f"scaling '{scaling}'"):
            int8.quantize_tokens(x, scaling, scale, "half_even", "u")


def test_reciprocal_and_division_differ() -> None:
    """A pair where division would round up and the reciprocal does not, so the test above bites."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1 << 16, generator=generator) * 0.1 + 0.01
    tie = (torch.randint(-120, 120, scale.shape, generator=generator) + 0.5) * scale
    by_division = int8.round_to_int8(tie / scale, "half_even")
    got = int8.quantize(tie, scale, "half_even")
    assert not torch.equal(got, by_division)
    assert torch.equal(got, int8.round_to_int8(tie * (1 / scale), "half_even"))


def test_quantize_of_fp16_works_in_fp32() -> None:
    """In FP16 the product 60000 / 1000 would overflow before the scale brings it back."""
    x = torch.tensor([60000.0, -60000.0, 100.0], dtype=torch.float16)
    assert int8.quantize(x, torch.tensor(1000.0), "half_even").tolist() == [60, -60, 0]


def test_quantize_broadcasts_scales() -> None:
    """A scale per row must reach its row, not its column."""
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    got = int8.quantize(x, torch.tensor([[1.0], [10.0]]), "half_even")
    assert got.tolist() == [[1, 2], [1, 2]]


def test_scale_from_absmax() -> None:
    """absmax maps to 127; zero, and anything below the floor, gives a scale that divides."""
    scale = int8.scale_from_absmax(torch.tensor([127.0, 0.0, 1e-30, 2.54]))
    assert scale.dtype is torch.float32
    assert torch.equal(scale, torch.tensor([1.0, 1e-8, 1e-8, float(np.float32(2.54) / 127)]))
    assert int8.scale_from_absmax(torch.tensor(0.0), 1e-6).item() == pytest.approx(1e-6)
    assert int8.quantize(torch.zeros(3), scale[1], "half_even").tolist() == [0, 0, 0]


@given(absmax=st.floats(2.0**-19, 1e4, width=32))
def test_absmax_is_not_clipped(absmax: float) -> None:
    """absmax itself lands on 127, its negative on -127, under both roundings."""
    scale = int8.scale_from_absmax(torch.tensor(absmax))
    for rounding in ROUNDINGS:
        q = int8.quantize(torch.tensor([absmax, -absmax]), scale, rounding)
        assert q.tolist() == [127, -127]


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


@pytest.mark.parametrize("k", [1, 3, 64, 1023, 1024, 1025, 2048, 8192])
@pytest.mark.parametrize(
    "extremes", [(-128, -128), (-128, 127), (127, 127)], ids=lambda pair: f"{pair[0]}x{pair[1]}"
)
def test_int8_matmul_of_extremes(k: int, extremes: tuple[int, int]) -> None:
    """Sums up to 2^27: beyond FP32's integers, and what a saturating pair product gets wrong."""
    left, right = extremes
    a = torch.full((2, 3, k), left, dtype=torch.int8)
    b = torch.full((5, k), right, dtype=torch.int8)
    product = int8.int8_matmul(a, b)
    assert product.dtype is torch.int32
    assert torch.equal(product, torch.full((2, 3, 5), left * right * k, dtype=torch.int32))


@pytest.mark.parametrize("k", [1024, 2048, 4096, 8192])
def test_int8_matmul_of_odd_sums(k: int) -> None:
    """Sums that are odd and large: above 2^24 FP32 cannot hold them, so blocks must stay below."""
    a = torch.full((3, k), 127, dtype=torch.int8)
    b = torch.full((4, k), 127, dtype=torch.int8)
    b[:, 0] = 126
    want = 127 * 127 * k - 127
    assert want % 2 == 1
    assert torch.equal(int8.int8_matmul(a, b), torch.full((3, 4), want, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 768), (17, 33, 1500), (40, 16, 8192)])
def test_int8_matmul_of_random_values(shape: tuple[int, int, int]) -> None:
    """Odd shapes; every entry against 64-bit integers."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(k)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    assert torch.equal(int8.int8_matmul(a, b).long(), exact_product(a, b))


def test_int8_matmul_of_strided_operands() -> None:
    """A slice of a larger tensor, as one token of a sequence is."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (2, 6, 64), generator=generator, dtype=torch.int8)[:, ::2]
    b = torch.randint(-128, 128, (10, 64), generator=generator, dtype=torch.int8)[1::3]
    want = exact_product(a.reshape(-1, 64), b).reshape(2, 3, 3)
    assert torch.equal(int8.int8_matmul(a, b).long(), want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_saturation_fractions(rounding: Rounding) -> None:
    """Both ends count, 126 does not, calls of one site add up, unnamed calls are not counted."""
    with int8.count_saturation() as counter:
        int8.round_to_int8(torch.tensor([127.0, 126.0, -127.0, 1000.0]), rounding, "x")
        int8.round_to_int8(torch.tensor([0.0, -1000.0, 0.0, 0.0]), rounding, "x")
        int8.round_to_int8(torch.tensor([1000.0]), rounding)
        int8.round_to_int8(torch.zeros(0), rounding, "empty")
        int8.quantize(torch.tensor([1.0, 200.0]), torch.tensor(1.0), rounding, "y")
    assert counter.fractions() == {"x": 4 / 8, "y": 1 / 2}


def test_saturation_scopes_and_nesting() -> None:
    """A scope prefixes the sites; an inner block does not leak into the outer; after it, none."""
    full = torch.tensor([500.0])
    with int8.count_saturation() as outer:
        outer.scope = "layers.0."
        int8.round_to_int8(full, "half_even", "u")
        with int8.count_saturation() as inner:
            int8.round_to_int8(full, "half_even", "u")
        outer.scope = "layers.1."
        int8.round_to_int8(torch.zeros(2), "half_even", "u")
    int8.round_to_int8(full, "half_even", "u")
    assert inner.fractions() == {"u": 1.0}
    assert outer.fractions() == {"layers.0.u": 1.0, "layers.1.u": 0.0}


def test_saturation_counting_ends_with_an_error() -> None:
    """An exception inside the block must not leave the counter switched on."""
    with pytest.raises(RuntimeError, match="stop"), int8.count_saturation() as counter:
        raise RuntimeError("stop")
    int8.round_to_int8(torch.tensor([500.0]), "half_even", "u")
    assert counter.fractions() == {}
