"""What ops hand to each other: the model's data flow, run on sizes alone.

The third use of the one flow of `models`: where tensors compute it and graph values record it, here
each op's reference runs on tensors without data, which tells shapes and types of all that passes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.models.block import Context, linear
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.network import run_block, run_embedding, run_head
from ssdi8_edge.ops.op import Attributes, GraphValue, Op
from ssdi8_edge.plan.tensors import Tensors, block_tensors, bytes_of, table_tensors
from ssdi8_edge.recipes.recipe import QuantConfig


@dataclass(frozen=True, kw_only=True)
class Sized(GraphValue):
    """A value of the flow; `kept`: it has memory of its own, as weights and states have."""

    tensor: Tensor
    kept: bool


@dataclass
class Flow:
    """Calls of ops in their order, each with what it reads and what it makes; an `Emitter`."""

    calls: list[tuple[tuple[Sized, ...], tuple[Sized, ...]]] = field(default_factory=list)

    def value(self, tensor: Tensor, kept: bool = False) -> Sized:
        """A value that the flow begins with."""
        return Sized("", self, tensor=tensor, kept=kept)

    def emit(
        self, op: Op, inputs: tuple[GraphValue, ...], attributes: Attributes
    ) -> tuple[GraphValue, ...]:
        """Run the reference of `op` on sizes."""
        sized = tuple(each for each in inputs if isinstance(each, Sized))
        made = op.reference(*(each.tensor for each in sized), **attributes)
        outputs = tuple(map(self.value, made if isinstance(made, tuple) else (made,)))
        self.calls.append((sized, outputs))
        return outputs

    def peak(self, results: Sequence[Any], states: Sequence[Any] = ()) -> int:
        """Bytes that lie there at once at most, if memory is used again as soon as it can be.

        `results` are needed to the end. What is kept does not count, nor do the next `states`:
        both have memory of their own.
        """
        own = {id(each) for each in states}
        last = {id(each): i for i, (inputs, _) in enumerate(self.calls) for each in inputs}
        ends = {id(each): len(self.calls) for each in results}
        made = [(i, each) for i, (_, outputs) in enumerate(self.calls) for each in outputs]
        begun = {id(each): (-1, each) for inputs, _ in self.calls for each in inputs}
        lives = begun | {id(each): (i, each) for i, each in made}
        most = 0
        for now in range(len(self.calls)):
            alive = (
                bytes_of(each.tensor)
                for key, (start, each) in lives.items()
                if not each.kept
                and key not in own
                and start <= now <= max(last.get(key, now), ends.get(key, -1))
            )
            most = max(most, sum(alive))
        return most


@functools.lru_cache(maxsize=256)
def activation_bytes(model: Description, recipe: QuantConfig, batch: int, tokens: int) -> int:
    """Bytes between the ops of one call of `tokens` tokens, at most, by their lives.

    Args:
        model: `adapted` to the recipe, with a context where a state grows.
    """
    with torch.inference_mode():
        blocks = [_block(model, i, recipe, batch, tokens) for i in _distinct(model)]
        return max(*blocks, _ends(model, recipe, batch, tokens))


def _distinct(model: Description) -> Iterator[int]:
    for block in dict.fromkeys(model.blocks):
        yield model.blocks.index(block)


def _block(model: Description, index: int, recipe: QuantConfig, batch: int, tokens: int) -> int:
    flow, block = Flow(), model.blocks[index]
    shape = (batch, tokens, model.d_model)
    hidden, residual = (
        flow.value(torch.empty(shape, dtype=dtype, device="meta"))
        for dtype in (torch.float16, torch.float32)
    )
    states = tuple(flow.value(spec.zeros(batch, "meta"), True) for spec in block.states(recipe))
    p = _kept(flow, block_tensors(block, model.d_model, recipe))
    context = _context(flow, model, recipe)
    *results, carried = run_block(block, p, context, hidden, residual, states)
    return flow.peak(results, carried)


def _ends(model: Description, recipe: QuantConfig, batch: int, tokens: int) -> int:
    flow = Flow()
    top = _kept(flow, table_tensors(model, recipe))
    if "lm_head.weight" not in top and recipe.lm_head == "fp16":
        top["lm_head.weight"] = top["embedding.weight"]
    ids = flow.value(torch.empty((batch, tokens), dtype=torch.int32, device="meta"))
    hidden, residual = run_embedding(top, recipe, ids)
    first = flow.peak([hidden, residual])
    last = Flow()
    kept = [last.value(each.tensor[:, -1:]) for each in (hidden, residual)]
    top = {name: last.value(each.tensor, True) for name, each in top.items()}
    logits = run_head(top, _context(last, model, recipe), *kept)
    return max(first, last.peak([logits]))


def _kept(flow: Flow, tensors: Tensors) -> dict[str, Sized]:
    return {name: flow.value(tensor, True) for name, tensor in tensors.items()}


def _context(flow: Flow, model: Description, recipe: QuantConfig) -> Context:
    position = flow.value(torch.tensor(0), True)
    return Context(recipe, model.d_model, model.residual_eps, linear, position)
