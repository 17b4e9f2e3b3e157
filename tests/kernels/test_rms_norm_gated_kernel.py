"""The CUDA kernels of the gated norms and their rotation against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    normal,
    token_scaling,
)
from kernel_compare import (
    BOUNDARY_FRACTION,
    TOKEN_SCALE_TOLERANCE,
    compare,
)
from kernel_fixtures import (
    CUDA,
    DEVICE,
)

pytestmark = CUDA
scalings = pytest.mark.parametrize("scaling", ["dynamic", "static"])


@pytest.mark.parametrize(
    "row",
    [
        {},
        *({"length": length} for length in (1, 255, 256, 257, 515)),
        {"batch": 2},
        {"ngroups": 2},
        {"ngroups": 8},
        # every number of bits left to lane exchange, for each base matrix
        *({"d_inner": 2**k} for k in (3, 4, 5, 6, 7, 8, 10, 11, 12, 13)),
        *({"d_inner": 12 * 2**k} for k in (3, 4, 5, 6, 8, 9)),
        *({"d_inner": 20 * 2**k} for k in (3, 4, 5, 6, 7, 8)),
        {"d_inner": 5120, "length": 257},
        {"d_inner": 5120, "ngroups": 8},
        *({"heads": heads} for heads in (3, 6, 12)),  # rows not aligned
        # in blocks, of each base matrix; wider than a kernel of its own takes
        *({"d_inner": n, "ngroups": 8} for n in (7680, 10240, 14336)),
        *({"d_inner": n} for n in (56, 720, 1600, 9 * 192, 2880)),
        {"d_inner": 2880, "ngroups": 3, "heads": 3},
        {"magnitude": 0.0},
        {"magnitude": 100.0},
        {"scale": 1e-3},  # saturates
        {"rounding": "half_away"},
        {"rounding": "half_away", "scale": 1e-3},
    ],
    ids=str,
)
@scalings
def test_rms_norm_gated(generator: torch.Generator, row: dict[str, Any], scaling: str) -> None:
    compare_gated("Ssdi8RmsNormGated", generator, row, scaling)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"ngroups": 8, "batch": 2},
        {"d_inner": 7680, "ngroups": 8},
        *({"d_inner": n} for n in (8, 40, 192, 720, 2048, 2560)),
        {"heads": 3, "rounding": "half_away", "scale": 1e-3},
        {"magnitude": 0.0},
        {"magnitude": 100.0},
    ],
    ids=str,
)
@scalings
def test_norm_then_gate(generator: torch.Generator, row: dict[str, Any], scaling: str) -> None:
    compare_gated("Ssdi8NormThenGate", generator, row, scaling)


def compare_gated(op: str, generator: torch.Generator, row: dict[str, Any], scaling: str) -> None:
    base = {"batch": 1, "length": 5, "d_inner": 1536, "ngroups": 1, "magnitude": 1.0}
    case = {**base, "heads": 64, "scale": 0.03, "rounding": "half_even", **row}
    batch, length, d_inner = case["batch"], case["length"], case["d_inner"]
    y = normal(generator, batch, length, d_inner) * case["magnitude"]
    columns = 2 * d_inner + case["heads"]
    zxbcdt = torch.full((batch, length, columns), torch.nan, dtype=torch.float16, device=DEVICE)
    zxbcdt[..., :d_inner] = normal(generator, batch, length, d_inner) * max(case["magnitude"], 1)
    weight = torch.rand(d_inner, generator=generator, device=DEVICE) + 0.5
    compare(
        op,
        y,
        zxbcdt,
        weight,
        *token_scaling(scaling, case["scale"]),
        eps=1e-5,
        d_inner=d_inner,
        ngroups=case["ngroups"],
        rounding=case["rounding"],
        scaling=scaling,
        fractions=(BOUNDARY_FRACTION, TOKEN_SCALE_TOLERANCE),
    )
