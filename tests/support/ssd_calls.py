"""Calls of the SSD ops on the inputs of a case, and parts of these."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from case_table import (
    SSD_CASES,
    SsdCase,
    takes,
)
from torch import Tensor

from ssdi8_edge.ops import OPS


def all_cases(**changes: Any) -> pytest.MarkDecorator:
    cases = {name: dataclasses.replace(case, **changes) for name, case in SSD_CASES.items()}
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def call(name: str, inputs: dict[str, Tensor], case: SsdCase) -> Any:
    """The reference of an SSD op; inputs by their names."""
    op = OPS[name]
    names = [k for k in op.inputs if takes(case, k)]
    attributes = {k: v for k, v in case.attributes.items() if k in op.attributes}
    return op(*(inputs[k] for k in names), **attributes)


def run_modules(inputs: dict[str, Tensor], case: SsdCase) -> dict[str, Tensor]:
    """The four modules one after the other, called by hand."""
    t = dict(inputs)
    t["dt"], t["a"] = call("Ssdi8ChunkCumsum", t, case)
    t["states"] = call("Ssdi8ChunkState", t, case)
    t["passed"], t["passed_scale"], t["final"] = call("Ssdi8StatePassing", t, case)
    t["y"] = call("Ssdi8ChunkScan", t, case)
    return t


def fused(inputs: dict[str, Tensor], case: SsdCase) -> tuple[Tensor, Tensor]:
    y, state = call("Ssdi8SsdScan", inputs, case)
    return y, state


def part_of(
    inputs: dict[str, Tensor], tokens: slice, rows: slice = slice(None)
) -> dict[str, Tensor]:
    """The same inputs for some tokens of some sequences."""
    cut = {k: v[rows, tokens] for k, v in inputs.items() if k in ("x", "b_q", "c_q", "zxbcdt")}
    return {**inputs, **cut, "ssm_state": inputs["ssm_state"][rows]}


def fp_arguments(inputs: dict[str, Tensor], case: SsdCase) -> dict[str, Tensor]:
    """Inputs of the FP model's SSD; B and C dequantized, so that only SSD itself differs."""
    b, n = case.batch, case.length
    first = case.d_inner + case.conv_dim
    rows = {
        k: inputs[f"{k.lower()}_q"].reshape(b, n, case.ngroups, -1).float()
        * inputs[f"{k.lower()}_scale"][:, None]
        for k in "BC"
    }
    return {
        "x": inputs["x"].reshape(b, n, case.heads, -1).float(),
        "dt_raw": inputs["zxbcdt"][..., first:].float(),
        "dt_bias": inputs["dt_bias"],
        "A": inputs["A"],
        **rows,
        "D": inputs["D"],
    }
