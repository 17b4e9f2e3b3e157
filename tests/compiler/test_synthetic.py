"""The tool that writes checkpoints of published sizes: what it writes, the layouts read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssdi8_edge.checkpoints.checkpoint import Checkpoint


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


def test_published_sizes(tool: ModuleType) -> None:
    """Parameters, as the models' pages count them."""
    from ssdi8_edge.checkpoints.layouts.nemotron_h import NEMOTRON_H

    config = tool.config_of("nemotron-3-nano-4b")
    shapes = tool.stored_shapes(NEMOTRON_H, config)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(total / 1e9, 2) == 3.97
