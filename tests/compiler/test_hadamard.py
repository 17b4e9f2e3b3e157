"""The rotations: orthogonal, equal to the plain matrix product, and refused where none exists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation

# 2^k, 12 · 2^k and 20 · 2^k: the widths of the published models, and the smallest of each family.
ORDERS = [1, 2, 4, 12, 20, 24, 40, 48, 64, 256, 768, 1024, 1536, 2048, 2560, 3072, 5120]
# Dense n × n products beyond this are slow, and prove nothing more.
DENSE = [n for n in ORDERS if n <= 1536]


def matrix(n: int) -> Tensor:
    left, right = hadamard.factors(n)
    return torch.kron(left, right)


@pytest.mark.parametrize("n", ORDERS)
def test_factors_are_hadamard_matrices(n: int) -> None:
    """Entries ±1, order n together, and rows orthogonal: H·Hᵀ = n·I, in exact integers."""
    left, right = hadamard.factors(n)
    assert left.shape[0] * right.shape[0] == n
    for h in (left, right):
        assert h.shape[0] == h.shape[1]
        assert torch.equal(h.abs(), torch.ones_like(h))
        assert torch.equal(h @ h.t(), h.shape[0] * torch.eye(h.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("n", ORDERS)
def test_factors_are_balanced(n: int) -> None:
    """Two small products: neither factor may be (nearly) the whole matrix."""
    sizes = [f.shape[0] for f in hadamard.factors(n)]
    assert max(sizes) <= max(20, 4 * n**0.5)


@pytest.mark.parametrize("n", DENSE)
def test_transform_is_the_matrix_product(n: int) -> None:
    """x · H / √n with the dense Kronecker product: catches a transposed or swapped factor.

    Relative 1e-13: FP64 sums of n ≤ 1536 terms in another order.
    """
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    want = x @ matrix(n) / n**0.5
    torch.testing.assert_close(hadamard.transform(x), want, rtol=0, atol=1e-13 * n**0.5)


@pytest.mark.parametrize("n", ORDERS)
def test_transform_is_orthogonal(n: int) -> None:
    """Inner products survive (to FP64 rounding), so norms and linears can be rotated exactly."""
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = hadamard.transform(x)
    torch.testing.assert_close(y @ y.t(), x @ x.t(), rtol=1e-12, atol=1e-11 * n**0.5)


@pytest.mark.parametrize("n", [12, 20, 24, 1536])
def test_not_symmetric_where_paley_is_not(n: int) -> None:
    """H_12 and H_20 differ from their transposes: the test above can see a transposition."""
    h = matrix(n)
    assert not torch.equal(h, h.t())


def test_transform_spreads_an_outlier() -> None:
    """What the rotation is for: one large channel becomes n equal ones."""
    x = torch.zeros(1, 1536)
    x[0, 77] = 1536**0.5
    torch.testing.assert_close(hadamard.transform(x).abs(), torch.ones(1, 1536).double())


@pytest.mark.parametrize("n", [64, 128, 256])
def test_rotate_spreads_what_channels_share(n: int) -> None:
    """Equal channels become coefficients of equal size (4^k), or of two: 0 and √2 (2·4^k)."""
    spread = hadamard.rotate(torch.ones(n)).abs()
    sizes = torch.tensor([1.0] if n in (64, 256) else [0.0, 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(spread.round(decimals=9).unique(), sizes, atol=1e-8, rtol=0)
    g = torch.Generator().manual_seed(n)
    b, c = torch.randn(2, n, generator=g, dtype=torch.float64)
    products = (hadamard.rotate(b) * hadamard.rotate(c)).sum(), (b * c).sum()
    torch.testing.assert_close(*products)


def test_transform_computes_in_fp64() -> None:
    """FP16 input, FP64 arithmetic and result; the sum 60000 · 64 would overflow FP16."""
    y = hadamard.transform(torch.full((1, 64), 60000.0, dtype=torch.float16))
    assert y.dtype is torch.float64
    assert y[0, 0].item() == pytest.approx(60000 * 8, rel=1e-3)


@pytest.mark.parametrize("n", [3, 6, 10, 28, 36, 60, 100, 120 * 3, 4096 + 1])
def test_refuses_other_orders(n: int) -> None:
    """A UsageError that names the size and the way out, not a wrong rotation."""
    with pytest.raises(UsageError, match=rf"size {n}\b") as caught:
        hadamard.factors(n)
    assert "fp16" in caught.value.hint


# Widths of hybrid models: 49 · 64, 9 · 80, 30 · 256, 98 · 160 (also 245 · 64), 18 · 256, 28 · 160.
BLOCKS = {3136: 64, 720: 80, 7680: 256, 12544: 256, 15680: 160, 4608: 256, 4480: 160}


@pytest.mark.parametrize(("n", "order"), BLOCKS.items())
def test_other_widths_are_cut_into_blocks(n: int, order: int) -> None:
    assert hadamard.block_order(n) == order
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    want = [hadamard.transform(block) for block in x.split(order, -1)]
    assert torch.equal(hadamard.transform(x), torch.cat(want, -1))


@pytest.mark.parametrize(("n", "order"), [(2048, 256), (1536, 256), (96, 96), (16, 16), (2, 2)])
def test_widths_of_an_order_may_have_blocks(n: int, order: int) -> None:
    """At most 256 channels each; `transform` takes them whole all the same."""
    assert hadamard.block_order(n) == order
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    blocks = [hadamard.transform(block) for block in x.split(order, -1)]
    assert torch.equal(hadamard.apply(x, "blocks"), torch.cat(blocks, -1))
    signed = [hadamard.rotate(block) for block in x.split(order, -1)]
    assert torch.equal(hadamard.apply(x, "signs"), torch.cat(signed, -1))
    assert torch.equal(hadamard.apply(x, "full"), hadamard.transform(x))
    assert torch.equal(hadamard.apply(x, "none"), x.double())


@pytest.mark.parametrize("rotation", ["full", "blocks", "signs"])
def test_blocks_are_orthogonal(rotation: InputRotation) -> None:
    x = torch.randn(4, 720, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = hadamard.apply(x, rotation)
    torch.testing.assert_close(y @ y.t(), x @ x.t(), rtol=1e-12, atol=1e-10)


def test_signs_spread_what_is_never_negative() -> None:
    """The mean of a block goes to all coefficients; without signs, to one."""
    x = torch.rand(1, 512, generator=torch.Generator().manual_seed(8)) + 1
    plain, signed = (hadamard.apply(x, each).abs().amax() for each in ("blocks", "signs"))
    assert signed < 4 and plain > 20


@pytest.mark.parametrize("n", [3, 6, 10, 28, 4096 + 1])
def test_refuses_widths_without_blocks(n: int) -> None:
    for transform in (hadamard.transform, lambda x: hadamard.apply(x, "signs")):
        with pytest.raises(UsageError, match=rf"size {n}\b"):
            transform(torch.zeros(2, n))
    with pytest.raises(UsageError, match=f"wide = {n} has no Hadamard rotation"):
        hadamard.require_width("wide", n, "use --method fp16.")
    hadamard.require_width("wide", 720, "use --method fp16.")
