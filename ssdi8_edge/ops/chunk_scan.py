"""Outputs from chunk inputs and passed states (the paper's BMM and ChunkScan)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.formats import Rounding, Scaling
from ssdi8_edge.int8 import quantize_by_largest, round_to_int8
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.chunk_state import decay_lines
from ssdi8_edge.ops.chunking import chunks_of_decay, chunks_of_tokens, given, per_head
from ssdi8_edge.ops.op import Attributes, BodyForm, Op

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
    x_tile_scale: Tensor | None = None,
    *,
    chunk_size: int,
    scan_tile: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    rounding: Rounding,
    scaling: Scaling,
) -> Tensor:
    """y = exp(a_m)·C·R (Scan1) + Σ_{k ≤ m} CB · exp(a_m - a_k) · dt_k · x_k (Scan2) + D·x.

    CB = Q(C_q · B_qᵀ) is INT8. Scan2 is cut into tiles of `scan_tile` positions. On the diagonal
    the weighted CB is rounded to FP16 and multiplied with the FP16 x. Left of it, with r the decay
    at the end of the tile of k, exp(a_m - a_k) = exp(a_m - r) · exp(r - a_k): the second factor
    goes into an INT8 x once per tile, the first into the epilogue of an INT8 product. With
    scan_tile = chunk_size all of Scan2 is FP16, as released.

    With scaling "dynamic" each (tile, head, channel) of the INT8 x has its own scale, from its
    largest value, and CB on the diagonal, which no INT8 product takes, is rounded to FP16 instead;
    so with "none", whose passed states are FP16 and in real units: passed_scale is not read.

    Args:
        x: (B, L, H·P) FP16.
        b_q, c_q: (B, L, G·N) INT8.
        dt, a: (B, H, L) FP32.
        passed: (B, C, H, P, N) INT8 or FP16, and passed_scale: (B, C, H, P) FP32.
        D: (H) FP32.
        b_scale, c_scale, cb_scale: (G) FP32.
        x_tile_scale: (H, P) FP32, of exp(r - a_k) · dt_k · x_k; for scaling "static" with
            scan_tile < chunk_size only.

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
    tile_of = torch.arange(chunk_size, device=x.device) // scan_tile
    in_fp16 = (tile_of[:, None] == tile_of) & (scaling != "static")
    scan1_type = torch.float64 if scaling == "none" else torch.float32  # where integers are exact
    above_diagonal = torch.ones(scan_tile, scan_tile, dtype=torch.bool, device=x.device).triu(1)

    y = torch.empty(x_c.shape, dtype=torch.float16, device=x.device)
    for c in range(x_c.shape[1]):  # one chunk at a time: CB of all heads is the largest tensor here
        x_k, a_k, dt_k = x_c[:, c].float(), a_c[:, c], dt_c[:, c]
        cb = (c_c[:, c] @ b_c[:, c].transpose(-1, -2)).tril()  # (B, G, K, K)
        cb = cb * requantizer
        cb_q = round_to_int8(cb.masked_fill(in_fp16, 0), rounding, "CB").double()
        cb_h = torch.where(in_fp16, to_fp16(cb).double(), cb_q)
        cb_h = cb_h.repeat_interleave(nheads // ngroups, 1)  # (B, H, K, K)

        state = passed[:, c].to(scan1_type).unflatten(1, (ngroups, -1)).transpose(-1, -2)
        scan1 = (c_c[:, c, :, None].to(scan1_type) @ state).flatten(1, 2).double()  # (B, H, K, P)
        total = scan1 * scan1_scale[:, c, :, None, :] * torch.exp(a_k)[..., None]

        for start in range(0, chunk_size, scan_tile):
            m = slice(start, min(start + scan_tile, chunk_size))
            difference = a_k[..., m, None] - a_k[..., None, m]
            above = above_diagonal[: difference.shape[-1], : difference.shape[-1]]
            decay = difference.masked_fill(above, MASKED)
            weighted = cb_h[..., m, m] * cb_real * torch.exp(decay) * dt_k[..., None, m]
            total[..., m, :] += weighted.float().half().double() @ x_k[..., m, :].double()

        for end in range(scan_tile, chunk_size, scan_tile):
            k = slice(end - scan_tile, end)
            r = a_k[..., end - 1 : end]
            w = (torch.exp(r - a_k[..., k]) * dt_k[..., k]).float()[..., None]
            if scaling == "dynamic":
                x_q, step = quantize_by_largest(x_k[..., k, :] * w, -2, rounding)
            else:
                step = given(x_tile_scale, "x_tile_scale")[:, None, :]
                x_q = round_to_int8(x_k[..., k, :] * step.reciprocal() * w, rounding, "x_tile")
            product = cb_h[..., end:, k] @ x_q.double()
            row = torch.exp(a_k[..., end:] - r)[..., None]
            total[..., end:, :] += row * product * (cb_real * step.double())

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
    tile = int(a["scan_tile"])
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
        # CB for all heads of a group at once: INT8 `cb_q`, and `cb_wide` for the diagonal
        "b_nk = Transpose <perm = [0, 1, 2, 4, 3]> (b_cgkn)",
        "cb = MatMul (c_cgkn, b_nk)",
        "cb_scales = Mul (c_scale, b_scale)",
        "requantizer_g = Div (cb_scales, cb_scale)",
        t.ints("g_shape", [g, 1, 1]),
        "requantizer = Reshape (requantizer_g, g_shape)",
        "cb_steps = Mul (cb, requantizer)",
        t.round_to_int8("cb_int", "cb_steps", a["rounding"], form),
        t.from_int8("cb_q", "cb_int", form),
        *_diagonal_cb_lines("cb_q" if a["scaling"] == "static" else "cb_steps", f),
        # positions and tiles
        "zero = Constant <value = int64 {0}> ()",
        "one = Constant <value = int64 {1}> ()",
        f"chunk = Constant <value = int64 {{{k}}}> ()",
        f"tile = Constant <value = int64 {{{tile}}}> ()",
        "index = Range (zero, chunk, one)",
        "m = Unsqueeze (index, last)",
        t.ints("first", [0]),
        "k_index = Unsqueeze (index, first)",
        "m_tile = Div (m, tile)",
        "k_tile = Div (k_index, tile)",
        "causal = LessOrEqual (k_index, m)",
        "same_tile = Equal (m_tile, k_tile)",
        "diagonal = And (causal, same_tile)",
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
        # Scan2 on the diagonal
        "a_m = Unsqueeze (a_wide, last)",
        "a_k = Unsqueeze (a_wide, second_last)",
        "a_difference = Sub (a_m, a_k)",
        "a_masked = Where (diagonal, a_difference, masked)",
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
    ]
    total = "scans"
    if tile < k:
        lines += _off_diagonal_lines(a, form)
        total = "scans_all"
    lines += [
        t.ints("d_shape", [h, 1, 1]),
        "d_column = Reshape (D, d_shape)",
        t.cast("d_wide", "d_column", f),
        "skip = Mul (x_wide, d_wide)",
        f"total = Add ({total}, skip)",
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


def _diagonal_cb_lines(cb: str, f: int) -> list[str]:
    """`cb_wide`, in the compute type: INT8 values as they are, others by way of FP16."""
    if cb == "cb_q":
        return [t.cast("cb_wide", cb, f)]
    end = torch.finfo(torch.float16).max
    return [
        t.number("cb_low", -end),
        t.number("cb_high", end),
        f"cb_clipped = Clip ({cb}, cb_low, cb_high)",
        t.cast("cb_16", "cb_clipped", t.FP16),
        t.cast("cb_wide", "cb_16", f),
    ]


def _off_diagonal_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`scans_all` = `scans` + Scan2 left of the diagonal: products of INT8 CB and INT8 x."""
    f = t.compute_type(form)
    k, h, g, p = (int(a[key]) for key in ("chunk_size", "nheads", "ngroups", "headdim"))
    tile = int(a["scan_tile"])
    tiles = k // tile
    return [
        t.ints("tiled", [0, 0, h, tiles, tile]),
        "a_tiled = Reshape (a_wide, tiled)",
        t.ints("tile_last", [tile - 1]),
        t.ints("tile_end", [tile]),
        t.ints("axis4", [4]),
        "r = Slice (a_tiled, tile_last, tile_end, axis4)",  # (B, C, H, J, 1)
        "r_minus_a = Sub (r, a_tiled)",
        "r_exp = Exp (r_minus_a)",
        "dt_tiled = Reshape (dt_wide, tiled)",
        "w_tile_wide = Mul (r_exp, dt_tiled)",
        t.cast("w_tile", "w_tile_wide", t.FP32),
        "w_tile_column = Unsqueeze (w_tile, last)",
        t.cast("x32", "x_chkp", t.FP32),
        t.ints("x_tiled_shape", [0, 0, h, tiles, tile, p]),
        "x_tiled = Reshape (x32, x_tiled_shape)",
        *_quantized_tile_lines(a, form),
        t.from_int8("x_tile_q", "x_tile_int", form),
        t.ints("x_tile_group_shape", [0, 0, g, h // g, tiles, tile, p]),
        "x_tile_group = Reshape (x_tile_q, x_tile_group_shape)",
        t.ints("cb_tiled_shape", [0, 0, g, k, tiles, tile]),
        "cb_tiled_m = Reshape (cb_q, cb_tiled_shape)",
        "cb_tiled = Transpose <perm = [0, 1, 2, 4, 3, 5]> (cb_tiled_m)",
        "cb_tiled_heads = Unsqueeze (cb_tiled, axis3)",
        "product_group = MatMul (cb_tiled_heads, x_tile_group)",
        t.ints("product_shape", [0, 0, h, tiles, k, p]),
        "product_int = Reshape (product_group, product_shape)",
        t.cast("product", "product_int", f),
        f"tile_count = Constant <value = int64 {{{tiles}}}> ()",
        "tile_index = Range (zero, tile_count, one)",
        "tile_column = Unsqueeze (tile_index, last)",
        "row_tile = Div (k_index, tile)",
        "right_of_tile = Greater (row_tile, tile_column)",  # (J, K)
        "a_minus_r = Sub (a_k, r)",  # (B, C, H, 1, K) - (B, C, H, J, 1)
        "a_minus_r_masked = Where (right_of_tile, a_minus_r, masked)",
        "row_factor = Exp (a_minus_r_masked)",
        "row_factor_column = Unsqueeze (row_factor, last)",
        "product_decayed = Mul (product, row_factor_column)",
        t.cast("x_tile_step_wide", "x_tile_step", f),
        "product_real = Mul (product_decayed, x_tile_step_wide)",
        "off_diagonal_steps = ReduceSum <keepdims = 0> (product_real, axis3)",
        "off_diagonal = Mul (off_diagonal_steps, cb_real)",
        "scans_all = Add (scans, off_diagonal)",
    ]


def _quantized_tile_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`x_tile_int` INT8 (B, C, H, J, T, P), `x_tile_step` (B, C, H, J, 1, P) or (H, 1, 1, P)."""
    if a["scaling"] == "dynamic":
        return [
            "x_tile_weighted = Mul (x_tiled, w_tile_column)",
            t.quantize_by_largest(
                *("x_tile_int", "x_tile_step", "x_tile_weighted", 4, a["rounding"], form)
            ),
        ]
    return [
        t.ints("x_scale_shape", [int(a["nheads"]), 1, 1, int(a["headdim"])]),
        "x_tile_step = Reshape (x_tile_scale, x_scale_shape)",
        t.inverse("x_tile_inverse", "x_tile_step", form),
        "x_tile_steps = Mul (x_tiled, x_tile_inverse)",
        "x_tile_weighted = Mul (x_tile_steps, w_tile_column)",
        t.round_to_int8("x_tile_int", "x_tile_weighted", a["rounding"], form),
    ]


CHUNK_SCAN = Op(
    name="Ssdi8ChunkScan",
    outputs=("y",),
    reference=chunk_scan_reference,
    body=_body,
)
