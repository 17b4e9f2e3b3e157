"""Writes a checkpoint of a published size with random weights.

    python tools/synthetic_checkpoint.py --size mamba2-370m --tokenizer TOKENIZER.json --out FOLDER
    python tools/synthetic_checkpoint.py --size nemotron-3-nano-4b --out FOLDER

For measuring what a build costs (memory, time, bytes) without fetching a model: sizes, names and
types are those of the published checkpoints, values are about those that training starts from. What
a quantized model of it says about accuracy is nothing. Tensors are made and written one at a time,
large ones in pieces, so that the tool needs little memory itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import TOKENIZER
from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.config import read_config
from ssdi8_edge.checkpoints.layout import HEAD, Layout, expected_shapes
from ssdi8_edge.checkpoints.outline import layout_of, published
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import whole_or_absent, write_json

# Key of config.json that holds a pattern of blocks as one word.
PATTERN = "hybrid_override_pattern"
# What the layer norms and skips of a fresh model are, by the ends of stored names.
ONES = ("norm.weight", "norm_f.weight", "layernorm.weight", ".D")
ZEROS = (".bias", ".dt_bias")
OUTPUTS = tuple(f"{name}.weight" for name in ("out_proj", "o_proj", "down_proj", "output_linear"))
STD = 0.02
PIECE = 1 << 24  # values made at a time
SHARD_BYTES = 2 << 30


def config_of(size: str, blocks: str | None = None) -> dict[str, Any]:
    """config.json as the published checkpoint has it; `blocks` replaces a hybrid's pattern."""
    return published()[size] | ({PATTERN: blocks} if blocks else {})


def stored_shapes(layout: Layout, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the files."""
    model = layout.describe(config)
    sources = layout.sources(config, model)
    return {
        piece.stored: shape
        for name, ours in expected_shapes(model).items()
        if not (name == HEAD and model.tie_embeddings)
        for piece, shape in zip(sources[name].pieces, sources[name].shapes(ours), strict=True)
        if piece.stored
    }


def values(name: str, shape: tuple[int, ...], layers: int) -> Tensor:
    """FP16 values about as they are before training, drawn in pieces."""
    if name.endswith(ONES):
        return torch.ones(shape, dtype=torch.float16)
    if name.endswith(".A_log"):
        return torch.empty(shape).uniform_(1, 16).log().half()
    if name.endswith(ZEROS):
        # The inverse softplus of a time step of 0.01.
        return torch.full(shape, -4.6 if name.endswith(".dt_bias") else 0.0).half()
    table = "embed" in name or name == HEAD
    width = math.prod(shape[1:])
    std = STD if table else width**-0.5 / math.sqrt(3)
    if name.endswith(OUTPUTS):
        std /= math.sqrt(layers)  # keeps the residual stream in range
    made = torch.empty(shape, dtype=torch.float16)
    for piece in made.view(-1).split(PIECE):
        piece.copy_(torch.randn(len(piece)) * std)
    return made


def shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors, in files of about `SHARD_BYTES`."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        shard[name] = shape
        if sum(2 * math.prod(each) for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """config.json, shards and their index into an empty folder."""
    write_json(folder / "config.json", config)
    read = read_config(folder / "config.json")
    layout = layout_of(read, folder / "config.json")
    shapes = stored_shapes(layout, read)
    layers = layout.describe(read).n_layer
    files = list(shards(shapes))
    places: dict[str, str] = {}
    for i, shard in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors" if files[1:] else "model.safetensors"
        with SafetensorsWriter(folder / name) as writer:
            for stored, shape in shard.items():
                writer.add(stored, values(stored, shape, layers))
                places[stored] = name
    if files[1:]:
        write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=[*published()], metavar="NAME", required=True)
    parser.add_argument("--blocks", help="of a hybrid, another pattern: fewer of the same widths")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to copy")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.blocks and PATTERN not in published()[options.size]:
        parser.error(f"--blocks: {options.size} has no pattern of letters")
    torch.manual_seed(options.seed)
    with whole_or_absent(options.out) as folder:
        folder.mkdir()
        write_checkpoint(folder, config_of(options.size, options.blocks))
        if options.tokenizer:
            shutil.copyfile(options.tokenizer, folder / TOKENIZER)
    written = Checkpoint(options.out).parameter_bytes
    print(json.dumps({"folder": str(options.out), "bytes": written}))


if __name__ == "__main__":
    main()
