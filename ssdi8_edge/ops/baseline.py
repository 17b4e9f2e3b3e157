"""The ops of the FP16 baseline.

None has a plugin: their bodies are inlined, so that TensorRT builds the baseline from standard ops.
FP16 between ops, FP32 or wider inside them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.causal_conv1d import convolution_lines, convolve
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.rms_norm import rms_lines
from ssdi8_edge.ops.rms_norm_gated import (
    gated_norm,
    gated_norm_lines,
    norm_then_gate,
    norm_then_gate_lines,
)
from ssdi8_edge.ops.ssd.chunk_state import decay_lines
from ssdi8_edge.ops.ssd.cumsum import time_step_lines
from ssdi8_edge.ops.ssd.float import ssd_chunked
from ssdi8_edge.ops.ssd.kernel_checks import require_state, require_tokens
from ssdi8_edge.ops.ssd.passing import DECAY, scan_over_chunks
from ssdi8_edge.ops.ssd.scan import MASKED


def rms_norm_reference(
    hidden: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """residual' = residual + hidden (B, L, D) FP32; u = FP16(residual' / rms · weight)."""
    residual = residual + hidden.float()
    mean_square = residual.double().square().mean(-1, keepdim=True)
    rstd = (mean_square + eps).sqrt().reciprocal().float()
    return residual, (residual * rstd * weight).half()


def _rms_norm_kernel(call: Call) -> Any:
    shape = tuple(call.residual.shape)
    call.require(torch.float16, hidden=shape)
    call.require(torch.float32, residual=shape, weight=shape[-1:])
    call.residual_out = call.empty(shape, torch.float32)
    call.normed = call.empty(shape, torch.float16)
    call.tokens, call.d_model = math.prod(shape[:-1]), shape[-1]
    call.launch("fp16_rms_norm")
    return call.residual_out, call.normed


def _rms_norm_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            t.cast("hidden32", "hidden", t.FP32),
            "residual_out = Add (residual, hidden32)",
            *rms_lines("residual_out", "u", float(a["eps"]), t.compute_type(form)),
            "weighted = Mul (u, weight)",
            t.cast("normed", "weighted", t.FP16),
        ]
    )


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """FP16(x · weightᵀ): x (B, L, In) and weight (Out, In) FP16, FP32 accumulation."""
    return (x.float() @ weight.float().t()).half()


def _linear_kernel(call: Call) -> Any:
    out, width = call.weight.shape
    *rows, _ = call.x.shape
    call.require(torch.float16, weight=(out, width), x=(*rows, width))
    call.y = call.empty((*rows, out), torch.float16)
    call.tokens, call.in_features, call.out_features = math.prod(rows), width, out
    call.launch("fp16_linear")
    return call.y


def _linear_body(a: Attributes, form: BodyForm) -> str:
    if form == "tensorrt":  # FP16 operands: TensorRT accumulates in FP32 by itself
        return "weight_t = Transpose <perm = [1, 0]> (weight)\ny = MatMul (x, weight_t)"
    return "\n".join(
        [
            t.cast("x32", "x", t.FP32),
            t.cast("weight32", "weight", t.FP32),
            "weight_t = Transpose <perm = [1, 0]> (weight32)",
            "y32 = MatMul (x32, weight_t)",
            t.cast("y", "y32", t.FP16),
        ]
    )


def linear_bias_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """FP16(x · weightᵀ + bias): as `linear_reference`, with bias (Out) FP32."""
    return (x.float() @ weight.float().t() + bias).half()


def _linear_bias_body(a: Attributes, form: BodyForm) -> str:
    operands = [t.cast("x_wide", "x", t.FP32), t.cast("weight_wide", "weight", t.FP32)]
    if form == "tensorrt":  # as `_linear_body`
        operands = ["x_wide = Identity (x)", "weight_wide = Identity (weight)"]
    return "\n".join(
        [
            *operands,
            "weight_t = Transpose <perm = [1, 0]> (weight_wide)",
            "product = MatMul (x_wide, weight_t)",
            t.cast("product32", "product", t.FP32),
            "y32 = Add (product32, bias)",
            t.cast("y", "y32", t.FP16),
        ]
    )


def causal_conv1d_reference(
    zxbcdt: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    d_inner: int,
    conv_dim: int,
    d_conv: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the INT8 op, with B and C (B, L, G·N) in FP16."""
    activated, state = convolve(
        zxbcdt, conv_state, weight, bias, d_inner=d_inner, conv_dim=conv_dim, d_conv=d_conv
    )
    gn = (conv_dim - d_inner) // 2
    x, b, c = activated.half().split([d_inner, gn, gn], -1)
    return x, b, c, state


def _causal_conv1d_kernel(call: Call) -> Any:
    call.batch, call.length, call.row_stride = call.zxbcdt.shape
    tokens = (call.batch, call.length)
    call.require(torch.float16, zxbcdt=(*tokens, call.row_stride))
    call.require(torch.float16, conv_state=(call.batch, call.d_conv - 1, call.conv_dim))
    call.require(torch.float32, weight=(call.conv_dim, call.d_conv), bias=(call.conv_dim,))
    columns = (call.conv_dim - call.d_inner) // 2
    call.x = call.empty((*tokens, call.d_inner), torch.float16)
    call.b = call.empty((*tokens, columns), torch.float16)
    call.c = call.empty((*tokens, columns), torch.float16)
    call.conv_state_out = call.next_state(call.conv_state)
    call.launch("fp16_causal_conv1d")
    return call.x, call.b, call.c, call.conv_state_out


def _causal_conv1d_body(a: Attributes, form: BodyForm) -> str:
    e, conv_dim = int(a["d_inner"]), int(a["conv_dim"])
    gn = (conv_dim - e) // 2
    return "\n".join(
        [
            *convolution_lines(a, form),
            t.cast("activated16", "activated", t.FP16),
            t.slice_last("x", "activated16", 0, e),
            t.slice_last("b", "activated16", e, e + gn),
            t.slice_last("c", "activated16", e + gn, conv_dim),
        ]
    )


def ssd_scan_reference(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    zxbcdt: Tensor,
    ssm_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    dt_column: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """SSD without quantization; one token is a chunk of one.

    Returns y (B, L, H·P) FP16 and ssm_state' in the type of ssm_state.
    """
    x_h = x.unflatten(-1, (nheads, headdim)).float()
    b_g = b.unflatten(-1, (ngroups, d_state)).float()
    c_g = c.unflatten(-1, (ngroups, d_state)).float()
    dt_raw = zxbcdt[..., dt_column : dt_column + nheads].float()
    arguments = (x_h, dt_raw, dt_bias, A, b_g, c_g, D)
    y, final = ssd_chunked(
        *arguments,
        chunk_size=chunk_size,
        dt_limit=(dt_min, dt_max),
        initial_state=ssm_state.float(),
    )
    return y.half().flatten(2), final.to(ssm_state.dtype)


def _ssd_scan_kernel(call: Call) -> Any:
    require_tokens(call)
    columns = (call.batch, call.length, call.ngroups * call.d_state)
    call.require(torch.float16, b=columns, c=columns)
    call.row_stride = call.zxbcdt.shape[2]
    call.require(torch.float16, zxbcdt=(call.batch, call.length, call.row_stride))
    call.require(torch.float32, **{name: (call.nheads,) for name in ("dt_bias", "A", "D")})
    require_state(call, call.batch, call.nheads, call.headdim, call.d_state)
    call.y = call.empty(tuple(call.x.shape), torch.float16)
    call.launch("fp16_ssd_scan")
    return call.y, call.ssm_state_out


def _ssd_scan_body(a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    kind = "double" if form == "cpu" else "float"
    h, g, p, n = (int(a[key]) for key in ("nheads", "ngroups", "headdim", "d_state"))
    # No size is left to be inferred: from what, TensorRT could bound it by guessing only.
    chunks, k = "chunk_count", "chunk_tokens"
    lines = [
        *time_step_lines(a, form),
        "dt = Transpose <perm = [0, 2, 1]> (dt_blh)",
        t.chunk_padding("x", 1, int(a["chunk_size"]), shrink=True),
        t.pad_to_chunks("dt_chunks", "dt", 2, [0, 0, chunks, k]),
        t.cast("dt_hck", "dt_chunks", f),
        t.cast("A_chunk", "A", f),
        t.ints("A_shape", [h, 1, 1]),
        "A_row = Reshape (A_chunk, A_shape)",
        "decay_steps = Mul (dt_hck, A_row)",
        "axis_k = Constant <value = int64 {3}> ()",
        "cumulative = CumSum (decay_steps, axis_k)",
        t.shape("flat_shape", [0, 0, "padded_length"]),
        "a_padded = Reshape (cumulative, flat_shape)",
        t.keep_length("a", "a_padded", 2),
        *decay_lines(k, f),
        t.ints("last", [-1]),
        t.ints("second_last", [-2]),
        t.ints("axis3", [3]),
        t.pad_to_chunks("x_chunks", "x", 1, [0, chunks, k, h, p]),
        "x_chkp = Transpose <perm = [0, 1, 3, 2, 4]> (x_chunks)",
        t.cast("x_wide", "x_chkp", f),
        t.shape("x_group_shape", [0, 0, g, h // g, k, p]),
        "x_group = Reshape (x_wide, x_group_shape)",
    ]
    for name in ("b", "c"):
        lines += [
            t.pad_to_chunks(f"{name}_chunks", name, 1, [0, chunks, k, g, n]),
            f"{name}_cgkn16 = Transpose <perm = [0, 1, 3, 2, 4]> ({name}_chunks)",
            t.cast(f"{name}_cgkn", f"{name}_cgkn16", f),
            f"{name}_heads = Unsqueeze ({name}_cgkn, axis3)",
        ]
    lines += [
        "a_left = Sub (a_last, a_wide)",
        "a_left_exp = Exp (a_left)",
        "w = Mul (a_left_exp, dt_wide)",
        "w_column = Unsqueeze (w, last)",
        "x_weighted = Mul (x_wide, w_column)",
        "x_weighted_group = Reshape (x_weighted, x_group_shape)",
        "x_weighted_pk = Transpose <perm = [0, 1, 2, 3, 5, 4]> (x_weighted_group)",
        "states_group = MatMul (x_weighted_pk, b_heads)",
        t.ints("state_shape", [0, 0, h, p, n]),
        "states = Reshape (states_group, state_shape)",
        "states_c = Transpose <perm = [1, 0, 2, 3, 4]> (states)",
        "a_last_exp = Exp (a_last)",
        "gamma_bc = Unsqueeze (a_last_exp, last)",
        "gamma = Transpose <perm = [1, 0, 2, 3, 4]> (gamma_bc)",
        t.cast("start", "ssm_state", f),
        scan_over_chunks("start", "gamma", "states_c", kind, DECAY),
        "ssm_state_out = CastLike (final, ssm_state)",
        t.ints("entering_shape", [0, 0, g, h // g, n, p]),
        "entering_np = Transpose <perm = [1, 0, 2, 4, 3]> (entering_c)",  # (B, C, H, N, P)
        "entering_group = Reshape (entering_np, entering_shape)",
        "scan1_group = MatMul (c_heads, entering_group)",
        t.shape("head_shape", [0, 0, h, k, p]),
        "scan1_raw = Reshape (scan1_group, head_shape)",
        "a_exp = Exp (a_wide)",
        "a_exp_column = Unsqueeze (a_exp, last)",
        "scan1 = Mul (scan1_raw, a_exp_column)",
        "b_nk = Transpose <perm = [0, 1, 2, 4, 3]> (b_cgkn)",
        "cb_group = MatMul (c_cgkn, b_nk)",
        "cb = Unsqueeze (cb_group, axis3)",
        "zero = Constant <value = int64 {0}> ()",
        "one = Constant <value = int64 {1}> ()",
        t.ints("first", [0]),
        "chunk = Squeeze (chunk_tokens, first)",
        "index = Range (zero, chunk, one)",
        "m = Unsqueeze (index, last)",
        "k_index = Unsqueeze (index, first)",
        "causal = LessOrEqual (k_index, m)",
        t.number("masked", MASKED, f),
        "a_m = Unsqueeze (a_wide, last)",
        "a_k = Unsqueeze (a_wide, second_last)",
        "a_difference = Sub (a_m, a_k)",
        "a_masked = Where (causal, a_difference, masked)",
        "decay = Exp (a_masked)",
        "dt_row = Unsqueeze (dt_wide, second_last)",
        "decay_dt = Mul (decay, dt_row)",
        t.shape("square_shape", [0, 0, g, h // g, k, k]),
        "decay_group = Reshape (decay_dt, square_shape)",
        "weighted = Mul (decay_group, cb)",
        "scan2_group = MatMul (weighted, x_group)",
        "scan2 = Reshape (scan2_group, head_shape)",
        "scans = Add (scan1, scan2)",
        t.ints("d_shape", [h, 1, 1]),
        "d_column = Reshape (D, d_shape)",
        t.cast("d_wide", "d_column", f),
        "skip = Mul (x_wide, d_wide)",
        "total = Add (scans, skip)",
        t.cast("total32", "total", t.FP32),
        t.cast("total16", "total32", t.FP16),
        "total_khp = Transpose <perm = [0, 1, 3, 2, 4]> (total16)",
        t.shape("y_shape", [0, "padded_length", h * p]),
        "y_padded = Reshape (total_khp, y_shape)",
        t.keep_length("y", "y_padded", 1),
    ]
    return "\n".join(lines)


def rms_norm_gated_reference(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, *, eps: float, d_inner: int, ngroups: int
) -> Tensor:
    """`gated_norm` in FP16 (B, L, E), no rotation."""
    return gated_norm(y, zxbcdt, weight, d_inner=d_inner, ngroups=ngroups, eps=eps).half()


def _rms_norm_gated_kernel(call: Call) -> Any:
    *rows, row = call.zxbcdt.shape
    call.require(torch.float16, y=(*rows, call.d_inner), zxbcdt=(*rows, row))
    call.require(torch.float32, weight=(call.d_inner,))
    call.normed = call.empty((*rows, call.d_inner), torch.float16)
    call.tokens, call.row_stride = math.prod(rows), row
    call.launch("fp16_rms_norm_gated")
    return call.normed


def _rms_norm_gated_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join([*gated_norm_lines(a, form), t.cast("normed", "r", t.FP16)])


def norm_then_gate_reference(
    y: Tensor, zxbcdt: Tensor, weight: Tensor, *, eps: float, d_inner: int, ngroups: int
) -> Tensor:
    """`norm_then_gate` in FP16 (B, L, E), no rotation."""
    return norm_then_gate(y, zxbcdt, weight, d_inner=d_inner, ngroups=ngroups, eps=eps).half()


def _norm_then_gate_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join([*norm_then_gate_lines(a, form), t.cast("normed", "r", t.FP16)])


RMS_NORM = Op(
    name="RmsNorm",
    outputs=("residual_out", "normed"),
    reference=rms_norm_reference,
    body=_rms_norm_body,
    kernel=_rms_norm_kernel,
    plugin=False,
)
LINEAR = Op(
    name="Linear",
    outputs=("y",),
    reference=linear_reference,
    body=_linear_body,
    kernel=_linear_kernel,
    in_torch=torch.nn.functional.linear,  # cuBLAS
    plugin=False,
)
LINEAR_BIAS = Op(
    name="LinearBias",
    outputs=("y",),
    reference=linear_bias_reference,
    body=_linear_bias_body,
    plugin=False,
)
CAUSAL_CONV1D = Op(
    name="CausalConv1d",
    outputs=("x", "b", "c", "conv_state_out"),
    reference=causal_conv1d_reference,
    body=_causal_conv1d_body,
    kernel=_causal_conv1d_kernel,
    plugin=False,
)
SSD_SCAN = Op(
    name="SsdScan",
    outputs=("y", "ssm_state_out"),
    reference=ssd_scan_reference,
    body=_ssd_scan_body,
    kernel=_ssd_scan_kernel,
    plugin=False,
    part="SSD",
)
RMS_NORM_GATED = Op(
    name="RmsNormGated",
    outputs=("normed",),
    reference=rms_norm_gated_reference,
    body=_rms_norm_gated_body,
    kernel=_rms_norm_gated_kernel,
    plugin=False,
)
NORM_THEN_GATE = Op(
    name="NormThenGate",
    outputs=("normed",),
    reference=norm_then_gate_reference,
    body=_norm_then_gate_body,
    plugin=False,
)
