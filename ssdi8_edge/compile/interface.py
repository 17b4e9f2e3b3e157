"""What a runtime has to know of a model, as data in the manifest.

So there is no formula of any model on a board.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssdi8_edge.compile.export import output_name
from ssdi8_edge.models.description import Description
from ssdi8_edge.ops import OPS
from ssdi8_edge.recipes.recipe import QuantConfig


def interface(model: Description, recipe: QuantConfig) -> dict[str, Any]:
    """The part of the manifest that runtimes read.

    Returns:
        vocab_size: rows of the embedding, padding included.
        prompt_multiple: tokens; pieces of a long prompt are multiples of it.
        context: tokens that states with update "append" have room for, and so the most that a
            sequence may have; null where there are none.
        states: of the graph, in the order of the data: name and output (of the graph), shape
            without the batch, dtype, update ("replace"; or "append": a call writes the rows of its
            tokens, on axis 1 of the shape), suspects (the ops where an
            error is looked for that shows here first), shallow (whether it depends on one block
            and what leads into the next at most, so that errors have not added up yet).
        logits_suspects, decode_suspects: ops, if the logits of a prompt or of single tokens are the
            first to differ.
        ops: names that layers of an inference library carry, without prefixes -> the part of the
            model that each belongs to, "" where there is none.
        blocks: their kinds, in order.
    """
    states = list(_states(model, recipe))
    last = model.n_layer - 1
    return {
        "vocab_size": model.vocab_size,
        "prompt_multiple": model.prompt_multiple,
        "context": model.context if model.grows(recipe) else None,
        "states": states,
        "logits_suspects": [
            *_of_block(last, model.blocks[last].last_ops),
            *("head/RmsNorm", f"head/{_head_op(recipe)} (lm_head)"),
        ],
        "decode_suspects": [f"the decode step of any layer: {_ops_of(model, recipe)}"],
        "ops": {name.removeprefix("Ssdi8"): op.part for name, op in OPS.items()},
        "blocks": [block.kind for block in model.blocks],
    }


def _states(model: Description, recipe: QuantConfig) -> Iterator[dict[str, Any]]:
    before = ["Embedding" if recipe.embedding == "fp16" else "EmbeddingInt8"]
    seen_second_block = False
    for i, block in enumerate(model.blocks):
        for spec in block.states(recipe):
            name = f"{spec.name}.{i}"
            yield {
                "name": name,
                "output": output_name(name),
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "update": spec.update,
                "suspects": [*before, *_of_block(i, spec.ops)],
                "shallow": i == 0 or (i == 1 and not seen_second_block),
            }
            before = []
            seen_second_block = seen_second_block or i == 1
        before += _of_block(i, block.last_ops)


def _ops_of(model: Description, recipe: QuantConfig) -> str:
    """All ops that blocks are suspected by."""
    states = (op for _, spec in model.states(recipe) for op in spec.ops)
    last = (op for block in model.blocks for op in block.last_ops)
    return ", ".join(sorted({op.split(" ")[0] for op in (*states, *last)}))


def _head_op(recipe: QuantConfig) -> str:
    return "LinearW4" if recipe.lm_head == "w4" else "Linear"


def _of_block(index: int, ops: tuple[str, ...]) -> list[str]:
    return [f"layers.{index}/{op}" for op in ops]
