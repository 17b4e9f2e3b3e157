"""The CUDA kernels of activations and of `Quantize`, with rotations, against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import normal, token_scaling
from kernel_compare import NORM_FRACTIONS, compare, kernel_of
from kernel_fixtures import CUDA, DEVICE

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.numerics.formats import Scaling

pytestmark = CUDA
FRACTIONS = NORM_FRACTIONS[1:]
scalings = pytest.mark.parametrize("scaling", ["dynamic", "static"])


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"length": 1},
        {"length": 5, "batch": 2},
        {"rotation": "none"},
        {"rotation": "blocks"},
        *({"rotation": "full", "width": n} for n in (1536, 2048, 2560, 12544)),
        # every number of bits behind those in registers, for each base matrix
        *({"width": n} for n in (8, 16, 32, 64, 128, 256, 5 * 512)),
        *({"width": n} for n in (24, 48, 96, 192, 9 * 192)),
        *({"width": n} for n in (40, 80, 160, 9 * 80, 49 * 160)),
        {"width": 12544},  # more than one round of vectors
        {"width": 16384},
        {"width": 15680},
        {"magnitude": 0.0},
        {"magnitude": 1000.0},  # squares that FP16 does not hold
        {"scale": 1e-3},  # saturates
        {"rounding": "half_away", "scale": 1e-3},
        {"activation": "silu_gate"},
        {"activation": "silu_gate", "magnitude": 100.0},
        {"activation": "silu_gate", "width": 4608, "rotation": "blocks"},
        {"activation": "silu_gate", "others": 3},  # rows not aligned
        {"activation": "silu_gate", "others": 8, "width": 720},
        {"activation": "silu_gate", "gate_apart": True, "width": 1536, "rotation": "full"},
    ],
    ids=str,
)
@scalings
def test_activation(generator: torch.Generator, row: dict[str, Any], scaling: Scaling) -> None:
    """x stands behind the gate, or alone where the gate is the tensor of another op."""
    base = {"batch": 1, "length": 2, "width": 1536, "magnitude": 1.0, "scale": 0.03, "others": 0}
    base |= {"activation": "relu2", "rotation": "signs", "rounding": "half_even"}
    case = {**base, "gate_apart": False, **row}
    rows, width = (case["batch"], case["length"]), case["width"]
    columns = [torch.full((*rows, case["others"]), torch.nan, dtype=torch.float16, device=DEVICE)]
    gate = normal(generator, *rows, width)
    x_column = 0 if case["gate_apart"] or case["activation"] == "relu2" else width
    columns += [gate] if x_column else []
    columns += [normal(generator, *rows, width) * case["magnitude"]]
    x = torch.cat([*columns[1:], columns[0]], -1)
    compare(
        "Ssdi8Activation",
        x,
        torch.cat([gate, columns[0]], -1) if case["gate_apart"] else x,
        *token_scaling(scaling, case["scale"]),
        **{name: case[name] for name in ("activation", "width", "rotation", "rounding")},
        x_column=x_column,
        scaling=scaling,
        fractions=FRACTIONS,
    )


@pytest.mark.parametrize(
    ("width", "rotation"),
    [(5120, "none"), (1536, "full"), (2560, "blocks"), (720, "full"), (4096, "signs")],
)
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@scalings
def test_quantize(
    generator: torch.Generator, width: int, rotation: str, rounding: str, scaling: Scaling
) -> None:
    for magnitude in (1.0, 0.0, 1e4):
        compare(
            "Ssdi8Quantize",
            normal(generator, 2, 3, width) * magnitude,
            *token_scaling(scaling, 0.02),
            width=width,
            rotation=rotation,
            rounding=rounding,
            scaling=scaling,
            fractions=FRACTIONS,
        )


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("Ssdi8Quantize", {"width": 12}, "width 12 is not a multiple of 8"),
        ("Ssdi8Quantize", {"width": 16392}, "width 16392"),
        ("Ssdi8Quantize", {"rotation": "hadamard"}, "rotation 1 out of range"),
        ("Ssdi8Quantize", {"scaling": "none"}, "scaling 2 out of range"),
        ("Ssdi8Quantize", {"scaling": "static"}, "scaling static needs scale"),
        ("Ssdi8Activation", {"width": 60}, "width 60 is not a multiple of 8"),
        ("Ssdi8Activation", {"x_column": 8}, "row stride 64 of x does not hold 64 columns from 8"),
    ],
    ids=str,
)
def test_refusals(
    generator: torch.Generator, op: str, change: dict[str, Any], message: str
) -> None:
    a = {"width": 64, "rotation": "full", "rounding": "half_even", "scaling": "dynamic"} | change
    inputs = [normal(generator, 1, 2, 64 if op == "Ssdi8Activation" else a["width"])]
    if op == "Ssdi8Activation":
        inputs *= 2
        a = {"activation": "silu_gate", "x_column": 0} | a
    with pytest.raises(Ssdi8Error, match=message):
        kernel_of(op)(*inputs, **a)


def test_a_gate_that_is_too_narrow(generator: torch.Generator) -> None:
    """A gate of its own may have other columns than x."""
    a = {"width": 64, "rotation": "full", "rounding": "half_even", "scaling": "dynamic"}
    x, gate = normal(generator, 1, 2, 64), normal(generator, 1, 2, 56)
    with pytest.raises(Ssdi8Error, match="row stride 56 of gate does not hold 64 columns"):
        kernel_of("Ssdi8Activation")(x, gate, activation="silu_gate", x_column=0, **a)
