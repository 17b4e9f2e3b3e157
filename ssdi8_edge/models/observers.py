"""What calibration collects of every block: running absolute maxima and histograms.

Statistics are of the model in the rotated basis; scales are made from them when a recipe is
applied. Source: docs/method.md §6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.histogram import MagnitudeHistogram
from ssdi8_edge.numerics.int8 import scale_from_absmax
from ssdi8_edge.recipes.recipe import QuantConfig

# Of the observers that the release keeps outside SSD.
PER_TENSOR_FLOOR = 1e-6


class Observers:
    """Statistics of one block; called as the `observe` of `FloatBlock`. A kind adds its own."""

    def __init__(self, parts: Mapping[str, int], rotation: InputRotation = "full") -> None:
        """`parts`: the rows of in_proj, in order; `rotation`: of out_proj's input."""
        self._parts = parts
        self._rotation = rotation
        self._histograms: dict[str, MagnitudeHistogram] = {}
        self.absmax: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        if name == "u":
            self.whole("u", value)
        elif name == "in_proj":
            for part, rows in zip(
                self._parts, value.split([*self._parts.values()], -1), strict=True
            ):
                self.update(f"in_proj.{part}", rows.abs().amax())
        elif name == "r":
            self.whole("r", hadamard.apply(value, self._rotation))
        elif name == "out":
            self.update("out", value.abs().amax())

    def statistics(self) -> dict[str, Tensor]:
        """All that was seen: maxima, and as `<name>_mse` the ranges of least squared error."""
        best = {
            f"{name}_mse": histogram.best_range(self.absmax[name].reshape(-1))
            for name, histogram in self._histograms.items()
        }
        best = {k: v.reshape(self.absmax[k.removesuffix("_mse")].shape) for k, v in best.items()}
        return {**self.absmax, **best}

    def whole(self, name: str, value: Tensor) -> None:
        """A tensor with one scale."""
        self.update(name, value.abs().amax())
        self._count(name, value.reshape(1, -1))

    def by_group(self, name: str, value: Tensor) -> None:
        """A tensor (G, …) with a scale per group."""
        value = value.flatten(1)
        self.update(name, value.abs().amax(1))
        self._count(name, value)

    def update(self, name: str, value: Tensor) -> None:
        """The largest so far of `value`, which is absolute."""
        value = value.float()
        old = self.absmax.get(name)
        self.absmax[name] = value if old is None else torch.maximum(old, value)

    def _count(self, name: str, value: Tensor) -> None:
        if name not in self._histograms:
            self._histograms[name] = MagnitudeHistogram(len(value), value.device)
        self._histograms[name].add(value)


def of_linear_inputs(statistics: Mapping[str, Tensor], recipe: QuantConfig) -> dict[str, Tensor]:
    """The static scales of in_proj's and out_proj's inputs; none where each token has its own."""
    if recipe.input_scaling != "static":
        return {}
    suffix = "_mse" if recipe.clip == "mse" else ""
    return {f"{name}_scale": of_linear_input(statistics[f"{name}{suffix}"]) for name in ("u", "r")}


def of_linear_input(absmax: Tensor) -> Tensor:
    """The scale (1) of all tokens, from their largest value ()."""
    return scale_from_absmax(absmax, PER_TENSOR_FLOOR).reshape(1)
