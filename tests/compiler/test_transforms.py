"""Folds and rotations must not change what an FP model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from case_table import random_ids, relative_error, write_checkpoint
from conftest import make_config
from torch import Tensor

from ssdi8_edge.compile.calibrate import embed
from ssdi8_edge.models.block import IN_PROJ, NORM, OUT_PROJ
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2.clusters import permuted, sort_and_cluster
from ssdi8_edge.models.rewrites import (
    rotate_embedding,
    rotate_head,
    rotate_layer,
    rotate_out_proj_input,
)
from ssdi8_edge.numerics import hadamard

# FP32 sums in another basis; measured 5e-7.
TOLERANCE = 1e-5


def rotate(model: FloatModel) -> FloatModel:
    """A copy whose residual stream is rotated, the weights of its norms folded."""
    description = model.description
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    table, head = tensors["embedding.weight"], tensors["lm_head.weight"]
    norm_f = tensors["norm_f.weight"]
    tensors["lm_head.weight"] = rotate_head(head, norm_f)
    tensors["embedding.weight"] = rotate_embedding(table)
    tensors["norm_f.weight"] = torch.ones_like(norm_f)
    for i in range(description.n_layer):
        prefix = f"layers.{i}."
        layer = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        rotated = rotate_layer(layer)
        tensors |= {prefix + k: v for k, v in rotated.items()}
    untied = FloatModel(replace(description, tie_embeddings=False)).eval()
    untied.load_state_dict(tensors)
    return untied


@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_rotated_model_is_the_model(tmp_path: Path, ngroups: int, tied: bool) -> None:
    """FP32 logits of the rotated weights; norms differ from 1, so a missed fold shows."""
    _, model = write_checkpoint(tmp_path / "c", make_config(ngroups, tie_embeddings=tied))
    ids = random_ids(2, 37)
    with torch.inference_mode():
        want, _ = model(ids)
        got, _ = rotate(model)(ids)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("width", [64, 96, 160])
def test_rotation_of_paley_widths(tmp_path: Path, width: int) -> None:
    """96 = 12·8 and 160 = 20·8: there the rotation is not symmetric, and transposes differ."""
    _, model = write_checkpoint(tmp_path / "c", make_config(d_model=width))
    ids = random_ids(1, 20)
    with torch.inference_mode():
        want, _ = model(ids)
        got, _ = rotate(model)(ids)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("width", [128, 96, 160])
def test_out_proj_input_rotation(width: int) -> None:
    """(r · H) · (W · H)ᵀ = r · Wᵀ: the online transform meets the offline one."""
    g = torch.Generator().manual_seed(width)
    r = torch.randn(3, width, generator=g)
    weight = torch.randn(20, width, generator=g)
    got = hadamard.transform(r).float() @ rotate_out_proj_input(weight).t()
    torch.testing.assert_close(got, r @ weight.t(), rtol=1e-4, atol=1e-4)


def test_rotation_moves_the_residual(tmp_path: Path) -> None:
    """The rotated embedding is not the embedding, and what calibration embeds is it."""
    checkpoint, model = write_checkpoint(tmp_path / "c")
    ids = random_ids(70, 48)  # more than one batch of samples
    table = model.embedding.weight.detach()
    assert relative_error(rotate_embedding(table), table) > 0.5
    rows = torch.cat([rows for _, rows in embed(checkpoint, ids)])
    want = hadamard.transform(table[ids]).float()
    assert torch.equal(rows, want)


def test_rotate_layer_leaves_its_argument_alone() -> None:
    """Source tensors are shared with the checkpoint's cache: none may be written to."""
    g = torch.Generator().manual_seed(0)
    layer = {
        NORM: torch.rand(64, generator=g) + 0.5,
        IN_PROJ: torch.randn(296, 64, generator=g),
        "gate_norm.weight": torch.rand(128, generator=g) + 0.5,
        OUT_PROJ: torch.randn(64, 128, generator=g),
    }
    before = {k: v.clone() for k, v in layer.items()}
    rotated = rotate_layer(layer)
    assert all(torch.equal(layer[k], v) for k, v in before.items())
    assert torch.equal(rotated[NORM], torch.ones(64))
    assert torch.equal(rotated["gate_norm.weight"], layer["gate_norm.weight"])


def test_fold_is_the_diagonal(tmp_path: Path) -> None:
    """γ_pre scales columns of in_proj: checked without a model."""
    g = torch.Generator().manual_seed(1)
    layer: dict[str, Tensor] = {
        NORM: torch.rand(4, generator=g) + 0.5,
        IN_PROJ: torch.randn(6, 4, generator=g),
        "gate_norm.weight": torch.rand(8, generator=g) + 0.5,
        OUT_PROJ: torch.randn(4, 8, generator=g),
    }
    h4 = torch.kron(*hadamard.factors(4)).float() / 2
    rotated = rotate_layer(layer)
    torch.testing.assert_close(rotated[IN_PROJ], layer[IN_PROJ] * layer[NORM] @ h4)
    torch.testing.assert_close(rotated[OUT_PROJ], h4.t() @ layer[OUT_PROJ])


@pytest.mark.parametrize("ngroups", [1, 2])
def test_permuted_model_is_the_model(tmp_path: Path, ngroups: int) -> None:
    """Heads of each group and channels of each head in any order: the FP32 logits are the same."""
    _, model = write_checkpoint(tmp_path / "c", make_config(ngroups))
    ids = random_ids(2, 37)
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for i in range(model.description.n_layer):
        prefix = f"layers.{i}."
        layer = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        g = torch.Generator().manual_seed(i)
        group = 8 // ngroups  # heads must stay in their SSD group
        heads = torch.cat(
            [first + torch.randperm(group, generator=g) for first in range(0, 8, group)]
        )
        channels = torch.stack([torch.randperm(16, generator=g) for _ in range(8)])
        moved = permuted(layer, heads, channels)
        assert not torch.equal(moved[IN_PROJ], layer[IN_PROJ])
        tensors |= {prefix + k: v for k, v in moved.items()}
    other = FloatModel(model.description).eval()
    other.load_state_dict(tensors)
    with torch.inference_mode():
        want, _ = model(ids)
        got, _ = other(ids)
    assert relative_error(got, want) < TOLERANCE


def test_clusters_of_known_groups() -> None:
    """Four shapes of heads and four sizes of channels, in disorder: each is found again."""
    g = torch.Generator().manual_seed(0)
    curves = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 9], [1, 1, 9, 9], [1, 9, 9, 9]])
    kind = torch.randperm(16, generator=g) % 4
    size = curves[kind].repeat_interleave(4, 1)
    shuffled = torch.stack([row[torch.randperm(16, generator=g)] for row in size])
    order = sort_and_cluster(shuffled, 1)
    assert len({tuple(kind[order.heads[i : i + 4]].tolist()) for i in range(0, 16, 4)}) == 4
    values = order.of_channels(shuffled)
    for cluster in order.clusters.unique():
        assert len(values[order.clusters == cluster].unique()) == 1
    assert torch.equal(order.share_largest(values), values)
