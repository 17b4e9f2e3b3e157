"""Outputs from chunk inputs and passed states (BMM and ChunkScan: docs/method.md §5.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.numerics.int8 import round_to_int8
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.ssd.chunk_state import decay_lines
from ssdi8_edge.ops.ssd.chunking import chunks_of_decay, chunks_of_tokens, per_head
from ssdi8_edge.ops.ssd.kernel_checks import (
    GROUP_SCALES,
    chunks,
    passed_type,
    require_decay,
    require_scales,
    require_tokens,
)

# exp of this is zero in every format used; masks decays that would otherwise overflow.
MASKED = -1e30


def chunk_scan_reference(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    dt: Tensor,
    a: Tensor,
    passed: Tensor,
    passed_scale: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    cb_scale: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    rounding: Rounding,
    scaling: Scaling,
) -> Tensor:
    """y = exp(a_m)·C·R (Scan1) + Σ_{k ≤ m} CB · exp(a_m - a_k) · dt_k · x_k (Scan2) + D·x.

    CB = C_q · B_qᵀ in units of cb_scale. With scaling "static" it is INT8, as released, otherwise
    FP16, which Scan2 computes in anyway: the weighted CB is rounded to FP16 and multiplied with the
    FP16 x. With scaling "none" the passed states are FP16 and in real units: passed_scale is not
    read.

    Args:
        x: (B, L, H·P) FP16.
        b_q, c_q: (B, L, G·N) INT8.
        dt, a: (B, H, L) FP32.
        passed: (B, C, H, P, N) INT8 or FP16, and passed_scale: (B, C, H, P) FP32.
        D: (H) FP32.
        b_scale, c_scale, cb_scale: (G) FP32.

    Returns:
        y (B, L, H·P) FP16; the sums are evaluated in FP64 and rounded once.
    """
    x_c = chunks_of_tokens(x, chunk_size, nheads, headdim)  # (B, C, H, K, P)
    b_c = chunks_of_tokens(b_q, chunk_size, ngroups, d_state).float()  # (B, C, G, K, N)
    c_c = chunks_of_tokens(c_q, chunk_size, ngroups, d_state).float()
    dt_c = chunks_of_decay(dt, chunk_size, edge=False).double()
    a_c = chunks_of_decay(a, chunk_size, edge=True).double()
    requantizer = (c_scale * b_scale / cb_scale)[:, None, None]
    step = torch.ones_like(passed_scale) if scaling == "none" else passed_scale
    scan1_scale = (per_head(c_scale, nheads)[:, None] * step).double()  # (B, C, H, P)
    cb_real = per_head(cb_scale, nheads).double()[:, None, None]
    scan1_type = torch.float64 if scaling == "none" else torch.float32  # where integers are exact
    above_diagonal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)

    y = torch.empty(x_c.shape, dtype=torch.float16, device=x.device)
    for c in range(x_c.shape[1]):  # one chunk at a time: CB of all heads is the largest tensor here
        x_k, a_k, dt_k = x_c[:, c].float(), a_c[:, c], dt_c[:, c]
        cb = (c_c[:, c] @ b_c[:, c].transpose(-1, -2)).tril()  # (B, G, K, K)
        cb = cb * requantizer
        cb = round_to_int8(cb, rounding, "CB") if scaling == "static" else to_fp16(cb)
        cb = cb.double().repeat_interleave(nheads // ngroups, 1)  # (B, H, K, K)

        state = passed[:, c].to(scan1_type).unflatten(1, (ngroups, -1)).transpose(-1, -2)
        scan1 = (c_c[:, c, :, None].to(scan1_type) @ state).flatten(1, 2).double()  # (B, H, K, P)
        total = scan1 * scan1_scale[:, c, :, None, :] * torch.exp(a_k)[..., None]

        decay = (a_k[..., None] - a_k[..., None, :]).masked_fill(above_diagonal, MASKED)
        weighted = cb * cb_real * torch.exp(decay) * dt_k[..., None, :]
        total += weighted.float().half().double() @ x_k.double()
        total += D.double()[:, None, None] * x_k.double()
        y[:, c] = total.float().half()
    return y.transpose(2, 3).flatten(1, 2).flatten(2)[:, : x.shape[1]].contiguous()


def to_fp16(v: Tensor) -> Tensor:
    """FP16, with what is beyond its range at its end."""
    end = torch.finfo(torch.float16).max
    return v.clamp(-end, end).half()


def _body(a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    k, h, g, p, n = (
        int(a[key]) for key in ("chunk_size", "nheads", "ngroups", "headdim", "d_state")
    )
    lines = [
        t.chunk_padding("x", 1, k),
        t.pad_to_chunks("x_chunks", "x", 1, [0, -1, k, h, p]),
        "x_chkp = Transpose <perm = [0, 1, 3, 2, 4]> (x_chunks)",
        t.cast("x_wide", "x_chkp", f),
        *decay_lines(k, f),
        t.ints("last", [-1]),
        t.ints("second_last", [-2]),
    ]
    for name in ("b", "c"):
        lines += [
            t.from_int8(f"{name}32", f"{name}_q", form),
            t.pad_to_chunks(f"{name}_chunks", f"{name}32", 1, [0, -1, k, g, n]),
            f"{name}_cgkn = Transpose <perm = [0, 1, 3, 2, 4]> ({name}_chunks)",
        ]
    lines += [
        # CB for all heads of a group at once
        "b_nk = Transpose <perm = [0, 1, 2, 4, 3]> (b_cgkn)",
        "cb = MatMul (c_cgkn, b_nk)",
        "cb_scales = Mul (c_scale, b_scale)",
        "requantizer_g = Div (cb_scales, cb_scale)",
        t.ints("g_shape", [g, 1, 1]),
        "requantizer = Reshape (requantizer_g, g_shape)",
        "cb_steps = Mul (cb, requantizer)",
        *_rounded_cb_lines(a, form),
        # positions
        "zero = Constant <value = int64 {0}> ()",
        "one = Constant <value = int64 {1}> ()",
        f"chunk = Constant <value = int64 {{{k}}}> ()",
        "index = Range (zero, chunk, one)",
        "m = Unsqueeze (index, last)",
        t.ints("first", [0]),
        "k_index = Unsqueeze (index, first)",
        "causal = LessOrEqual (k_index, m)",
        t.number("masked", MASKED, f),
        # Scan1
        t.ints("axis3", [3]),
        *_passed_lines(a, form),
        "passed_np = Transpose <perm = [0, 1, 2, 4, 3]> (passed_real)",
        t.ints("group_heads", [0, 0, g, h // g, n, p]),
        "passed_group = Reshape (passed_np, group_heads)",
        "c_heads = Unsqueeze (c_of_scan1, axis3)",
        "scan1_group = MatMul (c_heads, passed_group)",
        t.ints("head_shape", [0, 0, h, k, p]),
        "scan1_int = Reshape (scan1_group, head_shape)",
        t.cast("scan1_wide", "scan1_int", f),
        t.cast("scan1_scale", "scan1_scale_row", f),
        "scan1_scaled = Mul (scan1_wide, scan1_scale)",
        "a_exp = Exp (a_wide)",
        "a_exp_column = Unsqueeze (a_exp, last)",
        "scan1 = Mul (scan1_scaled, a_exp_column)",
        # Scan2
        "a_m = Unsqueeze (a_wide, last)",
        "a_k = Unsqueeze (a_wide, second_last)",
        "a_difference = Sub (a_m, a_k)",
        "a_masked = Where (causal, a_difference, masked)",
        "decay = Exp (a_masked)",
        "dt_row = Unsqueeze (dt_wide, second_last)",
        "decay_dt = Mul (decay, dt_row)",
        t.per_head("cb_scale_h", "cb_scale", h, g, [h, 1, 1]),
        t.cast("cb_real", "cb_scale_h", f),
        "decay_scaled = Mul (decay_dt, cb_real)",
        t.ints("square_shape", [0, 0, g, h // g, k, k]),
        "decay_group = Reshape (decay_scaled, square_shape)",
        "cb_heads = Unsqueeze (cb_wide, axis3)",
        "weighted = Mul (decay_group, cb_heads)",
        t.cast("weighted32", "weighted", t.FP32),
        t.cast("weighted16", "weighted32", t.FP16),
        t.cast("weighted_rounded", "weighted16", f),
        t.ints("x_group_shape", [0, 0, g, h // g, k, p]),
        "x_group = Reshape (x_wide, x_group_shape)",
        "scan2_group = MatMul (weighted_rounded, x_group)",
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
        t.ints("y_shape", [0, -1, h * p]),
        "y_padded = Reshape (total_khp, y_shape)",
        t.keep_length("y", "y_padded", 1),
    ]
    return "\n".join(lines)


def _passed_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`passed_real` and `c_of_scan1`: integers in FP32, which is exact, or the compute type.
    `scan1_scale_row` (B, C, H, 1, P) or (H, 1, 1): the scale of their products."""
    h, g = int(a["nheads"]), int(a["ngroups"])
    if a["scaling"] == "none":
        f = t.compute_type(form)
        return [
            t.cast("passed_real", "passed", f),
            t.cast("c_of_scan1", "c_cgkn", f),
            t.per_head("scan1_scale_row", "c_scale", h, g, [h, 1, 1]),
        ]
    return [
        t.from_int8("passed_real", "passed", form),
        "c_of_scan1 = Identity (c_cgkn)",
        t.per_head("c_scale_h", "c_scale", h, g, [h, 1]),
        "scan1_scale32 = Mul (c_scale_h, passed_scale)",
        "scan1_scale_row = Unsqueeze (scan1_scale32, axis3)",
    ]


def _rounded_cb_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`cb_wide` from `cb_steps`, in the compute type, by way of INT8 or FP16."""
    f = t.compute_type(form)
    if a["scaling"] == "static":
        return [
            t.round_to_int8("cb_int", "cb_steps", a["rounding"], form),
            t.from_int8("cb_q", "cb_int", form),
            t.cast("cb_wide", "cb_q", f),
        ]
    end = torch.finfo(torch.float16).max
    return [
        t.number("cb_low", -end),
        t.number("cb_high", end),
        "cb_clipped = Clip (cb_steps, cb_low, cb_high)",
        t.cast("cb_16", "cb_clipped", t.FP16),
        t.cast("cb_wide", "cb_16", f),
    ]


def _kernel(call: Call) -> Any:
    require_tokens(call, "b_q", "c_q")
    require_decay(call)
    call.require(torch.float32, D=(call.nheads,))
    rows = (call.batch, chunks(call), call.nheads, call.headdim)
    call.require(passed_type(call), passed=(*rows, call.d_state))
    call.require(torch.float32, passed_scale=rows)
    require_scales(call, GROUP_SCALES, ())
    call.y = call.empty(tuple(call.x.shape), torch.float16)
    call.launch("chunk_scan")
    return call.y


CHUNK_SCAN = Op(
    name="Ssdi8ChunkScan",
    outputs=("y",),
    reference=chunk_scan_reference,
    body=_body,
    kernel=_kernel,
    part="SSD",
)
