"""The recurrence between chunks (the paper's StatePassing)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.formats import Gate, Rounding
from ssdi8_edge.int8 import round_to_int8, round_to_integer
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.chunking import chunks_of_decay
from ssdi8_edge.ops.op import Attributes, BodyForm, Op

GATE_BITS = 7


def state_passing_reference(
    states: Tensor,
    a: Tensor,
    ssm_state: Tensor,
    state_scale: Tensor,
    *,
    chunk_size: int,
    gate: Gate,
    rounding: Rounding,
) -> tuple[Tensor, Tensor]:
    """R_0 = ssm_state; R_{c+1} = exp(a_last of chunk c)·R_c + S_c; stored as Q(R_c / state_scale).

    gate "fp32": FP32 carry, one multiplication and one addition, each rounded; only the stored
    copies are quantized. gate "q0.7", as released: INT32 carry in units of state_scale, the gate in
    7 fractional bits capped at 127/128, products shifted right with halves rounded up.

    Args:
        states: (B, C, H, P, N) from `chunk_state_reference` with the same gate.
        a: (B, H, L) FP32.
        ssm_state: (B, H, P, N) FP16 or FP32, real units.
        state_scale: (H, P) FP32.

    Returns:
        passed (B, C, H, P, N) INT8, the state entering each chunk; ssm_state' (B, H, P, N) in the
        type of ssm_state, real units.
    """
    a_last = chunks_of_decay(a, chunk_size, edge=True)[..., -1]  # (B, C, H)
    gamma = torch.exp(a_last.double()).float()[..., None, None]
    scale = state_scale[..., None]
    inverse = scale.reciprocal()
    passed = torch.empty(states.shape, dtype=torch.int8, device=states.device)

    if gate == "fp32":
        carry = ssm_state.float()
        for c in range(states.shape[1]):
            passed[:, c] = round_to_int8(carry * inverse, rounding, "passed_state")
            carry = gamma[:, c] * carry + states[:, c]
        return passed, carry.to(ssm_state.dtype)

    one = 1 << GATE_BITS
    gate_q = round_to_int8(gamma * one, rounding).to(torch.int64)
    carry_q = round_to_integer(ssm_state.float() * inverse, rounding).to(torch.int64)
    for c in range(states.shape[1]):
        passed[:, c] = round_to_int8(carry_q.double(), rounding, "passed_state")
        carry_q = (carry_q * gate_q[:, c] + one // 2 >> GATE_BITS) + states[:, c]
    final = round_to_int8(carry_q.double(), rounding).float() * scale
    return passed, final.to(ssm_state.dtype)


def _body(a: Attributes, form: BodyForm) -> str:
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
        "scale = Unsqueeze (state_scale, last)",
        t.inverse("inverse", "scale", form),
        t.cast("start", "ssm_state", t.FP32),
        "states_c = Transpose <perm = [1, 0, 2, 3, 4]> (states)",
    ]
    if a["gate"] == "fp32":
        lines += [
            scan_over_chunks(
                "start", "gamma", "states_c", "float", "decayed = Mul (gamma_c, carry)"
            ),
            "entering = Transpose <perm = [1, 0, 2, 3, 4]> (entering_c)",
            "entering_q = Mul (entering, inverse)",
            t.round_to_int8("passed", "entering_q", rounding, form),
            "ssm_state_out = CastLike (final, ssm_state)",
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


STATE_PASSING = Op(
    name="Ssdi8StatePassing",
    outputs=("passed", "ssm_state_out"),
    reference=state_passing_reference,
    body=_body,
)
