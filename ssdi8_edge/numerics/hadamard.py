"""Orthonormal Hadamard transforms of the widths that models have.

Orders 2^k, 12·2^k and 20·2^k, the base matrices by Paley's first construction, so that nothing is
pasted. The operator acts on the last axis as a row vector, x ↦ x · H_n / √n; the same operator is
used offline on weights and online on activations (H_12 and H_20 are not symmetric). A width of
another order is cut into equal blocks, each rotated by itself. What is rotated and why:
docs/method.md §4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.numerics.formats import InputRotation

_BASE_ORDERS = (1, 12, 20)
# Channels of a block: more would spread little further; with fewer, a rotation is hardly one.
MOST_BLOCK, LEAST_BLOCK = 256, 8


def _paley(order: int) -> Tensor:
    """Hadamard matrix of order q + 1 for a prime q ≡ 3 (mod 4): 12 (q = 11), 20 (q = 19)."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    h = torch.ones(order, order, dtype=torch.float64)
    for i in range(q):
        for j in range(q):
            residue = (j - i) % q
            h[i + 1, j + 1] = 1.0 if residue == 0 or residue in squares else -1.0
    h[1:, 0] = -1.0
    return h


@functools.cache
def _sylvester(order: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def exists(n: int) -> bool:
    """Whether a Hadamard matrix of order n is constructed here."""
    return any(n % base == 0 and (n // base).bit_count() == 1 for base in _BASE_ORDERS)


@functools.cache
def block_order(n: int) -> int:
    """Channels of the blocks that a width n is cut into: the largest order that divides it.

    At most `MOST_BLOCK`, so a width of a full order may have blocks, too; 0: none is large enough.
    """
    fits = (m for m in range(min(n, MOST_BLOCK), 0, -1) if n % m == 0 and exists(m))
    order = next(fits, 0)
    return order if order >= min(n, LEAST_BLOCK) else 0


def require(name: str, n: int, remedy: str) -> None:
    """Raises UsageError if no Hadamard matrix has the order n of the size `name`."""
    if not exists(n):
        raise UsageError(
            f"{name} = {n} has no Hadamard rotation here, which needs 2^k, 12·2^k or 20·2^k;",
            remedy,
        )


def require_width(name: str, n: int, remedy: str) -> None:
    """Raises UsageError if the width `name` has no rotation, in blocks neither."""
    if not exists(n) and not block_order(n):
        raise UsageError(
            f"{name} = {n} has no Hadamard rotation here, which needs a multiple of {LEAST_BLOCK}, "
            "12 or 20;",
            remedy,
        )


@functools.cache
def factors(n: int) -> tuple[Tensor, Tensor]:
    """Matrices (A, B) of ±1 in FP64 with H_n = A ⊗ B, of nearly equal orders.

    Two small products then do the transform: reshape x to (order A, order B), Aᵀ · x · B.

    Raises:
        UsageError: no Hadamard matrix of order n is constructed here.
    """
    for base in sorted(_BASE_ORDERS, reverse=True):
        power = n // base
        if n % base == 0 and power & (power - 1) == 0:
            right = 1
            while right * right * 2 <= n and right < power:
                right *= 2
            left = _sylvester(power // right)
            if base > 1:
                left = torch.kron(_paley(base), left)
            return left, _sylvester(right)
    raise _no_rotation(n)


def _no_rotation(n: int) -> UsageError:
    return UsageError(
        f"there is no Hadamard rotation of size {n};",
        f"model widths must be multiples of {LEAST_BLOCK}, 12 or 20 for the rotated recipes (use "
        "--method fp16).",
    )


def signs(n: int) -> Tensor:
    """The first n of the Golay-Rudin-Shapiro sequence, ±1 in FP64.

    Its Hadamard transform is flat (n = 4^k), or flat but for zeros (2·4^k): what all channels have
    in common is spread over all coefficients, where the bare matrix would gather it in the first.
    Source: Rudin, "Some theorems on Fourier coefficients" (1959).
    """
    return torch.tensor([1.0 - 2.0 * ((i & i >> 1).bit_count() % 2) for i in range(n)]).double()


def rotate(x: Tensor) -> Tensor:
    """x (…, n) ↦ (x · diag(signs)) · H_n / √n, computed and returned in FP64."""
    return transform(x.double() * signs(x.shape[-1]).to(x.device))


def transform(x: Tensor) -> Tensor:
    """x (…, n) ↦ x · H_n / √n, computed and returned in FP64; by blocks if n is of no order."""
    n = x.shape[-1]
    if not exists(n):
        return apply(x, "blocks")
    left, right = (m.to(x.device) for m in factors(n))
    blocks = x.double().reshape(*x.shape[:-1], left.shape[0], right.shape[0])
    y = left.t() @ (blocks @ right)
    return y.reshape(x.shape) * n**-0.5


def apply(x: Tensor, rotation: InputRotation) -> Tensor:
    """x (…, n) rotated, computed and returned in FP64.

    "full" is `transform`. "blocks" cuts the channels into blocks of `block_order(n)`, each of which
    is transformed by itself; "signs" multiplies each block by `signs` before.

    Raises:
        UsageError: n has no blocks.
    """
    if rotation in ("none", "full"):
        return x.double() if rotation == "none" else transform(x)
    n = x.shape[-1]
    order = block_order(n)
    if not order:
        raise _no_rotation(n)
    blocks = x.unflatten(-1, (-1, order))
    return (rotate(blocks) if rotation == "signs" else transform(blocks)).flatten(-2)
