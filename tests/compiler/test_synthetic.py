"""The tool that writes checkpoints of published sizes: what it writes, the layouts read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layouts import layouts
from ssdi8_edge.models.float import FloatModel


@pytest.fixture
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "synthetic_checkpoint.py"
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hybrid_in_shards(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow, with all kinds of blocks: opens, tensors are finite and of a sensible size."""
    monkeypatch.setattr(tool, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(tool, "PIECE", 1000)
    narrow = {"hidden_size": 64, "vocab_size": 500, "mamba_num_heads": 8, "mamba_head_dim": 16}
    narrow |= {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2}
    narrow |= {"intermediate_size": 128, "n_groups": 2, "ssm_state_size": 16}
    tool.write_checkpoint(tmp_path, tool.config_of("nemotron-3-nano-4b", "M-*-") | narrow)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = Checkpoint(tmp_path)
    assert [b.kind for b in checkpoint.description.blocks] == ["mamba2", "mlp", "attention", "mlp"]
    checkpoint.require_finite()
    assert 0.015 < checkpoint.tensor("embedding.weight").float().std() < 0.025
    assert torch.equal(checkpoint.tensor("layers.0.norm.weight"), torch.ones(64).half())


@pytest.mark.parametrize(
    ("size", "billions"),
    [("nemotron-3-nano-4b", 3.97), ("granite-4.0-h-1b", 1.46), ("falcon-h1-1.5b", 1.55)],
)
def test_published_sizes(tool: ModuleType, size: str, billions: float) -> None:
    """Parameters, as the models' pages count them."""
    config = tool.config_of(size)
    layout = next(layout for layout in layouts() if layout.recognises(config))
    shapes = tool.stored_shapes(layout, config)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(total / 1e9, 2) == billions


NARROW = {
    "granite-4.0-h-1b": {
        "hidden_size": 64,
        "vocab_size": 300,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "shared_intermediate_size": 128,
    },
    "falcon-h1-1.5b": {
        "hidden_size": 64,
        "vocab_size": 301,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
}


@pytest.mark.parametrize("size", NARROW)
def test_other_families(tool: ModuleType, tmp_path: Path, size: str) -> None:
    """Narrow: opens, and the logits of a fresh model neither die nor explode."""
    tool.write_checkpoint(tmp_path, tool.config_of(size) | NARROW[size])
    checkpoint = Checkpoint(tmp_path)
    model = FloatModel(checkpoint.description).eval()
    model.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.names})
    with torch.inference_mode():
        logits, _ = model(torch.arange(40)[None])
    assert 1e-4 < logits.std() < 10
