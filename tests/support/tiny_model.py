"""A tiny checkpoint with a tokenizer, and a text for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, state_spaces_config, stored_tensors
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER

TEXT_BYTES = 600  # one token a byte
BOOKKEEPING = {".lock", "steps.json"}  # in a run folder, besides the artifacts


def byte_tokenizer(vocabulary: int = 256) -> Tokenizer:
    """One token a byte, or fewer tokens than bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocabulary]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_model(folder: Path, **sizes: int) -> Path:
    """A checkpoint with tokenizer: 2 layers, 256 tokens; the smallest sizes that have kernels and
    that 4-bit groups of 128 divide, unless `sizes` says otherwise."""
    fitting = {"d_model": 128, "headdim": 64, "d_state": 64, "chunk_size": 64}
    config = make_config(**(fitting | sizes))
    tensors = stored_tensors(make_model(config))
    del tensors["lm_head.weight"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(state_spaces_config(config)))
    save_file(tensors, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_text(path: Path, start: int = 0, size: int = TEXT_BYTES) -> Path:
    """A piece of the shipped evaluation text."""
    path.write_bytes((DEMO_FOLDER / "evaluation.txt").read_bytes()[start : start + size])
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
