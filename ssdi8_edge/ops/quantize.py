"""Rotation and quantization to INT8 of what other ops leave in FP16: the input of out_proj."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation, Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_tokens
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.rms_norm import token_scale


def quantize_reference(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    width: int,
    rotation: InputRotation,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """Q(R · x), R the rotation.

    Args:
        x: (B, L, width) FP16.
        scale: (1) FP32, of the rotated x in all tokens; with scaling "static" only.
        rotation: see `hadamard.apply`.
        scaling: see `int8.quantize_tokens`.

    Returns:
        q (B, L, width) INT8 and token_scale (B, L, 1) FP32: the rotated x ≈ token_scale · q.
    """
    rotated = hadamard.apply(x, rotation).float()
    return quantize_tokens(rotated, scaling, scale, rounding, "r")


def _body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            t.cast("x32", "x", t.FP32),
            *t.rotate_and_quantize("quantized", "token_scale", "x32", int(a["width"]), a, form),
        ]
    )


def _kernel(call: Call) -> Any:
    *rows, _ = call.x.shape
    shape = (*rows, call.width)
    call.require(torch.float16, x=shape)
    call.quantized = call.empty(shape, torch.int8)
    call.token_scale = token_scale(call, tuple(rows))
    call.tokens = math.prod(rows)
    call.launch("quantize")
    return call.quantized, call.token_scale


QUANTIZE = Op(
    name="Ssdi8Quantize",
    outputs=("quantized", "token_scale"),
    reference=quantize_reference,
    body=_body,
    kernel=_kernel,
)
