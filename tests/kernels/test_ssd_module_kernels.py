"""The CUDA kernels of the modules of SSD against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    FP16_ROWS,
    SSD_ROWS,
    run_ssd_kernel,
    select,
    ssd_arguments,
    ssd_case,
)
from kernel_compare import (
    assert_near,
    compare,
    reference,
    relative_error,
)
from kernel_fixtures import (
    CUDA,
    DEVICE,
)

pytestmark = CUDA


@pytest.mark.parametrize("row", [*SSD_ROWS, *FP16_ROWS], ids=str)
def test_ssd_modules(generator: torch.Generator, row: dict[str, Any]) -> None:
    """Each kernel on the outputs of the references before it."""
    case = ssd_case(generator, row)
    values, attributes = case["inputs"], case["attributes"]

    def wanted(op: str) -> Any:
        return reference(op, *ssd_arguments(op, values), **select(op, attributes))

    got = run_ssd_kernel("Ssdi8ChunkCumsum", values, attributes)
    values["dt"], values["a"] = wanted("Ssdi8ChunkCumsum")
    assert torch.allclose(got[0], values["dt"], rtol=1e-6, atol=0)
    assert torch.allclose(got[1], values["a"], rtol=1e-6, atol=0)

    states = run_ssd_kernel("Ssdi8ChunkState", values, attributes)
    values["states"] = wanted("Ssdi8ChunkState")
    assert_near(states, values["states"])

    passed, scale, final = run_ssd_kernel("Ssdi8StatePassing", values, attributes)
    values["passed"], values["passed_scale"], want_final = wanted("Ssdi8StatePassing")
    assert_near(passed, values["passed"])
    assert scale.shape == values["passed_scale"].shape
    if case["scaling"] != "dynamic":
        assert torch.equal(scale, values["passed_scale"])
    assert torch.allclose(scale, values["passed_scale"], rtol=1e-5, atol=0)
    assert relative_error(final, want_final) < 2e-4

    y = run_ssd_kernel("Ssdi8ChunkScan", values, attributes)
    assert relative_error(y, wanted("Ssdi8ChunkScan")) < 1e-3


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_ssd_modules_round_ties(rounding: str) -> None:
    """Halves, which random values never are, in every rounding of the modules."""
    n, length = 64, 128
    ones, zeros = torch.ones(1, n, device=DEVICE), torch.zeros(1, 1, length, device=DEVICE)
    halves = torch.arange(-32, 32, device=DEVICE) / 2
    position = torch.arange(n, device=DEVICE)
    x = halves.half().repeat(1, length, 1)
    b_q = torch.zeros(1, length, n, dtype=torch.int8, device=DEVICE)
    c_q = torch.zeros_like(b_q)
    b_q[0, position, position] = 1
    sizes = {"nheads": 1, "headdim": n, "ngroups": 1, "d_state": n, "chunk_size": length}
    choice = {"rounding": rounding, "scaling": "static"}
    one = ones[0, :1]

    states = (x, b_q, zeros + 1, zeros, one, ones, ones)  # Q(x)
    compare("Ssdi8ChunkState", *states, **sizes, **choice, gate="fp32")

    # CB, in steps of 2.
    c_q[0, position, position] = c_q[0, n + position, position] = torch.arange(
        -32, 32, dtype=torch.int8, device=DEVICE
    )
    passed = torch.zeros(1, 1, 1, n, n, dtype=torch.int8, device=DEVICE)
    scan = (x, b_q, c_q, zeros + 1, zeros, passed, torch.ones(1, 1, 1, n, device=DEVICE))
    scales = (zeros[0, 0, :1], one, one, 2 * one)
    compare("Ssdi8ChunkScan", *scan, *scales, **sizes, **choice)

    passing = (torch.zeros(1, 1, 1, n, n, device=DEVICE), zeros, halves.repeat(1, 1, n, 1), ones)
    gate = {"chunk_size": length, "gate": "fp32"}
    compare("Ssdi8StatePassing", *passing, **gate, **choice, fractions=(0.0, 0.0, 0.0))
