"""What FP16 cannot hold: carried where a power of two can carry it, else named with its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from case_table import apply_recipe, random_ids, relative_error, tiny_recipe, write_checkpoint
from conftest import make_config
from safetensors.torch import load_file, save_file
from tiny_model import write_model, write_text
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.compile.bundle import golden_vectors
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import evaluate, open_subject, perplexity, plan
from ssdi8_edge.evaluate.table import notes
from ssdi8_edge.ground.artifacts import QUANTIZED
from ssdi8_edge.ground.errors import CheckpointError, UsageError
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.numerics.fp16_range import all_finite, see, to_fp16, watched
from ssdi8_edge.recipes.presets import METHODS, find_method
from ssdi8_edge.targets import load_target

NAN, INF = float("nan"), float("inf")
LAYER = "backbone.layers.0."
OUT_PROJ = f"{LAYER}mixer.out_proj.weight"
IN_PROJ = f"{LAYER}mixer.in_proj.weight"
EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"

Edit = Callable[[dict[str, Tensor]], None]


def edit_weights(folder: Path, edit: Edit) -> Path:
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def scaled(name: str, factor: float, row: int | None = None) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name][slice(None) if row is None else row] *= factor

    return edit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with tokenizer, to be spoiled."""
    return write_model(tmp_path / "model")


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Callable[..., Build]:
    def ask(method: str, until: str = "bundle", said: list[str] | None = None) -> Build:
        request = BuildRequest(
            model=str(folder),
            recipe=find_method(method),
            target=load_target("host-cpu"),
            out=tmp_path / "run",
            calibration=write_text(tmp_path / "text.txt"),
            until=until,
        )
        return Build(request, say=[].append if said is None else said.append)

    return ask


# ---------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_finite(dtype: torch.dtype) -> None:
    value = torch.randn(5, 7).to(dtype)
    assert all_finite(value) and all_finite(value[:0])
    for bad in (NAN, INF, -INF):
        for place in range(35):
            spoiled = value.clone()
            spoiled.view(-1)[place] = bad
            assert not all_finite(spoiled)


def test_to_fp16() -> None:
    """65519 still rounds to 65504; 65520 does not."""
    value = torch.tensor([[1.0, -65519.0], [65504.0, 0.0]])
    assert to_fp16(value, "w", "").tolist() == [[1.0, -65504.0], [65504.0, 0.0]]
    value[1] = torch.tensor([65520.0, -1e6])
    with pytest.raises(CheckpointError) as caught:
        to_fp16(value, "w", "do this.")
    assert "tensor w holds 2 values beyond 65504" in str(caught.value)
    assert "the first is 65520 at [1, 0]; do this." in str(caught.value)


def test_see_looks_only_while_watched() -> None:
    bad = torch.tensor([1.0, INF]).half()
    assert see("y", bad) is bad
    with watched("m", lambda name: f"mend {name}.") as watch:
        watch.scope = "layers.3"
        assert see("y", "a value of a graph") == "a value of a graph"
        with pytest.raises(CheckpointError, match=r"^layers\.3: y goes beyond 65504.*; mend y\.$"):
            see("y", bad)
    assert see("y", bad) is bad


# ---------------------------------------------------------------------------------------------
# Carrying
# ---------------------------------------------------------------------------------------------


def test_residual_scale_changes_nothing_in_fp32(tmp_path: Path) -> None:
    """Embedding and out_proj times a power of two, eps times its square: the same bits."""
    _, model = write_checkpoint(tmp_path / "m", make_config())
    scale = 2.0**-5
    other = FloatModel(replace(model.description, residual_scale=scale, tie_embeddings=False))
    tensors = {
        k: v * scale if k == "embedding.weight" or k.endswith("out_proj.weight") else v
        for k, v in model.state_dict().items()
    }
    other.load_state_dict(tensors)
    ids = random_ids(2, 20)
    with torch.inference_mode():
        assert torch.equal(other(ids)[0], model(ids)[0])


@pytest.mark.parametrize("method", ["edge-w8a8", "edge-w4a8", "ssdi8-w8a8", "quamba2-w8a8"])
def test_massive_channel_is_carried(method: str, tmp_path: Path) -> None:
    """A channel of the residual stream far beyond FP16: the logits keep to those of FP32."""
    checkpoint, _ = write_checkpoint(tmp_path / "m", make_config())
    edit_weights(checkpoint.folder, scaled(OUT_PROJ, 1e7, row=7))
    checkpoint = Checkpoint(checkpoint.folder)
    made = apply_recipe(checkpoint, tiny_recipe(method), random_ids(4, 48))
    assert made.model.description.residual_scale < 1
    reference = FloatModel(checkpoint.description).eval()
    reference.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names})
    ids = random_ids(2, 30, seed=5)
    with torch.inference_mode():
        want = reference(ids)[0]
    error = relative_error(made.model.forward(ids, keep=30)[0], want)
    assert error < (0.5 if "w4" in method else 0.2)


def massive_embedding(tensors: dict[str, Tensor]) -> None:
    """With an ordinary head, or the logits would be massive too."""
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    tensors[EMBEDDING] *= 1e9


@pytest.mark.parametrize("edit", [scaled(OUT_PROJ, 1e8), massive_embedding], ids=["out", "in"])
def test_bundle_of_massive_weights(edit: Edit, folder: Path, build: Callable[..., Build]) -> None:
    """Export and golden vectors agree about the scale; onnxruntime reproduces them."""
    edit_weights(folder, edit)
    manifest = build("edge-w8a8").run().manifest
    assert manifest is not None and manifest["model"]["residual_scale"] < 1


def test_ordinary_model_keeps_its_scale(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "m", make_config())
    made = apply_recipe(checkpoint, tiny_recipe("edge-w8a8"), random_ids(2, 32))
    assert made.model.description.residual_scale == 1


# ---------------------------------------------------------------------------------------------
# Refusing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EMBEDDING, OUT_PROJ, IN_PROJ])
def test_weight_that_the_baseline_cannot_hold(
    name: str, folder: Path, build: Callable[..., Build]
) -> None:
    edit_weights(folder, lambda t: t[name].view(-1)[5:6].fill_(1e5))
    with pytest.raises(CheckpointError) as caught:
        build("fp16").run()
    assert f"tensor {name} holds 1 value beyond 65504" in str(caught.value)
    assert "the first is 100000 at [0, 5]; choose --method edge-w8a8" in str(caught.value)


def test_head_that_the_baseline_and_no_method_can_hold(
    folder: Path, build: Callable[..., Build]
) -> None:
    edit_weights(folder, lambda t: t.update({HEAD: t[EMBEDDING] * 1e9}))
    with pytest.raises(CheckpointError) as caught:
        build("fp16").run()
    assert "only `evaluate CHECKPOINT`" in str(caught.value)


def test_head_that_no_method_can_hold(folder: Path, build: Callable[..., Build]) -> None:
    edit_weights(folder, scaled("backbone.norm_f.weight", 1e9))
    with pytest.raises(CheckpointError) as caught:
        build("edge-w8a8").run()
    assert "tensor lm_head.weight, rotated, holds" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (scaled(OUT_PROJ, 2e5), "layers.0: the output of out_proj"),
        (scaled(IN_PROJ, 1e5), "layers.0: the output of in_proj"),
        (scaled(f"{LAYER}mixer.conv1d.weight", 1e7), "layers.0: x behind the convolution"),
        (scaled(f"{LAYER}mixer.D", 1e10), "layers.0: y, the output of SSD,"),
        (scaled("backbone.layers.1.norm.weight", 1e6), "layers.1: the input of in_proj"),
        (scaled("backbone.norm_f.weight", 1e6), "head: the input of lm_head"),
    ],
)
def test_activation_of_the_baseline(
    edit: Edit, place: str, folder: Path, build: Callable[..., Build]
) -> None:
    """Named with layer and tensor when the golden vectors are computed: no NaN in a bundle."""
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        build("fp16").run()
    assert str(caught.value).startswith(f"{place} goes beyond 65504")
    carried = "put of out_proj" in place or "the input of in_proj" in place
    assert ("choose --method edge-w8a8" in str(caught.value)) == carried
    assert "`evaluate" in str(caught.value)
    assert not (build("fp16").request.out / "bundle").exists()


def test_embedding_too_long_for_fp32(folder: Path, build: Callable[..., Build]) -> None:
    """Every value is finite, and the norm of the row is not."""
    edit_weights(folder, lambda t: t[EMBEDDING][5].fill_(1e30))
    with pytest.raises(CheckpointError, match=r"rows of the tensor backbone\.embedding\.weight"):
        build("edge-w8a8").run()


@pytest.mark.parametrize(("factor", "built"), [(1e8, True), (1e10, False), (1e13, False)])
def test_a_row_far_longer_than_the_others(factor: float, built: bool, tmp_path: Path) -> None:
    """Carried while FP16 holds the others beside it; then refused, as nothing is left of them."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[EMBEDDING][5] *= factor

    checkpoint, _ = write_checkpoint(tmp_path / "m", make_config())
    edit_weights(checkpoint.folder, edit)
    checkpoint = Checkpoint(checkpoint.folder)
    ids = random_ids(4, 48)
    if built:
        assert apply_recipe(checkpoint, tiny_recipe("edge-w8a8"), ids).model
        return
    with pytest.raises(CheckpointError, match="loses 255 of its 256 rows beside them") as caught:
        apply_recipe(checkpoint, tiny_recipe("edge-w8a8"), ids)
    assert f"tensor {EMBEDDING} has rows" in str(caught.value)
    assert "only `evaluate CHECKPOINT`" in str(caught.value)


def bias_of_time_step(value: float) -> Edit:
    return lambda tensors: tensors[f"{LAYER}mixer.dt_bias"][1:2].fill_(value)


@pytest.mark.parametrize("method", ["edge-w8a8", "fp16"])
def test_time_step_beyond_what_a_graph_computes(
    method: str, folder: Path, build: Callable[..., Build]
) -> None:
    """onnxruntime takes softplus by exp, which overflows; before, that asked for a report."""
    edit_weights(folder, bias_of_time_step(1e4))
    with pytest.raises(CheckpointError) as caught:
        build(method).run()
    assert "layers.0: head 1 takes softplus of" in str(caught.value)


def test_time_step_that_a_graph_computes(folder: Path, build: Callable[..., Build]) -> None:
    edit_weights(folder, bias_of_time_step(600))
    build("fp16").run()


@pytest.mark.parametrize("method", ["edge-w8a8", "quamba2-w8a8"])
@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (scaled(IN_PROJ, 1e7), "the z that in_proj gives reaches"),
        (scaled(f"{LAYER}mixer.conv1d.weight", 1e8), "x behind the convolution reaches"),
        (scaled(f"{LAYER}mixer.D", 1e10), "y, the output of SSD, reaches"),
    ],
)
def test_activation_of_a_quantized_model(
    edit: Edit, place: str, method: str, folder: Path, build: Callable[..., Build]
) -> None:
    """Found in calibration, before an hour is spent on GPTQ."""
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        build(method, until="calibrate").run()
    assert f"layers.0 of {folder}: {place}" in str(caught.value)
    assert "`evaluate CHECKPOINT`" in str(caught.value)


def test_golden_vectors_name_the_place(tmp_path: Path) -> None:
    """Text unlike the calibration text: what the statistics could not show."""
    checkpoint, _ = write_checkpoint(tmp_path / "m", make_config())
    made = apply_recipe(checkpoint, tiny_recipe("edge-w8a8"), random_ids(2, 32))
    tensors = dict(made.tensors)
    tensors["layers.1.out_proj.scale"] = tensors["layers.1.out_proj.scale"] * 1e9
    model = QuantizedModel(made.model.description, made.recipe, tensors)
    with pytest.raises(CheckpointError, match=r"^layers\.1: the output of out_proj goes beyond"):
        golden_vectors(model, random_ids(1, 32).flatten(), 512)


@pytest.mark.parametrize("method", ["fp16", "edge-w8a8"])
def test_evaluation_says_so(
    method: str, folder: Path, build: Callable[..., Build], tmp_path: Path
) -> None:
    """The row says why its perplexity is no number; the model beside it is measured."""
    build(method, until="quantize").run()
    quantized = tmp_path / "run" / QUANTIZED
    name = "layers.0.out_proj.scale" if method == "edge-w8a8" else "layers.0.gate_norm.weight"
    edit_weights(quantized, scaled(name, 1e9))
    text = tmp_path / "evaluation.txt"
    text.write_text("the board runs the model and the model runs the board " * 4)
    measures = plan([], [text])
    good, bad = evaluate([open_subject(str(folder)), open_subject(str(quantized))], measures)
    assert math.isfinite(good.perplexities[0].perplexity) and good.perplexities[0].reason is None
    (found,) = bad.perplexities
    assert math.isnan(found.perplexity)
    assert re.match(r"layers\.0: the (in|out)put of out_proj goes beyond", found.reason or "")
    assert found.reason in notes([good, bad])


def test_evaluation_of_a_float_model(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, scaled("backbone.norm_f.weight", 1e38))
    text = tmp_path / "evaluation.txt"
    text.write_text("the board runs the model and the model runs the board " * 4)
    found = perplexity(open_subject(str(folder)), text)
    assert not math.isfinite(found.perplexity)
    assert found.reason is not None and "computes logits that are not numbers" in found.reason


@pytest.mark.parametrize("method", list(METHODS))
def test_nan_is_found_before_anything_is_written(
    method: str, folder: Path, build: Callable[..., Build], tmp_path: Path
) -> None:
    edit_weights(folder, lambda t: t["backbone.norm_f.weight"][3:4].fill_(NAN))
    until = "quantize" if find_method(method).ssd == "dequantized" else "bundle"
    with pytest.raises(CheckpointError, match=r"norm_f\.weight of .* the first at \[3\]: nan"):
        build(method, until).run()
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}


# ---------------------------------------------------------------------------------------------
# Notes, and sizes without a rotation
# ---------------------------------------------------------------------------------------------


def test_note_about_a_head_of_its_own(
    folder: Path, build: Callable[..., Build], tmp_path: Path
) -> None:
    """To the user and into the manifest; the logits are those of the stored head."""
    edit_weights(folder, lambda t: t.update({"lm_head.weight": -t[EMBEDDING]}))
    said: list[str] = []
    manifest = build("fp16", said=said).run().manifest
    assert manifest is not None
    (note,) = manifest["checkpoint"]["notes"]
    assert f"note: {note}" in said and "the stored one is used" in note
    assert open_subject(str(folder)).notes == (note,)
    stored = load_file(tmp_path / "run" / QUANTIZED / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], -stored["embedding.weight"])


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.bc_rotation == "none"])
def test_d_state_without_a_rotation(method: str, tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "m", make_config(d_state=28))
    made = apply_recipe(checkpoint, tiny_recipe(method), random_ids(2, 32))
    assert all_finite(made.model.forward(random_ids(1, 20))[0])


def test_d_state_without_a_rotation_is_said_at_once(
    tmp_path: Path, folder: Path, build: Callable[..., Build]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_model(tmp_path / "other", d_state=112)
    for path in (tmp_path / "other").iterdir():
        path.replace(folder / path.name)
    assert config["ssm_cfg"]["d_state"] == 64
    with pytest.raises(UsageError, match=r"^d_state = 112 has no Hadamard") as caught:
        build("edge-w8a8")
    assert "ssdi8-w8a8" in caught.value.hint and "quamba" not in caught.value.hint
    assert not (tmp_path / "run").exists()
    build("ssdi8-w8a8", until="calibrate").run()


def test_a_run_that_ended_early_is_evaluated(folder: Path, build: Callable[..., Build]) -> None:
    """Without a bundle, a run folder stands for its quantized/."""
    ended = build("edge-w8a8", until="quantize")
    ended.run()
    assert open_subject(str(ended.request.out), None, "cpu").name == "edge-w8a8"
