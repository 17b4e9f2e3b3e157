"""Every layout that is read, and what is said of files that do not fit."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import mamba
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from ssdi8_edge.checkpoints import checkpoint as checkpoint_module
from ssdi8_edge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ssdi8_edge.checkpoints.files import SafetensorsFile
from ssdi8_edge.checkpoints.hub import TOKENIZER_FILES, fetch_tokenizer
from ssdi8_edge.checkpoints.layout import expected_shapes
from ssdi8_edge.checkpoints.layouts import state_spaces
from ssdi8_edge.ground.chat_templates import CHAT_FILES
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2 import Mamba2

MakeCheckpoint = Callable[..., Path]
MakeConfig = Callable[..., Description]


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; `ssm_cfg` is merged, `None` removes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if key == "ssm_cfg":
            config[key].update(value)
        elif value is None:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def save_as_bin(folder: Path, **options: Any) -> None:
    """Replaces the safetensors file with pytorch_model.bin, tied head stored as upstream does."""
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def assert_tensors(checkpoint: Checkpoint, want: dict[str, Tensor]) -> None:
    """Those of `want`, by their stored names, and the head where it is tied."""
    for name in checkpoint.names:
        stored = checkpoint.stored_name(name)
        if stored not in want:
            assert checkpoint.description.tie_embeddings and name == "lm_head.weight"
            continue
        assert torch.equal(checkpoint.tensor(name), want[stored]), name


def model_of(checkpoint: Checkpoint) -> FloatModel:
    model = FloatModel(checkpoint.description)
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names})
    return model.eval()


# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy-bin"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_state_spaces(
    form: str,
    tied: bool,
    tiny_config: MakeConfig,
    tiny_model: Callable[..., FloatModel],
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    config = tiny_config(2, tie_embeddings=tied)
    folder = tiny_checkpoint(config)
    if form != "safetensors":
        save_as_bin(folder, _use_new_zipfile_serialization=form == "bin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.description == config
    want = tiny_model(config).state_dict()
    assert checkpoint.names == list(expected_shapes(checkpoint.description))
    assert sorted(checkpoint.names) == sorted(want)
    for name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(name), want[name]), name
    stored = {id(p): p for p in tiny_model(config).parameters()}
    assert checkpoint.parameter_bytes == 4 * sum(p.numel() for p in stored.values())
    assert checkpoint.tokenizer_path is None


def test_layer_loads_into_a_block(tiny_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    block = FloatModel(checkpoint.description).layers[1]
    block.load_state_dict(checkpoint.layer(1))
    with pytest.raises(CheckpointError, match="no layer 2"):
        checkpoint.layer(2)
    with pytest.raises(CheckpointError, match=r"no tensor norm"):
        checkpoint.tensor("norm")


def test_defaults_of_the_published_130m_config() -> None:
    """Sizes that its config.json leaves out come from the class; the vocabulary is padded."""
    published = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    block = Mamba2(
        d_inner=1536,
        d_state=128,
        d_conv=4,
        headdim=64,
        ngroups=1,
        chunk_size=256,
        dt_limit=(0.0, math.inf),
        norm_eps=1e-5,
    )
    model = state_spaces.describe(published)
    assert model == Description(768, 50288, (block,) * 24, norm_eps=1e-5, tie_embeddings=True)
    assert expected_shapes(model)["layers.23.in_proj.weight"] == (3352, 768)


def test_nvidia_family(tiny_config: MakeConfig, tiny_checkpoint: MakeCheckpoint) -> None:
    """Converted 8B: eight groups, chunk 128, untied head, half precision, padding to 128."""
    config = tiny_config(8, chunk_size=128, tie_embeddings=False)
    folder = tiny_checkpoint(config)
    edit_config(folder, pad_vocab_size_multiple=128, vocab_size=250)
    edit_tensors(folder, lambda t: t.update({name: v.half() for name, v in t.items()}))
    save_as_bin(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.description == config
    assert checkpoint.tensor("lm_head.weight").dtype == torch.float16
    assert checkpoint.parameter_bytes == 2 * sum(p.numel() for p in FloatModel(config).parameters())


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hugging_face(shard_size: str, tied: bool, tmp_path: Path) -> None:
    """Written by transformers itself, infinity in its own spelling included."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the layout")
    torch.manual_seed(0)
    oracle = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=64,
            num_hidden_layers=2,
            vocab_size=256,
            state_size=16,
            head_dim=16,
            num_heads=8,
            n_groups=2,
            chunk_size=16,
            tie_word_embeddings=tied,
        )
    ).eval()
    oracle.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.description.tie_embeddings is tied
    assert mamba(checkpoint.description).dt_limit == (0.0, math.inf)
    ids = torch.randint(256, (1, 40))
    with torch.no_grad():
        want = oracle(ids, use_cache=False).logits
        got, _ = model_of(checkpoint)(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_hugging_face_width_is_that_of_the_heads(hugging_face_folder: Path) -> None:
    """What some config.json say of Codestral Mamba and its kin is not so, or is no whole number."""
    plain = open_checkpoint(hugging_face_folder).description
    edit_config(hugging_face_folder, expand=1.5, norm_before_gate=True)
    assert open_checkpoint(hugging_face_folder).description == plain


def test_hugging_face_time_step_limit(hugging_face_folder: Path) -> None:
    edit_config(hugging_face_folder, time_step_limit=[0.001, 0.1])
    assert mamba(open_checkpoint(hugging_face_folder).description).dt_limit == (0.001, 0.1)


@pytest.fixture
def hugging_face_folder(tiny_checkpoint: MakeCheckpoint) -> Path:
    """The same layout written without transformers: renamed embedding, its config keys."""
    folder = tiny_checkpoint()

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")

    edit_tensors(folder, rename)
    config = {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        "state_size": 16,
        "head_dim": 16,
        "num_heads": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_beside_the_weights(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    assert open_checkpoint(folder).tokenizer_path == folder / "tokenizer.json"


def test_fingerprint_follows_the_bytes(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    first = open_checkpoint(folder).fingerprint()
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    (copied / "tokenizer.json").write_text("{}")
    assert open_checkpoint(copied).fingerprint() == first
    edit_config(copied, fused_add_norm=False)
    second = open_checkpoint(copied).fingerprint()
    edit_tensors(copied, lambda t: t["backbone.norm_f.weight"].mul_(2.0))
    assert len({first, second, open_checkpoint(copied).fingerprint()}) == 3


def test_demo_is_the_shipped_folder(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(checkpoint_module.__file__).parents[1]
    assert package / "demo" == checkpoint_module.DEMO_FOLDER
    folder = tiny_checkpoint()
    monkeypatch.setattr(checkpoint_module, "DEMO_FOLDER", folder)
    assert open_checkpoint("demo").folder == folder


def test_shipped_demo_opens_and_predicts() -> None:
    """The model that the wheel carries: under 12 MB, half precision, knows some English."""
    checkpoint = open_checkpoint("demo")
    assert checkpoint.parameter_bytes < 12e6
    assert checkpoint.tokenizer_path is not None
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.get_vocab_size() == checkpoint.description.vocab_size
    text = (checkpoint.folder / "evaluation.txt").read_text(encoding="utf-8")[:4000]
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        logits, _ = model_of(checkpoint)(ids[:, :-1])
    assert torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]) < 5.0


# ---------------------------------------------------------------------------------------------
# Refusals: sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 128}, "sets d_intermediate = 128; only 0"),
        ({"attn_layer_idx": [1]}, r"sets attn_layer_idx = \[1\]"),
        ({"rms_norm": False}, "sets rms_norm = false"),
        ({"n_layer": 1e30}, "sets n_layer = 1000000000000000[0-9]*; no model has more than 4096"),
        ({"d_model": 1 << 25}, "sets d_model = 33554432; no model has more than"),
        ({"ssm_cfg": {"conv_bias": False}}, r"unexpected tensor .*conv1d\.bias"),
        ({"ssm_cfg": {"bias": True}}, r"lacks the tensor .*in_proj\.bias"),
        ({"ssm_cfg": {"rmsnorm": False}}, r"sets ssm_cfg\.rmsnorm = false"),
        ({"ssm_cfg": {"norm_before_gate": True}}, r"sets ssm_cfg\.norm_before_gate = true"),
        ({"ssm_cfg": {"D_has_hdim": True}}, r"sets ssm_cfg\.D_has_hdim = true"),
        ({"ssm_cfg": {"d_ssm": 64}}, r"sets ssm_cfg\.d_ssm = 64"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, r'sets ssm_cfg\.layer = "Mamba1"'),
        ({"ssm_cfg": {"novelty": 1}}, r"sets ssm_cfg\.novelty, which is not supported"),
        ({"ssm_cfg": {"d_state": 0}}, "sets d_state = 0"),
        ({"ssm_cfg": {"headdim": 48}}, "does not fit together"),
        ({"ssm_cfg": {"dt_limit": 3}}, r"sets ssm_cfg\.dt_limit = 3"),
        ({"n_layer": None}, "lacks n_layer"),
        ({"n_layer": "two"}, "sets n_layer = 'two'"),
        ({"d_model": None}, "neither d_model"),
    ],
)
def test_state_spaces_config_refusals(
    changes: dict[str, Any], message: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_mamba_1_is_named(tiny_checkpoint: MakeCheckpoint) -> None:
    """A Mamba-1 config.json has an empty ssm_cfg."""
    folder = tiny_checkpoint()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "ssm_cfg": {}}))
    with pytest.raises(CheckpointError, match="a Mamba-1 model"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, r"lacks the tensor .*in_proj\.bias"),
        ({"use_conv_bias": False}, r"unexpected tensor .*conv1d\.bias"),
        ({"hidden_act": "gelu"}, 'sets hidden_act = "gelu"'),
        ({"model_type": "llama"}, 'sets model_type = "llama"; only mamba2, nemotron_h, gran'),
        ({"num_heads": 4}, r"in_proj\.weight has shape \(296, 64\) where config\.json implies"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"time_step_limit": [{"__float__": "much"}, 1]}, "sets time_step_limit"),
    ],
)
def test_hugging_face_config_refusals(
    changes: dict[str, Any], message: str, hugging_face_folder: Path
) -> None:
    edit_config(hugging_face_folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hugging_face_folder)


# ---------------------------------------------------------------------------------------------
# Refusals: files and tensors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), r"lacks the tensor backbone\.norm_f\.weight"),
        (
            lambda t: t.pop("backbone.layers.1.mixer.conv1d.bias"),
            r"lacks the tensor backbone\.layers\.1\.mixer\.conv1d\.bias",
        ),
        (
            lambda t: t.update({"backbone.layers.0.mixer.D": torch.ones(8, 16)}),
            r"backbone\.layers\.0\.mixer\.D has shape \(8, 16\) where config\.json implies \(8,\)",
        ),
        (
            lambda t: t.update({"backbone.layers.0.mixer.D": torch.ones(8, dtype=torch.int8)}),
            r"mixer\.D has type I8; give a floating-point checkpoint",
        ),
        (
            lambda t: t.update({"zz": torch.ones(1), "aa": torch.ones(1)}),
            "holds an unexpected tensor aa",
        ),
    ],
    ids=["missing", "missing-bias", "shape", "type", "extra"],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tensor_refusals(
    edit: Callable[[dict[str, Tensor]], None],
    message: str,
    form: str,
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    folder = tiny_checkpoint()
    edit_tensors(folder, edit)
    if form == "bin":
        save_as_bin(folder)
        message = message.replace("I8", r"torch\.int8")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_untied_model_needs_its_head(
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_weights(damage: str, name: str, tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    if name.endswith(".bin"):
        save_as_bin(folder)
    path = folder / name
    content = {"truncated": path.read_bytes()[:-5000], "text": b"not weights at all", "empty": b""}
    path.write_bytes(content[damage])
    with pytest.raises(CheckpointError, match=r"is not a complete|is damaged") as caught:
        open_checkpoint(folder)
    assert caught.value.hint.startswith("fetch it again")


class Payload:
    """Unpickling this would run code."""


def test_pickled_objects_are_refused(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"backbone.embedding.weight": Payload()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors; it was not loaded"):
        open_checkpoint(folder)
    torch.save({"backbone.embedding.weight": 3}, path)
    with pytest.raises(CheckpointError, match=r"'backbone\.embedding\.weight', which is not a"):
        open_checkpoint(folder)
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match="holds a list, not named tensors"):
        open_checkpoint(folder)


def shard(folder: Path) -> Path:
    """Splits the weights over two files with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:]), start=1):
        name = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    want = load_file(folder / "model.safetensors")
    index = shard(folder)
    checkpoint = open_checkpoint(folder)
    assert_tensors(checkpoint, want)

    (folder / "model-00002-of-00002.safetensors").rename(folder / "aside")
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is"):
        open_checkpoint(folder)
    for content, message in [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../aside"}}', "names aside outside the checkpoint"),
    ]:
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


def test_missing_files(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint("nowhere")
    folder = tiny_checkpoint()
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(str(folder / "config.json"))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model"):
        open_checkpoint(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)


# ---------------------------------------------------------------------------------------------
# The same model, written otherwise
# ---------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    edit_tensors(folder, lambda t: t.update({new_name(n): t.pop(n) for n in list(t)}))


def without_backbone(name: str) -> str:
    return name.removeprefix("backbone.")


@pytest.mark.parametrize(
    "new_name",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: n.replace("layers.1.", "layers.1._orig_mod."),
        lambda n: n.replace("mixer.", "mixer._orig_mod."),
        lambda n: f"module.{n}",
        lambda n: f"_forward_module.model._orig_mod.{n}",
        lambda n: f"model.{n}",
        lambda n: n.replace("mixer.", "_checkpoint_wrapped_module.mixer."),
        without_backbone,
        lambda n: f"_orig_mod.{without_backbone(n)}".replace("embedding.", "embeddings."),
    ],
    ids=["compiled", "layer", "inside", "ddp", "fabric", "lightning", "remat", "base", "base-hf"],
)
def test_names_of_wrapped_and_bare_models(
    new_name: Callable[[str], str], tiny_checkpoint: MakeCheckpoint
) -> None:
    folder = tiny_checkpoint()
    want = load_file(folder / "model.safetensors")
    rename(folder, new_name)
    checkpoint = open_checkpoint(folder)
    assert_tensors(checkpoint, want)
    assert checkpoint.notes == []


def test_base_model_whose_config_does_not_tie(tiny_checkpoint: MakeCheckpoint) -> None:
    """It never had a head; what serves as one is said."""
    folder = tiny_checkpoint()
    edit_config(folder, tie_embeddings=False)
    rename(folder, without_backbone)
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("embedding.weight"))
    assert len(checkpoint.notes) == 1 and "the embedding is used as its head" in checkpoint.notes[0]


def test_tied_model_that_stores_only_its_head(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    want = load_file(folder / "model.safetensors")["backbone.embedding.weight"]
    rename(folder, lambda n: "lm_head.weight" if n == "backbone.embedding.weight" else n)
    checkpoint = open_checkpoint(folder)
    for name in ("embedding.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.tensor(name), want)
    assert checkpoint.description.tie_embeddings and checkpoint.notes == []


@pytest.mark.parametrize(
    "head",
    [lambda e: e.clone(), lambda e: e.bfloat16(), lambda e: e.double(), lambda e: e[:250].clone()],
    ids=["equal", "rounded", "wider", "without-padding"],
)
def test_stored_head_that_is_the_embedding(
    head: Callable[[Tensor], Tensor], tiny_checkpoint: MakeCheckpoint
) -> None:
    folder = tiny_checkpoint()
    embedding = load_file(folder / "model.safetensors")["backbone.embedding.weight"]
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": head(embedding)}))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), embedding)
    assert checkpoint.description.tie_embeddings and checkpoint.notes == []


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_stored_head_that_is_another_is_used(form: str, tiny_checkpoint: MakeCheckpoint) -> None:
    """config.json ties, the weights do not: the weights are what was trained."""
    folder = tiny_checkpoint()
    head = torch.rand(256, 64)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": head}))
    if form == "bin":
        save_as_bin(folder)
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), head)
    assert not checkpoint.description.tie_embeddings
    assert len(checkpoint.notes) == 1 and "the stored one is used" in checkpoint.notes[0]
    assert torch.equal(model_of(checkpoint).lm_head.weight, head)


def test_stored_head_of_another_shape_is_named(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.rand(250, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(250, 64\)"):
        open_checkpoint(folder)


def test_fp64(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    want = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda t: t.update({n: v.double() for n, v in t.items()}))
    checkpoint = open_checkpoint(folder)
    assert_tensors(checkpoint, want)
    assert checkpoint.parameter_bytes == 8 * sum(v.numel() for v in want.values())


@pytest.mark.parametrize("wrap", [["state_dict"], ["model"], ["module"], ["model", "state_dict"]])
def test_weights_inside_a_training_state(wrap: list[str], tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    want = load_file(folder / "model.safetensors")
    held: dict[str, Any] = dict(want)
    for key in wrap:
        held = {key: held, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(held, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert_tensors(checkpoint, want)


@pytest.mark.parametrize("name", ["swish", "silu", "SiLU", "Swish"])
def test_activation_has_two_names(
    name: str, hugging_face_folder: Path, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    edit_config(hugging_face_folder, hidden_act=name)
    open_checkpoint(hugging_face_folder)
    other = tiny_checkpoint(seed=1)
    edit_config(other, ssm_cfg={"activation": name})
    open_checkpoint(other)


def test_config_values_as_strings_and_floats(hugging_face_folder: Path) -> None:
    """Command lines and some exporters write every value as a string."""
    plain = open_checkpoint(hugging_face_folder).description
    changes: dict[str, Any] = {
        "hidden_size": "64",
        "num_hidden_layers": 2.0,
        "use_bias": "False",
        "tie_word_embeddings": "true",
        "layer_norm_epsilon": "1e-5",
        "time_step_limit": ["0.0", "inf"],
    }
    edit_config(hugging_face_folder, **changes)
    assert open_checkpoint(hugging_face_folder).description == plain
    edit_config(hugging_face_folder, tie_word_embeddings="false")
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        open_checkpoint(hugging_face_folder)


@pytest.mark.parametrize(
    "limit",
    [
        *("null", "[0, 1e999]", "[0, Infinity]", '["0", "inf"]', "[0.0, null]", "[null, null]"),
        *("[-Infinity, Infinity]", '[0.0, {"__float__": "Infinity"}]'),
    ],
)
def test_spellings_of_an_unlimited_step(limit: str, hugging_face_folder: Path) -> None:
    path = hugging_face_folder / "config.json"
    path.write_text(path.read_text()[:-1] + f', "time_step_limit": {limit}}}')
    assert mamba(open_checkpoint(hugging_face_folder).description).dt_limit == (0.0, INF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "perhaps"}, "sets tie_word_embeddings = 'perhaps'; expected true"),
        ({"layer_norm_epsilon": [1]}, r"sets layer_norm_epsilon = \[1\]; expected a positive"),
        ({"layer_norm_epsilon": "inf"}, "sets layer_norm_epsilon = inf; expected a positive"),
        ({"hidden_size": "64.5"}, "sets hidden_size = 64.5; expected a positive integer"),
        ({"time_step_limit": [0]}, "sets time_step_limit"),
        ({"time_step_limit": ["nan", 1]}, r"sets time_step_limit = \[nan, 1\]; expected a lower"),
        ({"time_step_limit": [0, NAN]}, r"sets time_step_limit = \[0, nan\]; expected a lower"),
        ({"time_step_limit": [1, 0.1]}, "expected a lower and an upper bound"),
        ({"time_step_limit": [-5, -1]}, "expected a lower and an upper bound"),
        ({"time_step_limit": [INF, INF]}, "expected a lower and an upper bound"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq"),
        ({"quantization_config": {"load_in_8bit": True}}, r"already quantized \(quantization_con"),
        ({"recipe": {}, "model": {}}, "was written by `ssdi8-edge build`; give the floating-point"),
    ],
)
def test_more_config_refusals(
    changes: dict[str, Any], message: str, hugging_face_folder: Path
) -> None:
    edit_config(hugging_face_folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hugging_face_folder)
    assert re.search(message, str(caught.value))


def test_config_with_a_byte_order_mark(hugging_face_folder: Path) -> None:
    """As some editors save it."""
    path = hugging_face_folder / "config.json"
    plain = open_checkpoint(hugging_face_folder).description
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_checkpoint(hugging_face_folder).description == plain


def test_config_that_is_nested_too_deep(hugging_face_folder: Path) -> None:
    """Python's reader raises no ValueError for it."""
    (hugging_face_folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(hugging_face_folder)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_torch_file_with_tensors_of_another_kind(
    kind: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["backbone.norm_f.weight"]
    odd = norm.to_sparse() if kind == "sparse" else norm.to("meta")
    torch.save(tensors | {"backbone.norm_f.weight": odd}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"norm_f\.weight has type .*{kind}.*; give a float"):
        open_checkpoint(folder)


# ---------------------------------------------------------------------------------------------
# Refusals: what a tensor holds
# ---------------------------------------------------------------------------------------------


NAMES = [
    *("backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"),
    *(f"backbone.layers.1.mixer.{n}" for n in ("A_log", "D", "dt_bias", "in_proj.weight")),
    *(f"backbone.layers.1.mixer.{n}" for n in ("conv1d.weight", "conv1d.bias", "norm.weight")),
]


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        *((name, torch.bfloat16, NAN) for name in NAMES),
        *(
            ("lm_head.weight", dtype, value)
            for dtype in (torch.float16, torch.float32, torch.float64)
            for value in (NAN, INF, -INF)
        ),
    ],
)
def test_values_that_are_not_finite(
    name: str,
    dtype: torch.dtype,
    value: float,
    tiny_config: MakeConfig,
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    """Named with the tensor, how many, and where the first is, whatever the type."""
    folder = tiny_checkpoint(tiny_config(tie_embeddings=False))

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.update({n: v.to(dtype) for n, v in tensors.items()})
        tensors[name].view(-1)[[3, 5]] = value

    edit_tensors(folder, spoil)
    checkpoint = open_checkpoint(folder)
    first = r"\[0, 3\]" if name.endswith(("embedding.weight", "head.weight", "proj.weight")) else ""
    first = r"\[0, 0, 3\]" if "conv1d.weight" in name else first or r"\[3\]"
    pattern = (
        rf"tensor {re.escape(name)} of \S+ holds 2 values of NaN, .* first at {first}: {value:g}"
    )
    ours = {checkpoint.stored_name(each): each for each in checkpoint.names}
    for read in (lambda: checkpoint.tensor(ours[name]), checkpoint.require_finite):
        with pytest.raises(CheckpointError, match=pattern):
            read()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("D", 1e300, r"mixer\.D of .* holds 1 value .* beyond FP32, the first at \[2\]: 1e\+300"),
        ("A_log", 100.0, r"exp\(backbone\.layers\.0\.mixer\.A_log\) of .* first at \[2\]: 2\.68"),
    ],
)
def test_values_that_leave_fp32(
    name: str, value: float, message: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    folder = tiny_checkpoint()

    def spoil(tensors: dict[str, Tensor]) -> None:
        key = f"backbone.layers.0.mixer.{name}"
        tensors[key] = tensors[key].double()
        tensors[key][2] = value

    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder).require_finite()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("base_model.model.backbone.x.lora_A.weight", "holds the adapter tensor .* merge it into"),
        ("backbone.layers.0.mixer.in_proj.base_layer.weight", "holds the adapter tensor"),
        ("backbone.layers.0.mixer.in_proj.qweight", "is already quantized: it holds the tensor"),
        ("backbone.layers.0.mixer.in_proj.SCB", "is already quantized: it holds the tensor"),
        ("module.backbone.norm_f.weight", "holds two different tensors backbone.norm_f.weight"),
    ],
)
def test_tensors_of_other_kinds(stored: str, message: str, tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    edit_tensors(folder, lambda t: t.update({stored: torch.zeros(64)}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert re.search(message, str(caught.value))


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_types_that_are_not_read(dtype: torch.dtype, tiny_checkpoint: MakeCheckpoint) -> None:
    """Also where two tensors have to be compared first."""
    folder = tiny_checkpoint()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(256, 64).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has type \S+; give a floating-"):
        open_checkpoint(folder)


def test_empty_tensor(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint()
    edit_tensors(folder, lambda t: t.update({"backbone.norm_f.weight": torch.zeros(0)}))
    with pytest.raises(CheckpointError, match=r"norm_f\.weight has shape \(0,\)"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(tiny_checkpoint: MakeCheckpoint) -> None:
    """The same bits are read; different ones leave open which is meant."""
    folder = tiny_checkpoint()
    shard(folder)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second)
    open_checkpoint(folder)
    save_file({**load_file(second), name: value + 1}, second)
    with pytest.raises(CheckpointError, match=f"two different tensors {re.escape(name)}"):
        open_checkpoint(folder)


# ---------------------------------------------------------------------------------------------
# Hub
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hub_fetches_one_form_of_the_weights(
    form: str, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    if form == "bin":
        save_as_bin(folder)
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "some/model"
        assert {"generation_config.json", *TOKENIZER_FILES} <= {*allow_patterns}
        asked.extend(p for p in allow_patterns if p.startswith(("model", "pytorch")))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("some/model").folder == folder
    assert asked == ["model*.safetensors", "pytorch_model*.bin"][: 2 if form == "bin" else 1]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError(""), RuntimeError("x")])
def test_hub_errors_become_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub model") as caught:
        open_checkpoint("some/model")
    assert "\n" not in str(caught.value)


def test_tokenizer_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are asked for; whatever goes wrong there is one sentence."""
    asked: list[str] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "org/name"
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_tokenizer("org/name") == tmp_path
    assert asked == [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("tokenizer.model", *CHAT_FILES),
    ]

    def refuse(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"org/name .*no route\); check the spelling"):
        fetch_tokenizer("org/name")


def test_weights_that_this_user_may_not_read(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said as that: safetensors speaks of a missing file."""
    folder = tiny_checkpoint()

    def refuse(self: Path, *arguments: object, **others: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(
            CheckpointError, match=r"safetensors cannot be read \(Permission denied"
        ):
            SafetensorsFile(folder / "model.safetensors")
