"""Chunk states by the sparse-aware reformulation (ChunkState: docs/method.md §5.2, §9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.formats import Gate, Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_by_largest, round_to_int8
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.ssd.chunking import chunks_of_decay, chunks_of_tokens, given, per_head
from ssdi8_edge.ops.ssd.kernel_checks import (
    chunks,
    require_decay,
    require_scales,
    require_tokens,
    state_type,
)
from ssdi8_edge.ops.ssd.passing import require_one_scale


def chunk_state_reference(
    x: Tensor,
    b_q: Tensor,
    dt: Tensor,
    a: Tensor,
    b_scale: Tensor,
    x_scale: Tensor | None = None,
    state_scale: Tensor | None = None,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    gate: Gate,
    rounding: Rounding,
    scaling: Scaling,
) -> Tensor:
    """S[p, n] = Σ_k Q(w_k · x[k, p]) · B_q[k, n] with w_k = exp(a_last - a_k) · dt_k (LUT_state).

    Scaling x instead of B is exact, since w depends on the contracted index only, and lets the
    INT8 B be quantized once before the group-to-head broadcast. With scaling "dynamic" each (chunk,
    head, channel) of w · x has its own scale, from its largest value: it is a row of the product.
    With scaling "none" Q is FP16(FP16(w) · x), the sum is evaluated in FP64 and rounded to FP32,
    and the states to FP16.

    Args:
        x: (B, L, H·P) FP16.
        b_q: (B, L, G·N) INT8.
        dt, a: (B, H, L) FP32.
        b_scale: (G) FP32.
        x_scale: (H, P) FP32, of w · x, and state_scale: (H, P) FP32, of the stored states; both for
            scaling "static" only.

    Returns:
        (B, C, H, P, N): with gate "fp32" the states in real units, FP32 or with scaling "none"
        FP16; with gate "q0.7" INT8 in units of state_scale.

    Raises:
        ValueError: gate "q0.7" without scaling "static": its integer carry needs one scale.
    """
    require_one_scale(gate, scaling)
    x_c = chunks_of_tokens(x, chunk_size, nheads, headdim).float()  # (B, C, H, K, P)
    b_c = chunks_of_tokens(b_q, chunk_size, ngroups, d_state).float()  # (B, C, G, K, N)
    dt_c = chunks_of_decay(dt, chunk_size, edge=False)
    a_c = chunks_of_decay(a, chunk_size, edge=True).double()

    w = (torch.exp(a_c[..., -1:] - a_c) * dt_c.double()).float()[..., None]
    scale_of_b = per_head(b_scale, nheads)[:, None]
    if scaling == "none":
        v = (x_c * w.half().float()).half().double().unflatten(2, (ngroups, -1))
        total = (v.transpose(-1, -2) @ b_c.double()[:, :, :, None]).flatten(2, 3)
        return (total.float() * scale_of_b[..., None]).half()
    if scaling == "dynamic":
        v_q, step = quantize_by_largest(x_c * w, -2, rounding)
        step = step.squeeze(-2)  # (B, C, H, P)
    else:
        step = given(x_scale, "x_scale")
        v_q = round_to_int8((x_c * step.reciprocal()[:, None, :]) * w, rounding, "x_scaled")
    v_g = v_q.float().unflatten(2, (ngroups, -1))  # (B, C, G, H/G, K, P)
    accumulator = (v_g.transpose(-1, -2) @ b_c[:, :, :, None]).flatten(2, 3)

    multiplier = step * scale_of_b
    if gate == "fp32":
        return accumulator * multiplier[..., None]
    requantized = accumulator * (multiplier / given(state_scale, "state_scale"))[..., None]
    return round_to_int8(requantized, rounding, "chunk_state")


def _body(a: Attributes, form: BodyForm) -> str:
    require_one_scale(a["gate"], a["scaling"])
    f = t.compute_type(form)
    k, h, g = int(a["chunk_size"]), int(a["nheads"]), int(a["ngroups"])
    p = int(a["headdim"])
    lines = [
        t.chunk_padding("x", 1, k),
        t.pad_to_chunks("x_chunks", "x", 1, [0, -1, k, h, p]),
        t.cast("x32", "x_chunks", t.FP32),
        "x_chkp = Transpose <perm = [0, 1, 3, 2, 4]> (x32)",
        t.from_int8("b32", "b_q", form),
        t.pad_to_chunks("b_chunks", "b32", 1, [0, -1, k, g, int(a["d_state"])]),
        "b_cgkn = Transpose <perm = [0, 1, 3, 2, 4]> (b_chunks)",
        *decay_lines(k, f),
        "a_last_minus = Sub (a_last, a_wide)",
        "a_last_exp = Exp (a_last_minus)",
        "w_wide = Mul (a_last_exp, dt_wide)",
        t.ints("last", [-1]),
        t.cast("w", "w_wide", t.FP32),
        "w_column = Unsqueeze (w, last)",
        *_quantized_lines(a, form),
        "v_pk = Transpose <perm = [0, 1, 2, 4, 3]> (v_q)",
        t.ints("v_group_shape", [0, 0, g, -1, k]),
        "v_group = Reshape (v_pk, v_group_shape)",
        t.cast("b_heads", "b_cgkn", f if a["scaling"] == "none" else t.FP32),
        "accumulator_wide = MatMul (v_group, b_heads)",
        t.cast("accumulator_group", "accumulator_wide", t.FP32),
        t.ints("state_shape", [0, 0, h, p, -1]),
        "accumulator = Reshape (accumulator_group, state_shape)",
        t.per_head("b_scale_h", "b_scale", h, g, [h, 1]),
        "multiplier = Mul (step, b_scale_h)",
    ]
    if a["gate"] == "fp32":
        lines += [
            "multiplier_column = Unsqueeze (multiplier, last)",
            "states_32 = Mul (accumulator, multiplier_column)",
            t.cast("states", "states_32", t.FP16 if a["scaling"] == "none" else t.FP32),
        ]
    else:
        lines += [
            "requantizer = Div (multiplier, state_scale)",
            "requantizer_column = Unsqueeze (requantizer, last)",
            "requantized = Mul (accumulator, requantizer_column)",
            t.round_to_int8("states", "requantized", a["rounding"], form),
        ]
    return "\n".join(lines)


def _quantized_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`v_q` (B, C, H, K, P), as whole numbers in FP32, and its `step`, (B, C, H, P) or (H, P);
    with scaling "none" in real units, and 1."""
    if a["scaling"] == "none":
        return [
            t.cast("w_16", "w_column", t.FP16),
            t.cast("w_rounded", "w_16", t.FP32),
            "v = Mul (x_chkp, w_rounded)",
            t.cast("v_16", "v", t.FP16),
            t.cast("v_q", "v_16", t.compute_type(form)),
            t.number("step", 1.0),
        ]
    if a["scaling"] == "dynamic":
        return [
            "v = Mul (x_chkp, w_column)",
            t.quantize_by_largest("v_int", "step_row", "v", 3, a["rounding"], form),
            t.from_int8("v_q", "v_int", form),
            t.ints("k_of_step", [3]),
            "step = Squeeze (step_row, k_of_step)",
        ]
    return [
        t.ints("scale_row", [int(a["nheads"]), 1, int(a["headdim"])]),
        "x_scale_row = Reshape (x_scale, scale_row)",
        t.inverse("x_inverse", "x_scale_row", form),
        "x_steps = Mul (x_chkp, x_inverse)",
        "v = Mul (x_steps, w_column)",
        t.round_to_int8("v_int", "v", a["rounding"], form),
        t.from_int8("v_q", "v_int", form),
        "step = Identity (x_scale)",
    ]


def decay_lines(chunk: int | str, f: int) -> list[str]:
    """`dt_wide`, `a_wide` (B, C, H, K) and `a_last` (B, C, H, 1) in the compute type.

    After `onnx_text.chunk_padding`; `chunk` is the number of tokens, or the tensor that holds it.
    """
    return [
        t.pad_to_chunks("dt_hc", "dt", 2, [0, 0, "chunk_count", chunk]),
        "dt_ch = Transpose <perm = [0, 2, 1, 3]> (dt_hc)",
        t.cast("dt_wide", "dt_ch", f),
        t.pad_to_chunks("a_hc", "a", 2, [0, 0, "chunk_count", chunk], mode="edge"),
        "a_ch = Transpose <perm = [0, 2, 1, 3]> (a_hc)",
        t.cast("a_wide", "a_ch", f),
        t.ints("k_axis", [3]),
        "a_last = Slice (a_wide, chunk_less_one, chunk_tokens, k_axis)",
    ]


def _kernel(call: Call) -> Any:
    require_tokens(call, "b_q")
    require_decay(call)
    require_scales(call, ("b_scale",), ("x_scale", "state_scale"))
    shape = (call.batch, chunks(call), call.nheads, call.headdim, call.d_state)
    call.states = call.empty(shape, state_type(call))
    call.launch("chunk_state")
    return call.states


CHUNK_STATE = Op(
    name="Ssdi8ChunkState",
    outputs=("states",),
    reference=chunk_state_reference,
    body=_body,
    kernel=_kernel,
    part="SSD",
)
