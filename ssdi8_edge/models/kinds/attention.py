"""Causal attention with grouped queries over a cache, with rotary positions or none.

Axis letters: B batch, L token, Q query heads, KV heads of keys and values, T tokens of the cache, d
channels of a head. Quantized as docs/method.md §12.2 says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
    StateSpec,
    require_sizes,
    static,
)
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.fp16_range import see
from ssdi8_edge.ops.attention import ATTENTION, ATTENTION_FP16
from ssdi8_edge.ops.kernel_limits import inner_width_misfit, size_misfit
from ssdi8_edge.ops.quantize import QUANTIZE
from ssdi8_edge.recipes.recipe import QuantConfig


@dataclass(frozen=True)
class Attention(Block):
    """Sizes of an attention block.

    Attributes:
        rope_theta: of the rotary positions; None: no positions.
        context: capacity of the cache, tokens; 0 until a build or a model in memory sets it.
    """

    kind: ClassVar[str] = "attention"
    last_ops: ClassVar[tuple[str, ...]] = ("Attention", "Quantize", "Linear (out_proj)")

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float | None = None
    context: int = 0

    def __post_init__(self) -> None:
        require_sizes(self, "n_heads", "n_kv_heads", "head_dim")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"{self.n_heads} heads cannot share n_kv_heads = {self.n_kv_heads} keys."
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise CheckpointError(f"rope_theta must be positive, not {self.rope_theta!r}.")
        if self.rope_theta is not None and self.head_dim % 2:
            raise CheckpointError(
                f"rotary positions turn pairs, and head_dim = {self.head_dim} is odd."
            )

    @property
    def parts(self) -> dict[str, int]:
        """The rows of in_proj, in order."""
        kv = self.n_kv_heads * self.head_dim
        return {"q": self.width, "k": kv, "v": kv}

    @property
    def width(self) -> int:
        """Columns of out_proj."""
        return self.n_heads * self.head_dim

    def with_context(self, tokens: int) -> Attention:
        """With a cache of so many tokens."""
        return dataclasses.replace(self, context=tokens)

    # --- in floating point ---

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        """A module with random weights."""
        return AttentionFloatBlock(self, d_model, norm_eps)

    # --- quantized ---

    @property
    def rotation(self) -> InputRotation:
        """None: what attention gives is a mean of values, without outliers."""
        return "none"

    def states(self, recipe: QuantConfig) -> tuple[StateSpec, ...]:
        """Keys and values of all tokens so far; in INT8, each with its scale per token and head."""
        rows = (self.n_kv_heads, self.context)
        types: dict[str, tuple[tuple[int, ...], Any]]
        if self._int8_cache(recipe):
            types = {"cache": ((*rows, self.head_dim), "int8"), "scale": (rows, "fp16")}
        else:
            types = {"cache": ((*rows, self.head_dim), "fp16")}
        return tuple(
            StateSpec(
                name=f"{name}_{what}",
                shape=shape,
                dtype=dtype,
                update="append",
                ops=("RmsNorm", "Linear (in_proj)", "Attention"),
            )
            for name in "kv"
            for what, (shape, dtype) in types.items()
        )

    def inner_products(self, tokens: int, before: int) -> int:
        """Scores and mean of values, of each token with itself and those before it."""
        pairs = tokens * before + tokens * (tokens + 1) // 2
        return 2 * self.width * pairs

    def misfit(self) -> str | None:
        """head_dim or the width of all heads, if it has no INT8 kernel."""
        found = size_misfit({"head_dim": self.head_dim})
        return found or inner_width_misfit("attention width", self.width)

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        """q, k, v = `projected`: attention, whose output is quantized as it is."""
        recipe = context.recipe
        o, states = self.attend(context, projected, states)
        if not recipe.quantized:
            return o, states
        r = QUANTIZE(
            *(o, *static(p, "r_scale")),
            width=self.width,
            rotation=self.rotation,
            rounding=recipe.rounding,
            scaling=recipe.input_scaling,
        )
        return Int8Input(*r), states

    def attend(
        self, context: Context, projected: Any, states: States, first_column: int = 0
    ) -> tuple[Any, States]:
        """Attention's output (B, L, Q·d) FP16 and the next states.

        `projected` holds q, k and v from `first_column` on.
        """
        op = ATTENTION if self._int8_cache(context.recipe) else ATTENTION_FP16
        o, *carried = op(
            *(projected, *states, context.position),
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            first_column=first_column,
            rope_theta=float(self.rope_theta or 0.0),
        )
        return see("the output of attention", o), tuple(carried)

    def _int8_cache(self, recipe: QuantConfig) -> bool:
        return recipe.quantized and recipe.kv == "int8"


class AttentionFloatBlock(FloatBlock):
    """Attention with a cache that grows."""

    def __init__(self, block: Attention, d_model: int, norm_eps: float) -> None:
        super().__init__(block, d_model, norm_eps)
        self.sizes = block
        self.out_proj = nn.Linear(block.width, d_model, bias=block.out_bias)

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        """States: k and v (b, kv, tokens so far, d), after rotary."""
        return float_attention(self.sizes, projected, states)


def float_attention(
    sizes: Attention, projected: Tensor, states: States | None
) -> tuple[Tensor, States]:
    """q, k, v = `projected` (b, l, rows) -> (b, l, Q·d), and the next k and v (b, kv, t, d)."""
    q, k, v = (
        part.unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2)
        for part in projected.split([*sizes.parts.values()], -1)
    )
    first = 0 if states is None else states[0].shape[2]
    positions = torch.arange(first, first + q.shape[2], device=q.device)
    if sizes.rope_theta:
        d = sizes.head_dim
        frequencies = (sizes.rope_theta ** (-torch.arange(0, d, 2).double() / d)).float()
        angles = positions[:, None].float() * frequencies.to(q.device)
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k = turn(q), turn(k)
    if states is not None:
        k, v = torch.cat([states[0], k], 2), torch.cat([states[1], v], 2)
    seen = torch.arange(k.shape[2], device=q.device) <= positions[:, None]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o.transpose(1, 2).flatten(2), (k, v)
