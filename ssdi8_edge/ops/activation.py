"""What stands between two linear layers: the square of ReLU, or a gate that goes through SiLU.

Three blocks share it: an MLP with the square of ReLU, one with SwiGLU, and Mamba-2 whose gate has
no norm. The result is rotated in blocks and becomes the INT8 input of out_proj.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation, Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_tokens
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.causal_conv1d import silu, silu_lines
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.rms_norm import token_scale

# max(x, 0)², or x · silu(gate).
Activation = Literal["relu2", "silu_gate"]


def activated(
    x: Tensor, gate: Tensor, *, activation: Activation, width: int, x_column: int
) -> Tensor:
    """The activation of x (B, L, width), FP32: the square of an FP16 value may exceed FP16."""
    value = x[..., x_column : x_column + width].float()
    if activation == "relu2":
        return value.relu().square()
    return value * silu(gate[..., :width])


def activation_reference(
    x: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    *,
    activation: Activation,
    width: int,
    x_column: int,
    rotation: InputRotation,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """Q(R · f(x)): f is max(x, 0)² ("relu2") or x · silu(gate) ("silu_gate"), R the rotation.

    The values of f are FP32 and never stored: squares of FP16 do not fit FP16.

    Args:
        x: (B, L, …) FP16; `width` columns are read, the first of them `x_column`.
        gate: (B, L, …) FP16; its first `width` columns. May be the tensor of x; "relu2" reads none.
        scale: (1) FP32, of the rotated values of all tokens; with scaling "static" only.
        rotation: see `hadamard.apply`.
        scaling: see `int8.quantize_tokens`.

    Returns:
        q (B, L, width) INT8 and token_scale (B, L, 1) FP32: the rotated values ≈ token_scale · q.
    """
    value = activated(x, gate, activation=activation, width=width, x_column=x_column)
    rotated = hadamard.apply(value, rotation).float()
    return quantize_tokens(rotated, scaling, scale, rounding, "r")


def activation_fp16_reference(
    x: Tensor, gate: Tensor, *, activation: Activation, width: int, x_column: int
) -> Tensor:
    """`activated` in FP16 (B, L, width), no rotation."""
    return activated(x, gate, activation=activation, width=width, x_column=x_column).half()


def _activated_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`activated` as statements: defines `value` (B, L, width) FP32."""
    width, column = int(a["width"]), int(a["x_column"])
    lines = [t.slice_last("x16", "x", column, column + width), t.cast("x32", "x16", t.FP32)]
    if a["activation"] == "relu2":
        return [*lines, "positive = Relu (x32)", "value = Mul (positive, positive)"]
    return [
        *lines,
        t.slice_last("gate16", "gate", 0, width),
        t.cast("gate32", "gate16", t.FP32),
        silu_lines("opened", "gate32", t.compute_type(form)),
        "value = Mul (x32, opened)",
    ]


def _body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            *_activated_lines(a, form),
            *t.rotate_and_quantize("quantized", "token_scale", "value", int(a["width"]), a, form),
        ]
    )


def _fp16_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join([*_activated_lines(a, form), t.cast("y", "value", t.FP16)])


def _kernel(call: Call) -> Any:
    (*rows, call.x_stride), call.gate_stride = call.x.shape, call.gate.shape[-1]
    call.require(torch.float16, x=(*rows, call.x_stride), gate=(*rows, call.gate_stride))
    call.quantized = call.empty((*rows, call.width), torch.int8)
    call.token_scale = token_scale(call, tuple(rows))
    call.tokens = math.prod(rows)
    call.launch("activation")
    return call.quantized, call.token_scale


ACTIVATION = Op(
    name="Ssdi8Activation",
    outputs=("quantized", "token_scale"),
    reference=activation_reference,
    body=_body,
    kernel=_kernel,
)
ACTIVATION_FP16 = Op(
    name="Activation",
    outputs=("y",),
    reference=activation_fp16_reference,
    body=_fp16_body,
    plugin=False,
)
