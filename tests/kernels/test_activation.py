"""Activations between linear layers: references against loops, bodies against references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from op_bodies import compare_body, token_scaling
from slow_ops import ROUNDINGS, assert_same, f32, quantized_token, slow_silu
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.ops import OPS

# name: activation, width, x_column, columns of x, rotation
CASES: dict[str, tuple[str, int, int, int, str]] = {
    "relu2": ("relu2", 96, 0, 96, "signs"),
    "relu2 in blocks": ("relu2", 720, 0, 720, "signs"),
    "swiglu": ("silu_gate", 48, 48, 96, "blocks"),
    "swiglu in blocks": ("silu_gate", 144, 144, 288, "blocks"),
    "gate without norm": ("silu_gate", 48, 0, 131, "full"),
    "no rotation": ("silu_gate", 20, 20, 40, "none"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def inputs_of(
    case: tuple[str, int, int, int, str], magnitude: float, batch: int = 2, length: int = 3
) -> tuple[list[Tensor], dict[str, Any]]:
    activation, width, x_column, columns, rotation = case
    g = torch.Generator().manual_seed(width)
    x = (torch.randn(batch, length, columns, generator=g) * magnitude).half()
    gate = torch.randn(batch, length, columns, generator=g).half() if columns == 131 else x
    attributes = {"activation": activation, "width": width, "x_column": x_column}
    return [x, gate], {**attributes, "rotation": rotation}


def slow_rotation(values: np.ndarray, rotation: str) -> np.ndarray:
    """FP32 values of a token, rotated entry by entry, with exact sums."""
    n = len(values)
    if rotation == "none":
        return values
    order = n if rotation == "full" and hadamard.exists(n) else hadamard.block_order(n)
    h = torch.kron(*hadamard.factors(order)).numpy()
    sign = hadamard.signs(order).numpy() if rotation == "signs" else np.ones(order)
    out = np.zeros(n, f32)
    for start in range(0, n, order):
        block = values[start : start + order].astype(np.float64) * sign
        out[start : start + order] = [
            math.fsum(block * h[:, j]) * order**-0.5 for j in range(order)
        ]
    return out


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("magnitude", [1.0, 0.0, 1000.0])
@cases
def test_activation_against_loops(
    case: tuple[str, int, int, int, str], magnitude: float, rounding: Rounding, scaling: Scaling
) -> None:
    """With 1000, squares reach millions: FP16 would overflow."""
    scale = 0.03
    (x, gate), a = inputs_of(case, magnitude, batch=1)
    got, got_scale = OPS["Ssdi8Activation"](
        *(x, gate, *token_scaling(scaling, scale)), **a, rounding=rounding, scaling=scaling
    )
    width, first = a["width"], a["x_column"]
    for i in range(x.shape[1]):
        value = x[0, i, first : first + width].numpy().astype(f32)
        if a["activation"] == "relu2":
            value = np.maximum(value, f32(0)) ** 2
        else:
            value = value * np.array([slow_silu(float(v)) for v in gate[0, i, :width]], f32)
        rotated = slow_rotation(value, a["rotation"])
        want, want_scale = quantized_token(rotated, scaling, scale, rounding)
        assert_same(got[0, i], want)
        assert got_scale[0, i].tolist() == [want_scale]


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@cases
def test_activation_bodies(
    case: tuple[str, int, int, int, str], rounding: Rounding, scaling: Scaling
) -> None:
    for magnitude in (1.0, 0.0, 100.0):
        inputs, a = inputs_of(case, magnitude)
        chosen = {"rounding": rounding, "scaling": scaling}
        compare_body("Ssdi8Activation", [*inputs, *token_scaling(scaling, 0.02)], {**a, **chosen})


@cases
def test_fp16_bodies(case: tuple[str, int, int, int, str]) -> None:
    """Squares up to 1,000; what FP16 does not hold, the baseline says."""
    inputs, a = inputs_of(case, 8.0)
    del a["rotation"]
    compare_body("Activation", inputs, a)
