"""4-bit weights: groups of input columns with one scale each, values by GPTQ or by rounding.

Source: Frantar et al., "GPTQ" (ICLR 2023); settings and formats of method §5.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssdi8_edge.errors import UsageError
from ssdi8_edge.int8 import scale_from_absmax
from ssdi8_edge.ops.linear import pack_w4

# As method §5.3: part of the mean diagonal added to the Hessian.
DAMPING = 0.01

# Integer group scales: the largest that an INT8 weight has room for, and the one that the largest
# group of the row starts with, so that a group may grow while GPTQ moves errors into it.
LARGEST_INTEGER = 16
FIRST_INTEGER = 15


class W4(NamedTuple):
    """packed (Out, In / 2) INT8, group_scale (Out, In / group) FP16 or INT8, row_scale (Out) FP32.

    As `ops.linear.unpack_w4` takes them.
    """

    packed: Tensor
    group_scale: Tensor
    row_scale: Tensor


def require_groups(columns: int, group_size: int) -> None:
    """Raises UsageError if a linear with so many input columns cannot have such groups."""
    if columns % group_size:
        raise UsageError(
            f"a 4-bit linear with {columns} input columns cannot have groups of {group_size}",
            "choose an 8-bit method, or a group_size that divides it.",
        )


def _round_group(column: Tensor, scale: Tensor) -> Tensor:
    """q4 in [0, 15] of a column (Out) under the scales of its group (Out)."""
    return (torch.round(column / scale) + 8).clamp(0, 15)


def quantize_w4(
    weight: Tensor, group_size: int, hessian: Tensor | None, *, integer_scales: bool = False
) -> W4:
    """Quantize `weight` (Out, In), FP32.

    With `hessian` (In, In) = Σ x xᵀ of the inputs, columns are rounded one after the other and the
    error of each is moved to those not yet rounded (GPTQ); without, to nearest. A group's scale is
    taken when the group starts: 2 · max|w| / 15, with `integer_scales` the nearest multiple of a
    step of the row.

    Raises:
        UsageError: the input width is not a multiple of the group size.
    """
    rows, columns = weight.shape
    require_groups(columns, group_size)
    work = weight.float().clone()
    factor = None if hessian is None else _inverse_cholesky(work, hessian)
    q4 = torch.empty(rows, columns, dtype=torch.int16, device=work.device)
    scales = torch.empty(rows, columns // group_size, device=work.device)
    row_step = _group_scale(work.unflatten(1, (-1, group_size))).amax(1) / FIRST_INTEGER
    for start in range(0, columns, group_size):
        block = slice(start, start + group_size)
        scale = _group_scale(work[:, block])
        if integer_scales:
            scale = (scale / row_step).round().clamp(1, LARGEST_INTEGER) * row_step
        scales[:, start // group_size] = scale
        if factor is None:
            q4[:, block] = _round_group(work[:, block], scale[:, None]).to(torch.int16)
            continue
        errors = torch.empty(rows, group_size, device=work.device)
        inside = factor[block, block]
        current = work[:, block]
        for j in range(group_size):
            q = _round_group(current[:, j], scale)
            q4[:, start + j] = q.to(torch.int16)
            error = (current[:, j] - (q - 8) * scale) / inside[j, j]
            current[:, j:] -= error[:, None] * inside[j, j:]
            errors[:, j] = error
        work[:, start + group_size :] -= errors @ factor[block, start + group_size :]
    if integer_scales:
        integers = (scales / row_step[:, None]).round().to(torch.int8)
        return W4(pack_w4(q4), integers, row_step)
    return _two_level(q4, scales, group_size)


def _group_scale(group: Tensor) -> Tensor:
    """2 · max|w| / 15 over the last axis."""
    return (group.abs().amax(-1) * 2 / 15).clamp_min(1e-8)


def _inverse_cholesky(weight: Tensor, hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse damped Hessian; inputs never seen get zero weights."""
    h = hessian.double().clone()
    diagonal = h.diagonal()
    unseen = diagonal == 0
    diagonal[unseen] = 1
    weight[:, unseen] = 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _two_level(q4: Tensor, scales: Tensor, group_size: int) -> W4:
    """Express the group scales in steps of the row: w8 = round((q4 - 8) · group_scale) is INT8."""
    grouped = (q4 - 8).reshape(q4.shape[0], -1, group_size)
    reached = grouped.abs().amax(-1) * scales
    row_scale = scale_from_absmax(reached.amax(1))
    return W4(pack_w4(q4), (scales / row_scale[:, None]).half(), row_scale)
