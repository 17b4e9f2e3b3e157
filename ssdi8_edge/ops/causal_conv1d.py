"""Depthwise causal convolution and SiLU with carried state; x leaves in FP16, B and C in INT8.

B and C are quantized here, once, before the group-to-head broadcast, and reused by ChunkState and
ChunkScan (SSDi8's reuse; the release does it in two kernels of its own).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import Rotation, Rounding
from ssdi8_edge.numerics.int8 import quantize
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), evaluated in FP64 and rounded to FP32 once."""
    wide = x.double()
    return (wide / (1 + torch.exp(-wide))).float()


def convolve(
    zxbcdt: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    d_inner: int,
    conv_dim: int,
    d_conv: int,
) -> tuple[Tensor, Tensor]:
    """silu(bias + Σ_w weight[:, w] · xBC[t - W + 1 + w]) in FP32 (B, L, E2), and the new state."""
    xbc = zxbcdt[..., d_inner : d_inner + conv_dim]
    sequence = torch.cat([conv_state, xbc], 1)
    length = xbc.shape[1]
    total = bias.expand(xbc.shape)
    for w in range(d_conv):
        total = total + sequence[:, w : w + length].float() * weight[:, w]
    return silu(total), sequence[:, length:].contiguous()


def causal_conv1d_reference(
    zxbcdt: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    *,
    d_inner: int,
    conv_dim: int,
    d_conv: int,
    ngroups: int,
    rotation: Rotation,
    rounding: Rounding,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve the x · B · C columns of in_proj's output.

    With rotation "hadamard" the N values of B and of C in each group go through `hadamard.rotate`
    before they are quantized.

    Args:
        zxbcdt: (B, L, 2E + 2GN + H) FP16, columns z(E) · x(E) · B(GN) · C(GN) · dt(H).
        conv_state: (B, W - 1, E2) FP16, the rows before this call, oldest first.
        weight, bias: (E2, W) and (E2) FP32; d_conv = W, conv_dim = E2 = E + 2GN.
        b_scale, c_scale: (G) FP32, of what is quantized.

    Returns:
        x (B, L, E) FP16, B and C (B, L, G·N) INT8, conv_state' (B, W - 1, E2) FP16.
    """
    activated, state = convolve(
        zxbcdt, conv_state, weight, bias, d_inner=d_inner, conv_dim=conv_dim, d_conv=d_conv
    )
    gn = (conv_dim - d_inner) // 2
    x, b, c = activated.split([d_inner, gn, gn], -1)

    def per_group(values: Tensor, scale: Tensor, site: str) -> Tensor:
        grouped = values.unflatten(-1, (ngroups, -1))
        if rotation == "hadamard":
            grouped = hadamard.rotate(grouped).float()
        return quantize(grouped, scale[:, None], rounding, site).flatten(-2)

    return x.half(), per_group(b, b_scale, "B"), per_group(c, c_scale, "C"), state


def convolution_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`convolve` as statements: defines `activated` (B, L, E2) FP32 and `conv_state_out`."""
    f = t.compute_type(form)
    e, width = int(a["d_inner"]), int(a["d_conv"])
    conv_dim = int(a["conv_dim"])
    lines = [
        t.slice_last("xbc", "zxbcdt", e, e + conv_dim),
        "sequence = Concat <axis = 1> (conv_state, xbc)",
        "length = Shape <start = 1, end = 2> (zxbcdt)",
        t.ints("axis_l", [1]),
        t.ints("far", [2**31 - 1]),
        "conv_state_out = Slice (sequence, length, far, axis_l)",
        "taps = Transpose <perm = [1, 0]> (weight)",
        t.cast("sequence32", "sequence", t.FP32),
    ]
    total = "bias"
    for w in range(width):
        lines += [
            t.ints(f"start{w}", [w]),
            f"stop{w} = Add (length, start{w})",
            f"row{w} = Slice (sequence32, start{w}, stop{w}, axis_l)",
            f"index{w} = Constant <value = int64 {{{w}}}> ()",
            f"tap{w} = Gather <axis = 0> (taps, index{w})",
            f"product{w} = Mul (row{w}, tap{w})",
            f"total{w} = Add ({total}, product{w})",
        ]
        total = f"total{w}"
    return [*lines, silu_lines("activated", total, f)]


def silu_lines(out: str, x: str, f: int) -> str:
    """`silu` of the FP32 value `x`, rounded to FP32."""
    return "\n".join(
        [
            t.cast(f"{out}_wide", x, f),
            t.number(f"{out}_one", 1.0, f),
            f"{out}_negative = Neg ({out}_wide)",
            f"{out}_exp = Exp ({out}_negative)",
            f"{out}_denominator = Add ({out}_exp, {out}_one)",
            f"{out}_silu = Div ({out}_wide, {out}_denominator)",
            t.cast(out, f"{out}_silu", t.FP32),
        ]
    )


def rotation_lines(out: str, x: str, n: int, form: BodyForm) -> list[str]:
    """`hadamard.rotate` of the FP32 value `x` (B, L, G, N), rounded to FP32."""
    f = t.compute_type(form)
    return [
        t.cast(f"{out}_plain", x, f),
        t.whole_numbers(f"{out}_signs", hadamard.signs(n), form),
        f"{out}_wide = Mul ({out}_plain, {out}_signs)",
        t.hadamard_transform(f"{out}_sum", f"{out}_wide", n, form, leading=3),
        t.cast(out, f"{out}_sum", t.FP32),
    ]


def _body(a: Attributes, form: BodyForm) -> str:
    e, g = int(a["d_inner"]), int(a["ngroups"])
    gn = (int(a["conv_dim"]) - e) // 2
    rotated = a["rotation"] == "hadamard"
    lines = [
        *convolution_lines(a, form),
        t.slice_last("x32", "activated", 0, e),
        t.cast("x", "x32", t.FP16),
        t.ints("grouped", [0, 0, g, -1]),
        t.ints("flat", [0, 0, -1]),
        t.ints("scale_shape", [g, 1]),
    ]
    for out, scale, start in (("b_q", "b_scale", e), ("c_q", "c_scale", e + gn)):
        lines += [
            t.slice_last(f"{out}_32", "activated", start, start + gn),
            f"{out}_grouped = Reshape ({out}_32, grouped)",
        ]
        values = f"{out}_grouped"
        if rotated:
            lines += rotation_lines(f"{out}_rotated", values, gn // g, form)
            values = f"{out}_rotated"
        lines += [
            f"{out}_scale = Reshape ({scale}, scale_shape)",
            t.quantize(f"{out}_int", values, f"{out}_scale", a["rounding"], form),
            f"{out} = Reshape ({out}_int, flat)",
        ]
    return "\n".join(lines)


def _kernel(call: Call) -> Any:
    batch, length, row = call.zxbcdt.shape
    conv_state = (batch, call.d_conv - 1, call.conv_dim)
    call.require(torch.float16, zxbcdt=(batch, length, row), conv_state=conv_state)
    call.require(torch.float32, weight=(call.conv_dim, call.d_conv), bias=(call.conv_dim,))
    call.require(torch.float32, b_scale=(call.ngroups,), c_scale=(call.ngroups,))
    call.x = call.empty((batch, length, call.d_inner), torch.float16)
    columns = (call.conv_dim - call.d_inner) // 2
    call.b_q = call.empty((batch, length, columns), torch.int8)
    call.c_q = call.empty((batch, length, columns), torch.int8)
    call.conv_state_out = call.next_state(call.conv_state)
    call.batch, call.length, call.row_stride = batch, length, row
    call.launch("causal_conv1d")
    return call.x, call.b_q, call.c_q, call.conv_state_out


CAUSAL_CONV1D = Op(
    name="Ssdi8CausalConv1d",
    outputs=("x", "b_q", "c_q", "conv_state_out"),
    reference=causal_conv1d_reference,
    body=_body,
    kernel=_kernel,
)
