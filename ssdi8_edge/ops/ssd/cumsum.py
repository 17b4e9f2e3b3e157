"""dt and its cumulative decay inside each chunk (the paper's ChunkCumsum: docs/method.md §2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.ssd.chunking import pad_tokens


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in FP64, in the form that does not overflow."""
    wide = x.double()
    return wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))


def time_step(
    zxbcdt: Tensor, dt_bias: Tensor, *, nheads: int, dt_column: int, dt_min: float, dt_max: float
) -> Tensor:
    """clamp(softplus(dt_raw + dt_bias)) (B, L, H) FP32; dt_raw starts at dt_column."""
    raw = zxbcdt[..., dt_column : dt_column + nheads].float() + dt_bias
    return softplus(raw).clamp(dt_min, dt_max).float()


def chunk_cumsum_reference(
    zxbcdt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    dt_column: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """dt = clamp(softplus(dt_raw + dt_bias)); a_k = Σ_{j ≤ k} A · dt_j, restarting at each chunk.

    Args:
        zxbcdt: (B, L, 2E + 2GN + H) FP16; dt_raw is the H columns from dt_column on.
        dt_bias, A: (H) FP32; A < 0.

    Returns:
        dt and a, (B, H, L) FP32 each; a ≤ 0 and non-increasing inside a chunk.
    """
    dt = time_step(
        zxbcdt, dt_bias, nheads=nheads, dt_column=dt_column, dt_min=dt_min, dt_max=dt_max
    )
    dt = dt.transpose(1, 2).contiguous()
    length = dt.shape[2]
    decay = pad_tokens(dt, 2, chunk_size).double().unflatten(2, (-1, chunk_size))
    a = (decay * A.double()[:, None, None]).cumsum(-1).flatten(2)[..., :length]
    return dt, a.float().contiguous()


def time_step_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`time_step` as statements: defines `dt_blh` (B, L, H) FP32."""
    f = t.compute_type(form)
    start, heads = int(a["dt_column"]), int(a["nheads"])
    lines = [
        t.slice_last("raw16", "zxbcdt", start, start + heads),
        t.cast("raw", "raw16", t.FP32),
        "raw_biased = Add (raw, dt_bias)",
        t.cast("raw_wide", "raw_biased", f),
        "softplus = Softplus (raw_wide)",
    ]
    out = "softplus"
    if float(a["dt_min"]) > 0:
        lines += [t.number("dt_min", float(a["dt_min"]), f), f"dt_low = Max ({out}, dt_min)"]
        out = "dt_low"
    # An infinite limit is written as the largest finite FP32, which no softplus reaches.
    if float(a["dt_max"]) < 3e38:
        lines += [t.number("dt_max", float(a["dt_max"]), f), f"dt_high = Min ({out}, dt_max)"]
        out = "dt_high"
    return [*lines, t.cast("dt_blh", out, t.FP32)]


def _body(a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    chunk, heads = int(a["chunk_size"]), int(a["nheads"])
    return "\n".join(
        [
            *time_step_lines(a, form),
            "dt = Transpose <perm = [0, 2, 1]> (dt_blh)",
            t.chunk_padding("dt", 2, chunk),
            t.pad_to_chunks("dt_chunks", "dt", 2, [0, 0, -1, chunk]),
            t.cast("dt_wide", "dt_chunks", f),
            t.cast("A_wide", "A", f),
            t.ints("A_shape", [heads, 1, 1]),
            "A_column = Reshape (A_wide, A_shape)",
            "decay = Mul (dt_wide, A_column)",
            "axis_k = Constant <value = int64 {3}> ()",
            "cumulative = CumSum (decay, axis_k)",
            t.ints("flat_shape", [0, 0, -1]),
            "flat = Reshape (cumulative, flat_shape)",
            t.cast("flat32", "flat", t.FP32),
            t.keep_length("a", "flat32", 2),
        ]
    )


def _kernel(call: Call) -> Any:
    call.batch, call.length, call.row_stride = call.zxbcdt.shape
    call.require(torch.float16, zxbcdt=(call.batch, call.length, call.row_stride))
    call.require(torch.float32, dt_bias=(call.nheads,), A=(call.nheads,))
    shape = (call.batch, call.nheads, call.length)
    call.dt = call.empty(shape, torch.float32)
    call.a = call.empty(shape, torch.float32)
    call.launch("chunk_cumsum")
    return call.dt, call.a


CHUNK_CUMSUM = Op(
    name="Ssdi8ChunkCumsum",
    outputs=("dt", "a"),
    reference=chunk_cumsum_reference,
    body=_body,
    kernel=_kernel,
    part="SSD",
)
