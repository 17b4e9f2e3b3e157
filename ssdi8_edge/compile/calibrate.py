"""Calibration: a text file goes through the FP model, layer by layer, under observers.

Source: docs/method.md §6. Statistics are running absolute maxima of the model in the rotated basis,
and of some tensors the range of least squared error; the scales are made from them when a recipe is
applied. One layer is in memory at a time, and on a CPU the residual stream between layers lies in a
temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import EMBEDDING
from ssdi8_edge.ground.allocator import return_freed_memory
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.spool import batches, open_spool
from ssdi8_edge.models.float import load_block
from ssdi8_edge.models.rewrites import rotate_embedding, rotate_layer
from ssdi8_edge.numerics.fp16_range import IN_FP32, LARGEST
from ssdi8_edge.recipes.recipe import QuantConfig


def fp32_layer(checkpoint: Checkpoint, index: int, device: str) -> dict[str, Tensor]:
    return {k: tensor.to(device).float() for k, tensor in checkpoint.layer(index).items()}


def embed(
    checkpoint: Checkpoint, ids: Tensor, scale: float = 1.0
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the rotated embedding times `scale`, batch by batch, without rotating all of it."""
    table = checkpoint.tensor(EMBEDDING)
    for part in batches(ids):
        yield part, rotate_embedding(table[ids[part]].float()) * scale


# Goes into the key of the statistics: raised when what is observed changes, so that those of an
# earlier state of this file are made again.
STATISTICS = 6

# Of a table with a row for each word, handled at once: so many rows, and fewer where they are long.
TABLE_ROWS = 8192
TABLE_VALUES = 1 << 23


def rows_at_once(table: Tensor) -> int:
    """Rows of a tall table (V, D) whose FP64 copies, 64 MB each, may lie beside it."""
    return max(1, min(TABLE_ROWS, TABLE_VALUES // table.shape[1]))


def calibrate(
    checkpoint: Checkpoint,
    recipe: QuantConfig,
    ids: Tensor,
    track: Track = silent,
    device: str = "cpu",
    scratch: Path | None = None,
) -> dict[str, Tensor]:
    """Statistics of every layer on the token windows `ids` (S, T).

    `scratch` is a folder on the disk that holds the residual stream meanwhile.

    Returns:
        `layers.{i}.<name>` -> FP32 absolute maximum: u, r, and in_proj.<part>, its output: (); out,
        the output of the rotated out_proj: (); what the kind of block adds. `<name>_mse`: the range
        of least squared error. `norm_f`: (), the rotated input of lm_head. `embedding`: (), the
        largest norm of a row, which no rotated value exceeds.

    Raises:
        CheckpointError: the model computes something that is not a number, or that FP16 cannot hold
            where every method needs it to.
    """
    model = checkpoint.description.adapted(recipe)
    shape = (*ids.shape, model.d_model)
    statistics: dict[str, Tensor] = {}
    with (
        torch.inference_mode(),
        open_spool(shape, torch.float32, device, scratch) as stream,
    ):
        table = checkpoint.tensor(EMBEDDING)
        norms = [rows.float().norm(dim=1).amax() for rows in table.split(rows_at_once(table))]
        del table
        statistics["embedding"] = torch.stack(norms).amax()
        if not statistics["embedding"].isfinite():
            raise CheckpointError(
                f"rows of the tensor {checkpoint.stored_name(EMBEDDING)} of {checkpoint.folder} "
                "are longer than FP32 holds",
                "the checkpoint is damaged, fetch it again.",
            )
        for part, rows in embed(checkpoint, ids):
            stream[part] = rows
        for i in track(range(model.n_layer), "calibrate"):
            layer = fp32_layer(checkpoint, i, device)
            observers = model.blocks[i].observers(layer)
            block = load_block(model, i, rotate_layer(layer))
            for part in batches(ids):
                residual, _ = block(stream[part].to(device), None, observers)
                stream[part] = residual
            seen = observers.statistics()
            statistics |= {f"layers.{i}.{k}": v.cpu() for k, v in seen.items()}
            _require_numbers(checkpoint, i, observers.absmax)
            _require_fp16_range(checkpoint, i, recipe, observers.absmax)
            model.blocks[i].require_computable(i, layer, observers.absmax)
            return_freed_memory()
        norm_f = torch.zeros((), device=device)
        for part in batches(ids):
            rows = stream[part].to(device)
            rms = (rows.square().mean(-1, keepdim=True) + model.norm_eps).sqrt()
            norm_f = torch.maximum(norm_f, (rows / rms).abs().amax())
    statistics["norm_f"] = norm_f.cpu()
    return statistics


def _require_numbers(checkpoint: Checkpoint, index: int, absmax: dict[str, Tensor]) -> None:
    for name, value in absmax.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"layers.{index} of {checkpoint.folder} computes {name} that is not a number",
                "the checkpoint is damaged, fetch it again.",
            )


def _require_fp16_range(
    checkpoint: Checkpoint, index: int, recipe: QuantConfig, absmax: dict[str, Tensor]
) -> None:
    for name, words in checkpoint.description.blocks[index].kept_in_fp16(recipe).items():
        largest = absmax[name].amax().item()
        if largest > LARGEST:
            raise CheckpointError(
                f"layers.{index} of {checkpoint.folder}: {words} reaches {largest:.3g} on the "
                f"calibration text, and FP16, in which every method keeps it, ends at {LARGEST:g}",
                IN_FP32,
            )
