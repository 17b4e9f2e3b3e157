"""Activation scales of a layer, from its calibration statistics (docs/method.md §5.1, §6, §10)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssdi8_edge.int8 import scale_from_absmax
from ssdi8_edge.methods import QuantConfig
from ssdi8_edge.quantize.clusters import Order

# Of the observers that the release keeps outside SSD.
PER_TENSOR_FLOOR = 1e-6


def activation_scales(
    statistics: Mapping[str, Tensor],
    recipe: QuantConfig,
    in_proj_parts: Mapping[str, int],
    order: Order | None = None,
) -> dict[str, Tensor]:
    """The static scales that the recipe computes with, by parameter name.

    Args:
        statistics: of one layer, as `calibrate` names them.
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
    if recipe.input_scaling == "static":
        scales |= {f"{name}_scale": of_linear_input(seen(name)) for name in ("u", "r")}
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


def of_linear_input(absmax: Tensor) -> Tensor:
    """The scale (1) of all tokens, from their largest value ()."""
    return scale_from_absmax(absmax, PER_TENSOR_FLOOR).reshape(1)


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
