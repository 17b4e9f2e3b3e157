"""All of SSD in one op: the modules composed for a sequence, the recurrence for one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.formats import Gate, Rounding, Scaling
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import DOMAIN, Attributes, BodyForm, Op
from ssdi8_edge.ops.ssd.chunk_state import CHUNK_STATE
from ssdi8_edge.ops.ssd.chunking import per_head
from ssdi8_edge.ops.ssd.cumsum import CHUNK_CUMSUM, time_step, time_step_lines
from ssdi8_edge.ops.ssd.kernel_checks import (
    GROUP_SCALES,
    require_scales,
    require_state,
    require_tokens,
)
from ssdi8_edge.ops.ssd.passing import STATE_PASSING
from ssdi8_edge.ops.ssd.scan import CHUNK_SCAN


def ssd_modules(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    zxbcdt: Tensor,
    ssm_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    cb_scale: Tensor,
    x_scale: Tensor | None = None,
    state_scale: Tensor | None = None,
    **attributes: Any,
) -> tuple[Tensor, Tensor]:
    """ChunkCumsum → ChunkState → StatePassing → ChunkScan, each an op of its own.

    Arguments and results as in `ssd_scan_reference`. Works on tensors and on graph values.
    """

    def run(op: Op, *inputs: Tensor) -> Any:
        return op(*inputs, **{k: v for k, v in attributes.items() if k in op.attributes})

    def static(*scales: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(scale for scale in scales if scale is not None)

    dt, a = run(CHUNK_CUMSUM, zxbcdt, dt_bias, A)
    states = run(CHUNK_STATE, x, b_q, dt, a, b_scale, *static(x_scale, state_scale))
    passed, passed_scale, final = run(STATE_PASSING, states, a, ssm_state, *static(state_scale))
    y = run(CHUNK_SCAN, x, b_q, c_q, dt, a, passed, passed_scale, D, b_scale, c_scale, cb_scale)
    return y, final


def ssd_scan_reference(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    zxbcdt: Tensor,
    ssm_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    cb_scale: Tensor,
    x_scale: Tensor | None = None,
    state_scale: Tensor | None = None,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    dt_column: int,
    dt_min: float,
    dt_max: float,
    gate: Gate,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """SSD with carried state: `ssd_modules` for L > 1, `ssd_step` for L = 1.

    Args:
        x: (B, L, H·P) FP16; b_q, c_q: (B, L, G·N) INT8; zxbcdt: in_proj's output, for dt.
        ssm_state: (B, H, P, N) FP16 or FP32.
        dt_bias, A, D: (H) FP32. b_scale, c_scale, cb_scale: (G) FP32.
        x_scale, state_scale: (H, P) FP32, with scaling "static" only.

    Returns:
        y (B, L, H·P) FP16 and ssm_state' in the type of ssm_state.
    """
    if x.shape[1] == 1:
        dt = time_step(
            zxbcdt, dt_bias, nheads=nheads, dt_column=dt_column, dt_min=dt_min, dt_max=dt_max
        )
        return ssd_step(x, b_q, c_q, dt, ssm_state, A, D, b_scale, c_scale)
    return ssd_modules(
        x,
        b_q,
        c_q,
        zxbcdt,
        ssm_state,
        dt_bias,
        A,
        D,
        b_scale,
        c_scale,
        cb_scale,
        x_scale,
        state_scale,
        chunk_size=chunk_size,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        dt_column=dt_column,
        dt_min=dt_min,
        dt_max=dt_max,
        gate=gate,
        rounding=rounding,
        scaling=scaling,
    )


def ssd_step(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    dt: Tensor,
    ssm_state: Tensor,
    A: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: h = exp(A · dt) · h + (dt · x) ⊗ B; y = h · C + D · x; the state is not quantized.

    x (B, 1, H·P), dt (B, 1, H); the rest as in `ssd_scan_reference`. FP32, the sum over N in FP64.
    """
    heads, groups = A.shape[0], b_scale.shape[0]
    x32 = x[:, 0].unflatten(-1, (heads, -1)).float()  # (B, H, P)
    dt32 = dt[:, 0]
    decay = torch.exp(dt32.double() * A.double()).float()
    b = _group_rows(b_q, b_scale, heads, groups)  # (B, H, N)
    c = _group_rows(c_q, c_scale, heads, groups)
    update = (dt32[..., None] * x32)[..., None] * b[:, :, None]
    h = ssm_state.float() * decay[..., None, None] + update
    y = (h.double() @ c.double()[..., None])[..., 0] + D.double()[:, None] * x32.double()
    return y.float().half().flatten(1)[:, None], h.to(ssm_state.dtype)


def _group_rows(q: Tensor, scale: Tensor, heads: int, groups: int) -> Tensor:
    """(B, 1, G·N) INT8 -> (B, H, N) FP32, dequantized."""
    rows = q[:, 0].unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1)
    return rows.float() * per_head(scale, heads)[:, None]


def _body(a: Attributes, form: BodyForm) -> str:
    static = a["scaling"] == "static"
    of_x, of_state = (", x_scale", ", state_scale") if static else ("", "")

    def node(op: Op, outputs: str, arguments: str) -> str:
        attributes = ", ".join(f"{k} = {_literal(a[k])}" for k in op.attributes)
        return f"{outputs} = {DOMAIN}.{op.name} <{attributes}> ({arguments})"

    modules = "\n".join(
        [
            node(CHUNK_CUMSUM, "dt, a", "zxbcdt, dt_bias, A"),
            node(CHUNK_STATE, "states", f"x, b_q, dt, a, b_scale{of_x}{of_state}"),
            node(
                *(STATE_PASSING, "passed, passed_scale, final_chunks"),
                f"states, a, ssm_state{of_state}",
            ),
            node(
                *(CHUNK_SCAN, "y_chunks"),
                "x, b_q, c_q, dt, a, passed, passed_scale, D, b_scale, c_scale, cb_scale",
            ),
        ]
    )
    if form == "tensorrt":
        # Both branches compute shapes, which some TensorRT builders cannot place in a conditional.
        # The modules serve a single token too, and this form is only ever checked, not run.
        return modules.replace("final_chunks", "ssm_state_out").replace("y_chunks", "y")
    h, g = int(a["nheads"]), int(a["ngroups"])
    dequantize = "\n".join(
        [
            t.from_int8("b_step32", "b_q", form),
            t.from_int8("c_step32", "c_q", form),
            t.per_head("b_step_scale", "b_scale", h, g, [h, 1, 1]),
            t.per_head("c_step_scale", "c_scale", h, g, [h, 1, 1]),
        ]
    )
    return "\n".join(
        [
            "tokens = Shape <start = 1, end = 2> (x)",
            t.ints("one_token", [1]),
            "step_vector = Equal (tokens, one_token)",
            t.ints("axis0", [0]),
            "is_step = Squeeze (step_vector, axis0)",
            "y, ssm_state_out = If (is_step) <\n"
            "then_branch = step () => (y_step, final_step) "
            f"{{\n{dequantize}\n{_step_lines(a, form)}\n}},\n"
            f"else_branch = chunks () => (y_chunks, final_chunks) {{\n{modules}\n}}\n>",
        ]
    )


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _step_lines(a: Attributes, form: BodyForm) -> str:
    """`ssd_step` from `b_step32`, `c_step32` (B, 1, G·N) and their scales per head (H, 1, 1)."""
    f = t.compute_type(form)
    h, p, g, n = (int(a[key]) for key in ("nheads", "headdim", "ngroups", "d_state"))
    lines = [
        *time_step_lines(a, form),
        t.ints("bh11", [-1, h, 1, 1]),
        "dt_step = Reshape (dt_blh, bh11)",
        t.cast("dt_step_wide", "dt_step", f),
        t.ints("h11", [h, 1, 1]),
        t.cast("A_wide", "A", f),
        "A_column = Reshape (A_wide, h11)",
        "rate = Mul (dt_step_wide, A_column)",
        "rate_exp = Exp (rate)",
        t.cast("step_decay", "rate_exp", t.FP32),
        t.ints("bhp1", [-1, h, p, 1]),
        "x_step16 = Reshape (x, bhp1)",
        t.cast("x_step", "x_step16", t.FP32),
        "dt_x = Mul (dt_step, x_step)",
        t.ints("bg1n", [-1, g, 1, n]),
        t.ints("bgrn", [1, 1, h // g, 1]),
        t.ints("bh1n", [-1, h, 1, n]),
    ]
    for name in ("b", "c"):
        lines += [
            f"{name}_step_group = Reshape ({name}_step32, bg1n)",
            f"{name}_step_tiled = Tile ({name}_step_group, bgrn)",
            f"{name}_step_rows = Reshape ({name}_step_tiled, bh1n)",
            f"{name}_step = Mul ({name}_step_rows, {name}_step_scale)",
        ]
    lines += [
        "update = Mul (dt_x, b_step)",
        t.cast("state32", "ssm_state", t.FP32),
        "state_decayed = Mul (state32, step_decay)",
        "state_new = Add (state_decayed, update)",
        "final_step = CastLike (state_new, ssm_state)",
        t.cast("state_wide", "state_new", f),
        t.cast("c_wide", "c_step", f),
        "c_column = Transpose <perm = [0, 1, 3, 2]> (c_wide)",
        "y_state = MatMul (state_wide, c_column)",
        t.cast("x_step_wide", "x_step", f),
        t.cast("D_wide", "D", f),
        "D_column = Reshape (D_wide, h11)",
        "y_skip = Mul (x_step_wide, D_column)",
        "y_wide = Add (y_state, y_skip)",
        t.cast("y_32", "y_wide", t.FP32),
        t.cast("y_16", "y_32", t.FP16),
        t.ints("b1e", [-1, 1, h * p]),
        "y_step = Reshape (y_16, b1e)",
    ]
    return "\n".join(lines)


def _kernel(call: Call) -> Any:
    require_tokens(call, "b_q", "c_q")
    call.row_stride = call.zxbcdt.shape[2]
    call.require(torch.float16, zxbcdt=(call.batch, call.length, call.row_stride))
    call.require(torch.float32, **{name: (call.nheads,) for name in ("dt_bias", "A", "D")})
    require_scales(call, GROUP_SCALES, ("x_scale", "state_scale"))
    require_state(call, call.batch, call.nheads, call.headdim, call.d_state)
    call.y = call.empty(tuple(call.x.shape), torch.float16)
    call.launch("ssd_scan")
    return call.y, call.ssm_state_out


SSD_SCAN = Op(
    name="Ssdi8SsdScan",
    outputs=("y", "ssm_state_out"),
    reference=ssd_scan_reference,
    body=_body,
    kernel=_kernel,
    part="SSD",
)
