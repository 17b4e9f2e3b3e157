"""Checkpoints of hybrids that transformers wrote, in FP32, against transformers itself.

Its prefill is the judge of ours in one piece, in several and token by token. Its own decoding is
none: it ignores limits of dt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ssdi8_edge.models.block import States
from ssdi8_edge.models.float import FloatModel

transformers = pytest.importorskip("transformers", minversion="5.24")

BOUND = 1e-5
VOCABULARY = 96
PIECES = (13, 1, 17, *[1] * 6)
SHORT = [0.02, 0.6]  # cuts dt of these models at both ends

NEMOTRON: dict[str, Any] = {
    "hidden_size": 48,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "mamba_num_heads": 3,
    "mamba_head_dim": 80,
    "n_groups": 3,
    "ssm_state_size": 64,
    "chunk_size": 16,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
}
GRANITE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_state": 64,
    "mamba_chunk_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "shared_intermediate_size": 96,
    "attention_multiplier": 0.25,
    "tie_word_embeddings": True,
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.03,
    "logits_scaling": 6.0,
}
FALCON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_state": 64,
    "mamba_chunk_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
}
FALCON_MULTIPLIERS = {
    "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.04,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.9,
    "attention_out_multiplier": 0.31,
    "ssm_in_multiplier": 1.6,
    "ssm_out_multiplier": 0.24,
    "ssm_multipliers": [0.35, 2.5, 0.4, 3.0, 0.5],
    "mlp_multipliers": [2.9, 0.17],
}
ALL_BIASES = {"mamba_proj_bias": True, "attention_bias": True}
ONE = {"num_hidden_layers": 1}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "nemotron_h": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "groups-1-heads-of-64-state-256": {
            "n_groups": 1,
            "mamba_head_dim": 64,
            "ssm_state_size": 256,
            "layers_block_type": ["full_attention", "linear_attention", "mlp"],
        },
        "groups-8-heads-of-32-state-128": {
            "n_groups": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 128,
            "layers_block_type": ["mlp", "linear_attention"],
        },
        "groups-2-heads-of-128": {
            "n_groups": 2,
            "mamba_num_heads": 2,
            "mamba_head_dim": 128,
            "layers_block_type": ["linear_attention"],
        },
        "biases": {"use_bias": True, "mlp_bias": True},
        "limits": {"time_step_limit": SHORT},
        "as-many-keys-as-queries": {"num_key_value_heads": 6, "conv_kernel": 2},
        "attention-heads-of-128": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "layers_block_type": ["full_attention", "linear_attention"],
        },
        "eps-no-conv-bias": {"layer_norm_epsilon": 0.3, "use_conv_bias": False},
    },
    "granitemoehybrid": {
        "plain": {},
        "multipliers": GRANITE_MULTIPLIERS,
        "multipliers-untied-biases": {
            **GRANITE_MULTIPLIERS,
            **ALL_BIASES,
            "tie_word_embeddings": False,
        },
        "groups-8-state-256": {
            "hidden_size": 128,
            "mamba_n_heads": 8,
            "mamba_n_groups": 8,
            "mamba_d_state": 256,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
        },
        "groups-2-heads-of-80": {
            "hidden_size": 80,
            "mamba_n_heads": 2,
            "mamba_n_groups": 2,
            "mamba_d_state": 128,
            "layer_types": None,
            "num_hidden_layers": 2,
        },
        "heads-of-128": {"mamba_n_heads": 1, "num_key_value_heads": 4},
        "heads-of-64": {"mamba_n_heads": 2, "mamba_d_head": 64, "num_key_value_heads": 1},
        "limits": {"time_step_limit": SHORT},
        "no-conv-bias": {"mamba_conv_bias": False, "mamba_expand": 3, "mamba_n_heads": 6},
        "eps": {"rms_norm_eps": 0.3},
    },
    "falcon_h1": {
        "plain": {},
        "multipliers": FALCON_MULTIPLIERS,
        "multipliers-tied": {**FALCON_MULTIPLIERS, "tie_word_embeddings": True},
        "multipliers-biases": {
            **FALCON_MULTIPLIERS,
            **ALL_BIASES,
            "projectors_bias": True,
            "mlp_bias": True,
        },
        "some-biases": {**FALCON_MULTIPLIERS, "mamba_proj_bias": True},
        "other-biases": {**FALCON_MULTIPLIERS, "attention_bias": True, **ONE},
        "output-bias": {**FALCON_MULTIPLIERS, "projectors_bias": True, **ONE},
        "norm-first-groups-2": {
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_n_groups": 2,
            "mamba_n_heads": 2,
            "mamba_d_state": 256,
        },
        "grouped-norm-groups-8": {
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_n_groups": 8,
            "mamba_n_heads": 8,
            "mamba_d_ssm": 256,
            "mamba_d_state": 128,
        },
        "heads-of-128": {"mamba_n_heads": 1, "num_key_value_heads": 4, "mamba_conv_bias": False},
        "heads-of-80": {"mamba_n_heads": 2, "mamba_d_ssm": 160, "head_dim": 12},
        "attention-heads-of-64": {"num_key_value_heads": 1, "head_dim": 64, **ONE},
        "expanded": {"mamba_d_ssm": None, "mamba_n_heads": 2, "num_key_value_heads": 1},
        "limits-tied": {"time_step_limit": SHORT, "tie_word_embeddings": True},
        "eps": {"rms_norm_eps": 0.3},
    },
    # As Codestral Mamba's: what config.json says of the norm is not so.
    "mamba2": {
        "codestral": {"norm_before_gate": True, "n_groups": 8, "num_heads": 8, "head_dim": 16},
        "limits-tied": {"time_step_limit": SHORT, "tie_word_embeddings": True},
        "eps": {"layer_norm_epsilon": 0.3, "head_dim": 32, "num_heads": 4, "n_groups": 2},
        "biases": {"use_bias": True},
        "no-conv-bias": {"use_conv_bias": False, "state_size": 256},
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    "nemotron_h": NEMOTRON,
    "granitemoehybrid": GRANITE,
    "falcon_h1": FALCON,
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 64,
        "chunk_size": 16,
    },
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """transformers tells of missing kernels, and of positions that a model type does without."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def oracle_of(family: str, **changes: Any) -> Any:
    """A model with random weights of which each, and each multiplier, shows in the logits."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **PLAIN[family] | changes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    g = torch.Generator().manual_seed(1)

    def uniform(value: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(value.shape, generator=g) * (high - low) + low

    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("A_log"):
                value.copy_(uniform(value, 1, 8).log())
            elif name.endswith("dt_bias"):
                value.copy_(uniform(value, -4, 0))
            elif value.ndim == 1:
                value.copy_(uniform(value, 0.5, 1.5))
            elif "conv1d" in name:
                value.copy_(uniform(value, -0.8, 0.8))
            else:
                value.copy_(torch.randn(value.shape, generator=g) * value.shape[1] ** -0.5)
        if config.tie_word_embeddings and family == "nemotron_h":
            # transformers reads this flag for other families alone.
            model.lm_head.weight = model.model.embeddings.weight
            model._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    for module in model.modules():
        if family == "nemotron_h" and hasattr(module, "time_step_limit"):
            # transformers takes `time_step_min` for the lower one, which trained models do not.
            module.time_step_limit = tuple(config.time_step_limit)
    return model


def float_model(checkpoint: Checkpoint) -> FloatModel:
    model = FloatModel(checkpoint.description)
    model.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.names})
    return model.eval()


def in_pieces(model: FloatModel, ids: Tensor, pieces: tuple[int, ...]) -> Tensor:
    states: list[States] | None = None
    logits = []
    for piece in ids.split(pieces, dim=1):
        part, states = model(piece, states)
        logits.append(part)
    return torch.cat(logits, dim=1)


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return float((got - want).norm() / want.norm())


def ids_of(tokens: int = sum(PIECES)) -> Tensor:
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def require_parity(oracle: Any, folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    ours, ids = float_model(checkpoint), ids_of()
    want = oracle(ids, use_cache=False).logits
    for pieces in ((len(ids[0]),), PIECES):
        assert relative_error(in_pieces(ours, ids, pieces), want) < BOUND, pieces
    return checkpoint


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family in CASES for case in CASES[family]]
)
def test_logits(family: str, case: str, tmp_path: Path) -> None:
    changes = CASES[family][case]
    oracle = oracle_of(family, **changes)
    oracle.save_pretrained(tmp_path, max_shard_size="60KB" if case == "plain" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (case == "plain")
    checkpoint = require_parity(oracle, tmp_path)
    assert checkpoint.notes == []
    tied = json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert checkpoint.description.tie_embeddings is tied
    stored = {id(value): value.numel() for value in oracle.parameters()}
    assert checkpoint.parameter_bytes == 4 * sum(stored.values())
