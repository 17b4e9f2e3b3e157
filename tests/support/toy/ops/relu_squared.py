"""max(x, 0)², as FP16 and as the rotated INT8 input of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_tokens
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def relu_squared_reference(x: Tensor) -> Tensor:
    """x (B, L, E) FP16 -> FP16."""
    return torch.relu(x).float().square().half()


def _lines() -> list[str]:
    # Exact in FP32: a product of two numbers of 11 bits.
    return [t.cast("x32", "x", t.FP32), "positive = Relu (x32)", "r = Mul (positive, positive)"]


def _body(a: Attributes, form: BodyForm) -> str:
    return "\n".join([*_lines(), t.cast("y", "r", t.FP16)])


def rotated_reference(
    x: Tensor, scale: Tensor | None = None, *, width: int, rounding: Rounding, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """x (B, L, E) FP16 -> INT8 and token_scale (B, L, 1) FP32 of max(x, 0)² · H."""
    r = hadamard.transform(torch.relu(x).float().square()).float()
    return quantize_tokens(r, scaling, scale, rounding, "r")


def _rotated_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            *_lines(),
            t.cast("wide", "r", t.compute_type(form)),
            t.hadamard_transform("rotated_wide", "wide", int(a["width"]), form, leading=2),
            t.cast("rotated", "rotated_wide", t.FP32),
            t.quantize_tokens("quantized", "token_scale", "rotated", a, form),
        ]
    )


RELU_SQUARED = Op("ReluSquared", ("y",), relu_squared_reference, _body, plugin=False)
RELU_SQUARED_INT8 = Op(
    "ReluSquaredInt8", ("quantized", "token_scale"), rotated_reference, _rotated_body, plugin=False
)
