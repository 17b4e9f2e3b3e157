"""Running a kernel with guards behind its outputs, and comparing it with its reference.

Outputs are allocated full of garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_fixtures import (
    synchronize,
)
from torch import Tensor

from ssdi8_edge.ops import OPS, kernel_library

GUARD = 1 << 14  # more than a row of any output
GARBAGE = 0xA5
# Where the reference evaluates exp, a root or a sum in FP64 and the kernel in FP32, a value that
# falls on a rounding boundary may go to the other side: by 1 step, in this fraction of the values
# (measured on an H100: rms_norm 8e-7, gated norm 7e-6, convolution 6e-5).
BOUNDARY_FRACTION = 5e-4
# Of the largest value of a token, for the same reason.
TOKEN_SCALE_TOLERANCE = 4e-6
NORM_FRACTIONS = (0.0, BOUNDARY_FRACTION, TOKEN_SCALE_TOLERANCE)
CONV_FRACTIONS = (BOUNDARY_FRACTION, BOUNDARY_FRACTION, BOUNDARY_FRACTION, 0.0)
# exp in FP32 instead of FP64: an INT8 value may fall on the other side of a rounding boundary.
SSD_FRACTION = 1e-3


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """`torch.empty` gives garbage with a guard behind it; on leaving, the guards are checked."""
    guards: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros

        def empty(*size: Any, dtype: torch.dtype, device: Any) -> Tensor:
            shape = size[0] if not isinstance(size[0], int) else size
            n = torch.Size(shape if isinstance(shape, tuple) else (shape,)).numel() * dtype.itemsize
            memory = zeros(n + GUARD, dtype=torch.uint8, device=device).fill_(GARBAGE)
            guards.append(memory[n:])
            return memory[:n].view(dtype).view(shape)

        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda t: empty(t.shape, dtype=t.dtype, device=t.device))
        yield
    assert all(bool((guard == GARBAGE).all()) for guard in guards), "written past an output's end"


def steps(values: Tensor) -> Tensor:
    """Integers that count representable values, so that neighbours differ by 1."""
    if values.dtype is not torch.float16:
        return values.to(torch.int64)
    assert not values.isnan().any()
    bits = values.view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_close(got: Tensor, want: Tensor, max_fraction: float = 0.0) -> None:
    """At most 1 representable step apart, and that in at most `max_fraction` of the values.

    FP32: `max_fraction` apart at most, relative to the value.
    """
    assert got.dtype is want.dtype and got.shape == want.shape
    if got.dtype is torch.float32:
        torch.testing.assert_close(got, want, rtol=max_fraction, atol=0.0)
        return
    difference = (steps(got) - steps(want)).abs()
    worst = int(difference.max())
    fraction = float((difference > 0).double().mean())
    allowed = max_fraction + (1 / got.numel() if max_fraction else 0)
    if worst > (1 if max_fraction else 0) or fraction > allowed:
        where = tuple(int(i) for i in torch.nonzero(difference == worst)[0])
        raise AssertionError(
            f"off by {worst} at {where}: {got[where]} for {want[where]}; fraction {fraction:.2e}"
        )


def assert_near(got: Tensor, want: Tensor) -> None:
    """INT8 by value, others in norm."""
    if want.dtype is torch.int8:
        assert_close(got, want, SSD_FRACTION)
    else:
        assert relative_error(got, want) < 2e-4


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype is want.dtype
    assert bool(got.isfinite().all()) and bool(want.isfinite().all())
    difference = torch.linalg.vector_norm(got.double() - want.double())
    return float(difference / torch.linalg.vector_norm(want.double()).clamp_min(1e-30))


def kernel_of(op: str, variant: int = 0) -> Callable[..., Any]:
    kernel = OPS[op].runnable_kernel(variant)
    assert kernel is not None
    return kernel


def reference(op: str, *inputs: Tensor, **attributes: Any) -> Any:
    """Without kernels inside: the reference of SsdScan calls ops."""
    with kernel_library.references_only():
        return OPS[op].reference(*inputs, **attributes)


def compare(
    op: str,
    *inputs: Tensor,
    fractions: tuple[float, ...] = (0.0,),
    variant: int = 0,
    **attributes: Any,
) -> Any:
    """Run the op's kernel and its reference; one fraction per output."""
    with guarded_allocations():
        got = kernel_of(op, variant)(*inputs, **attributes)
        synchronize()
    want = reference(op, *inputs, **attributes)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
    for (g, w), fraction in zip(pairs, fractions, strict=True):
        assert_close(g, w, fraction)
    return got
