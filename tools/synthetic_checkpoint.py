"""Writes a checkpoint of a published Mamba-2 size with random weights.

    python tools/synthetic_checkpoint.py --size 370m --tokenizer TOKENIZER.json --out FOLDER

For measuring what a build costs (memory, time, bytes) without fetching a model: sizes, names and
types are those of the state-spaces checkpoints, values are those that training starts from. What a
quantized model of it says about accuracy is nothing. Layers are made and written one at a time, so
that the tool needs little memory itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

from runtime.files import TOKENIZER, WEIGHTS
from ssdi8_edge.checkpoints.layouts.state_spaces import stored_name
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import whole_or_absent, write_json
from ssdi8_edge.models.block import OUT_PROJ
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2

# d_model and layers of state-spaces/mamba2-*; everything else is the same for all.
SIZES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}
VOCABULARY = 50277  # of the published tokenizer; the embedding is padded to the next multiple
PAD_MULTIPLE = 16
EMBEDDING_STD = 0.02
EMBEDDING_ROWS = 4096  # made at a time


def sizes_of(name: str) -> Description:
    """The model's sizes under its published name."""
    d_model, layers = SIZES[name]
    padded = math.ceil(VOCABULARY / PAD_MULTIPLE) * PAD_MULTIPLE
    block = Mamba2(d_inner=2 * d_model)
    return Description(d_model=d_model, vocab_size=padded, blocks=(block,) * layers)


def config_json(config: Description) -> dict[str, object]:
    """config.json as the published checkpoints have it."""
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": VOCABULARY,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": PAD_MULTIPLE,
        "tie_embeddings": True,
    }


def write_weights(path: Path, config: Description) -> None:
    """FP16 weights as they are before training, tensor by tensor."""
    writer = SafetensorsWriter(path)
    table = torch.empty(config.vocab_size, config.d_model, dtype=torch.float16)
    for rows in table.split(EMBEDDING_ROWS):
        rows.copy_(torch.randn(rows.shape) * EMBEDDING_STD)
    writer.add(stored_name("embedding.weight"), table)
    for i, block in enumerate(config.blocks):
        layer = block.float_block(config.d_model, config.norm_eps)
        for name, value in layer.state_dict().items():
            if name == OUT_PROJ:
                value = value / math.sqrt(config.n_layer)  # keeps the residual stream in range
            writer.add(stored_name(f"layers.{i}.{name}"), value.half())
    writer.add(stored_name("norm_f.weight"), torch.ones(config.d_model, dtype=torch.float16))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json to copy")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = sizes_of(options.size)
    with whole_or_absent(options.out) as folder:
        folder.mkdir()
        write_weights(folder / WEIGHTS, config)
        write_json(folder / "config.json", config_json(config))
        shutil.copyfile(options.tokenizer, folder / TOKENIZER)
    size = (options.out / WEIGHTS).stat().st_size
    print(json.dumps({"folder": str(options.out), "bytes": size}))


if __name__ == "__main__":
    main()
