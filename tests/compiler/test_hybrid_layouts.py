"""Checkpoints of hybrids: names, spellings, what is joined and scaled, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import byte_tokenizer, write_text
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ssdi8_edge.checkpoints.layout import expected_shapes
from ssdi8_edge.checkpoints.layouts import layouts
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate.subject import open_subject
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hidden_size": 64,
    "vocab_size": 256,
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    "mamba_num_heads": 3,
    "mamba_head_dim": 80,
    "n_groups": 3,
    "ssm_state_size": 64,
    "chunk_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_limit": [0.0, 0.5],
    "layer_norm_epsilon": 1e-6,
}
GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "hidden_size": 64,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 64,
    "mamba_chunk_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "shared_intermediate_size": 128,
    "position_embedding_type": "nope",
    "attention_multiplier": 0.03,
    "residual_multiplier": 0.25,
    "embedding_multiplier": 12,
    "logits_scaling": 3,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
FALCON: dict[str, Any] = {
    "model_type": "falcon_h1",
    "hidden_size": 64,
    "vocab_size": 256,
    "num_hidden_layers": 1,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 3,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_chunk_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.3,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.35, 0.25, 0.36, 0.5, 2.0],
    "attention_in_multiplier": 3,
    "attention_out_multiplier": 0.9,
    "ssm_out_multiplier": 0.24,
    "mlp_multipliers": [0.88, 0.59],
    "attention_bias": True,
    "projectors_bias": True,
}
FAMILIES = {"nemotron_h": NEMOTRON, "granitemoehybrid": GRANITE, "falcon_h1": FALCON}
NAN = float("nan")


def stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of this config.json has to hold."""
    layout = next(each for each in layouts() if each.recognises(config))
    model = layout.describe(config)
    sources = layout.sources(config, model)
    return {
        piece.stored: shape
        for name, ours in expected_shapes(model).items()
        for piece, shape in zip(sources[name].pieces, sources[name].shapes(ours), strict=True)
        if piece.stored and not (name == "lm_head.weight" and model.tie_embeddings)
    }


def write(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=g) / 8 + (1 if name.endswith("norm.weight") else 0))
        for name, shape in stored_shapes(config).items()
    }
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    """Changes the weights; returns what they were."""
    tensors = load_file(folder / "model.safetensors")
    before = dict(tensors)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return before


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    edit(folder, lambda t: t.update({new_name(n): t.pop(n) for n in list(t)}))


def contents(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def require_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# ---------------------------------------------------------------------------------------------
# Joining and scaling
# ---------------------------------------------------------------------------------------------


def test_nemotron_keeps_its_type(tmp_path: Path) -> None:
    """Nothing is scaled: queries, keys and values are joined as they are stored."""
    checkpoint = open_checkpoint(write(tmp_path, NEMOTRON, torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in contents(checkpoint).values()} == {torch.bfloat16}
    at = "backbone.layers.2.mixer."
    joined = torch.cat([stored[f"{at}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(checkpoint.tensor("layers.2.in_proj.weight"), joined)
    assert torch.equal(checkpoint.tensor("layers.2.out_proj.weight"), stored[f"{at}o_proj.weight"])
    assert checkpoint.parameter_bytes == 2 * sum(tensor.numel() for tensor in stored.values())


def test_granite_is_scaled_in_fp32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, GRANITE, torch.bfloat16))
    stored = {n: t.float() for n, t in load_file(tmp_path / "model.safetensors").items()}
    tensor = checkpoint.tensor
    q, k, v = (stored[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(tensor("layers.2.in_proj.weight"), torch.cat([q * (0.03 * 4), k, v]))
    o = stored["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(tensor("layers.2.out_proj.weight"), o * 0.25)
    last = stored["model.layers.0.shared_mlp.output_linear.weight"]
    assert torch.equal(tensor("layers.1.out_proj.weight"), last * 0.25)
    # One table, which the head reads with the factor of the embedding.
    assert torch.equal(tensor("norm_f.weight"), stored["model.norm.weight"] * (1 / 3 / 12))
    embedding = stored["model.embed_tokens.weight"]
    assert torch.equal(tensor("embedding.weight"), embedding * 12)
    assert torch.equal(tensor("lm_head.weight"), embedding * 12)
    assert checkpoint.description.tie_embeddings and checkpoint.notes == []
    assert checkpoint.parameter_bytes == 2 * sum(t.numel() for t in stored.values())


def test_falcon_joins_both_mixers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, FALCON))
    stored, at = load_file(tmp_path / "model.safetensors"), "model.layers.0."
    found = checkpoint.layer(0)
    rows = [r * 1.25 for r, n in zip(FALCON["ssm_multipliers"], (96, 96, 64, 64, 3), strict=True)]
    factors = torch.tensor(rows).repeat_interleave(torch.tensor([96, 96, 64, 64, 3]))
    q, k, v = (stored[f"{at}self_attn.{part}_proj.weight"] for part in "qkv")
    mamba = stored[f"{at}mamba.in_proj.weight"] * factors[:, None]
    assert torch.equal(found["in_proj.weight"], torch.cat([mamba, q * 3, k * (3 * 0.4), v * 3]))
    q, k, v = (stored[f"{at}self_attn.{part}_proj.bias"] for part in "qkv")
    assert torch.equal(found["in_proj.bias"], torch.cat([torch.zeros(323), q, k * 0.4, v]))
    out, o = (stored[f"{at}{name}_proj.weight"] for name in ("mamba.out", "self_attn.o"))
    assert torch.equal(found["out_proj.weight"], torch.cat([out * 0.24, o * 0.9], 1))
    out, o = (stored[f"{at}{name}_proj.bias"] for name in ("mamba.out", "self_attn.o"))
    assert torch.equal(found["out_proj.bias"], out * 0.24 + o * 0.9)
    gate, up = (stored[f"{at}feed_forward.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(checkpoint.tensor("layers.1.in_proj.weight"), torch.cat([gate * 0.88, up]))


def test_a_convolution_without_bias_has_zeros(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {**NEMOTRON, "use_conv_bias": False}))
    assert not checkpoint.tensor("layers.0.conv1d.bias").any()


# ---------------------------------------------------------------------------------------------
# The same model, written otherwise
# ---------------------------------------------------------------------------------------------

OTHER_SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "nemotron_h": [
        {"layers_block_type": None, "hybrid_override_pattern": "M-*"},
        {"layers_block_type": ["mamba", "mlp", "attention"], "hybrid_override_pattern": "MEMEM"},
        {"layers_block_type": None, "layer_types": ["mamba", "mlp", "full_attention"]},
        {"n_groups": None, "mamba_n_groups": 3, "conv_kernel": None, "mamba_d_conv": 4},
        {"chunk_size": None, "mamba_chunk_size": 64, "mamba_conv_bias": True},
        {"time_step_limit": None, "mamba_dt_limit": [0.0, 0.5]},
        {"head_dim": None, "attention_head_dim": 32, "num_hidden_layers": 17, "expand": 2},
        {"layer_norm_epsilon": None, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 2},
        {"layer_norm_epsilon": None, "norm_eps": 1e-6, "n_routed_experts": 8, "rope_theta": 1e4},
        {"time_step_min": 0.001, "mlp_hidden_act": "relu2", "mamba_hidden_act": "swish"},
    ],
    "granitemoehybrid": [
        {"layer_types": None, "layers_block_type": ["mamba", "attention"]},
        {"layer_types": ["mamba", "attention"], "position_embedding_type": None},
        {"mamba_d_head": 32, "rope_theta": 1e4, "intermediate_size": 999, "head_dim": 16},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    "falcon_h1": [
        {"rope_parameters": None, "rope_theta": 1e11, "rope_scaling": None},
        {"mamba_d_head": "auto", "mamba_expand": 7, "mamba_norm_before_gate": False},
        {"time_step_limit": [{"__float__": "0"}, {"__float__": "Infinity"}]},
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_spellings_of_config(family: str) -> None:
    config = FAMILIES[family]
    layout = next(each for each in layouts() if each.recognises(config))
    plain = layout.describe(config)
    for changes in OTHER_SPELLINGS[family]:
        other = {k: v for k, v in (config | changes).items() if v is not None}
        assert layout.describe(other) == plain, changes


@pytest.mark.parametrize("family", FAMILIES)
def test_null_gives_each_query_its_key(family: str) -> None:
    """Left out, it is the class default, which for two of the three is another number."""
    config = FAMILIES[family] | {"num_key_value_heads": None}
    layout = next(each for each in layouts() if each.recognises(config))
    assert layout.describe(config) == layout.describe(config | {"num_key_value_heads": 4})


@pytest.mark.parametrize(
    "new_name",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"model.{n}",
        lambda n: f"_forward_module.model._orig_mod.{n}",
        lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda n: n.replace("backbone.", "model."),
        lambda n: n.removeprefix("backbone.").removeprefix("model."),
    ],
    ids=["compiled", "lightning", "fabric", "remat", "model", "bare"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_wrapped_models(
    family: str, new_name: Callable[[str], str], tmp_path: Path
) -> None:
    plain = contents(open_checkpoint(write(tmp_path, FAMILIES[family])))
    rename(tmp_path, new_name)
    checkpoint = open_checkpoint(tmp_path)
    require_same(contents(checkpoint), plain)
    assert checkpoint.notes == []


def test_base_model_without_a_head(tmp_path: Path) -> None:
    """Untied by config.json, which for a base model means nothing."""
    write(tmp_path, FALCON)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        open_checkpoint(tmp_path)
    rename(tmp_path, lambda n: n.removeprefix("model."))
    checkpoint = open_checkpoint(tmp_path)
    assert "the embedding is used as its head" in checkpoint.notes[0]
    assert checkpoint.description.tie_embeddings
    embedding, head = (checkpoint.tensor(f"{name}.weight") for name in ("embedding", "lm_head"))
    assert torch.equal(embedding, head)


def test_stored_head_of_a_tied_model(tmp_path: Path) -> None:
    """The same: one table with a factor. Another: it is used, and that is said."""
    write(tmp_path, GRANITE)
    plain = contents(open_checkpoint(tmp_path))
    edit(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    checkpoint = open_checkpoint(tmp_path)
    require_same(contents(checkpoint), plain)
    assert checkpoint.notes == []
    edit(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(256, 64)}))
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), torch.ones(256, 64))
    assert "the stored one is used" in checkpoint.notes[0]


def test_a_tied_model_without_multipliers_stays_tied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {**NEMOTRON, "tie_word_embeddings": True}))
    assert checkpoint.description.tie_embeddings


def test_further_prediction_heads_are_left_out(tmp_path: Path) -> None:
    plain = contents(open_checkpoint(write(tmp_path, NEMOTRON)))
    names = ("mtp.layers.0.mixer.q_proj.weight", "mtp.norm_f.weight")
    edit(tmp_path, lambda t: t.update({name: torch.ones(3) for name in names}))
    checkpoint = open_checkpoint(tmp_path)
    require_same(contents(checkpoint), plain)
    assert len(checkpoint.notes) == 1
    assert "the heads that predict further tokens are left out" in checkpoint.notes[0]


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------

K_PROJ = "backbone.layers.2.mixer.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_PROJ), rf"lacks the tensor {K_PROJ}"),
        (
            lambda t: t.update({K_PROJ: torch.ones(32, 64)}),
            rf"{K_PROJ} has shape \(32, 64\) where config\.json implies \(64, 64\)",
        ),
        (lambda t: t.update({K_PROJ: t[K_PROJ].char()}), rf"{K_PROJ} has type I8"),
        (
            lambda t: t.update({"backbone.extra": torch.ones(1)}),
            r"unexpected tensor backbone\.extra",
        ),
        (lambda t: t[K_PROJ][3, 4].fill_(NAN), rf"{K_PROJ} of .* holds 1 value of NaN.*\[3, 4\]"),
    ],
    ids=["missing", "shape", "type", "extra", "nan"],
)
def test_messages_name_the_stored_tensor(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path, NEMOTRON)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).require_finite()


def test_a_product_beyond_fp32_is_refused(tmp_path: Path) -> None:
    write(tmp_path, GRANITE)
    edit(tmp_path, lambda t: t["model.embed_tokens.weight"][0, 0].fill_(2e38))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight times its multiplier of"):
        open_checkpoint(tmp_path).require_finite()


EXPERTS = "a mixture of experts.*only dense hybrids are supported"
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("nemotron_h", {"layers_block_type": ["mamba", "moe"]}, EXPERTS),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "ME*"}, EXPERTS),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M|*"}, r"with '\|'"),
    ("nemotron_h", {"layers_block_type": None}, "lacks layers_block_type and hybrid_override"),
    ("nemotron_h", {"layers_block_type": []}, r"layers_block_type = \[\]; expected block types"),
    ("nemotron_h", {"layers_block_type": ["mlp", "attention"]}, "without a Mamba-2 block"),
    ("nemotron_h", {"sliding_window": 4096}, "sets sliding_window = 4096; only attention over"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, 'sets mlp_hidden_act = "silu"; only "relu2" is'),
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, 'sets mamba_hidden_act = "gelu"; only "silu"'),
    ("nemotron_h", {"attention_bias": True}, "sets attention_bias = true; only false is"),
    ("nemotron_h", {"n_groups": 2}, "3 heads cannot be shared by ngroups = 2"),
    ("nemotron_h", {"num_key_value_heads": 3}, "cannot share n_kv_heads = 3"),
    ("granitemoehybrid", {"num_local_experts": 32}, EXPERTS),
    ("granitemoehybrid", {"num_local_experts": None}, "num_local_experts is left out, and so 8"),
    ("granitemoehybrid", {"layer_types": ["attention"] * 2}, "no Mamba-2 block; its H variant"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "num_hidden_layers = 2, but layer_types has"),
    ("granitemoehybrid", {"layer_types": ["mamba", "mlp"]}, "sets layer_types with 'mlp'"),
    ("granitemoehybrid", {"position_embedding_type": "rope"}, "asks for rope positions; only"),
    ("granitemoehybrid", {"hidden_act": "gelu"}, 'sets hidden_act = "gelu"; only "silu" is'),
    ("granitemoehybrid", {"mamba_d_head": 64}, r"mamba_n_heads \* mamba_d_head = 256, but"),
    ("granitemoehybrid", {"logits_scaling": 0}, "sets logits_scaling = 0"),
    ("granitemoehybrid", {"residual_multiplier": "much"}, "sets residual_multiplier = 'much'"),
    ("granitemoehybrid", {"num_attention_heads": 6}, "which num_attention_heads = 6 do not divide"),
    ("falcon_h1", {"rope_scaling": {"rope_type": "yarn"}}, "asks for yarn positions; only plain"),
    ("falcon_h1", {"rope_scaling": {"type": "linear"}}, "asks for linear positions; only plain"),
    ("falcon_h1", {"rope_parameters": {"rope_type": "llama3"}}, "asks for llama3 positions"),
    ("falcon_h1", {"partial_rotary_factor": 0.5}, r"asks for partial_rotary_factor = 0\.5 pos"),
    ("falcon_h1", {"ssm_multipliers": [1, 2]}, r"ssm_multipliers = \[1, 2\]; expected 5 numbers"),
    ("falcon_h1", {"mlp_multipliers": [1, "x"]}, "sets mlp_multipliers = 'x'"),
    ("falcon_h1", {"hidden_act": "gelu"}, 'sets hidden_act = "gelu"'),
    ("falcon_h1", {"quantization_config": {"quant_method": "awq"}}, "is already quantized .awq"),
    ("falcon_h1", {"model_type": "zamba2"}, "Zamba2 shares one attention block between layers"),
    ("falcon_h1", {"model_type": "jamba"}, "made of Mamba-1 blocks; only Mamba-2 is supported"),
    ("falcon_h1", {"model_type": "mamba"}, "made of Mamba-1 blocks; only Mamba-2 is supported"),
    ("falcon_h1", {"model_type": "falcon_mamba"}, "made of Mamba-1 blocks; only Mamba-2"),
    ("falcon_h1", {"model_type": "bamba"}, r"Bamba is not supported; Granite 4\.0 H continues it"),
    ("falcon_h1", {"head_dim": 31}, "rotary positions turn pairs"),
    ("nemotron_h", {"layers_block_type": ["mamba", ["mlp"]]}, r"layers_block_type with \['mlp'\]"),
    (
        "granitemoehybrid",
        {"model_type": ["mamba2"]},
        r'sets model_type = \["mamba2"\]; only mamba2',
    ),
    ("falcon_h1", {"model_type": "llama"}, 'sets model_type = "llama"; only mamba2, nemotron_h'),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSALS)
def test_refusals(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {k: v for k, v in (FAMILIES[family] | changes).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    said = str(caught.value)
    assert said.endswith(".") and not re.search(r"[.!?] [A-Z]", said) and "\n" not in said
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_and_quantize(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", FAMILIES[family])
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    ids = torch.arange(80)[None] % 256
    wanted = open_subject(str(folder)).logits(ids)
    text, target = write_text(tmp_path / "text.txt", size=300), load_target("host-cpu")
    asked = BuildRequest(str(folder), METHODS["edge-w8a8"], target, tmp_path / "out", text)
    Build(replace(asked, until="quantize")).run()
    found = open_subject(str(tmp_path / "out" / "quantized")).logits(ids)
    assert math.isfinite(found.norm()) and (found - wanted).norm() < 0.2 * wanted.norm()
