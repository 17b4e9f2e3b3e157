"""The CUDA kernel of the convolution against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    conv_case,
)
from kernel_compare import (
    CONV_FRACTIONS,
    compare,
    kernel_of,
)
from kernel_fixtures import (
    CUDA,
)

from ssdi8_edge.ops import kernel_library

pytestmark = CUDA


@pytest.mark.parametrize(
    "row",
    [
        {},
        *({"length": length} for length in (1, 2, 3, 4, 255, 256, 257, 515)),
        {"batch": 2},
        {"batch": 2, "length": 257},
        {"ngroups": 2},
        {"ngroups": 8},
        {"d_conv": 2},
        {"d_conv": 3},
        {"d_conv": 3, "length": 1},
        {"d_inner": 5120, "length": 257},
        *({"heads": heads, "batch": 2, "length": 70} for heads in (3, 6, 12)),  # rows not aligned
        {"d_inner": 320, "d_state": 64},
        {"d_state": 64, "ngroups": 3, "length": 3},
        {"d_state": 256, "ngroups": 2, "length": 70},
        {"d_state": 256, "d_conv": 3},
        {"rotation": "none"},
        {"rotation": "none", "d_inner": 128, "d_state": 16},
        {"rotation": "none", "d_inner": 5120, "length": 257},
        {"magnitude": 0.0},
        {"magnitude": 100.0},
        {"scale": 1e-4},  # saturates
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_causal_conv1d(generator: torch.Generator, row: dict[str, Any], rounding: str) -> None:
    base = {"batch": 1, "length": 5, "d_inner": 1536, "ngroups": 1, "d_state": 128}
    inputs, attributes = conv_case(generator, **{**base, **row})
    attributes["rounding"] = rounding
    compare("Ssdi8CausalConv1d", *inputs, **attributes, fractions=CONV_FRACTIONS)


def test_causal_conv1d_continues_a_sequence(generator: torch.Generator) -> None:
    """Prefill of 65 tokens and three steps give what 68 tokens at once give, bit for bit."""
    (zxbcdt, state, *rest), attributes = conv_case(generator, 2, 68, 1536, 1, 128)
    whole = kernel_of("Ssdi8CausalConv1d")(zxbcdt, state, *rest, **attributes)
    parts = []
    for piece in zxbcdt.split([65, 1, 1, 1], 1):
        *out, state = kernel_of("Ssdi8CausalConv1d")(piece, state, *rest, **attributes)
        parts.append(out)
    for got, want in zip(zip(*parts, strict=True), whole[:3], strict=True):
        assert torch.equal(torch.cat(got, 1), want)
    assert torch.equal(state, whole[3])


@pytest.mark.parametrize("length", [1, 2, 257])
def test_causal_conv1d_state_in_place(generator: torch.Generator, length: int) -> None:
    inputs, attributes = conv_case(generator, 2, length, 1536, 1, 128)
    want = kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)
    with kernel_library.states_in_place():
        got = kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)
    assert got[3] is inputs[1]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
