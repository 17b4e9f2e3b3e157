"""Rotation and quantization of an FP16 tensor, and two beside each other."""

from __future__ import annotations

import pytest
import torch
from op_bodies import compare_body, token_scaling
from slow_ops import ROUNDINGS, assert_same, f32, quantized_token
from test_activation import slow_rotation

from ssdi8_edge.numerics.formats import Rounding, Scaling
from ssdi8_edge.ops import OPS

rows = pytest.mark.parametrize(
    ("width", "rotation"),
    [(48, "none"), (48, "full"), (720, "full"), (144, "blocks"), (512, "blocks"), (144, "signs")],
)


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@rows
def test_quantize_against_loops(
    width: int, rotation: str, rounding: Rounding, scaling: Scaling
) -> None:
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(width)).half()
    got, got_scale = OPS["Ssdi8Quantize"](
        *(x, *token_scaling(scaling, 0.02)),
        width=width,
        rotation=rotation,
        rounding=rounding,
        scaling=scaling,
    )
    for i in range(2):
        rotated = slow_rotation(x[0, i].numpy().astype(f32), rotation)
        want, want_scale = quantized_token(rotated, scaling, 0.02, rounding)
        assert_same(got[0, i], want)
        assert got_scale[0, i].tolist() == [want_scale]


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@rows
def test_quantize_bodies(width: int, rotation: str, rounding: Rounding, scaling: Scaling) -> None:
    g = torch.Generator().manual_seed(3)
    for magnitude in (1.0, 0.0, 1e4):
        x = (torch.randn(2, 5, width, generator=g) * magnitude).half()
        attributes = {"width": width, "rotation": rotation}
        chosen = {"rounding": rounding, "scaling": scaling}
        inputs = [x, *token_scaling(scaling, 0.02)]
        compare_body("Ssdi8Quantize", inputs, {**attributes, **chosen})


def test_two_beside_each_other() -> None:
    x, y = torch.randn(2, 3, 8).half(), torch.randn(2, 3, 5).half()
    compare_body("SideBySide", [x, y], {})
