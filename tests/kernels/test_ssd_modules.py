"""The modules of SSD: references against loops, bodies against references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from case_table import (
    BASE,
    CHUNK,
    SSD_CASES,
    SsdCase,
    relative_error,
    ssd_inputs,
    takes,
)
from op_bodies import compare_body
from slow_ops import (
    ROUNDINGS,
    as_numpy,
    assert_same,
    chunk_slices,
    slow_cb,
    slow_chunk_state,
    slow_cumsum,
    slow_passing,
    slow_scan,
)
from ssd_calls import call, run_modules
from torch import Tensor

from ssdi8_edge.numerics import int8
from ssdi8_edge.numerics.int8 import Rounding
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.ssd import scan

# Loops over positions are quadratic: long rows are left to the graph comparison.
SLOW_CASES = {name: case for name, case in SSD_CASES.items() if case.length < 5 * CHUNK}


@pytest.mark.parametrize("case", SLOW_CASES.values(), ids=SLOW_CASES.keys())
def test_modules_against_loops(case: SsdCase) -> None:
    """dt, a, chunk states, passed states, final state and y, each bit for bit."""
    inputs = ssd_inputs(case)
    got, t = run_modules(inputs, case), as_numpy(inputs)
    dt, a = slow_cumsum(t, case)
    assert_same(got["dt"], dt)
    assert_same(got["a"], a)
    states = slow_chunk_state(t, dt, a, case)
    kinds = {"fp32": torch.float32, "q0.7": torch.int8}
    kind = torch.float16 if case.scaling == "none" else kinds[case.gate]
    assert got["states"].dtype is kind
    assert_same(got["states"], states)
    passed, passed_scale, final = slow_passing(t, states, a, case)
    assert got["passed"].dtype is (torch.float16 if case.scaling == "none" else torch.int8)
    assert_same(got["passed"], passed)
    assert_same(got["passed_scale"], passed_scale)
    assert got["final"].dtype is case.state_dtype
    assert_same(got["final"], final)
    assert_same(got["y"], slow_scan(t, dt, a, passed, passed_scale, case))


def test_the_rows_reach_the_ends_of_int8() -> None:
    """The saturating rows do saturate, and the base row does not: else they test the same."""
    for name, low, high in (("static", 0.0, 0.07), ("static saturating", 0.07, 1.0)):
        case = SSD_CASES[name]
        with int8.count_saturation() as counter:
            run_modules(ssd_inputs(case), case)
        sites = counter.fractions()
        assert set(sites) == {"x_scaled", "passed_state", "CB"}
        for site, fraction in sites.items():
            assert low <= fraction <= high, (name, site, fraction)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ngroups", [1, 2])
def test_cb_is_exact_integers(
    rounding: Rounding, ngroups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CB never leaves the op, so it is caught where it is rounded; saturating entries included."""
    case = dataclasses.replace(
        BASE, ngroups=ngroups, rounding=rounding, batch=2, d_state=24, scaling="static"
    )
    inputs = ssd_inputs(case)
    inputs["cb_scale"] = inputs["cb_scale"] / 2
    seen: list[Tensor] = []

    def spy(v: Tensor, mode: Rounding, site: str = "") -> Tensor:
        q = int8.round_to_int8(v, mode, site)
        if site == "CB":
            seen.append(q)
        return q

    monkeypatch.setattr(scan, "round_to_int8", spy)
    run_modules(inputs, case)
    t = as_numpy(inputs)
    for c, part in chunk_slices(case):
        for b, g in np.ndindex(case.batch, ngroups):
            want = slow_cb(t, b, g, part, case)
            assert_same(seen[c][b, g, : len(want), : len(want)], want)
            assert int(seen[c].abs().max()) >= 127


def test_dynamic_scales_do_not_depend_on_the_size_of_w() -> None:
    """With dt a thousand times smaller "static" rounds w · x to zero; "dynamic" loses nothing.

    A factor of 2^-10 in dt alone (a is given apart) is exactly one in the states.
    """
    kept: dict[str, float] = {}
    for scaling in ("static", "dynamic"):
        case = dataclasses.replace(BASE, scaling=scaling, length=CHUNK)
        t = run_modules(ssd_inputs(case), case)
        small = {**t, "dt": t["dt"] * 2**-10}
        want = call("Ssdi8ChunkState", t, case).float() / 2**10
        kept[scaling] = relative_error(call("Ssdi8ChunkState", small, case).float(), want)
    assert kept["dynamic"] == 0
    assert kept["static"] > 0.1


def test_dynamic_scales_use_the_whole_range_of_each_row() -> None:
    """Each (chunk, head, channel) of the passed states reaches 127, whatever their sizes."""
    case = dataclasses.replace(BASE, state_dtype=torch.float32)
    inputs = ssd_inputs(case)
    spread = 10.0 ** torch.arange(-4, 4).repeat(case.heads * case.headdim // 8)
    inputs["ssm_state"] = inputs["ssm_state"] * spread.reshape(1, case.heads, case.headdim, 1)
    t = run_modules(inputs, case)
    assert bool((t["passed"].abs().amax(-1) == 127).all())
    entering = t["passed"][:, 0].float() * t["passed_scale"][:, 0, ..., None]
    error = (entering - inputs["ssm_state"]).abs() / t["passed_scale"][:, 0, ..., None]
    assert float(error.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("name", ["Ssdi8ChunkState", "Ssdi8StatePassing"])
def test_integer_carry_refuses_dynamic_scales(name: str) -> None:
    """One scale for all chunks is what makes the INT32 carry possible; both forms say so."""
    case = dataclasses.replace(BASE, scaling="static")
    t = run_modules(ssd_inputs(case), case)
    broken = dataclasses.replace(BASE, gate="q0.7")
    with pytest.raises(ValueError, match=r'gate "q0\.7" needs scaling "static"'):
        call(name, t, broken)
    with pytest.raises(ValueError, match=r'gate "q0\.7" needs scaling "static"'):
        OPS[name].body(broken.attributes, "cpu")


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("Ssdi8ChunkState", "x_scale"),
        ("Ssdi8StatePassing", "state_scale"),
    ],
)
def test_static_scales_cannot_be_left_out(name: str, scale: str) -> None:
    """They are optional inputs, but not with scaling "static"."""
    case = dataclasses.replace(BASE, scaling="static")
    t = run_modules(ssd_inputs(case), case)
    op = OPS[name]
    attributes = {k: v for k, v in case.attributes.items() if k in op.attributes}
    inputs = {k: t[k] for k in op.inputs if k != scale}
    with pytest.raises(ValueError, match=f'scaling "static" needs {scale}'):
        op.reference(**inputs, **attributes)


SSD_OPS = [
    "Ssdi8ChunkCumsum",
    "Ssdi8ChunkState",
    "Ssdi8StatePassing",
    "Ssdi8ChunkScan",
    "Ssdi8SsdScan",
]


@pytest.mark.parametrize("name", SSD_OPS)
@pytest.mark.parametrize("case", SSD_CASES.values(), ids=SSD_CASES.keys())
def test_ssd_bodies(name: str, case: SsdCase) -> None:
    """Each SSD op alone under onnxruntime: every output equal to the reference, bit for bit."""
    op = OPS[name]
    t = run_modules(ssd_inputs(case), case)
    names = [k for k in op.inputs if takes(case, k)]
    attributes = {k: v for k, v in case.attributes.items() if k in op.attributes}
    compare_body(name, [t[k] for k in names], attributes)
