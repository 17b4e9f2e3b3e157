"""The numeric contract: rounding, saturation, scales and exact integer products.

Every INT8 cast of the package goes through `round_to_int8`; `ops.onnx_text` holds its twin in
ONNX. All scales are symmetric (zero point 0), FP32, "absmax / 127", and have the unit of the tensor
they belong to: tensor ≈ scale · q.

Two roundings exist, chosen by the recipe (docs/method.md §3.1):

* ``half_even``: round half to even, saturate to [-128, 127]. One hardware convert instruction.
* ``half_away``: ⌊|v| + ½⌋ (an FP32 sum) with the sign of v, saturate to [-127, 127]. SSDi8 as
  released.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ssdi8_edge.numerics.formats import Rounding, Scaling

QMAX = 127
# What is smaller counts as zero where a tensor is scaled by its own largest value.
LEAST_MAGNITUDE = 1e-30
# An FP32 sum of integers is exact below 2^24; 128 · 128 · 1024 reaches it.
EXACT_FP32_TERMS = 1024


class SaturationCounter:
    """Counts, per site, how many rounded values reached the end of the INT8 range."""

    def __init__(self) -> None:
        self.scope = ""
        # On the device until they are asked for: a GPU need not wait for the host at each site.
        self._saturated: dict[str, Tensor] = {}
        self._total: defaultdict[str, int] = defaultdict(int)

    def add(self, site: str, q: Tensor) -> None:
        key = f"{self.scope}{site}"
        saturated = (q.to(torch.int16).abs() >= QMAX).sum()
        self._saturated[key] = self._saturated[key] + saturated if key in self._total else saturated
        self._total[key] += q.numel()

    def fractions(self) -> dict[str, float]:
        """Site -> fraction of its values with |q| ≥ 127, in [0, 1]."""
        return {
            key: int(self._saturated[key]) / total for key, total in self._total.items() if total
        }


_counter: ContextVar[SaturationCounter | None] = ContextVar("saturation_counter", default=None)


@contextmanager
def count_saturation() -> Iterator[SaturationCounter]:
    """Collect saturation fractions of every named `round_to_int8` call inside the block."""
    counter = SaturationCounter()
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)


def round_to_integer(v: Tensor, rounding: Rounding) -> Tensor:
    """Round to whole numbers in the float type of `v`, without saturation."""
    if rounding == "half_even":
        return torch.round(v)
    return torch.floor(v.abs() + 0.5) * torch.sign(v)


def round_to_int8(v: Tensor, rounding: Rounding, site: str = "") -> Tensor:
    """Round `v` (any shape, any float type, already divided by its scale) to INT8, saturating.

    `site` names the tensor for `count_saturation`.
    """
    low = -128 if rounding == "half_even" else -QMAX
    q = round_to_integer(v, rounding).clamp_(low, QMAX).to(torch.int8)
    counter = _counter.get()
    if counter is not None and site:
        counter.add(site, q)
    return q


def quantize(x: Tensor, scale: Tensor, rounding: Rounding, site: str = "") -> Tensor:
    """round(x · FP32(1 / scale)), saturating; `scale` broadcasts against `x`."""
    return round_to_int8(x.float() * scale.float().reciprocal(), rounding, site)


def quantize_by_largest(v: Tensor, dim: int, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """INT8 `v` in units of a 127th of its largest magnitude along `dim`; nothing saturates.

    Returns:
        q like `v`, and the FP32 step with `dim` kept at size 1: v ≈ step · q. With top the largest
        magnitude, q = round(v · FP32(127 / top)) and step = FP32(top / 127).
    """
    top = v.abs().amax(dim, keepdim=True).clamp_min(LEAST_MAGNITUDE)
    # Both operands tensors: torch turns a division by, or of, a number into a product.
    qmax = torch.full_like(top, QMAX)
    return round_to_int8(v * (qmax / top), rounding), top / qmax


def quantize_tokens(
    x: Tensor, scaling: Scaling, scale: Tensor | None, rounding: Rounding, site: str
) -> tuple[Tensor, Tensor]:
    """The input x (B, L, D) FP32 of a linear layer as INT8, and its scale (B, L, 1) of each token.

    Args:
        scaling: "dynamic" scales each token by its own largest value; nothing saturates.
        scale: (1), that of all tokens, with scaling "static" only.

    Raises:
        ValueError: scaling "static" without `scale`, or "none".
    """
    if scaling == "dynamic":
        return quantize_by_largest(x, -1, rounding)
    if scale is None or scaling == "none":
        raise ValueError(f"the input of a linear layer has scaling {scaling!r}, scale {scale}")
    return quantize(x, scale, rounding, site), scale.expand(*x.shape[:-1], 1).contiguous()


def scale_from_absmax(absmax: Tensor, floor: float = 1e-8) -> Tensor:
    """absmax / 127 in FP32, never below `floor`, so that an all-zero tensor has a usable scale."""
    return (absmax.float() / QMAX).clamp_min(floor)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact INT8 × INT8 → INT32 product of `a` (…, k) with the rows of `b` (n, k): (…, n).

    By FP32 products of integers. `torch._int_mm` is a plain loop on CPUs without VNNI, up to 28
    times slower, and may be inexact on others.
    """
    flat = a.reshape(-1, a.shape[-1])
    product = torch.zeros(flat.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, flat.shape[1], EXACT_FP32_TERMS):
        part = slice(start, start + EXACT_FP32_TERMS)
        product += (flat[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return product.reshape(*a.shape[:-1], b.shape[0])
