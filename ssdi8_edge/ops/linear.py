"""INT8 linear layers: W8A8, and W4A8 with two-level scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.int8 import int8_matmul, round_to_int8
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op

# Of a 4-bit weight, unpacked at once: whole, the one of a vocabulary would take gigabytes.
ROWS = 16384


def linear_reference(
    x: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """y = FP16((FP32(x · weightᵀ) · scale) · token_scale + bias), the product exact in INT32.

    Args:
        x: (B, L, In) INT8.
        token_scale: (B, L, 1) FP32, of x.
        weight: (Out, In) INT8.
        scale: (Out) FP32, of the weight's rows.
        bias: (Out) FP32; carries the mean correction of out_proj.

    Returns:
        (B, L, Out) FP16.
    """
    return (int8_matmul(x, weight).float() * scale * token_scale + bias).half()


def pack_w4(q4: Tensor) -> Tensor:
    """q4 (Out, In) in [0, 15] as `unpack_w4` takes it."""
    low, high = q4.to(torch.int16).unflatten(1, (-1, 2, 4)).unbind(2)
    return (high * 16 + low - 128).to(torch.int8).flatten(1)


def unpack_w4(packed: Tensor, group_scale: Tensor, group_size: int) -> Tensor:
    """The INT8 weight that a W4 kernel multiplies with: round((q4 - 8) · group_scale).

    Args:
        packed: (Out, In / 2) INT8; byte 4i + j, plus 128, = 16 · q4[8i + 4 + j] + q4[8i + j], q4 in
            [0, 15]: four bytes hold eight inputs in a row, which masks alone put in order.
        group_scale: (Out, In / group_size), in units of the row's INT8 step: FP16, or INT8 from
            -15 to 16 without 0, which need no rounding and let a kernel scale a group's sum.
    """
    byte = (packed.to(torch.int16) + 128).unflatten(1, (-1, 4))
    q4 = torch.stack([byte % 16, byte // 16], 2).flatten(1) - 8
    sigma = group_scale.float().repeat_interleave(group_size, 1)
    return round_to_int8(q4.float() * sigma, "half_even")


def linear_w4_reference(
    x: Tensor,
    token_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    group_size: int,
) -> Tensor:
    """`linear_reference` with the weight of `unpack_w4`: docs/method.md §7.2 (21).

    Args:
        x, token_scale: as in `linear_reference`.
        packed, group_scale: as in `unpack_w4`.
        scale: (Out) FP32, the row's INT8 step.
        bias: (Out) FP32.

    Returns:
        (B, L, Out) FP16.
    """
    pieces = zip(*(each.split(ROWS) for each in (packed, group_scale, scale, bias)), strict=True)
    return torch.cat(
        [
            linear_reference(x, token_scale, unpack_w4(q4, sigma, group_size), step, shift)
            for q4, sigma, step, shift in pieces
        ],
        -1,
    )


def _product(form: BodyForm) -> list[str]:
    """From INT8 `x` (B, L, In) and `weight` (Out, In) to FP16 `y`."""
    if form == "tensorrt":
        # The form TensorRT fuses natively: the scale of the row is the weight's, that of x is 1.
        product = [
            t.number("one", 1.0),
            "x_real = DequantizeLinear (x, one)",
            "weight_real = DequantizeLinear <axis = 0> (weight, scale)",
            "weight_t = Transpose <perm = [1, 0]> (weight_real)",
            "scaled = MatMul (x_real, weight_t)",
        ]
    else:
        # Unsigned operands with zero point 128: x86 without VNNI adds pairs of mixed-sign
        # products in saturating 16 bits, pairs of unsigned ones exactly.
        product = [
            "offset = Constant <value = int32 {128}> ()",
            "zero_point = Constant <value = uint8 {128}> ()",
            "x_wide = Cast <to = 6> (x)",
            "x_shifted = Add (x_wide, offset)",
            "x_unsigned = Cast <to = 2> (x_shifted)",
            "weight_wide = Cast <to = 6> (weight)",
            "weight_shifted = Add (weight_wide, offset)",
            "weight_unsigned = Cast <to = 2> (weight_shifted)",
            "weight_t = Transpose <perm = [1, 0]> (weight_unsigned)",
            "accumulator = MatMulInteger (x_unsigned, weight_t, zero_point, zero_point)",
            t.cast("product", "accumulator", t.FP32),
            "scaled = Mul (product, scale)",
        ]
    return [
        *product,
        "real = Mul (scaled, token_scale)",
        "biased = Add (real, bias)",
        t.cast("y", "biased", t.FP16),
    ]


def _body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(_product(form))


def _w4_body(a: Attributes, form: BodyForm) -> str:
    group = int(a["group_size"])
    return "\n".join(
        [
            t.from_int8("byte_signed", "packed", form),
            t.number("byte_offset", 128.0),
            t.number("sixteen", 16.0),
            t.number("eight", 8.0),
            "byte = Add (byte_signed, byte_offset)",
            "byte_over_16 = Div (byte, sixteen)",
            "high = Floor (byte_over_16)",
            "high_16 = Mul (high, sixteen)",
            "low = Sub (byte, high_16)",
            t.ints("last", [-1]),
            t.ints("fours_shape", [0, -1, 1, 4]),
            "low_four = Reshape (low, fours_shape)",
            "high_four = Reshape (high, fours_shape)",
            "eights = Concat <axis = 2> (low_four, high_four)",
            t.ints("grouped_shape", [0, -1, group]),
            "q4 = Reshape (eights, grouped_shape)",
            "q4_signed = Sub (q4, eight)",
            t.cast("sigma", "group_scale", t.FP32),
            "sigma_column = Unsqueeze (sigma, last)",
            "steps = Mul (q4_signed, sigma_column)",
            t.ints("weight_shape", [0, -1]),
            "steps_flat = Reshape (steps, weight_shape)",
            t.round_to_int8("weight", "steps_flat", "half_even", form),
            *_product(form),
        ]
    )


def _kernel(call: Call) -> Any:
    out, width = call.weight.shape
    call.require(torch.int8, weight=(out, width))
    return _any_kernel("linear", call, out, width)


def _w4_kernel(call: Call) -> Any:
    out, width = call.packed.shape[0], 2 * call.packed.shape[1]
    call.require(torch.int8, packed=(out, width // 2))
    call.integer_scales = int(call.group_scale.dtype is torch.int8)
    kind = torch.int8 if call.integer_scales else torch.float16
    call.require(kind, group_scale=(out, width // call.group_size))
    return _any_kernel("linear_w4", call, out, width)


def _any_kernel(launcher: str, call: Call, out: int, width: int) -> Any:
    *rows, _ = call.x.shape
    call.require(torch.int8, x=(*rows, width))
    call.require(torch.float32, token_scale=(*rows, 1), scale=(out,), bias=(out,))
    call.y = call.empty((*rows, out), torch.float16)
    call.tokens, call.in_features, call.out_features = math.prod(rows), width, out
    call.launch(launcher)
    return call.y


LINEAR = Op(
    name="Ssdi8Linear",
    outputs=("y",),
    reference=linear_reference,
    body=_body,
    kernel=_kernel,
)
LINEAR_W4 = Op(
    name="Ssdi8LinearW4",
    outputs=("y",),
    reference=linear_w4_reference,
    body=_w4_body,
    kernel=_w4_kernel,
)
