"""Names, shapes and types of a quantized checkpoint, told by the code that makes it.

Everything is made without data (device "meta"), but for what has rows of which each takes the same
(tables and linear layers), of which a few are quantized, and statistics, whose shapes depend on
neither width nor text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ssdi8_edge.checkpoints.layout import EMBEDDING, HEAD, NORM_F
from ssdi8_edge.compile.quantize.linears import linear_tensors
from ssdi8_edge.models.block import IN_BIAS, IN_PROJ, NORM, OUT_BIAS, OUT_PROJ, Block, Layer
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.observers import of_linear_input
from ssdi8_edge.numerics.int8 import quantize_by_largest
from ssdi8_edge.ops.glue import pack_rows
from ssdi8_edge.recipes.recipe import QuantConfig

# Of a table or a linear layer, quantized in earnest.
ROWS = 8
# Of the residual stream of the block that gives statistics.
NARROW = 8

Tensors = Mapping[str, Tensor]


@functools.lru_cache(maxsize=64)
def quantized_tensors(model: Description, recipe: QuantConfig) -> Tensors:
    """What `quantize` writes of a model that is `adapted` to the recipe, without data."""
    layers = {block: block_tensors(block, model.d_model, recipe) for block in {*model.blocks}}
    return {
        **table_tensors(model, recipe),
        **{
            f"layers.{i}.{name}": tensor
            for i, block in enumerate(model.blocks)
            for name, tensor in layers[block].items()
        },
    }


@functools.lru_cache(maxsize=64)
def table_tensors(model: Description, recipe: QuantConfig) -> Tensors:
    """Embedding, last norm and head; a tied head of the FP16 baseline is the embedding."""
    rows = torch.zeros(ROWS, model.d_model)
    made: Layer = {EMBEDDING: rows.half()}
    if recipe.embedding == "int8_row":
        q, scale = quantize_by_largest(rows, -1, "half_even")
        made = {"embedding.packed": pack_rows(q), "embedding.scale": scale}
    if recipe.lm_head != "fp16":
        made |= linear_tensors("lm_head", rows, _to_nearest(recipe).head)
    elif recipe.quantized or not model.tie_embeddings:
        made[HEAD] = rows.half()
    tensors = _with_rows(made, model.vocab_size)
    if recipe.lm_head == "fp16":
        tensors[NORM_F] = torch.empty(model.d_model, device="meta")
    elif recipe.input_scaling == "static":
        tensors["norm_f.scale"] = of_linear_input(torch.ones(())).to("meta")
    return tensors


@functools.lru_cache(maxsize=256)
def block_tensors(block: Block, d_model: int, recipe: QuantConfig) -> Tensors:
    """Local name -> tensor of one quantized block."""
    layer = {
        name: torch.empty(shape, device="meta") for name, shape in block.parameters(d_model).items()
    }
    linears = {"in_proj": (IN_PROJ, IN_BIAS), "out_proj": (OUT_PROJ, OUT_BIAS)}
    if not recipe.quantized:
        half = {weight: layer[weight].half() for weight, _ in linears.values()}
        biases = {bias: layer[bias] for _, bias in linears.values() if bias in layer}
        return {NORM: layer[NORM], **half, **block.own_tensors(layer, recipe), **biases}
    with torch.inference_mode():
        statistics = _statistics(block)
        layer, order = block.reordered(layer, statistics, recipe)
        made = {**block.scales(statistics, recipe, order), **block.own_tensors(layer, recipe)}
        for name, (weight, _) in linears.items():
            rows, columns = layer[weight].shape
            quantized = linear_tensors(name, torch.zeros(ROWS, columns), _to_nearest(recipe))
            made |= _with_rows(quantized, rows)
    return {name: tensor.to("meta") for name, tensor in made.items()}


def _statistics(block: Block) -> Tensors:
    narrow = block.float_block(NARROW, 1e-5)
    observers = block.observers(dict(narrow.named_parameters()))
    narrow(torch.zeros(1, 1, NARROW), None, observers)
    return observers.statistics()


def _to_nearest(recipe: QuantConfig) -> QuantConfig:
    """The same formats without the search for the best values."""
    return dataclasses.replace(
        recipe, gptq=False, descent=0, compensation=0.0, group_search="absmax"
    )


def _with_rows(tensors: Tensors, rows: int) -> dict[str, Tensor]:
    return {
        name: torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def bytes_of(tensor: Tensor) -> int:
    """Of its data."""
    return tensor.numel() * tensor.element_size()
