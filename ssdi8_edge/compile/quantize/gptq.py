"""INT8 and 4-bit weights: scales, and values by GPTQ, by coordinate descent, or to nearest.

Source: Frantar et al., "GPTQ" (ICLR 2023); settings and formats of docs/method.md §7.2, §7.3. The
search for group scales, signed integer scales and the descent (§7.4) are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.numerics.int8 import scale_from_absmax
from ssdi8_edge.ops.linear import pack_w4

# docs/method.md §7.3: part of the mean diagonal added to the Hessian.
DAMPING = 0.01

# Integer group scales: the largest that an INT8 weight has room for, and the one that the largest
# group of the row starts with, so that a group may grow while GPTQ moves errors into it.
LARGEST_INTEGER = 16
FIRST_INTEGER = 15

# Columns whose updates are gathered before they go to the rest of the matrix as one product.
BLOCK = 128


class W4(NamedTuple):
    """packed (Out, In / 2) INT8, group_scale (Out, In / group) FP16 or INT8, row_scale (Out) FP32.

    As `ops.linear.unpack_w4` takes them.
    """

    packed: Tensor
    group_scale: Tensor
    row_scale: Tensor


@dataclass(frozen=True)
class Grid:
    """Whole numbers that a stored weight can be."""

    low: int
    high: int

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest number for each weight, as a float; `scale` broadcasts against `weight`."""
        return self.nearest(weight / scale)

    def nearest(self, steps: Tensor) -> Tensor:
        """The same for weights in units of their scale."""
        return steps.round().clamp_(self.low, self.high)


GRID8, GRID4 = Grid(-128, 127), Grid(-8, 7)

# Scales (Out) of the columns that start at an index, from their weights (Out, n) as they are then.
ChooseScale = Callable[[Tensor, int], Tensor]


def require_groups(columns: int, group_size: int) -> None:
    """Raises UsageError if a linear with so many input columns cannot have such groups."""
    if columns % group_size:
        raise UsageError(
            f"a 4-bit linear with {columns} input columns cannot have groups of {group_size}",
            "choose an 8-bit method, or a group_size that divides it.",
        )


class Hessian:
    """(In, In) = Σ x xᵀ of a linear's inputs, up to a factor, as GPTQ and the descent take it.

    Made once for all rows of a weight that is quantized in pieces of rows.

    Attributes:
        unseen: (In) inputs that were always zero.
        factor: (In, In) FP32, the upper Cholesky factor of the damped inverse.
        plain: (In, In) FP32, for the descent; None without.
    """

    def __init__(self, hessian: Tensor, descent: int) -> None:
        self.unseen = hessian.diagonal() == 0
        # One copy in FP64, and each result in place of what it is made from: of wide layers, a
        # matrix is more than a gigabyte.
        work = hessian.to(torch.float64, copy=True)
        work.diagonal().add_(self.unseen)
        self.plain = work.float() if descent else None
        work.diagonal().add_(DAMPING * work.diagonal().mean())
        work = torch.linalg.cholesky(work)
        work = torch.cholesky_inverse(work)
        self.factor = torch.linalg.cholesky(work, upper=True).float()


def quantize_w8(
    weight: Tensor, scale: Tensor, hessian: Tensor | Hessian | None = None, descent: int = 0
) -> Tensor:
    """INT8 values (Out, In) of `weight` under the scales of its rows (Out).

    With `hessian` (In, In) = Σ x xᵀ of the inputs by GPTQ and `descent` passes, else to nearest.
    """
    rounded = _round(weight, GRID8, BLOCK, lambda columns, start: scale, hessian, descent)
    return rounded.values.to(torch.int8)


def quantize_w4(
    weight: Tensor,
    group_size: int,
    hessian: Tensor | Hessian | None = None,
    descent: int = 0,
    *,
    integer_scales: bool = False,
    search: bool = False,
) -> W4:
    """Quantize `weight` (Out, In), FP32, in groups of input columns.

    With `hessian` (In, In) = Σ x xᵀ of the inputs by GPTQ and `descent` passes, else to nearest. A
    group's scale is taken when the group starts: 2 · max|w| / 15, or with `search` the one of least
    squared error; with `integer_scales` among the whole multiples of a step of the row.

    Raises:
        UsageError: the input width is not a multiple of the group size.
    """
    require_groups(weight.shape[1], group_size)
    weight = weight.float()
    widest = _widest_scale(weight.unflatten(1, (-1, group_size))).amax(1)
    row_step = widest / FIRST_INTEGER

    def choose(columns: Tensor, start: int) -> Tensor:
        scale = _widest_scale(columns)
        if integer_scales:
            nearest = (scale / row_step).round().clamp(1, LARGEST_INTEGER) * row_step
            return _best_scale(columns, _multiples(row_step)) if search else nearest
        return _best_scale(columns, _fractions(scale)) if search else scale

    rounded = _round(weight, GRID4, group_size, choose, hessian, descent)
    q4 = (rounded.values + 8).to(torch.int16)
    if integer_scales:
        integers = (rounded.scales / row_step[:, None]).round().to(torch.int8)
        return W4(pack_w4(q4), integers, row_step)
    return _two_level(q4, rounded.scales, group_size)


# ------------------------------------------------------------------------------------------------
# Scales of 4-bit groups
# ------------------------------------------------------------------------------------------------


def _widest_scale(group: Tensor) -> Tensor:
    """2 · max|w| / 15 over the last axis."""
    return (group.abs().amax(-1) * 2 / 15).clamp_min(1e-8)


def _multiples(row_step: Tensor) -> Iterator[Tensor]:
    """Every integer scale. The grid reaches from -8 to 7: a negative scale turns it round, for
    groups whose largest weight is positive; there -16 would leave INT8."""
    for integer in (*range(1, LARGEST_INTEGER + 1), *range(-1, -LARGEST_INTEGER, -1)):
        yield row_step * integer


def _fractions(widest: Tensor) -> Iterator[Tensor]:
    """Scales from a little above the widest down to half of it, and the same turned round."""
    for percent in range(105, 50, -3):
        yield widest * (percent / 100)
        yield widest * (-percent / 100)


def _best_scale(group: Tensor, candidates: Iterator[Tensor]) -> Tensor:
    """Of `candidates` (Out), per row, the first of least squared error on `group` (Out, n)."""
    best = torch.full(group.shape[:1], torch.inf, device=group.device)
    chosen = torch.empty_like(best)
    for scale in candidates:
        column = scale[:, None]
        error = (GRID4.round(group, column) * column - group).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def _two_level(q4: Tensor, scales: Tensor, group_size: int) -> W4:
    """Express the group scales in steps of the row: w8 = round((q4 - 8) · group_scale) is INT8."""
    grouped = (q4 - 8).reshape(q4.shape[0], -1, group_size)
    reached = grouped.abs().amax(-1) * scales.abs()
    row_scale = scale_from_absmax(reached.amax(1))
    return W4(pack_w4(q4), (scales / row_scale[:, None]).half(), row_scale)


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------


class _Rounded(NamedTuple):
    """values (Out, In) whole numbers as floats; scales (Out, number of blocks)."""

    values: Tensor
    scales: Tensor


def _round(
    weight: Tensor,
    grid: Grid,
    block: int,
    choose: ChooseScale,
    hessian: Tensor | Hessian | None,
    descent: int,
) -> _Rounded:
    weight = weight.float()
    starts = range(0, weight.shape[1], block)
    if hessian is None:
        scales = torch.stack([choose(weight[:, i : i + block], i) for i in starts], 1)
        return _Rounded(grid.round(weight, _spread(scales, weight, block)), scales)
    if isinstance(hessian, Tensor):
        hessian = Hessian(hessian, descent)
    weight = weight.masked_fill(hessian.unseen, 0)
    rounded = _gptq(weight, grid, block, choose, hessian.factor)
    for _ in range(descent):
        assert hessian.plain is not None
        rounded = _descend(weight, grid, block, rounded, hessian.plain)
    return rounded


def _spread(scales: Tensor, weight: Tensor, block: int) -> Tensor:
    """A scale for each weight."""
    return scales.repeat_interleave(block, 1)[:, : weight.shape[1]]


def _gptq(weight: Tensor, grid: Grid, block: int, choose: ChooseScale, factor: Tensor) -> _Rounded:
    """Round columns one after the other, moving the error of each to those not yet rounded.

    `factor` is that of `Hessian`. Source: docs/method.md §7.3 (22).
    """
    work, values = weight.clone(), torch.empty_like(weight)
    scales = []
    for start in range(0, weight.shape[1], block):
        part = slice(start, start + block)
        current, inside = work[:, part], factor[part, part]
        scale = choose(current, start)
        scales.append(scale)
        # Few and small operations per column: on a GPU launching them is what takes the time.
        shares = inside / inside.diagonal()[:, None]
        errors = torch.empty_like(current)
        for j in range(current.shape[1]):
            q = grid.round(current[:, j], scale)
            values[:, start + j] = q
            errors[:, j] = torch.addcmul(current[:, j], q, scale, value=-1)
            current[:, j:].addr_(errors[:, j], shares[j, j:], alpha=-1)
        errors /= inside.diagonal()
        work[:, part.stop :] -= errors @ factor[part, part.stop :]
    return _Rounded(values, torch.stack(scales, 1))


def _descend(
    weight: Tensor, grid: Grid, block: int, rounded: _Rounded, hessian: Tensor
) -> _Rounded:
    """One pass over the columns, each set to the best number while all others stay.

    What GPTQ decides for a column is best given those before it; this looks at those behind it too.
    Source: docs/method.md §7.4 (23).
    """
    values, scales = rounded.values.clone(), rounded.scales
    # Of half the squared output error, the negative gradient by column.
    gradient = (weight - values * _spread(scales, weight, block)) @ hessian
    diagonal = hessian.diagonal()
    for start in range(0, weight.shape[1], block):
        part = slice(start, start + block)
        scale, inside = scales[:, start // block], hessian[part, part]
        current = gradient[:, part].clone()
        before = values[:, part].clone()
        # Of a weight, in units of its scale, for its gradient.
        rate = (scale[:, None] * diagonal[part]).reciprocal()
        for j in range(current.shape[1]):
            old = before[:, j]
            q = grid.nearest(torch.addcmul(old, current[:, j], rate[:, j]))
            current.addr_((q - old) * scale, inside[j], alpha=-1)
            values[:, start + j] = q
        gradient -= ((values[:, part] - before) * scale[:, None]) @ hessian[part]
    return _Rounded(values, scales)
