"""Gate, grouped RMSNorm, Hadamard rotation and quantization to INT8: the input of out_proj.

Mamba-2's gate comes before the norm. Models that were trained with the norm first have an op of
their own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_tokens
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.causal_conv1d import silu, silu_lines
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.rms_norm import rms_lines, token_scale


def gated_norm(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, *, d_inner: int, ngroups: int, eps: float
) -> Tensor:
    """r = v / rms(v in its group) · weight, v = y · silu(z), in FP32 (B, L, E)."""
    v = y.float() * silu(zxbcdt[..., :d_inner])
    return _grouped_norm(v, ngroups, eps) * weight


def norm_then_gate(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, *, d_inner: int, ngroups: int, eps: float
) -> Tensor:
    """r = y / rms(y in its group) · weight · silu(z), in FP32 (B, L, E)."""
    return _grouped_norm(y.float(), ngroups, eps) * weight * silu(zxbcdt[..., :d_inner])


def _grouped_norm(v: Tensor, ngroups: int, eps: float) -> Tensor:
    grouped = v.unflatten(-1, (ngroups, -1))
    mean_square = grouped.double().square().mean(-1, keepdim=True)
    rstd = (mean_square + eps).sqrt().reciprocal().float()
    return (grouped * rstd).flatten(-2)


def rms_norm_gated_reference(
    y: Tensor,
    zxbcdt: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    d_inner: int,
    ngroups: int,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """Q(H_E · r) with r of `gated_norm`: the gate comes before the norm, as in Mamba-2.

    Args:
        y: (B, L, E) FP16, output of SSD.
        zxbcdt: (B, L, 2E + 2GN + H) FP16; z is its first E columns.
        weight: (E) FP32.
        scale: (1) FP32, of the rotated r in all tokens; with scaling "static" only.
        scaling: of the rotated r, see `int8.quantize_tokens`.

    Returns:
        q (B, L, E) INT8 and token_scale (B, L, 1) FP32: the rotated r ≈ token_scale · q.
    """
    r = gated_norm(y, zxbcdt, weight, d_inner=d_inner, ngroups=ngroups, eps=eps)
    rotated = hadamard.transform(r).float()
    return quantize_tokens(rotated, scaling, scale, rounding, "r")


def norm_then_gate_reference(
    y: Tensor,
    zxbcdt: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    d_inner: int,
    ngroups: int,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_gated_reference`, with r of `norm_then_gate`."""
    r = norm_then_gate(y, zxbcdt, weight, d_inner=d_inner, ngroups=ngroups, eps=eps)
    rotated = hadamard.transform(r).float()
    return quantize_tokens(rotated, scaling, scale, rounding, "r")


def gated_norm_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`gated_norm` as statements: defines `r` (B, L, E) FP32."""
    return [
        *_gate_lines(a, form),
        "v_flat = Mul (y32, gate)",
        *_grouped_norm_lines("v_flat", a, form),
        "r = Mul (v_norm_flat, weight)",
    ]


def norm_then_gate_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`norm_then_gate` as statements: defines `r` (B, L, E) FP32."""
    return [
        *_gate_lines(a, form),
        *_grouped_norm_lines("y32", a, form),
        "weighted = Mul (v_norm_flat, weight)",
        "r = Mul (weighted, gate)",
    ]


def _gate_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`gate`, SiLU of z, and `y32`."""
    return [
        t.slice_last("z16", "zxbcdt", 0, int(a["d_inner"])),
        t.cast("z", "z16", t.FP32),
        silu_lines("gate", "z", t.compute_type(form)),
        t.cast("y32", "y", t.FP32),
    ]


def _grouped_norm_lines(x: str, a: Attributes, form: BodyForm) -> list[str]:
    """`v_norm_flat`: `x` (B, L, E) FP32 without its RMS in each group."""
    e, g = int(a["d_inner"]), int(a["ngroups"])
    return [
        t.ints("grouped", [0, 0, g, e // g]),
        f"v = Reshape ({x}, grouped)",
        *rms_lines("v", "v_norm", float(a["eps"]), t.compute_type(form)),
        t.ints("flat", [0, 0, e]),
        "v_norm_flat = Reshape (v_norm, flat)",
    ]


def _body(a: Attributes, form: BodyForm) -> str:
    return _rotated_body(gated_norm_lines(a, form), a, form)


def _norm_then_gate_body(a: Attributes, form: BodyForm) -> str:
    return _rotated_body(norm_then_gate_lines(a, form), a, form)


def _rotated_body(r_lines: list[str], a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    return "\n".join(
        [
            *r_lines,
            t.cast("r_wide", "r", f),
            t.hadamard_transform("rotated_wide", "r_wide", int(a["d_inner"]), form, leading=2),
            t.cast("rotated", "rotated_wide", t.FP32),
            t.quantize_tokens("quantized", "token_scale", "rotated", a, form),
        ]
    )


def _kernel(name: str, call: Call) -> Any:
    *rows, row = call.zxbcdt.shape
    call.require(torch.float16, y=(*rows, call.d_inner), zxbcdt=(*rows, row))
    call.require(torch.float32, weight=(call.d_inner,))
    call.quantized = call.empty(tuple(call.y.shape), torch.int8)
    call.token_scale = token_scale(call, tuple(rows))
    call.tokens, call.row_stride = math.prod(rows), row
    call.launch(name)
    return call.quantized, call.token_scale


RMS_NORM_GATED = Op(
    name="Ssdi8RmsNormGated",
    outputs=("quantized", "token_scale"),
    reference=rms_norm_gated_reference,
    body=_body,
    kernel=functools.partial(_kernel, "rms_norm_gated"),
)
NORM_THEN_GATE = Op(
    name="Ssdi8NormThenGate",
    outputs=("quantized", "token_scale"),
    reference=norm_then_gate_reference,
    body=_norm_then_gate_body,
    kernel=functools.partial(_kernel, "norm_then_gate"),
)
