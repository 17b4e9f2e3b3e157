"""The CUDA kernel of residual add and RMSNorm against its reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    normal,
    token_scaling,
)
from kernel_compare import (
    NORM_FRACTIONS,
    compare,
)
from kernel_fixtures import (
    CUDA,
)

pytestmark = CUDA


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "magnitude", "scale", "rounding"),
    [
        (1, 5, 768, 1.0, 0.03, "half_even"),
        (1, 1, 768, 1.0, 0.03, "half_even"),  # L
        (1, 255, 768, 1.0, 0.03, "half_even"),
        (1, 256, 768, 1.0, 0.03, "half_even"),
        (1, 257, 768, 1.0, 0.03, "half_even"),
        (1, 515, 768, 1.0, 0.03, "half_even"),
        (2, 5, 768, 1.0, 0.03, "half_even"),  # batch
        (1, 5, 8, 1.0, 0.03, "half_even"),  # width
        (1, 5, 1024, 1.0, 0.03, "half_even"),
        (1, 257, 2560, 1.0, 0.03, "half_even"),
        (1, 5, 4104, 1.0, 0.03, "half_even"),
        (1, 5, 8192, 1.0, 0.03, "half_even"),
        (1, 5, 768, 0.0, 0.03, "half_even"),  # magnitude
        (1, 5, 768, 1e4, 0.03, "half_even"),
        (1, 5, 768, 1e-7, 0.03, "half_even"),
        (1, 5, 768, 1.0, 0.001, "half_even"),  # saturates
        (1, 5, 768, 1.0, 0.001, "half_away"),
        (1, 515, 768, 1.0, 0.03, "half_away"),  # rounding
    ],
)
def test_rms_norm(
    generator: torch.Generator,
    batch: int,
    length: int,
    d_model: int,
    magnitude: float,
    scale: float,
    rounding: str,
    scaling: str,
) -> None:
    shape = (batch, length, d_model)
    hidden = (normal(generator, *shape, dtype=torch.float32) * magnitude).half()
    residual = normal(generator, *shape, dtype=torch.float32) * magnitude
    compare(
        "Ssdi8RmsNorm",
        hidden,
        residual,
        *token_scaling(scaling, scale),
        eps=1e-5,
        rounding=rounding,
        scaling=scaling,
        fractions=NORM_FRACTIONS,
    )
