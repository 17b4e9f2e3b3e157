"""Residual add, RMSNorm and quantization to INT8: the input of in_proj and of an INT8 lm_head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_tokens
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def rms_norm_reference(
    hidden: Tensor,
    residual: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual' = residual + hidden; u = Q(residual' / rms(residual')).

    The norm's own weight is folded into the linear behind it: docs/method.md §4.2.

    Args:
        hidden: (B, L, D) FP16, output of the block before.
        residual: (B, L, D) FP32.
        scale: (1) FP32, of u in all tokens; with scaling "static" only.
        scaling: of u, see `int8.quantize_tokens`.

    Returns:
        residual' (B, L, D) FP32, q (B, L, D) INT8 and token_scale (B, L, 1) FP32:
        u ≈ token_scale · q.
    """
    residual = residual + hidden.float()
    mean_square = residual.double().square().mean(-1, keepdim=True)
    rstd = (mean_square + eps).sqrt().reciprocal().float()
    u = residual * rstd
    return residual, *quantize_tokens(u, scaling, scale, rounding, "u")


def _body(a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    return "\n".join(
        [
            t.cast("hidden32", "hidden", t.FP32),
            "residual_out = Add (residual, hidden32)",
            *rms_lines("residual_out", "u", float(a["eps"]), f),
            t.quantize_tokens("quantized", "token_scale", "u", a, form),
        ]
    )


def rms_lines(x: str, out: str, eps: float, f: int) -> list[str]:
    """out = x · FP32(1 / sqrt(mean(x²) + eps)) over the last axis; `x` and `out` FP32."""
    return [
        t.cast(f"{out}_wide", x, f),
        f"{out}_square = Mul ({out}_wide, {out}_wide)",
        t.ints(f"{out}_last", [-1]),
        f"{out}_mean = ReduceMean ({out}_square, {out}_last)",
        t.number(f"{out}_eps", eps, f),
        f"{out}_biased = Add ({out}_mean, {out}_eps)",
        f"{out}_root = Sqrt ({out}_biased)",
        f"{out}_inverse_root = Reciprocal ({out}_root)",
        t.cast(f"{out}_rstd", f"{out}_inverse_root", t.FP32),
        f"{out} = Mul ({x}, {out}_rstd)",
    ]


def _kernel(call: Call) -> Any:
    shape = tuple(call.residual.shape)
    call.require(torch.float16, hidden=shape)
    call.require(torch.float32, residual=shape)
    call.residual_out = call.empty(shape, torch.float32)
    call.quantized = call.empty(shape, torch.int8)
    call.token_scale = token_scale(call, shape[:-1])
    call.tokens, call.d_model = math.prod(shape[:-1]), shape[-1]
    call.launch("rms_norm")
    return call.residual_out, call.quantized, call.token_scale


def token_scale(call: Call, rows: tuple[Any, ...]) -> Any:
    """Where the scales of tokens go; checks the one that static scaling takes for all."""
    if call.scale is not None:
        call.require(torch.float32, scale=(1,))
    return call.empty((*rows, 1), torch.float32)


RMS_NORM = Op(
    name="Ssdi8RmsNorm",
    outputs=("residual_out", "quantized", "token_scale"),
    reference=rms_norm_reference,
    body=_body,
    kernel=_kernel,
)
