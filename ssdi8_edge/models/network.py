"""The quantized network: one data flow, run on tensors or recorded as a graph.

The parameters of a block are a mapping from name to tensor (or graph value); in the checkpoint
`layers.{i}.` stands before the names. Outside the blocks there are `embedding.weight`, or
`embedding.packed` and `embedding.scale`, `norm_f.weight` or `norm_f.scale`, and `lm_head.*`. The
recipe that quantizes nothing, the FP16 baseline, runs here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.models.block import (
    IN_BIAS,
    IN_PROJ,
    NORM,
    OUT_BIAS,
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
from ssdi8_edge.numerics.fp16_range import IN_FP32, RangeWatch, enter, see, watched
from ssdi8_edge.ops import baseline
from ssdi8_edge.ops.glue import EMBEDDING, EMBEDDING_INT8, LAST_POSITIONS, LOGITS
from ssdi8_edge.recipes.presets import DEFAULT_METHOD
from ssdi8_edge.recipes.recipe import QuantConfig

Scope = Callable[[str], AbstractContextManager[Any]]


def run_block(
    block: Block, p: Parameters, context: Context, hidden: Any, residual: Any, states: States
) -> tuple[Any, Any, States]:
    """One block: hidden (B, L, D) FP16 and residual (B, L, D) FP32 in, their successors out."""
    recipe = context.recipe
    if not recipe.quantized:
        residual, u = baseline.RMS_NORM(hidden, residual, p[NORM], eps=context.residual_eps)
        see("the input of in_proj", u)
        projected = see("the output of in_proj", _fp16_linear(p, IN_PROJ, IN_BIAS, u))
        r, states = block.inner(p, context, projected, states)
        see("the input of out_proj", r)
        out = see("the output of out_proj", _fp16_linear(p, OUT_PROJ, OUT_BIAS, r))
        return out, residual, states
    residual, r, states = run_to_out_proj(block, p, context, hidden, residual, states)
    return context.linear(p, "out_proj", r, recipe.for_columns(block.width)), residual, states


def _fp16_linear(p: Parameters, weight: str, bias: str, x: Any) -> Any:
    if bias in p:
        return baseline.LINEAR_BIAS(x, p[weight], p[bias])
    return baseline.LINEAR(x, p[weight])


def run_to_out_proj(
    block: Block, p: Parameters, context: Context, hidden: Any, residual: Any, states: States
) -> tuple[Any, Any, States]:
    """A quantized block up to out_proj: (residual', its input, states')."""
    residual, u = norm(p, "u_scale", context, hidden, residual)
    recipe = context.recipe.for_columns(context.d_model)
    r, states = block.inner(p, context, context.linear(p, "in_proj", u, recipe), states)
    return residual, r, states


def run_embedding(p: Parameters, recipe: QuantConfig, input_ids: Any) -> tuple[Any, Any]:
    """input_ids (B, L) -> hidden (B, L, D) FP16 and residual (B, L, D) FP32 of the first block."""
    if recipe.embedding == "fp16":
        return EMBEDDING(p["embedding.weight"], input_ids)
    return EMBEDDING_INT8(p["embedding.packed"], p["embedding.scale"], input_ids)


def run_head(p: Parameters, context: Context, hidden: Any, residual: Any) -> Any:
    """Final norm and lm_head: logits (B, L, V) FP32."""
    if context.recipe.lm_head == "fp16":
        _, normed = baseline.RMS_NORM(
            hidden, residual, p["norm_f.weight"], eps=context.residual_eps
        )
        see("the input of lm_head", normed)
        logits = baseline.LINEAR(normed, p["lm_head.weight"])
    else:
        _, u = norm(p, "norm_f.scale", context, hidden, residual)
        logits = linear(p, "lm_head", u, context.recipe.head.for_columns(context.d_model))
    return LOGITS(see("the logits", logits))


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
    hidden, residual = run_embedding(top, context.recipe, input_ids)
    new_states = []
    for i, (block, carried) in enumerate(zip(blocks, states, strict=True)):
        enter(f"layers.{i}")
        with scope(f"layers.{i}"):
            hidden, residual, carried = run_block(
                block, layer(i), context, hidden, residual, carried
            )
        new_states.append(carried)
    enter("head")
    with scope("head"):
        hidden, residual = LAST_POSITIONS(hidden, residual, keep)
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
        self._context = Context(recipe, description.d_model, description.residual_eps, linear)
        self._top: dict[str, Any] = {}
        self._layers: list[dict[str, Any]] = [{} for _ in description.blocks]
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, index, local = name.split(".", 2)
                self._layers[int(index)][local] = tensor
            else:
                self._top[name] = tensor
        if recipe.lm_head == "fp16" and "lm_head.weight" not in self._top:
            self._top["lm_head.weight"] = self._top["embedding.weight"]

    def zero_states(self, batch: int) -> list[States]:
        device = next(iter(self._top.values())).device
        return [
            tuple(spec.zeros(batch, device) for spec in block.states(self.recipe))
            for block in self.description.blocks
        ]

    def _with_room(self, states: list[States], tokens: int) -> list[States]:
        blocks = zip(self.description.blocks, states, strict=True)
        return [
            tuple(
                spec.with_room(state, tokens)
                for spec, state in zip(block.states(self.recipe), carried, strict=True)
            )
            for block, carried in blocks
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
        position: int = 0,
    ) -> tuple[Tensor, list[States]]:
        """input_ids (B, L) -> logits (B, keep, V) FP32 and the states after the last token.

        `position` is the number of tokens before these; caches grow where they are too short.
        """
        context = dataclasses.replace(self._context, position=torch.tensor(position))
        if states is None:
            states = self.zero_states(input_ids.shape[0])
        states = self._with_room(states, position + input_ids.shape[1])
        with torch.inference_mode():
            return run_model(
                self.description.blocks,
                self._layers.__getitem__,
                self._top,
                context,
                input_ids,
                states,
                torch.tensor(keep),
                scope,
            )


# What is FP16 in the baseline and not in other methods: it is scaled, or added in FP32.
SCALED = ("the input of in_proj", "the input of out_proj", "the output of out_proj")


def watched_model(
    model: QuantizedModel, tell: Callable[[str], None] | None = None
) -> AbstractContextManager[RangeWatch]:
    """Inside, `model` raises CheckpointError where a tensor leaves FP16, and names it.

    `tell` is handed the sentence instead.
    """
    recipe = model.recipe

    def remedy(name: str) -> str:
        if recipe.quantized:
            return "calibrate on text like this; if it stays so, " + IN_FP32
        if name in SCALED:
            return (
                f"choose --method {DEFAULT_METHOD}, which scales it; "
                "`evaluate` of the checkpoint itself computes in FP32."
            )
        return IN_FP32

    return watched(recipe.name, remedy, tell)
