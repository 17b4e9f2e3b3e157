"""The CUDA kernels of the FP16 baseline against their references.

FP32 against FP64 inside, and sums in another order: an FP16 value may be its neighbour.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import conv_case, normal
from kernel_compare import guarded_allocations, kernel_of, reference, relative_error
from kernel_fixtures import CUDA, DEVICE, needs_gpu, skip_unless_affordable, synchronize
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops import kernel_library

pytestmark = CUDA
# Of the norm of a tensor: one step of FP16, 5e-4 of a value, at a few of the values.
TOLERANCE = 2e-4


def compare_nearly(op: str, inputs: list[Tensor], attributes: dict[str, Any]) -> None:
    with guarded_allocations():
        got = kernel_of(op)(*inputs, **attributes)
        synchronize()
    want = reference(op, *inputs, **attributes)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
    for g, w in pairs:
        assert relative_error(g, w) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "width", "rows"),
    [
        (1, 64, 16),
        (1, 768, 250),  # rows that no tile divides
        (8, 96, 64),
        (9, 96, 65),  # the larger tile
        (33, 128, 130),
        (70, 32, 1),
        pytest.param(2048, 2560, 10576, marks=needs_gpu),
        pytest.param(1, 2560, 50280, marks=needs_gpu),
    ],
)
def test_linear(generator: torch.Generator, tokens: int, width: int, rows: int) -> None:
    x, weight = normal(generator, 1, tokens, width), normal(generator, rows, width)
    compare_nearly("Linear", [x, weight], {})


@pytest.mark.parametrize("width", [1, 64, 300, 2560])
def test_rms_norm(generator: torch.Generator, width: int) -> None:
    hidden = normal(generator, 2, 3, width)
    residual = normal(generator, 2, 3, width, dtype=torch.float32)
    weight = normal(generator, width, dtype=torch.float32)
    compare_nearly("RmsNorm", [hidden, residual, weight], {"eps": 1e-5})


@pytest.mark.parametrize(("width", "ngroups"), [(64, 1), (300, 3), (2048, 8)])
def test_rms_norm_gated(generator: torch.Generator, width: int, ngroups: int) -> None:
    zxbcdt = torch.full((2, 3, width + 5), torch.nan, dtype=torch.float16, device=DEVICE)
    zxbcdt[..., :width] = normal(generator, 2, 3, width)
    weight = normal(generator, width, dtype=torch.float32)
    attributes = {"eps": 1e-5, "d_inner": width, "ngroups": ngroups}
    compare_nearly("RmsNormGated", [normal(generator, 2, 3, width), zxbcdt, weight], attributes)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "d_conv", "heads"),
    [(1, 1, 4, 8), (2, 2, 4, 8), (1, 33, 4, 8), (1, 70, 3, 7), (2, 5, 2, 8)],
)
def test_causal_conv1d(
    generator: torch.Generator, batch: int, length: int, d_conv: int, heads: int, in_place: bool
) -> None:
    inputs, given = conv_case(generator, batch, length, 128, 2, 64, d_conv=d_conv, heads=heads)
    attributes = {name: given[name] for name in ("d_inner", "conv_dim", "d_conv")}
    want = reference("CausalConv1d", *inputs[:4], **attributes)
    if not in_place:
        compare_nearly("CausalConv1d", inputs[:4], attributes)
        return
    with kernel_library.states_in_place():
        got = kernel_of("CausalConv1d")(*inputs[:4], **attributes)
        synchronize()
    assert got[3].data_ptr() == inputs[1].data_ptr()
    assert torch.equal(got[3], want[3]) and relative_error(got[0], want[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("batch", "length", "heads", "headdim", "ngroups", "d_state", "state"),
    [
        (1, 1, 2, 64, 1, 64, torch.float32),
        (2, 5, 2, 64, 2, 64, torch.float16),
        (1, 70, 2, 16, 1, 128, torch.float32),
        (1, 3, 4, 128, 2, 256, torch.float32),
        pytest.param(2, 2048, 80, 64, 1, 128, torch.float32, marks=needs_gpu),
    ],
)
def test_ssd_scan(
    generator: torch.Generator,
    batch: int,
    length: int,
    heads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    state: torch.dtype,
) -> None:
    skip_unless_affordable(batch * length * heads * headdim * d_state)
    column = heads * headdim + 3
    zxbcdt = torch.full((batch, length, column + heads), torch.nan, device=DEVICE).half()
    zxbcdt[..., column:] = normal(generator, batch, length, heads)
    inputs = [
        normal(generator, batch, length, heads * headdim),
        normal(generator, batch, length, ngroups * d_state),
        normal(generator, batch, length, ngroups * d_state),
        zxbcdt,
        normal(generator, batch, heads, headdim, d_state, dtype=state),
        torch.linspace(-5.0, -2.0, heads, device=DEVICE),
        -torch.linspace(1.0, 16.0, heads, device=DEVICE),
        normal(generator, heads, dtype=torch.float32),
    ]
    attributes = {
        "chunk_size": 64,
        "nheads": heads,
        "headdim": headdim,
        "ngroups": ngroups,
        "d_state": d_state,
        "dt_column": column,
        "dt_min": 0.0,
        "dt_max": float("inf"),
    }
    compare_nearly("SsdScan", inputs, attributes)


def test_refusals(generator: torch.Generator) -> None:
    with pytest.raises(Ssdi8Error, match="fp16_linear: in_features 48 is not a multiple of 32"):
        kernel_of("Linear")(normal(generator, 1, 1, 48), normal(generator, 8, 48))
