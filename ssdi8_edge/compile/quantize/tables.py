"""The embedding and lm_head: tall tables, rewritten and quantized in pieces of rows.

Never more than a piece is in FP32 or FP64: a whole copy would outweigh all that a block takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import EMBEDDING, HEAD, NORM_F
from ssdi8_edge.compile.calibrate import rows_at_once
from ssdi8_edge.compile.quantize.gptq import Hessian
from ssdi8_edge.compile.quantize.linears import InputStatistics, linear_tensors
from ssdi8_edge.ground.allocator import return_freed_memory
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.models.rewrites import rotate_embedding, rotate_head
from ssdi8_edge.numerics.fp16_range import IN_FP32, all_finite, to_fp16
from ssdi8_edge.numerics.int8 import quantize_by_largest
from ssdi8_edge.ops.glue import pack_rows
from ssdi8_edge.recipes.recipe import QuantConfig

# Error of an embedding row, relative to it, that is no longer small beside that of INT8.
FADED = 1 / 32
# Of a piece of a table's rows (n, D) in FP32, tensors of n rows.
Convert = Callable[[Tensor], dict[str, Tensor]]


def embedding_tensors(
    checkpoint: Checkpoint, recipe: QuantConfig, residual_scale: float, ruled: bool = False
) -> dict[str, Tensor]:
    """The rotated embedding times `residual_scale`, under the names that `run_embedding` reads.

    Args:
        ruled: by its longest row, that scale is.

    Raises:
        CheckpointError: it holds values that FP16 cannot, or rows that are lost beside the longest.
    """
    stored = checkpoint.stored_name(EMBEDDING)
    name, lost = f"{stored}, rotated,", 0

    def convert(rows: Tensor) -> dict[str, Tensor]:
        nonlocal lost
        rows = rotate_embedding(rows) * residual_scale
        lost += _faded(rows, residual_scale) if ruled else 0
        # Rows leave an INT8 table in FP16, too.
        kept = to_fp16(rows, name, IN_FP32)
        if recipe.embedding == "fp16":
            return {EMBEDDING: kept}
        q, scale = quantize_by_largest(rows, -1, "half_even")
        return {"embedding.packed": pack_rows(q), "embedding.scale": scale}

    tensors = by_rows(checkpoint.tensor(EMBEDDING), convert)
    if lost:
        raise CheckpointError(
            f"tensor {stored} has rows so much longer than others that FP16, in which it is kept, "
            f"loses {lost} of its {checkpoint.description.vocab_size} rows beside them",
            f"look at the longest row; {IN_FP32}",
        )
    return tensors


def _faded(scaled: Tensor, scale: float) -> int:
    """How many rows FP16 keeps well, but not times `scale`, near the lower end of its range."""

    def faded(rows: Tensor) -> Tensor:
        return (rows.half().float() - rows).norm(dim=1) > FADED * rows.norm(dim=1)

    return int((faded(scaled) & ~faded(scaled / scale)).sum())


def embedded(rows: Tensor, recipe: QuantConfig) -> Tensor:
    """What the quantized model has of the rotated FP32 `rows` (…, D) of its embedding, FP32."""
    if recipe.embedding == "int8_row":
        q, scale = quantize_by_largest(rows, -1, "half_even")
        rows = q.float() * scale
    return rows.half().float()


def fp16_head(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """lm_head in FP16, rotated and with γ_f folded in.

    Raises:
        CheckpointError: it holds values that FP16 cannot.
    """
    norm_f = checkpoint.tensor(NORM_F).float()
    name = f"{checkpoint.stored_name(HEAD)}, rotated,"
    return by_rows(
        checkpoint.tensor(HEAD),
        lambda rows: {HEAD: to_fp16(rotate_head(rows, norm_f), name, IN_FP32)},
    )


def fits_fp16(checkpoint: Checkpoint) -> bool:
    """Whether `fp16_head` has a value for everything."""
    norm_f, table = checkpoint.tensor(NORM_F).float(), checkpoint.tensor(HEAD)
    return all(
        all_finite(rotate_head(rows.float(), norm_f).half())
        for rows in table.split(rows_at_once(table))
    )


def quantized_head(
    checkpoint: Checkpoint,
    recipe: QuantConfig,
    inputs: InputStatistics | None,
    device: str,
    track: Track = silent,
) -> dict[str, Tensor]:
    """The same as an INT8 linear of the recipe's format, compensated and rounded like in_proj.

    `inputs` are those of the quantized model, and by how much the FP model's differ; None where the
    recipe uses neither GPTQ nor compensation.
    """
    norm_f = checkpoint.tensor(NORM_F).float()
    lacking = hessian = None
    if inputs is not None and recipe.compensation:
        lacking = inputs.regression()
    if inputs is not None and recipe.gptq:
        hessian = Hessian(inputs.hessian, recipe.descent)
    return_freed_memory()

    def convert(rows: Tensor) -> dict[str, Tensor]:
        weight = rotate_head(rows, norm_f).to(device)
        if lacking is not None:
            weight = (weight + recipe.compensation * (weight.double() @ lacking)).float()
        return linear_tensors("lm_head", weight, recipe.head, hessian)

    return by_rows(checkpoint.tensor(HEAD), convert, track)


def by_rows(table: Tensor, convert: Convert, track: Track = silent) -> dict[str, Tensor]:
    """What `convert` makes of a tall table (V, D), on the CPU."""
    whole: dict[str, Tensor] = {}
    rows = rows_at_once(table)
    for start in track(range(0, len(table), rows), "quantize the head"):
        part = slice(start, start + rows)
        for name, made in convert(table[part].float()).items():
            if name not in whole:
                shape = (len(table), *made.shape[1:])
                whole[name] = torch.empty(shape, dtype=made.dtype)
            whole[name][part] = made
    return_freed_memory()
    return whole
