"""Plans against what builds make: tensors, states, caches, activations; bounds; refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import apply_recipe as quantize
from case_table import random_ids, tiny_recipe
from commands import assert_one_sentence, data, ssdi8
from hybrid_builds import build_hybrid, toy_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hybrids import FAMILIES, NEMOTRON, MemoryCheckpoint, hybrid, with_biases
from tiny_model import one_thread, write_model

from runtime.files import MANIFEST, WEIGHTS
from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import HEAD, expected_shapes
from ssdi8_edge.checkpoints.outline import outline, published
from ssdi8_edge.compile.safetensors_writer import data_start
from ssdi8_edge.ground.errors import CheckpointError, UsageError
from ssdi8_edge.ground.shipped import shipped
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.plan.bounds import int8_peak
from ssdi8_edge.plan.choices import require_fitting
from ssdi8_edge.plan.flow import activation_bytes
from ssdi8_edge.plan.plan import Plan, make_plan
from ssdi8_edge.plan.quantizing import LivePeak, host_peak
from ssdi8_edge.plan.tensors import quantized_tensors
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target, target_names

__all__ = ["one_thread", "toy_layout"]  # fixtures, taken over

# Rounding to nearest writes the same tensors, sooner.
QUICK: dict[str, Any] = {"gptq": False, "descent": 0, "compensation": 0.0, "group_search": "absmax"}
FORMATS: dict[str, dict[str, Any]] = {
    "edge-w8a8": {},
    "edge-w4a8": {},
    "edge-w8a8+w4-head": {"lm_head": "w4", "embedding": "fp16", "kv": "fp16"},
    "ssdi8-w8a8": {},
    "ssdi8-w4a8": {"lm_head": "w8_row"},
    "fp16": {},
}
NANO = load_target("orin-nano")


def plan_of(
    name: str, method: str = "edge-w8a8", target: str = "orin-nano", **options: Any
) -> Plan:
    return make_plan(name, outline(name), METHODS[method], load_target(target), **options)


def forms(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_every_family(family: str, form: str) -> None:
    """Name, shape and type of every tensor, with biases, as quantizing writes them."""
    model = hybrid(with_biases(FAMILIES[family]))
    recipe = tiny_recipe(form.partition("+")[0], **FORMATS[form])
    quick = dataclasses.replace(recipe, **QUICK) if recipe.quantized else recipe
    checkpoint: Any = MemoryCheckpoint(model)
    made = quantize(checkpoint, quick, random_ids(1, 32)).tensors
    planned = quantized_tensors(model.description.adapted(recipe), recipe)
    assert forms(planned) == forms(made)


def test_tensors_of_a_recipe_that_only_evaluates() -> None:
    """Clustered channels, the scales of what is stored in INT8: no bundle has them, plans do."""
    model = hybrid(FAMILIES["gates"])
    recipe = tiny_recipe("quamba2-w8a8")
    checkpoint: Any = MemoryCheckpoint(model)
    made = quantize(checkpoint, recipe, random_ids(1, 32)).tensors
    assert forms(quantized_tensors(model.description, recipe)) == forms(made)


@pytest.mark.parametrize("method", ["edge-w8a8", "fp16"])
def test_bytes_of_a_bundle(tmp_path: Path, method: str) -> None:
    """Weights, states and cache of a model with all kinds of blocks, to the byte."""
    bundle = build_hybrid(tmp_path, method) / "bundle"
    manifest = json.loads((bundle / MANIFEST).read_text())
    target = load_target("host-cpu").model_copy(
        update={"context": manifest["interface"]["context"]}
    )
    model = outline(str(tmp_path / "hybrid"))
    found = make_plan("hybrid", model, METHODS[method], target).memory
    weights = bundle / WEIGHTS
    assert found.weights == weights.stat().st_size - data_start(weights)
    sizes = {"replace": 0, "append": 0}
    for state in manifest["interface"]["states"]:
        width = {"fp16": 2, "fp32": 4, "int8": 1}[state["dtype"]]
        sizes[state["update"]] += torch.Size(state["shape"]).numel() * width
    # Read and written; onnxruntime has both of a cache, too.
    assert (found.states, found.cache) == (2 * sizes["replace"], 2 * sizes["append"])


@pytest.mark.parametrize("model", ["granite-4.0-h-1b", "mamba2-130m"])
def test_a_tied_head_takes_nothing(model: str) -> None:
    """Also where the embedding is multiplied, as Granite's is."""
    tied = plan_of(model, "fp16", "host-cpu").memory
    assert tied.head == 0 < tied.embedding


# --------------------------------------------------------------------------------------------------
# activations


@pytest.mark.parametrize("method", ["edge-w8a8", "ssdi8-w8a8", "fp16"])
@pytest.mark.parametrize("family", ["nemotron", "falcon"])
def test_activations_hold_what_one_op_reads_and_writes(family: str, method: str) -> None:
    """At least the widest linear layer's input and output beside the stream; fewer than all that a
    block ever makes; no states, whatever the context."""
    recipe = METHODS[method]
    model = FAMILIES[family].adapted(recipe).with_context(64)
    tokens = 32
    found = activation_bytes(model, recipe, 1, tokens)
    wide = max(sum(block.parts.values()) for block in model.blocks)
    assert found >= tokens * (4 * model.d_model + 2 * wide)
    assert found < 6 * tokens * (4 * model.d_model + 2 * wide + 2 * model.blocks[0].width)
    assert activation_bytes(model.with_context(4096), recipe, 1, tokens) == found
    assert activation_bytes(model, recipe, 2, tokens) == 2 * found


@settings(max_examples=4, deadline=None)
@given(tokens=st.integers(1, 96), more=st.integers(0, 64))
def test_activations_grow_with_the_call(tokens: int, more: int) -> None:
    model = NEMOTRON.with_context(256)
    recipe = METHODS["edge-w8a8"]
    first, second = (activation_bytes(model, recipe, 1, n) for n in (tokens, tokens + more))
    assert first <= second


def test_live_tensors_are_counted_once() -> None:
    """Views share memory, what is freed is taken off, and sizes alone count like data."""
    for device in ("cpu", "meta"):
        with LivePeak() as live:
            first = torch.zeros(1000, device=device)
            view = first[:500]
            second = first + 1
            del first, view
            third = second * 2
        assert live.most == 2 * 4000
        del second, third


def test_memory_of_the_host_follows_the_model() -> None:
    """More for wider blocks, whatever their number; hardly anything where nothing is quantized."""
    small, wide = (
        host_peak(outline(f"mamba2-{size}"), METHODS["edge-w8a8"]) for size in ("130m", "2.7b")
    )
    assert small < wide
    longer = dataclasses.replace(outline("mamba2-130m"), blocks=outline("mamba2-130m").blocks * 2)
    assert host_peak(longer, METHODS["edge-w8a8"]) == small
    assert host_peak(outline("mamba2-130m"), METHODS["fp16"]) < small


# --------------------------------------------------------------------------------------------------
# bounds


def test_bounds_by_hand() -> None:
    """One block of Mamba-2, FP16: every weight once, states twice, two operations a product."""
    block = Mamba2(d_inner=128, headdim=64, d_state=64, chunk_size=64)
    model = Description(d_model=64, vocab_size=256, blocks=(block,))
    plan = make_plan("hand", model, METHODS["fp16"], NANO, prompt_tokens=100)
    states = (3 * 256 + 2 * 64 * 64) * 2  # taps of x, B and C; heads, P, N
    token, prompt = plan.bounds.token, plan.bounds.prompt
    assert token.bytes == plan.memory.weights + 2 * states + 64 * 2
    assert prompt.bytes == plan.memory.weights + 2 * states + 100 * 64 * 2
    linear = 64 * (128 + 128 + 2 * 64 + 2 + 128)
    assert token.fp16_operations == 2 * (linear + 2 * 128 * 64 + 64 * 256)
    assert prompt.fp16_operations == 2 * (100 * (linear + 2 * 128 * 64) + 64 * 256)
    assert token.int8_operations == 0
    assert token.limit == "memory"
    assert token.seconds == pytest.approx(token.bytes / 102.4e9)


def test_peak_of_a_board() -> None:
    """NVIDIA's 33 dense TOPS of an Orin Nano, from SMs and clock."""
    assert int8_peak(NANO.board) == pytest.approx(33.4e12, rel=0.01)


def test_attention_reads_more_as_it_goes() -> None:
    """A token behind a longer prompt moves more; one of Mamba-2 alone does not."""
    short, long = (
        plan_of("granite-4.0-h-1b", prompt_tokens=n).bounds.token.bytes for n in (512, 2048)
    )
    rows = 4 * 2 * 4 * (128 + 2)  # blocks, keys and values, heads, a row with its scale
    assert long - short == (2048 - 512) * rows
    short, long = (plan_of("mamba2-130m", prompt_tokens=n).bounds.token.bytes for n in (512, 2048))
    assert long == short


def test_more_sequences_share_the_weights() -> None:
    one, four = (plan_of("mamba2-370m", parallel=n) for n in (1, 4))
    assert four.memory.states == 4 * one.memory.states
    assert four.memory.weights == one.memory.weights
    most, of_one = four.bounds.tokens_per_s, one.bounds.tokens_per_s
    assert most is not None and of_one is not None and 3 * of_one < most < 4 * of_one


def test_the_table_of_facts() -> None:
    """Nano 4B by 4 bits at 2,048 tokens moves 2.19 GB a token, as worked out by hand."""
    found = plan_of("nemotron-3-nano-4b", "edge-w4a8", prompt_tokens=2048).bounds.token.bytes
    assert found == pytest.approx(2.19e9, rel=0.01)


# --------------------------------------------------------------------------------------------------
# what can be planned, and for what


# Billions of parameters, as the models' pages count them.
SIZES = {
    "mamba2-1.3b": 1.34,
    "mamba2-2.7b": 2.70,
    **{f"mamba2-{size}": float(size[:-1]) / 1000 for size in ("130m", "370m", "780m")},
    "nemotron-3-nano-4b": 3.97,
    "nemotron-h-4b": 4.49,
    "nemotron-h-8b": 8.10,
    "nemotron-nano-9b-v2": 8.89,
    "granite-4.0-h-350m": 0.34,
    "granite-4.0-h-1b": 1.46,
    "granite-4.0-h-micro": 3.19,
    "falcon-h1-0.5b": 0.52,
    "falcon-h1-1.5b": 1.55,
    "falcon-h1-1.5b-deep": 1.55,
    "falcon-h1-3b": 3.15,
    "falcon-h1-7b": 7.59,
    "codestral-mamba-7b": 7.28,
}


def test_published_models() -> None:
    """Each is described, and has its size."""
    assert published().keys() == SIZES.keys()
    for name, billions in SIZES.items():
        shapes = expected_shapes(outline(name))
        if published()[name].get("tie_word_embeddings", "mamba2-" in name):
            del shapes[HEAD]
        found = sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9
        assert found == pytest.approx(billions, abs=0.007), name


def test_targets_say_what_they_have() -> None:
    """Every shipped board has room and speed, with their source, and sees less than is soldered."""
    boards = [each.board for name in target_names() if (each := load_target(name)).board]
    assert len(boards) == 6
    for board in boards:
        assert board is not None and board.free_mib and board.gpu_mhz and board.bandwidth_gb_s
        assert board.source and board.free_mib * 2**20 < board.memory_gb * 2**30


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "zamba2"}, "Zamba2 shares one attention block between layers"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 4}, "a mixture of experts"),
        ({"torch_dtype": "float16"}, "not a Mamba-2 model"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized (awq"),
    ],
)
def test_refused_as_the_reader_refuses(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    """Word for word."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentences = []
    for read in (outline, lambda folder: Checkpoint(Path(folder))):
        with pytest.raises(CheckpointError) as caught:
            read(str(tmp_path))
        sentences.append(str(caught.value))
    assert words in sentences[0]
    assert sentences[0] == sentences[1]


def test_a_recipe_that_no_engine_runs() -> None:
    with pytest.raises(UsageError, match="for comparing accuracy only"):
        plan_of("mamba2-130m", "quamba-w8a8")


def test_command(tmp_path: Path) -> None:
    """Terminal, JSON and Markdown tell the same; the default is every board by two methods."""
    model = write_model(tmp_path / "tiny")
    plans = data("plan", model)
    assert len(plans) == 6 * 2
    first = plans[0]
    assert first["memory"]["total"] == sum(
        first["memory"][part]
        for part in ("blocks", "embedding", "head", "states", "cache", "activations", "runtime")
    )
    shown = ssdi8("plan", model, "--target", "orin-nx", "--method", "fp16", "--prompt", 300)
    assert shown.returncode == 0, shown.stderr
    assert "prompt of 300 tokens" in shown.stdout and "bounds, no forecasts" in shown.stdout
    text = ssdi8("plan", model, "--target", "host-cpu", "--markdown").stdout
    assert "| host-cpu | edge-w8a8 |" in text and "unknown" in text


def test_command_refuses(tmp_path: Path) -> None:
    assert_one_sentence(ssdi8("plan", "no-such-model"), ["no-such-model", "mamba2-2.7b"])
    both = ssdi8("plan", "demo", "--json", "--markdown")
    assert_one_sentence(both, ["--json and --markdown"])
    (tmp_path / "config.json").write_text('{"model_type": "jamba"}')
    assert_one_sentence(ssdi8("plan", tmp_path), ["Mamba-1 blocks"], exit_code=2)
    assert_one_sentence(ssdi8("plan", "demo", "--target", "orin"), ["unknown target"])
    long = ssdi8("plan", "granite-4.0-h-1b", "--context", 100, "--prompt", 100)
    assert_one_sentence(long, ["no room for a prompt of 100"])


# --------------------------------------------------------------------------------------------------
# what does not fit


def small(target: str, free_mib: int) -> Any:
    """A target whose board has less room."""
    found = load_target(target)
    assert found.board is not None
    board = found.board.model_copy(update={"free_mib": free_mib})
    return found.model_copy(update={"board": board})


@pytest.mark.parametrize(
    ("name", "method", "target", "largest", "remedy"),
    [
        ("granite-4.0-h-1b", "edge-w8a8", small("agx-orin", 2636), "weights", "--context 4096"),
        ("nemotron-3-nano-4b", "edge-w8a8", small("orin-nano", 4000), "weights", "--method edge-w"),
        ("codestral-mamba-7b", "edge-w4a8", load_target("orin-nano-4gb"), "weights", "--target "),
        (
            "codestral-mamba-7b",
            "edge-w8a8",
            small("orin-nx", 8000),
            "weights",
            "--method edge-w4a8",
        ),
    ],
)
def test_the_nearest_choice(name: str, method: str, target: Any, largest: str, remedy: str) -> None:
    """It fits; and what is named as the largest part is."""
    model, recipe = outline(name), METHODS[method]
    plan = make_plan(name, model, recipe, target)
    assert plan.fits is False
    with pytest.raises(UsageError) as caught:
        require_fitting(plan, model, recipe, target)
    said = str(caught.value)
    assert largest in said and f"give {remedy}" in said and "--force" in said, said


def test_nothing_fits() -> None:
    huge = dataclasses.replace(outline("codestral-mamba-7b"), vocab_size=2**25)
    recipe = METHODS["edge-w8a8"]
    with pytest.raises(UsageError, match="no target has room for it"):
        require_fitting(make_plan("huge", huge, recipe, NANO), huge, recipe, NANO)


def test_build_refuses_at_once(tmp_path: Path) -> None:
    """Before a stage runs, with nothing written; --force goes on."""
    model = write_model(tmp_path / "tiny")
    profile = tmp_path / "full.toml"
    text = (shipped("profiles") / "orin-nx.toml").read_text()
    profile.write_text(re.sub("free_mib = .*", "free_mib = 100", text))
    asked = ("build", "--model", model, "--target", profile, "--out", tmp_path / "run", "--dry-run")
    assert_one_sentence(ssdi8(*asked), ["CUDA, TensorRT and Python", "--force"])
    assert not (tmp_path / "run").exists()
    assert ssdi8(*asked, "--force").returncode == 0


# --------------------------------------------------------------------------------------------------
# beside what was measured


def measured_point(model: str, length: int, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    """What a point must have, as `sweep` writes it."""
    bundle = {"digest": "d", "name": "n", "checkpoint": "c", "bytes": 1, "model": model}
    repeat = {"start_s": 0.0, "end_s": 1.0, "ttft_s": ttft_s, "token_s": [tpot_s]}
    times = {"ttft_s": ttft_s, "tpot_s": tpot_s, "load_s": 0.0, "repeats": [repeat]}
    machine = {"platform": "Linux", "cpu": "none", "cores": 1, "python": "3"}
    return {
        "kind": "point",
        "schema": 1,
        "board": "orin",
        "mode": "25W",
        "length": length,
        "backend": "fake",
        "versions": {},
        "engine": None,
        "conditions": {},
        "date": "2026-11-24T01:00:00Z",
        "ssdi8_edge": "0",
        "power": None,
        "power_missing": None,
        "bundle": {**bundle, "method": "edge-w8a8", "target": "orin-nano"},
        "machine": {"kind": "jetson", **machine},
        "settings": {"new_tokens": 2, "repeat": 1, "warmup": 1, "pin_clocks": False}
        | {"power_seconds": 0.0},
        "timing": {"batch": 1, "new_tokens": 2, "warmup": 1, **times},
    }


def test_measured_points_beside_bounds(tmp_path: Path) -> None:
    """Those of the same model, method and target, each with the bound at its own length."""
    token = plan_of("mamba2-130m", prompt_tokens=200).bounds.token.seconds
    assert token is not None
    points = [
        measured_point("mamba2-130m", 200, ttft_s=1.0, tpot_s=4 * token),
        measured_point("mamba2-370m", 200, ttft_s=1.0, tpot_s=1.0),
    ]
    file = tmp_path / "sweep.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in points))
    asked = ("plan", "mamba2-130m", "--target", "orin-nano", "--measured", file)
    eight, four = data(*asked)
    (beside,) = eight["measured"]
    assert beside["token_share"] == pytest.approx(0.25)
    assert (beside["length"], beside["board"], beside["simulated"]) == (200, "orin", False)
    assert four["measured"] == []
    assert "25%" in ssdi8(*asked, "--markdown").stdout
    missing = ssdi8("plan", "demo", "--measured", tmp_path / "none")
    assert_one_sentence(missing, ["is no file"])
