"""The recurrence between chunks (the paper's StatePassing: docs/method.md §2.3, §5.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.numerics.formats import Gate, Rounding, Scaling
from ssdi8_edge.numerics.int8 import quantize_by_largest, round_to_int8, round_to_integer
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op
from ssdi8_edge.ops.ssd.chunking import chunks_of_decay, given
from ssdi8_edge.ops.ssd.kernel_checks import (
    chunks,
    passed_type,
    require_scales,
    require_state,
    state_type,
)

GATE_BITS = 7


def state_passing_reference(
    states: Tensor,
    a: Tensor,
    ssm_state: Tensor,
    state_scale: Tensor | None = None,
    *,
    chunk_size: int,
    gate: Gate,
    rounding: Rounding,
    scaling: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    """R_0 = ssm_state; R_{c+1} = exp(a_last of chunk c)·R_c + S_c; stored as Q(R_c / passed_scale).

    With scaling "static", passed_scale is state_scale everywhere; "dynamic" takes it from the
    largest value of each stored (chunk, head, channel); with "none" states and passed are FP16, the
    carry between them FP32, and the scale is 1.

    gate "fp32": FP32 carry, one multiplication and one addition, each rounded; only the stored
    copies are quantized. gate "q0.7", as released: INT32 carry in units of state_scale, the gate in
    7 fractional bits capped at 127/128, products shifted right with halves rounded up.

    Args:
        states: (B, C, H, P, N) from `chunk_state_reference` with the same gate.
        a: (B, H, L) FP32.
        ssm_state: (B, H, P, N) FP16 or FP32, real units.
        state_scale: (H, P) FP32, for scaling "static" only.

    Returns:
        passed (B, C, H, P, N) INT8 or FP16, the state entering each chunk; passed_scale
        (B, C, H, P) FP32, its steps; ssm_state' (B, H, P, N) in the type of ssm_state, real units.

    Raises:
        ValueError: gate "q0.7" without scaling "static": its integer carry needs one scale.
    """
    require_one_scale(gate, scaling)
    a_last = chunks_of_decay(a, chunk_size, edge=True)[..., -1]  # (B, C, H)
    gamma = torch.exp(a_last.double()).float()[..., None, None]
    passed = torch.empty(states.shape, dtype=torch.int8, device=states.device)

    if scaling == "none":
        passed = passed.half()
        carry = ssm_state.float()
        for c in range(states.shape[1]):
            passed[:, c] = carry.half()
            carry = gamma[:, c] * carry + states[:, c]
        ones = torch.ones(states.shape[:-1], device=states.device)
        return passed, ones, carry.to(ssm_state.dtype)

    if scaling == "dynamic":
        steps = []
        carry = ssm_state.float()
        for c in range(states.shape[1]):
            passed[:, c], step = quantize_by_largest(carry, -1, rounding)
            steps.append(step.squeeze(-1))
            carry = gamma[:, c] * carry + states[:, c]
        return passed, torch.stack(steps, 1), carry.to(ssm_state.dtype)

    state_scale = given(state_scale, "state_scale")
    passed_scale = state_scale.expand(passed.shape[:-1]).contiguous()
    scale = state_scale[..., None]
    inverse = scale.reciprocal()
    if gate == "fp32":
        carry = ssm_state.float()
        for c in range(states.shape[1]):
            passed[:, c] = round_to_int8(carry * inverse, rounding, "passed_state")
            carry = gamma[:, c] * carry + states[:, c]
        return passed, passed_scale, carry.to(ssm_state.dtype)

    one = 1 << GATE_BITS
    gate_q = round_to_int8(gamma * one, rounding).to(torch.int64)
    carry_q = round_to_integer(ssm_state.float() * inverse, rounding).to(torch.int64)
    for c in range(states.shape[1]):
        passed[:, c] = round_to_int8(carry_q.double(), rounding, "passed_state")
        carry_q = (carry_q * gate_q[:, c] + one // 2 >> GATE_BITS) + states[:, c]
    final = round_to_int8(carry_q.double(), rounding).float() * scale
    return passed, passed_scale, final.to(ssm_state.dtype)


def require_one_scale(gate: Gate, scaling: Scaling) -> None:
    """Raises ValueError for anything but one scale with a carry in units of it."""
    if gate == "q0.7" and scaling != "static":
        raise ValueError(f'gate "q0.7" needs scaling "static", not "{scaling}"')


def _body(a: Attributes, form: BodyForm) -> str:
    require_one_scale(a["gate"], a["scaling"])
    f = t.compute_type(form)
    k, rounding = int(a["chunk_size"]), a["rounding"]
    lines = [
        t.chunk_padding("a", 2, k),
        t.pad_to_chunks("a_hc", "a", 2, [0, 0, -1, k], mode="edge"),
        t.ints("k_axis", [3]),
        "a_last = Slice (a_hc, chunk_less_one, chunk_tokens, k_axis)",
        "a_last_c = Transpose <perm = [2, 0, 1, 3]> (a_last)",  # (C, B, H, 1)
        t.cast("a_last_wide", "a_last_c", f),
        "gamma_wide = Exp (a_last_wide)",
        t.cast("gamma_row", "gamma_wide", t.FP32),
        t.ints("last", [-1]),
        "gamma = Unsqueeze (gamma_row, last)",
        t.cast("start", "ssm_state", t.FP32),
        "states_c = Transpose <perm = [1, 0, 2, 3, 4]> (states)",
    ]
    if a["gate"] == "fp32":
        lines += [
            t.cast("states_32", "states_c", t.FP32),
            scan_over_chunks("start", "gamma", "states_32", "float", DECAY),
            "entering = Transpose <perm = [1, 0, 2, 3, 4]> (entering_c)",
            "ssm_state_out = CastLike (final, ssm_state)",
        ]
        if a["scaling"] == "none":
            lines += [
                t.cast("passed", "entering", t.FP16),
                t.number("scale_of_all", 1.0),
                "scale_shape = Shape <start = 0, end = 4> (entering)",
                "passed_scale = Expand (scale_of_all, scale_shape)",
            ]
        elif a["scaling"] == "dynamic":
            lines += [
                t.quantize_by_largest("passed", "step_column", "entering", 4, rounding, form),
                "passed_scale = Squeeze (step_column, last)",
            ]
        else:
            lines += [
                *_static_scale_lines("entering", form),
                "entering_q = Mul (entering, inverse)",
                t.round_to_int8("passed", "entering_q", rounding, form),
            ]
        return "\n".join(lines)
    wide = "double" if form == "cpu" else "float"
    decay = "\n".join(
        [
            "product = Mul (carry, gamma_c)",
            t.number("half", float(1 << (GATE_BITS - 1)), f),
            t.number("one", float(1 << GATE_BITS), f),
            "raised = Add (product, half)",
            "shifted = Div (raised, one)",
            "decayed = Floor (shifted)",
        ]
    )
    lines += [
        *_static_scale_lines("states", form),
        t.number("gate_one", float(1 << GATE_BITS)),
        "gamma_steps = Mul (gamma, gate_one)",
        t.round_to_int8("gate_int", "gamma_steps", rounding, form),
        t.from_int8("gate_q32", "gate_int", form),
        t.cast("gate_q", "gate_q32", f),
        "start_steps = Mul (start, inverse)",
        t.round_to_integer("start_rounded", "start_steps", rounding),
        t.cast("start_q", "start_rounded", f),
        t.from_int8("states_32", "states_c", form),
        t.cast("states_q", "states_32", f),
        scan_over_chunks("start_q", "gate_q", "states_q", wide, decay),
        "entering = Transpose <perm = [1, 0, 2, 3, 4]> (entering_c)",
        t.cast("entering32", "entering", t.FP32),
        t.round_to_int8("passed", "entering32", rounding, form),
        t.cast("final32", "final", t.FP32),
        t.round_to_int8("final_int", "final32", rounding, form),
        t.from_int8("final_q", "final_int", form),
        "final_real = Mul (final_q, scale)",
        "ssm_state_out = CastLike (final_real, ssm_state)",
    ]
    return "\n".join(lines)


def _static_scale_lines(like: str, form: BodyForm) -> list[str]:
    """`scale` (H, P, 1), its `inverse`, `passed_scale` for the states `like` (B, C, H, P, N)."""
    return [
        "scale = Unsqueeze (state_scale, last)",
        t.inverse("inverse", "scale", form),
        f"scale_shape = Shape <start = 0, end = 4> ({like})",
        "passed_scale = Expand (state_scale, scale_shape)",
    ]


# One step of an unquantized carry.
DECAY = "decayed = Mul (gamma_c, carry)"


def scan_over_chunks(start: str, gamma: str, states: str, kind: str, decay: str) -> str:
    """`final`, `entering_c` (C, B, H, P, N) = scan over chunks; `decay` defines `decayed`."""
    state = f"{kind}[b, h, p, n]"
    return (
        f"final, entering_c = Scan <num_scan_inputs = 2, body = chunk_step "
        f"({state} carry, {kind}[b, h, i, j] gamma_c, {state} state_c) "
        f"=> ({state} carry_next, {state} carry_seen) {{\n"
        f"{decay}\ncarry_next = Add (decayed, state_c)\ncarry_seen = Identity (carry)\n"
        f"}}> ({start}, {gamma}, {states})"
    )


def _kernel(call: Call) -> Any:
    call.batch, count, call.nheads, call.headdim, call.d_state = shape = tuple(call.states.shape)
    call.length = call.a.shape[2]
    if chunks(call) != count:
        raise Ssdi8Error(f"CUDA kernel: {call.length} tokens are not {count} chunks.")
    call.require(state_type(call), states=shape)
    call.require(torch.float32, a=(call.batch, call.nheads, call.length))
    require_scales(call, (), ("state_scale",))
    require_state(call, call.batch, *shape[2:])
    call.passed = call.empty(shape, passed_type(call))
    call.passed_scale = call.empty(shape[:-1], torch.float32)
    call.launch("state_passing")
    return call.passed, call.passed_scale, call.ssm_state_out


STATE_PASSING = Op(
    name="Ssdi8StatePassing",
    outputs=("passed", "passed_scale", "ssm_state_out"),
    reference=state_passing_reference,
    body=_body,
    kernel=_kernel,
    part="SSD",
)
