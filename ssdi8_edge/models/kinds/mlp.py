"""A multilayer perceptron: the square of ReLU, or SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from ssdi8_edge.ground.errors import CheckpointError
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
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.ops.activation import ACTIVATION, ACTIVATION_FP16
from ssdi8_edge.ops.kernel_limits import inner_width_misfit

Activation = Literal["relu2", "swiglu"]


@dataclass(frozen=True)
class Mlp(Block):
    """Sizes of an MLP block.

    Attributes:
        activation: "relu2", max(x, 0)²; "swiglu", silu(gate) · up.
    """

    kind: ClassVar[str] = "mlp"
    last_ops: ClassVar[tuple[str, ...]] = ("Activation", "Linear (out_proj)")

    hidden: int
    activation: Activation = "relu2"

    def __post_init__(self) -> None:
        require_sizes(self, "hidden")
        if self.activation not in get_args(Activation):
            raise CheckpointError(f"activation must be relu2 or swiglu, not {self.activation!r}.")

    @property
    def parts(self) -> dict[str, int]:
        """The rows of in_proj, in order."""
        names = ("up",) if self.activation == "relu2" else ("gate", "up")
        return dict.fromkeys(names, self.hidden)

    @property
    def width(self) -> int:
        """Columns of out_proj."""
        return self.hidden

    # --- in floating point ---

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        """A module with random weights."""
        return MlpFloatBlock(self, d_model, norm_eps)

    # --- quantized ---

    @property
    def rotation(self) -> InputRotation:
        """With signs where no value is negative: docs/method.md §12.1."""
        return "signs" if self.activation == "relu2" else "blocks"

    def misfit(self) -> str | None:
        """The width, if it has no INT8 kernel."""
        return inner_width_misfit("hidden", self.hidden)

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        """hidden."""
        check("hidden", self.hidden)

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        """The activation of `projected`."""
        recipe = context.recipe
        if not recipe.quantized:
            return ACTIVATION_FP16(projected, projected, **self._activation), ()
        r = ACTIVATION(
            *(projected, projected, *static(p, "r_scale")),
            **self._activation,
            rotation=self.rotation,
            rounding=recipe.rounding,
            scaling=recipe.input_scaling,
        )
        return Int8Input(*r), ()

    @property
    def _activation(self) -> dict[str, Any]:
        """Node attributes: SwiGLU's gate comes first."""
        if self.activation == "relu2":
            return {"activation": "relu2", "width": self.hidden, "x_column": 0}
        return {"activation": "silu_gate", "width": self.hidden, "x_column": self.hidden}


class MlpFloatBlock(FloatBlock):
    """The activation alone."""

    def __init__(self, block: Mlp, d_model: int, norm_eps: float) -> None:
        super().__init__(block, d_model, norm_eps)
        self.sizes = block
        self.out_proj = nn.Linear(block.width, d_model, bias=block.out_bias)

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        """(b, l, hidden), and no states."""
        if self.sizes.activation == "relu2":
            return projected.relu().square(), ()
        gate, up = projected.chunk(2, -1)
        return F.silu(gate) * up, ()
