"""Hybrids as published: their config.json's words, their names, against slow loops in FP64.

transformers is not needed. Limits of dt hold in prefill and in decoding alike, which transformers
does not do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import slow_hybrids
import torch
from slow_hybrids import attention_shapes, mamba_shapes
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import open_checkpoint
from ssdi8_edge.models.block import States
from ssdi8_edge.models.float import FloatModel

BOUND = 1e-5
D, V = 48, 64
LIMITS = (0.02, 0.6)  # cuts dt at both ends
SPLITS = [(37,), (16, 1, 19, 1), (1,) * 37]


def nemotron(folder: Path, pattern: str, tied: bool) -> dict[str, Any]:
    """As NVIDIA writes it: a pattern, an `expand` that does not fit, keys of experts; heads of 80
    in three groups."""
    config = {
        "model_type": "nemotron_h",
        "hidden_size": D,
        "vocab_size": V,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": 99,
        "expand": 2,
        "layer_norm_epsilon": 1e-3,
        "mamba_num_heads": 3,
        "mamba_head_dim": 80,
        "ssm_state_size": 64,
        "n_groups": 3,
        "conv_kernel": 4,
        "chunk_size": 16,
        "time_step_limit": [*LIMITS],
        "time_step_min": 0.1,
        "time_step_max": 0.2,
        "time_step_floor": 0.1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 20,
        "intermediate_size": 80,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 8,
        "tie_word_embeddings": tied,
        "mamba_proj_bias": True,
        "num_nextn_predict_layers": 1,
    }
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (V, D)}
    for i, letter in enumerate(pattern):
        at = f"backbone.layers.{i}"
        shapes[f"{at}.norm.weight"] = (D,)
        if letter == "M":
            shapes |= mamba_shapes(f"{at}.mixer", D, 3, 80, 3, 64, norm=True)
        elif letter == "*":
            shapes |= attention_shapes(f"{at}.mixer", D, 4, 2, 20)
        else:
            shapes[f"{at}.mixer.up_proj.weight"] = (80, D)
            shapes[f"{at}.mixer.down_proj.weight"] = (D, 80)
    shapes["backbone.norm_f.weight"] = (D,)
    shapes["mtp.layers.0.norm.weight"] = (D,)
    head = "backbone.embeddings.weight" if tied else "lm_head.weight"
    slow_hybrids.write(folder, config, shapes | {head: (V, D)})
    return {
        "pattern": pattern,
        "eps": 1e-3,
        "head": head,
        "mamba": {"heads": 3, "width": 80, "groups": 3, "state": 64, "limits": LIMITS},
        "attention": {"heads": 4, "kv": 2, "width": 20},
    }


def granite(folder: Path, words: tuple[str, str], tied: bool) -> dict[str, Any]:
    """As IBM writes it; `words` for a layer with Mamba-2 and one with attention."""
    layers = ["mamba", "attention", "mamba"]
    multipliers = {
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.9,
        "logits_scaling": 8,
    }
    config = {
        "model_type": "granitemoehybrid",
        "hidden_size": D,
        "vocab_size": V,
        "num_hidden_layers": 3,
        "layer_types": [words[word == "attention"] for word in layers],
        "mamba_n_heads": 3,
        "mamba_d_head": "auto",
        "mamba_expand": 2,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [*LIMITS],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 80,
        "intermediate_size": 999,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "position_embedding_type": "nope",
        "rope_theta": 10000,
        "rope_scaling": None,
        "normalization_function": "rmsnorm",
        "tie_word_embeddings": tied,
        **multipliers,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i, word in enumerate(layers):
        at = f"model.layers.{i}"
        if word == "mamba":
            shapes |= mamba_shapes(f"{at}.mamba", D, 3, 32, 1, 64, norm=True)
        else:
            shapes |= attention_shapes(f"{at}.self_attn", D, 3, 1, 16)
        shapes[f"{at}.shared_mlp.input_linear.weight"] = (160, D)
        shapes[f"{at}.shared_mlp.output_linear.weight"] = (D, 80)
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    slow_hybrids.write(folder, config, shapes | {head: (V, D)})
    return {
        "layers": layers,
        "eps": 1e-5,
        "head": head,
        **multipliers,
        "mamba": {"heads": 3, "width": 32, "groups": 1, "state": 64, "limits": LIMITS},
        "attention": {"heads": 3, "kv": 1, "width": 16},
    }


def falcon(folder: Path, norm: str, tied: bool) -> dict[str, Any]:
    """As TII writes it: rope_theta beside the rest, its own width of Mamba-2 and of heads."""
    multipliers: dict[str, Any] = {
        "embedding_multiplier": 5.656854249492381,
        "lm_head_multiplier": 0.0390625,
        "key_multiplier": 0.390625,
        "attention_in_multiplier": 1.7,
        "attention_out_multiplier": 0.9375,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.23570226039551587,
        "ssm_multipliers": [0.3535533905932738, 0.25, 2.5, 0.5, 0.7],
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
    }
    config = {
        "model_type": "falcon_h1",
        "hidden_size": D,
        "vocab_size": V,
        "num_hidden_layers": 2,
        "intermediate_size": 80,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
        "mamba_n_groups": 2,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 16,
        "mamba_expand": 2,
        "mamba_rms_norm": norm != "none",
        "mamba_norm_before_gate": norm == "first",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "rope_theta": 100000000000.0,
        "rope_scaling": None,
        "time_step_limit": [*LIMITS],
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **multipliers,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= mamba_shapes(f"{at}.mamba", D, 2, 32, 2, 64, norm=norm != "none")
        shapes |= attention_shapes(f"{at}.self_attn", D, 4, 2, 20)
        shapes[f"{at}.feed_forward.gate_proj.weight"] = (80, D)
        shapes[f"{at}.feed_forward.up_proj.weight"] = (80, D)
        shapes[f"{at}.feed_forward.down_proj.weight"] = (D, 80)
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.pre_ff_layernorm.weight"] = (D,)
    shapes["model.final_layernorm.weight"] = (D,)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    slow_hybrids.write(folder, config, shapes | {head: (V, D)})
    return {
        "layers": 2,
        "norm": norm,
        "eps": 1e-5,
        "head": head,
        **multipliers,
        "mamba": {"heads": 2, "width": 32, "groups": 2, "state": 64, "limits": LIMITS},
        "attention": {"heads": 4, "kv": 2, "width": 20, "theta": 1e11},
    }


CASES: dict[str, tuple[str, Any, Any]] = {
    "nemotron": ("nemotron", nemotron, "M-M*-"),
    "nemotron-attention-first": ("nemotron", nemotron, "*M"),
    "granite": ("granite", granite, ("mamba", "attention")),
    "granite-new-words": ("granite", granite, ("linear_attention", "full_attention")),
    "falcon": ("falcon", falcon, "none"),
    "falcon-norm-first": ("falcon", falcon, "first"),
    "falcon-grouped": ("falcon", falcon, "grouped"),
}


def in_pieces(model: FloatModel, ids: Tensor, pieces: tuple[int, ...]) -> Tensor:
    states: list[States] | None = None
    logits = []
    for piece in ids[None].split(pieces, dim=1):
        part, states = model(piece, states)
        logits.append(part[0])
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tied: bool, tmp_path: Path) -> None:
    family, make, choice = CASES[case]
    meant = make(tmp_path, choice, tied)
    ids = torch.randint(V, (37,), generator=torch.Generator().manual_seed(3))
    want = slow_hybrids.logits(tmp_path, family, ids, meant)
    checkpoint = open_checkpoint(tmp_path)
    left_out = ["the heads that predict further tokens are left out"] * (family == "nemotron")
    assert [note.rpartition(": ")[2].rstrip(".") for note in checkpoint.notes] == left_out
    model = FloatModel(checkpoint.description).eval()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names})
    for pieces in SPLITS:
        error = (in_pieces(model, ids, pieces) - want).norm() / want.norm()
        assert error < BOUND, (pieces, float(error))
