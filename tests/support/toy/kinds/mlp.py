"""A gateless MLP with the square of ReLU: no parameters of its own, no states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ssdi8_edge.ops.relu_squared import RELU_SQUARED, RELU_SQUARED_INT8
from torch import Tensor, nn

from ssdi8_edge.models.block import (
    Block,
    Context,
    FloatBlock,
    Int8Input,
    Observe,
    Parameters,
    States,
    require_sizes,
    static,
)


@dataclass(frozen=True)
class Mlp(Block):
    """Sizes of an MLP block."""

    kind: ClassVar[str] = "mlp"
    last_ops: ClassVar[tuple[str, ...]] = ("ReluSquaredInt8", "Linear (out_proj)")

    hidden: int

    def __post_init__(self) -> None:
        require_sizes(self, "hidden")

    @property
    def parts(self) -> dict[str, int]:
        return {"up": self.hidden}

    @property
    def width(self) -> int:
        return self.hidden

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        check("hidden", self.hidden)

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        return MlpFloatBlock(self, d_model, norm_eps)

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        recipe = context.recipe
        if not recipe.quantized:
            return RELU_SQUARED(projected), ()
        r = RELU_SQUARED_INT8(
            *(projected, *static(p, "r_scale")),
            width=self.hidden,
            rounding=recipe.rounding,
            scaling=recipe.input_scaling,
        )
        return Int8Input(*r), ()


class MlpFloatBlock(FloatBlock):
    def __init__(self, block: Mlp, d_model: int, norm_eps: float) -> None:
        super().__init__(block, d_model, norm_eps)
        self.out_proj = nn.Linear(block.width, d_model, bias=False)

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        return projected.relu().square(), ()
