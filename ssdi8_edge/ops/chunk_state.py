"""Chunk states by the sparse-aware reformulation (the paper's ChunkState, SAR)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.formats import DecayScale, Gate, Rounding
from ssdi8_edge.int8 import round_to_int8
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.chunking import chunks_of_decay, chunks_of_tokens, per_head, split_peak
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def chunk_state_reference(
    x: Tensor,
    b_q: Tensor,
    dt: Tensor,
    a: Tensor,
    x_scale: Tensor,
    b_scale: Tensor,
    state_scale: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    gate: Gate,
    rounding: Rounding,
    decay_scale: DecayScale,
) -> Tensor:
    """S[p, n] = Σ_k Q(w_k · x[k, p]) · B_q[k, n] with w_k = exp(a_last - a_k) · dt_k (LUT_state).

    Scaling x instead of B is exact, since w depends on the contracted index only, and lets the
    INT8 B be quantized once before the group-to-head broadcast. With decay_scale "peak" the largest
    w_k of a chunk and head is taken out before x is rounded and multiplied back in afterwards.

    Args:
        x: (B, L, H·P) FP16.
        b_q: (B, L, G·N) INT8.
        dt, a: (B, H, L) FP32.
        x_scale: (H, P) FP32, of w · x; with decay_scale "peak" of (w / peak) · x.
        b_scale: (G) FP32.
        state_scale: (H, P) FP32, of the stored states.

    Returns:
        (B, C, H, P, N): with gate "fp32" the states in FP32, in real units; with gate "q0.7" INT8
        in units of state_scale.

    Raises:
        ValueError: gate "q0.7" with decay_scale "peak": its integer carry needs one scale.
    """
    _require_one_scale(gate, decay_scale)
    x_c = chunks_of_tokens(x, chunk_size, nheads, headdim).float()  # (B, C, H, K, P)
    b_c = chunks_of_tokens(b_q, chunk_size, ngroups, d_state).float()  # (B, C, G, K, N)
    dt_c = chunks_of_decay(dt, chunk_size, edge=False)
    a_c = chunks_of_decay(a, chunk_size, edge=True).double()

    w, peak = split_peak(torch.exp(a_c[..., -1:] - a_c) * dt_c.double(), decay_scale)
    v = (x_c * x_scale.reciprocal()[:, None, :]) * w[..., None]
    v_q = round_to_int8(v, rounding, "x_scaled").float()
    v_g = v_q.unflatten(2, (ngroups, -1))  # (B, C, G, H/G, K, P)
    accumulator = (v_g.transpose(-1, -2) @ b_c[:, :, :, None]).flatten(2, 3)

    multiplier = x_scale * per_head(b_scale, nheads)[:, None]
    if gate == "fp32":
        return accumulator * (multiplier * peak.float())[..., None]
    requantized = accumulator * (multiplier / state_scale)[..., None]
    return round_to_int8(requantized, rounding, "chunk_state")


def _require_one_scale(gate: Gate, decay_scale: DecayScale) -> None:
    if gate == "q0.7" and decay_scale != "static":
        raise ValueError(f'gate "q0.7" needs decay_scale "static", not "{decay_scale}"')


def _body(a: Attributes, form: BodyForm) -> str:
    _require_one_scale(a["gate"], a["decay_scale"])
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
        t.split_peak("w", "peak_wide", "w_wide", a["decay_scale"], form),
        "w_column = Unsqueeze (w, last)",
        t.ints("scale_row", [h, 1, p]),
        "x_scale_row = Reshape (x_scale, scale_row)",
        t.inverse("x_inverse", "x_scale_row", form),
        "x_steps = Mul (x_chkp, x_inverse)",
        "v = Mul (x_steps, w_column)",
        t.round_to_int8("v_int", "v", a["rounding"], form),
        t.from_int8("v_q", "v_int", form),
        "v_pk = Transpose <perm = [0, 1, 2, 4, 3]> (v_q)",
        t.ints("v_group_shape", [0, 0, g, -1, k]),
        "v_group = Reshape (v_pk, v_group_shape)",
        "accumulator_group = MatMul (v_group, b_cgkn)",
        t.ints("state_shape", [0, 0, h, p, -1]),
        "accumulator = Reshape (accumulator_group, state_shape)",
        t.per_head("b_scale_h", "b_scale", h, g, [h, 1]),
        "multiplier = Mul (x_scale, b_scale_h)",
    ]
    if a["gate"] == "fp32":
        in_real = "multiplier"
        if a["decay_scale"] == "peak":
            in_real = "multiplier_peak"
            lines += [
                t.cast("peak", "peak_wide", t.FP32),
                "multiplier_peak = Mul (multiplier, peak)",
            ]
        lines += [
            f"multiplier_column = Unsqueeze ({in_real}, last)",
            "states = Mul (accumulator, multiplier_column)",
        ]
    else:
        lines += [
            "requantizer = Div (multiplier, state_scale)",
            "requantizer_column = Unsqueeze (requantizer, last)",
            "requantized = Mul (accumulator, requantizer_column)",
            t.round_to_int8("states", "requantized", a["rounding"], form),
        ]
    return "\n".join(lines)


def decay_lines(chunk: int | str, f: int) -> list[str]:
    """`dt_wide`, `a_wide` (B, C, H, K) and `a_last` (B, C, H, 1) in the compute type.

    After `onnx_text.chunk_padding`; `chunk` is the number of tokens, or the tensor that holds it.
    """
    return [
        t.pad_to_chunks("dt_hc", "dt", 2, [0, 0, -1, chunk]),
        "dt_ch = Transpose <perm = [0, 2, 1, 3]> (dt_hc)",
        t.cast("dt_wide", "dt_ch", f),
        t.pad_to_chunks("a_hc", "a", 2, [0, 0, -1, chunk], mode="edge"),
        "a_ch = Transpose <perm = [0, 2, 1, 3]> (a_hc)",
        t.cast("a_wide", "a_ch", f),
        t.ints("k_axis", [3]),
        "a_last = Slice (a_wide, chunk_less_one, chunk_tokens, k_axis)",
    ]


CHUNK_STATE = Op(
    name="Ssdi8ChunkState",
    outputs=("states",),
    reference=chunk_state_reference,
    body=_body,
)
