"""Each token's values become their mean over all tokens so far, from a state that grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ssdi8_edge.ops.running_mean import RUNNING_MEAN
from torch import Tensor, nn

from ssdi8_edge.models.block import (
    Block,
    Context,
    FloatBlock,
    Int8Input,
    Observe,
    Parameters,
    States,
    StateSpec,
    require_sizes,
    static,
)
from ssdi8_edge.ops.quantize import QUANTIZE
from ssdi8_edge.recipes.recipe import QuantConfig


@dataclass(frozen=True)
class Recall(Block):
    """Sizes of such a block; `context`: tokens that the state has room for."""

    kind: ClassVar[str] = "recall"
    last_ops: ClassVar[tuple[str, ...]] = ("RunningMean", "Quantize", "Linear (out_proj)")

    hidden: int
    context: int = 0

    def __post_init__(self) -> None:
        require_sizes(self, "hidden")

    @property
    def parts(self) -> dict[str, int]:
        return {"value": self.hidden}

    @property
    def width(self) -> int:
        return self.hidden

    def with_context(self, tokens: int) -> Recall:
        return dataclasses.replace(self, context=tokens)

    def states(self, recipe: QuantConfig) -> tuple[StateSpec, ...]:
        shape = (1, self.context, self.hidden)
        return (StateSpec("value_cache", shape, "fp16", "append", ("Linear (in_proj)",)),)

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        check("hidden", self.hidden)

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        return RecallFloatBlock(self, d_model, norm_eps)

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        recipe = context.recipe
        y, cache = RUNNING_MEAN(projected, *states, context.position)
        if not recipe.quantized:
            return y, (cache,)
        r = QUANTIZE(
            *(y, *static(p, "r_scale")),
            width=self.hidden,
            rotation=self.rotation,
            rounding=recipe.rounding,
            scaling=recipe.input_scaling,
        )
        return Int8Input(*r), (cache,)


class RecallFloatBlock(FloatBlock):
    def __init__(self, block: Recall, d_model: int, norm_eps: float) -> None:
        super().__init__(block, d_model, norm_eps)
        self.out_proj = nn.Linear(block.width, d_model, bias=False)

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        first = 0 if states is None else states[0].shape[1]
        rows = projected if states is None else torch.cat([states[0], projected], 1)
        count = torch.arange(1, rows.shape[1] + 1, device=rows.device)[:, None]
        return (rows.cumsum(1) / count)[:, first:], (rows,)
