"""Mamba-2 and attention beside each other: both read the same input, and their outputs are added.

in_proj holds the rows of both, Mamba-2's first; so does out_proj with its columns, whose product is
the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssdi8_edge.models.block import (
    Block,
    Context,
    FloatBlock,
    Int8Input,
    Layer,
    Observe,
    Parameters,
    States,
    StateSpec,
    static,
)
from ssdi8_edge.models.kinds.attention import Attention, float_attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mamba2.calibration import Mamba2Observers
from ssdi8_edge.models.kinds.mamba2.float_block import Mamba2FloatBlock
from ssdi8_edge.models.observers import Observers
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.fp16_range import see
from ssdi8_edge.ops.glue import SIDE_BY_SIDE
from ssdi8_edge.ops.kernel_limits import inner_width_misfit
from ssdi8_edge.ops.quantize import QUANTIZE
from ssdi8_edge.recipes.recipe import QuantConfig


@dataclass(frozen=True)
class Parallel(Block):
    """Sizes of the two; the biases are those of the joined linear layers."""

    kind: ClassVar[str] = "parallel"
    last_ops: ClassVar[tuple[str, ...]] = (
        "ChunkScan",
        "Attention",
        "Quantize",
        "Linear (out_proj)",
    )

    mamba: Mamba2
    attention: Attention

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, of both."""
        return {
            "kind": self.kind,
            "in_bias": self.in_bias,
            "out_bias": self.out_bias,
            "mamba": self.mamba.to_dict(),
            "attention": self.attention.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Parallel:
        """Inverse of `to_dict`."""
        both = {
            "mamba": Mamba2.from_dict(fields["mamba"]),
            "attention": Attention.from_dict(fields["attention"]),
        }
        return super().from_dict({**fields, **both})

    def adapted(self, recipe: QuantConfig) -> Parallel:
        """With the recipe's chunk size."""
        return dataclasses.replace(self, mamba=self.mamba.adapted(recipe))

    @property
    def context(self) -> int:
        """That of attention."""
        return self.attention.context

    def with_context(self, tokens: int) -> Parallel:
        """With a cache of so many tokens."""
        return dataclasses.replace(self, attention=self.attention.with_context(tokens))

    @property
    def parts(self) -> dict[str, int]:
        """The rows of in_proj, in order."""
        return {**self.mamba.parts, **self.attention.parts}

    @property
    def width(self) -> int:
        """Columns of out_proj."""
        return self.mamba.width + self.attention.width

    @property
    def prompt_multiple(self) -> int:
        """A chunk of Mamba-2."""
        return self.mamba.prompt_multiple

    def own_parameters(self) -> dict[str, tuple[int, ...]]:
        """Mamba-2's."""
        return self.mamba.own_parameters()

    # --- in floating point ---

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        """A module with random weights."""
        return ParallelFloatBlock(self, d_model, norm_eps)

    # --- quantized ---

    @property
    def rotation(self) -> InputRotation:
        """Blocks: the two widths together seldom have an order."""
        return "blocks"

    def states(self, recipe: QuantConfig) -> tuple[StateSpec, ...]:
        """Mamba-2's, then attention's."""
        return (*self.mamba.states(recipe), *self.attention.states(recipe))

    def inner_products(self, tokens: int, before: int) -> int:
        """Of both."""
        both = (self.mamba, self.attention)
        return sum(block.inner_products(tokens, before) for block in both)

    def misfit(self) -> str | None:
        """Mamba-2's, attention's, or the two widths together."""
        found = self.mamba.misfit() or self.attention.misfit()
        return found or inner_width_misfit("width of Mamba-2 and attention together", self.width)

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        """d_inner and attention's width together."""
        check("d_inner and the width of attention", self.width)

    def require_rotations(self, recipe: QuantConfig) -> None:
        """Mamba-2's."""
        self.mamba.require_rotations(recipe)

    def require_computable(
        self, index: int, layer: Layer, absmax: Mapping[str, Tensor] | None = None
    ) -> None:
        """Mamba-2's."""
        self.mamba.require_computable(index, layer, absmax)

    def kept_in_fp16(self, recipe: QuantConfig) -> dict[str, str]:
        """Also what both give, before it is quantized."""
        both = {"mixed": "the output of Mamba-2 or of attention"}
        return super().kept_in_fp16(recipe) | self.mamba.kept_in_fp16(recipe) | both

    def observers(self, layer: Layer) -> Observers:
        """What calibration collects: Mamba-2's, and the largest output of both."""
        return ParallelObservers(
            self.mamba, -layer["A_log"].exp(), parts=self.parts, rotation=self.rotation
        )

    def reordered(
        self, layer: Layer, statistics: Mapping[str, Tensor], recipe: QuantConfig
    ) -> tuple[Layer, Any]:
        """Mamba-2's channels."""
        return self.mamba.reordered(layer, statistics, recipe)

    def own_tensors(self, layer: Layer, recipe: QuantConfig) -> Layer:
        """Mamba-2's."""
        return self.mamba.own_tensors(layer, recipe)

    def scales(
        self, statistics: Mapping[str, Tensor], recipe: QuantConfig, order: Any = None
    ) -> Layer:
        """Mamba-2's; that of out_proj's input is of both."""
        return self.mamba.scales(statistics, recipe, order)

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        """Both on their columns of `projected`; their outputs share one rotation and scale."""
        recipe = context.recipe
        own = len(self.mamba.states(recipe))
        y, gate, mamba_states = self.mamba.to_y(p, recipe, projected, states[:own])
        mixed = see("the output of Mamba-2", self.mamba.gated(p, y, gate))
        o, caches = self.attention.attend(
            context, projected, states[own:], first_column=sum(self.mamba.parts.values())
        )
        r = SIDE_BY_SIDE(mixed, o)
        carried = (*mamba_states, *caches)
        if not recipe.quantized:
            return r, carried
        q = QUANTIZE(
            *(r, *static(p, "r_scale")),
            width=self.width,
            rotation=self.rotation,
            rounding=recipe.rounding,
            scaling=recipe.input_scaling,
        )
        return Int8Input(*q), carried


class ParallelObservers(Mamba2Observers):
    """Also "mixed": (), the largest value of both outputs, not rotated."""

    def __call__(self, name: str, value: Tensor) -> None:
        super().__call__(name, value)
        if name == "r":
            self.update("mixed", value.abs().amax())


class ParallelFloatBlock(Mamba2FloatBlock):
    """Mamba-2's parameters; in_proj and out_proj are wider."""

    def __init__(self, block: Parallel, d_model: int, norm_eps: float) -> None:
        super().__init__(block.mamba, d_model, norm_eps)
        self.block = block
        self.in_proj = nn.Linear(d_model, sum(block.parts.values()), bias=block.in_bias)
        self.out_proj = nn.Linear(block.width, d_model, bias=block.out_bias)

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        """States: Mamba-2's, then attention's."""
        rows = sum(self.block.mamba.parts.values())
        r, carried = super().inner(
            projected[..., :rows], None if states is None else states[:2], observe
        )
        o, cache = float_attention(
            self.block.attention, projected[..., rows:], None if states is None else states[2:]
        )
        return torch.cat([r, o], -1), (*carried, *cache)
