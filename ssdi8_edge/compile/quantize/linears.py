"""The tensors of one INT8 linear, under the names that `models.block.linear` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssdi8_edge.compile.quantize.gptq import Hessian, quantize_w4, quantize_w8
from ssdi8_edge.numerics import int8
from ssdi8_edge.recipes.recipe import QuantConfig

# Of the mean diagonal of the Hessian, added to it when a weight is fitted: inputs that hardly vary
# must not be given large weights.
RIDGE = 0.01
# That of an input that is zero throughout.
LEAST_SQUARE = 1e-12


class InputStatistics:
    """What GPTQ and the compensation need to know of a linear's INT8 input x, in FP64.

    Attributes:
        hessian: Σ x xᵀ (In, In), of the values that x stands for.
        missing: Σ e xᵀ (Out or In, In), e being the FP result, or input, less the
            quantized one.
    """

    def __init__(self, width: int, missing_width: int, device: str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.hessian, self.missing = zeros(width, width), zeros(missing_width, width)

    def add(self, x: Tensor, missing: Tensor) -> None:
        """x (B, L, In) and missing (B, L, Out or In) FP32, of the same tokens."""
        rows, lacks = x.flatten(0, 1), missing.flatten(0, 1)
        # One batch in FP32: FP64 would be slow on a GPU.
        self.hessian += rows.t() @ rows
        self.missing += lacks.t() @ rows

    def regression(self) -> Tensor:
        """The matrix M of least Σ ‖e - M x‖², (Out or In, In): docs/method.md §7.5."""
        damped = self.hessian.clone()
        damped.diagonal().add_(RIDGE * damped.diagonal().mean().clamp_min(LEAST_SQUARE))
        return torch.linalg.solve(damped, self.missing, left=False)


def linear_tensors(
    name: str,
    weight: Tensor,
    recipe: QuantConfig,
    hessian: Tensor | Hessian | None = None,
    parts: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Quantize `weight` (Out, In) FP32 by the recipe; zero bias.

    Args:
        hessian: (In, In) Σ x xᵀ for GPTQ, up to a factor; None rounds to nearest.
        parts: numbers of rows that share a scale with linear "w8_block"; None is all rows.
    """
    if recipe.linear == "w4":
        recipe = recipe.for_columns(weight.shape[1])
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
            "scale": w4.row_scale,
            "bias": weight.new_zeros(len(weight)),
        }
    else:
        absmax = weight.abs().amax(1)
        if recipe.linear != "w8_row":
            sizes = parts if parts and recipe.linear == "w8_block" else [len(weight)]
            absmax = torch.cat([part.amax().expand(len(part)) for part in absmax.split([*sizes])])
        tensors = w8_tensors(weight, absmax, hessian, recipe.descent)
    return {f"{name}.{k}": v for k, v in tensors.items()}


def w8_tensors(
    weight: Tensor, absmax: Tensor, hessian: Tensor | Hessian | None = None, descent: int = 0
) -> dict[str, Tensor]:
    """INT8 weight (Out, In) for ranges `absmax` (Out), its scale, a zero bias."""
    scale = int8.scale_from_absmax(absmax)
    return {
        "weight": quantize_w8(weight, scale, hessian, descent),
        "scale": scale,
        "bias": weight.new_zeros(len(weight)),
    }
