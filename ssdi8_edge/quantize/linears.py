"""The tensors of one INT8 linear, under the names that `modules.linear` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssdi8_edge import int8
from ssdi8_edge.methods import QuantConfig
from ssdi8_edge.quantize.gptq import quantize_w4, quantize_w8

# Of the mean diagonal of the Hessian, added to it when a weight is fitted: inputs that hardly vary
# must not be given large weights.
RIDGE = 0.01


class InputStatistics:
    """What GPTQ and the compensation need to know of a linear's INT8 input x, in FP64.

    Attributes:
        hessian: Σ x xᵀ (In, In), x in INT8 steps.
        missing: Σ e xᵀ (Out or In, In), e being what the result, or the input, lacks to its FP
            counterpart, in real units.
    """

    def __init__(self, width: int, missing_width: int, device: str) -> None:
        self.hessian = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.missing = torch.zeros(missing_width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, missing: Tensor) -> None:
        """x (B, L, In) INT8 and missing (B, L, Out or In) FP32, of the same tokens."""
        rows = x.flatten(0, 1).float()
        # One batch in FP32: integers of its size are exact, and FP64 would be slow on a GPU.
        self.hessian += rows.t() @ rows
        self.missing += missing.flatten(0, 1).t() @ rows

    def regression(self) -> Tensor:
        """The matrix M of least ‖Σ e - M x‖², (Out or In, In), in real units per INT8 step."""
        damped = self.hessian.clone()
        damped.diagonal().add_(RIDGE * damped.diagonal().mean().clamp_min(1.0))
        return torch.linalg.solve(damped, self.missing, left=False)


def linear_tensors(
    name: str,
    weight: Tensor,
    input_scale: Tensor,
    recipe: QuantConfig,
    hessian: Tensor | None = None,
    parts: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Quantize `weight` (Out, In) FP32 by the recipe; zero bias.

    Args:
        input_scale: () FP32, of the INT8 input.
        hessian: (In, In) Σ x xᵀ for GPTQ, up to a factor; None rounds to nearest.
        parts: numbers of rows that share a scale with linear "w8_block"; None is all rows.
    """
    if recipe.linear == "w4":
        w4 = quantize_w4(
            weight,
            recipe.group_size,
            hessian,
            recipe.descent,
            integer_scales=recipe.group_scales == "integer",
            search=recipe.group_search == "mse",
        )
        tensors = {
            "packed": w4.packed,
            "group_scale": w4.group_scale,
            "scale": w4.row_scale * input_scale,
            "bias": weight.new_zeros(len(weight)),
        }
    else:
        absmax = weight.abs().amax(1)
        if recipe.linear != "w8_row":
            sizes = parts if parts and recipe.linear == "w8_block" else [len(weight)]
            absmax = torch.cat([part.amax().expand(len(part)) for part in absmax.split([*sizes])])
        tensors = w8_tensors(weight, absmax, input_scale, hessian, recipe.descent)
    return {f"{name}.{k}": v for k, v in tensors.items()}


def w8_tensors(
    weight: Tensor,
    absmax: Tensor,
    input_scale: Tensor,
    hessian: Tensor | None = None,
    descent: int = 0,
) -> dict[str, Tensor]:
    """INT8 weight (Out, In) for ranges `absmax` (Out), its scale times the input's, a zero bias."""
    scale = int8.scale_from_absmax(absmax)
    return {
        "weight": quantize_w8(weight, scale, hessian, descent),
        "scale": scale * input_scale,
        "bias": weight.new_zeros(len(weight)),
    }
