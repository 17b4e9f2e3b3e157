"""Writes a checkpoint of a published size with random weights.

    python tools/synthetic_checkpoint.py --size 370m --tokenizer TOKENIZER.json --out FOLDER
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
from ssdi8_edge.checkpoints.layouts import layouts
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import whole_or_absent, write_json

# d_model and layers of state-spaces/mamba2-*; everything else is the same for all.
MAMBA2 = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}
VOCABULARY = 50277  # of the published tokenizer; the embedding is padded to the next multiple
HYBRIDS: dict[str, dict[str, Any]] = {
    "nemotron-3-nano-4b": {
        "model_type": "nemotron_h",
        "hidden_size": 3136,
        "vocab_size": 131072,
        "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        "mamba_num_heads": 96,
        "mamba_head_dim": 80,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "chunk_size": 128,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12544,
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    "granite-4.0-h-1b": {
        "model_type": "granitemoehybrid",
        "hidden_size": 1536,
        "vocab_size": 100352,
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "position_embedding_type": "nope",
        "shared_intermediate_size": 4096,
        "num_local_experts": 0,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "attention_multiplier": 1 / 128,
        "logits_scaling": 6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "falcon-h1-1.5b": {
        "model_type": "falcon_h1",
        "hidden_size": 2048,
        "vocab_size": 65537,
        "num_hidden_layers": 24,
        "mamba_d_ssm": 3072,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 256,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 128,
        "mamba_rms_norm": False,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 1e11,
        "intermediate_size": 4608,
        "rms_norm_eps": 1e-5,
        # Of the 0.5B model.
        "embedding_multiplier": 5.656854,
        "lm_head_multiplier": 0.0390625,
        "key_multiplier": 0.390625,
        "attention_out_multiplier": 0.9375,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.235702,
        "ssm_multipliers": [0.353553, 0.25, 0.353553, 0.5, 0.353553],
        "mlp_multipliers": [0.883883, 0.585938],
        "tie_word_embeddings": False,
    },
}
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
    if size in HYBRIDS:
        cut = {PATTERN: blocks} if blocks else {}
        return HYBRIDS[size] | cut
    d_model, layers = MAMBA2[size]
    return {
        "d_model": d_model,
        "d_intermediate": 0,
        "n_layer": layers,
        "vocab_size": VOCABULARY,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }


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
    layout = next(each for each in layouts() if each.recognises(read))
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
    parser.add_argument("--size", choices=[*MAMBA2, *HYBRIDS], required=True)
    parser.add_argument("--blocks", help="of a hybrid, another pattern: fewer of the same widths")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to copy")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.blocks and PATTERN not in HYBRIDS.get(options.size, {}):
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
