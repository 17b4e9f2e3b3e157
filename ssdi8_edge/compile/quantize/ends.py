"""Embedding and lm_head: tall tables, rewritten and rounded some rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import EMBEDDING, HEAD, NORM_F
from ssdi8_edge.compile.calibrate import TABLE_ROWS
from ssdi8_edge.compile.quantize.linears import InputStatistics, linear_tensors
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.observers import of_linear_input
from ssdi8_edge.models.rewrites import rotate_embedding, rotate_head
from ssdi8_edge.numerics import int8
from ssdi8_edge.numerics.fp16_range import IN_FP32, to_fp16
from ssdi8_edge.recipes.recipe import QuantConfig

EMBEDDING_SCALE = "embedding.scale"


def embedding_tensors(
    checkpoint: Checkpoint, model: Description, recipe: QuantConfig
) -> dict[str, Tensor]:
    """The rotated embedding in the unit of the stream: FP16, or INT8 rows and their scales."""

    def rotated(rows: Tensor) -> Tensor:
        return rotate_embedding(rows) * model.residual_scale

    if recipe.embedding == "fp16":
        return {EMBEDDING: _fp16_rows(checkpoint, EMBEDDING, rotated)}
    parts = [_int8_rows(rotated(part.float())) for part in _parts(checkpoint, EMBEDDING)]
    table, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    return {EMBEDDING: table, EMBEDDING_SCALE: scale.squeeze(-1)}


def embedded(rows: Tensor, recipe: QuantConfig) -> Tensor:
    """What the embedding of `embedding_tensors` gives for rotated rows (…, D): FP16 values."""
    if recipe.embedding == "int8_row":
        q, scale = _int8_rows(rows)
        rows = q.float() * scale
    return rows.half().float()


def fp16_head(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """lm_head rotated, with the weight of the last norm in it."""
    norm_f = checkpoint.tensor(NORM_F).float()
    head = _fp16_rows(checkpoint, HEAD, lambda rows: rotate_head(rows, norm_f))
    return {NORM_F: torch.ones_like(norm_f), HEAD: head}


def head_scale(statistics: Mapping[str, Tensor], recipe: QuantConfig) -> dict[str, Tensor]:
    """The static scale of a quantized head's input; none where each token has its own."""
    if recipe.input_scaling != "static":
        return {}
    return {"norm_f.scale": of_linear_input(statistics["norm_f"])}


def quantized_head(
    checkpoint: Checkpoint,
    recipe: QuantConfig,
    inputs: InputStatistics | None,
    device: str,
) -> dict[str, Tensor]:
    """`fp16_head` in the recipe's INT8 or 4 bits.

    Args:
        inputs: of its INT8 input, for GPTQ and the compensation; None: the recipe has neither.
    """
    norm_f = checkpoint.tensor(NORM_F).float()
    linear = dataclasses.replace(recipe, linear=recipe.lm_head)
    missing = inputs.regression() if inputs is not None and recipe.compensation else None
    hessian = inputs.hessian if inputs is not None and recipe.gptq else None
    made: dict[str, list[Tensor]] = {}
    for part in _parts(checkpoint, HEAD):
        rows = rotate_head(part.float(), norm_f).to(device)
        if missing is not None:
            rows = (rows + recipe.compensation * (rows.double() @ missing)).float()
        for name, tensor in linear_tensors("lm_head", rows, linear, hessian).items():
            made.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(parts) for name, parts in made.items()}


def _parts(checkpoint: Checkpoint, name: str) -> tuple[Tensor, ...]:
    """A table some rows at a time, as stored: FP64 copies of it are not held whole."""
    return checkpoint.tensor(name).split(TABLE_ROWS)


def _fp16_rows(checkpoint: Checkpoint, name: str, rewrite: Callable[[Tensor], Tensor]) -> Tensor:
    rotated = f"{checkpoint.stored_name(name)}, rotated,"
    parts = _parts(checkpoint, name)
    return torch.cat([to_fp16(rewrite(part.float()), rotated, IN_FP32) for part in parts])


def _int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (…, D) FP32 as INT8, and the FP32 scale (…, 1) of each."""
    scale = int8.scale_from_absmax(rows.abs().amax(-1, keepdim=True))
    return int8.quantize(rows, scale, "half_even"), scale
