"""The recurrence between chunks: gates, shifts and carries."""

from __future__ import annotations

import math

import pytest
import torch
from slow_ops import (
    ROUNDINGS,
    f32,
)

from ssdi8_edge.numerics.int8 import Rounding
from ssdi8_edge.ops import OPS

# exp(a_last) is the gate; 1/256 and 126.5/128 are where it rounds to 0 and to its cap.
GATES = {
    "0": (0.0, 0),
    "below 1/256": (0.9 / 256, 0),
    "1/256": (1 / 256, None),  # a tie: to 0 by half_even, to 1 by half_away
    "above 1/256": (1.1 / 256, 1),
    "1/2": (0.5, 64),
    "126.4/128": (126.4 / 128, 126),
    "126.6/128": (126.6 / 128, 127),
    "1": (1.0, 127),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_integer_state_passing(gate: tuple[float, int | None], rounding: Rounding) -> None:
    """Every carry from -300 to 300 through one shift: negative ties, and carries beyond INT8.

    The decay is handed over as its logarithm; gates that are not ties survive the trip.
    """
    gamma, gate_q = gate
    if gate_q is None:
        gate_q = 0 if rounding == "half_even" else 1
    # log(1/256) in FP32 comes back as 1/256 exactly, or this row tests nothing.
    a = torch.full((1, 1, 2), math.log(gamma) if gamma else -200.0)
    if gamma == 1 / 256:
        assert f32(math.exp(float(a[0, 0, 0]))) == f32(1 / 256)
    carry = torch.arange(-300, 301, dtype=torch.float32)
    state = carry.reshape(1, 1, -1, 1)
    zeros = torch.zeros(1, 2, 1, len(carry), 1, dtype=torch.int8)
    passed, _, final = OPS["Ssdi8StatePassing"](
        *(zeros, a, state, torch.ones(1, len(carry))),
        chunk_size=1,
        gate="q0.7",
        rounding=rounding,
        scaling="static",
    )
    low = -128 if rounding == "half_even" else -127
    once = [(int(v) * gate_q + 64) // 128 for v in carry.tolist()]
    twice = [(v * gate_q + 64) // 128 for v in once]
    assert passed[0, 0].flatten().tolist() == [min(127, max(low, int(v))) for v in carry.tolist()]
    assert passed[0, 1].flatten().tolist() == [min(127, max(low, v)) for v in once]
    assert final.flatten().tolist() == [min(127, max(low, v)) for v in twice]


def test_shift_rounds_negative_halves_up() -> None:
    """-1 · 64 / 128 = -1/2 goes to 0, 1/2 to 1: neither half_even nor half_away does that."""
    state = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 4, 1)
    *_, final = OPS["Ssdi8StatePassing"](
        torch.zeros(1, 1, 1, 4, 1, dtype=torch.int8),
        torch.full((1, 1, 1), math.log(0.5)),
        state,
        torch.ones(1, 4),
        chunk_size=1,
        gate="q0.7",
        rounding="half_away",
        scaling="static",
    )
    assert final.flatten().tolist() == [-1, 0, 1, 2]


def test_integer_carry_is_not_clamped() -> None:
    """Five chunks of 100 add up to 485 inside; only the stored copies stop at 127.

    Then empty chunks let it decay: a clamped carry would fall below 127 at once.
    """
    states = torch.tensor([100, 100, 100, 100, 100, 0, 0, 0], dtype=torch.int8)
    passed, _, final = OPS["Ssdi8StatePassing"](
        states.reshape(1, 8, 1, 1, 1),
        torch.zeros(1, 1, 8),
        torch.zeros(1, 1, 1, 1),
        torch.ones(1, 1),
        chunk_size=1,
        gate="q0.7",
        rounding="half_away",
        scaling="static",
    )
    carry, want = 0, []
    for s in states.tolist():
        want.append(min(carry, 127))
        carry = (carry * 127 + 64) // 128 + s
    assert carry > 400
    assert passed.flatten().tolist() == want == [0, 100, 127, 127, 127, 127, 127, 127]
    assert final.item() == 127


def test_fp32_carry_is_not_quantized() -> None:
    """A state far below one step survives in the carry, though every stored copy is 0."""
    passed, _, final = OPS["Ssdi8StatePassing"](
        torch.full((1, 3, 1, 1, 1), 0.2),
        torch.zeros(1, 1, 3),
        torch.full((1, 1, 1, 1), 1e-3),
        torch.full((1, 1), 100.0),
        chunk_size=1,
        gate="fp32",
        rounding="half_even",
        scaling="static",
    )
    assert passed.flatten().tolist() == [0, 0, 0]
    assert final.item() == pytest.approx(0.601, rel=1e-6)
