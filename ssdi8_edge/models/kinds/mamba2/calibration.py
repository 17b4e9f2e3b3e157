"""What calibration collects of a Mamba-2 block, and the scales that are made from it.

Source: docs/method.md §5.1, §6, §10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssdi8_edge.models.kinds.mamba2.clusters import Order
from ssdi8_edge.models.observers import PER_TENSOR_FLOOR, Observers, of_linear_inputs
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.hadamard import rotate
from ssdi8_edge.numerics.histogram import MagnitudeHistogram
from ssdi8_edge.numerics.int8 import scale_from_absmax
from ssdi8_edge.recipes.recipe import QuantConfig

if TYPE_CHECKING:
    from ssdi8_edge.models.kinds.mamba2 import Mamba2

# Of |x| for the recipes that clip it so: docs/method.md §6.2 (19).
PERCENTILE = 0.9995
PERCENTILE_MOMENTUM = 0.01


class Mamba2Observers(Observers):
    """Statistics of one block; shapes as the scales they become.

    Besides those of every block: B, C, CB, CB_full: (G); x, x_scaled, chunk_state, passed_state:
    (H, P); y, the output of SSD: (). `<name>_rotated` of B, C and the states, where d_state has a
    Hadamard matrix: after `hadamard.rotate`. x_mean: (H, P), the largest mean of |x| over a window;
    x_percentile: (), a moving average of the windows' percentiles.
    """

    def __init__(
        self,
        sizes: Mamba2,
        a_rate: Tensor,
        parts: Mapping[str, int] | None = None,
        rotation: InputRotation | None = None,
    ) -> None:
        """`a_rate`: A (H); `parts` and `rotation` of the block, where it is more than Mamba-2."""
        super().__init__(parts or sizes.parts, rotation or sizes.rotation)
        self._chunk_size = sizes.chunk_size
        self._rotates = hadamard.exists(sizes.d_state)
        self._a_rate = a_rate
        self._seen: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        super().__call__(name, value)
        if name in ("B", "C"):
            self.by_group(name, value.movedim(2, 0))
            if self._rotates:
                self.by_group(f"{name}_rotated", rotate(value.movedim(2, 0)).float())
            self._seen[name] = value
        elif name == "x":
            self._seen["x"] = value
            self._channels(value)
        elif name == "dt":
            self._seen["dt"] = value
        elif name in ("chunk_state", "passed_state"):
            self.update(name, value.abs().amax((0, 1, 4)))
            if self._rotates:
                self.update(f"{name}_rotated", rotate(value).abs().amax((0, 1, 4)))
        elif name == "y":
            self.update("y", value.abs().amax())
            self._chunk_tensors()

    def _channels(self, x: Tensor) -> None:
        """What recipes that keep x in INT8 ask of it, x (B, L, H, P)."""
        self.update("x", x.abs().amax((0, 1)))
        self.update("x_mean", x.abs().mean(1).amax(0))
        for sample in x:
            histogram = MagnitudeHistogram(1, x.device)
            histogram.add(sample.reshape(1, -1))
            now = histogram.quantile(PERCENTILE)[0]
            old = self.absmax.get("x_percentile", now)
            self.absmax["x_percentile"] = old + PERCENTILE_MOMENTUM * (now - old)

    def _chunk_tensors(self) -> None:
        """w·x and CB, per chunk, from the tensors seen in this call."""
        seen = self._seen
        x, dt, b, c = seen["x"], seen["dt"], seen["B"], seen["C"]
        for start in range(0, x.shape[1], self._chunk_size):
            part = slice(start, start + self._chunk_size)
            x_k, dt_k = x[:, part], dt[:, part]
            a = (dt_k * self._a_rate).cumsum(1)  # (B, K, H)
            w = torch.exp(a[:, -1:] - a) * dt_k
            self.update("x_scaled", (x_k * w[..., None]).abs().amax((0, 1)))
            cb = torch.einsum("bmgn,bkgn->bgmk", c[:, part], b[:, part])
            self.update("CB_full", cb.abs().amax((0, 2, 3)))
            self.update("CB", cb.tril().abs().amax((0, 2, 3)))


def activation_scales(
    statistics: Mapping[str, Tensor],
    recipe: QuantConfig,
    in_proj_parts: Mapping[str, int],
    order: Order | None = None,
) -> dict[str, Tensor]:
    """The static scales that the recipe computes with, by parameter name.

    Args:
        statistics: of one block, as `Mamba2Observers` names them.
        in_proj_parts: the rows of in_proj, in order.
        order: of the channels of x, for x_granularity "cluster".
    """

    def seen(name: str) -> Tensor:
        return statistics[f"{name}_mse" if recipe.clip == "mse" else name]

    def of_group(value: Tensor) -> Tensor:
        return scale_from_absmax(_collapse(value, recipe.bc_granularity))

    rotated = "_rotated" if recipe.bc_rotation == "hadamard" else ""
    released = recipe.state_observer == "local"
    scales = {
        "b_scale": of_group(seen(f"B{rotated}")),
        "c_scale": of_group(seen(f"C{rotated}")),
    }
    scales |= of_linear_inputs(statistics, recipe)
    if recipe.ssd == "dequantized":
        parts = [statistics[f"in_proj.{k}"].expand(n) for k, n in in_proj_parts.items()]
        x = _stored_x(statistics, recipe, order).flatten()
        return scales | {
            "in_proj_scale": scale_from_absmax(torch.cat(parts), PER_TENSOR_FLOOR),
            "x_scale": scale_from_absmax(x, PER_TENSOR_FLOOR),
        }
    # The release observes the full square of CB, also where k > m. Where CB is FP16, its scale only
    # keeps it inside that range.
    scales["cb_scale"] = of_group(statistics["CB_full" if released else "CB"])
    if recipe.scaling == "static":
        scales |= _static_ssd_scales(statistics, recipe, rotated)
    return scales


def _collapse(value: Tensor, granularity: str) -> Tensor:
    return value.amax().expand(value.shape).clone() if granularity == "tensor" else value


def _static_ssd_scales(
    statistics: Mapping[str, Tensor], recipe: QuantConfig, rotated: str
) -> dict[str, Tensor]:
    """Of w · x and of the states, (H, P)."""
    states = statistics[f"chunk_state{rotated}"]
    if recipe.state_observer == "passed":
        states = torch.maximum(states, statistics[f"passed_state{rotated}"])
    ranges = {"x_scale": statistics["x_scaled"], "state_scale": states}
    return {k: scale_from_absmax(_collapse(v, recipe.x_granularity)) for k, v in ranges.items()}


def _stored_x(statistics: Mapping[str, Tensor], recipe: QuantConfig, order: Order | None) -> Tensor:
    """The range of each channel (H, P) of an x that is kept in INT8."""
    absmax = statistics["x"]
    if order is not None:
        return order.share_largest(order.of_channels(absmax))
    if recipe.x_granularity == "tensor_percentile":
        return statistics["x_percentile"].expand(absmax.shape)
    return _collapse(absmax, recipe.x_granularity)
