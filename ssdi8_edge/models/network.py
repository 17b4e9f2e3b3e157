"""The quantized network: one data flow, run on tensors or recorded as a graph.

The parameters of a block are a mapping from name to tensor (or graph value); in the checkpoint
`layers.{i}.` stands before the names. Outside the blocks there are `embedding.weight`,
`norm_f.weight` or `norm_f.scale`, and `lm_head.*`. The recipe that quantizes nothing, the FP16
baseline, runs here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.models.block import (
    IN_PROJ,
    NORM,
    OUT_PROJ,
    Block,
    Context,
    Linear,
    Parameters,
    States,
    linear,
    norm,
)
from ssdi8_edge.models.description import Description
from ssdi8_edge.ops import fp16
from ssdi8_edge.ops.linear import LINEAR
from ssdi8_edge.recipes.recipe import QuantConfig

Scope = Callable[[str], AbstractContextManager[Any]]


def run_block(
    block: Block, p: Parameters, context: Context, hidden: Any, residual: Any, states: States
) -> tuple[Any, Any, States]:
    """One block: hidden (B, L, D) FP16 and residual (B, L, D) FP32 in, their successors out."""
    recipe = context.recipe
    if not recipe.quantized:
        residual, u = fp16.RMS_NORM(hidden, residual, p[NORM], eps=context.norm_eps)
        r, states = block.inner(p, context, fp16.LINEAR(u, p[IN_PROJ]), states)
        return fp16.LINEAR(r, p[OUT_PROJ]), residual, states
    residual, r, states = run_to_out_proj(block, p, context, hidden, residual, states)
    return context.linear(p, "out_proj", r, recipe), residual, states


def run_to_out_proj(
    block: Block, p: Parameters, context: Context, hidden: Any, residual: Any, states: States
) -> tuple[Any, Any, States]:
    """A quantized block up to out_proj: (residual', its input, states')."""
    residual, u = norm(p, "u_scale", context, hidden, residual)
    r, states = block.inner(p, context, context.linear(p, "in_proj", u, context.recipe), states)
    return residual, r, states


def run_head(p: Parameters, context: Context, hidden: Any, residual: Any) -> Any:
    """Final norm and lm_head: logits (B, L, V) FP32."""
    if context.recipe.lm_head == "fp16":
        _, normed = fp16.RMS_NORM(hidden, residual, p["norm_f.weight"], eps=context.norm_eps)
        return fp16.LOGITS(fp16.LINEAR(normed, p["lm_head.weight"]))
    _, u = norm(p, "norm_f.scale", context, hidden, residual)
    return fp16.LOGITS(LINEAR(*u, p["lm_head.weight"], p["lm_head.scale"], p["lm_head.bias"]))


def run_model(
    blocks: tuple[Block, ...],
    layer: Callable[[int], Parameters],
    top: Parameters,
    context: Context,
    input_ids: Any,
    states: list[States],
    keep: Any,
    scope: Scope = lambda name: nullcontext(),
) -> tuple[Any, list[States]]:
    """Embedding to logits of the last `keep` positions, with carried states.

    `layer(i)` gives the parameters of block i; `top` those outside the blocks.
    """
    hidden, residual = fp16.EMBEDDING(top["embedding.weight"], input_ids)
    new_states = []
    for i, (block, carried) in enumerate(zip(blocks, states, strict=True)):
        with scope(f"layers.{i}"):
            hidden, residual, carried = run_block(
                block, layer(i), context, hidden, residual, carried
            )
        new_states.append(carried)
    with scope("head"):
        hidden, residual = fp16.LAST_POSITIONS(hidden, residual, keep)
        logits = run_head(top, context, hidden, residual)
    return logits, new_states


class QuantizedModel:
    """A quantized checkpoint in memory: the torch reference of what a bundle computes."""

    def __init__(
        self,
        description: Description,
        recipe: QuantConfig,
        tensors: Mapping[str, Tensor],
        linear: Linear = linear,
    ) -> None:
        self.description = description
        self.recipe = recipe
        self._context = Context(recipe, description.norm_eps, linear)
        self._top: dict[str, Any] = {}
        self._layers: list[dict[str, Any]] = [{} for _ in description.blocks]
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, index, local = name.split(".", 2)
                self._layers[int(index)][local] = tensor
            else:
                self._top[name] = tensor
        self._top.setdefault("lm_head.weight", self._top["embedding.weight"])

    def zero_states(self, batch: int) -> list[States]:
        device = self._top["embedding.weight"].device
        return [
            tuple(spec.zeros(batch, device) for spec in block.states(self.recipe))
            for block in self.description.blocks
        ]

    def named_states(self, states: list[States]) -> dict[str, Tensor]:
        """Graph name -> state, in the order of the data."""
        names = (name for name, _ in self.description.states(self.recipe))
        flat = (state for of_block in states for state in of_block)
        return dict(zip(names, flat, strict=True))

    def forward(
        self,
        input_ids: Tensor,
        states: list[States] | None = None,
        keep: int = 1,
        scope: Scope = lambda name: nullcontext(),
    ) -> tuple[Tensor, list[States]]:
        """input_ids (B, L) -> logits (B, keep, V) FP32 and the states after the last token."""
        with torch.inference_mode():
            return run_model(
                self.description.blocks,
                self._layers.__getitem__,
                self._top,
                self._context,
                input_ids,
                self.zero_states(input_ids.shape[0]) if states is None else states,
                torch.tensor(keep),
                scope,
            )
