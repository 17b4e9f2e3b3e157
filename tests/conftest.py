"""A tiny Mamba-2, as a configuration and as a checkpoint folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssdi8_edge.checkpoints.layouts.state_spaces import stored_name
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2 import Mamba2

pytest.register_assert_rewrite("kernel_compare", "op_bodies", "slow_ops")
pytest_plugins = ["kernel_fixtures"]

# A job that a script starts in the background ignores Ctrl-C, and so would every command that the
# tests start. A handler of our own is not inherited: they begin with the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first: else the last of them keeps one worker busy alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


MakeConfig = Callable[..., Description]
MakeCheckpoint = Callable[..., Path]


def make_config(
    ngroups: int = 1,
    *,
    d_model: int = 64,
    n_layer: int = 2,
    vocab_size: int = 256,
    headdim: int = 16,
    d_state: int = 16,
    chunk_size: int = 16,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    tie_embeddings: bool = True,
) -> Description:
    block = Mamba2(
        d_inner=2 * d_model,
        headdim=headdim,
        d_state=d_state,
        ngroups=ngroups,
        chunk_size=chunk_size,
        dt_limit=dt_limit,
    )
    return Description(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=(block,) * n_layer,
        tie_embeddings=tie_embeddings,
    )


def mamba(model: Description) -> Mamba2:
    """The sizes of its blocks, which are all alike."""
    block = model.blocks[0]
    assert isinstance(block, Mamba2) and set(model.blocks) == {block}
    return block


def stored_tensors(model: FloatModel) -> dict[str, torch.Tensor]:
    """Its state dict under the names of the state-spaces checkpoints."""
    return {stored_name(name): tensor for name, tensor in model.state_dict().items()}


def make_model(config: Description, seed: int = 0) -> FloatModel:
    """Random weights; the norms differ from 1, so that a forgotten norm weight shows."""
    torch.manual_seed(seed)
    model = FloatModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def state_spaces_config(config: Description) -> dict[str, object]:
    """config.json as state-spaces writes it, with the sizes that differ from the defaults."""
    block = mamba(config)
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "headdim": block.headdim,
            "d_state": block.d_state,
            "ngroups": block.ngroups,
            "chunk_size": block.chunk_size,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tie_embeddings,
    }


@pytest.fixture
def tiny_config() -> MakeConfig:
    """Factory: 2 layers, d_model 64, 8 heads of 16, d_state 16, chunk 16, 256 tokens."""
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., FloatModel]:
    """Factory: a configuration and a seed to a model with random weights."""
    return make_model


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Factory: writes a model as a state-spaces folder with safetensors and returns the folder."""

    def write(config: Description | None = None, seed: int = 0) -> Path:
        config = config or make_config()
        tensors = stored_tensors(make_model(config, seed))
        if config.tie_embeddings:
            del tensors["lm_head.weight"]
        folder = tmp_path / f"tiny-{mamba(config).ngroups}-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(state_spaces_config(config)))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write
