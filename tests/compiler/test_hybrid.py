"""Attention, MLPs and Mamba-2 beside attention, quantized: values, graphs, states, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from case_table import Quantized, layer_of, random_ids, relative_error, session
from tiny_hybrids import (
    FALCON,
    FAMILIES,
    GRANITE,
    NEMOTRON,
    SSM,
    hybrid,
    quantized,
    with_biases,
)
from tiny_model import one_thread
from torch import Tensor

from runtime.files import WEIGHTS
from ssdi8_edge.compile.export import record_model
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.errors import CheckpointError, UsageError
from ssdi8_edge.models.block import Block, States
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.models.kinds.parallel import Parallel
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.ops.kernel_limits import require_kernels, width_misfit
from ssdi8_edge.recipes.presets import METHODS

__all__ = ["one_thread"]  # a fixture, taken over

# Tokens of the calls that a sequence is given in: a prompt, a chunk, less than one, a single token.
PIECES = (32, 16, 11, 1)
TOKENS = sum(PIECES)
# INT8 everywhere, so that no FP32 sum of an FP16 linear shows its order.
INT8_HEAD = {"lm_head": "w8_row"}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> FloatModel:
    return hybrid(FAMILIES[request.param])


@pytest.fixture(scope="module")
def nemotron() -> FloatModel:
    return hybrid(NEMOTRON)


# Largest relative errors of the logits of random weights; 4 bits are coarse for these.
BOUNDS = {"edge-w8a8": 0.02, "edge-w4a8": 0.14, "w4a8": 0.17, "w8a8": 0.05, "fp16": 0.002}


@pytest.fixture(scope="module")
def mixed() -> FloatModel:
    """A block of each kind and form."""
    blocks = (*NEMOTRON.blocks, GRANITE.blocks[1], *FALCON.blocks)
    return hybrid(dataclasses.replace(NEMOTRON, blocks=blocks))


@pytest.mark.parametrize("method", METHODS)
def test_quantized_models_are_near(mixed: FloatModel, method: str) -> None:
    """Every method does something sensible with every kind of block."""
    ids = random_ids(2, TOKENS, seed=5)
    with torch.no_grad():
        wanted = mixed(ids)[0]
    found = quantized(mixed, method).model.forward(ids, keep=TOKENS)[0]
    bound = BOUNDS.get(method, BOUNDS["w4a8" if "w4a8" in method else "w8a8"])
    assert relative_error(found, wanted) < bound


def in_pieces(made: Quantized, ids: Tensor, states: list[States] | None = None) -> list[Any]:
    """(position, tokens, logits, states) of every call of a sequence given in `PIECES`."""
    calls, position = [], 0
    for size in PIECES:
        part = ids[:, position : position + size]
        logits, states = made.model.forward(part, states, keep=size, position=position)
        calls.append((position, part, logits, states))
        position += size
    return calls


@pytest.mark.parametrize("kv", ["int8", "fp16"])
def test_a_prompt_in_pieces_gives_the_same_bits(family: FloatModel, kv: str) -> None:
    """Pieces of whole chunks, with a state that is not rounded between calls; then what follows is
    near."""
    made = quantized(family, "edge-w8a8", kv=kv, state_dtype="fp32", **INT8_HEAD)
    ids = random_ids(2, TOKENS, seed=6)
    whole = made.model.forward(ids, keep=TOKENS)[0]
    pieces = torch.cat([logits for _, _, logits, _ in in_pieces(made, ids)], 1)
    assert torch.equal(pieces[:, :48], whole[:, :48])
    assert relative_error(pieces, whole) < 0.01


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("edge-w8a8", INT8_HEAD),
        ("edge-w4a8", {"kv": "fp16", **INT8_HEAD}),
        ("ssdi8-w8a8", INT8_HEAD),
        ("fp16", {}),
    ],
    ids=["edge-w8a8", "edge-w4a8 fp16 cache", "ssdi8-w8a8", "fp16"],
)
def test_the_graph_computes_the_same_bits(
    family: FloatModel, method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Prefill, chunk and decode of two sequences, every state carried; FP16 linears nearly."""
    made = quantized(family, method, **changes)
    with SafetensorsWriter(tmp_path / WEIGHTS) as writer:
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
    model = made.model.description.with_context(64)
    recorded = record_model(tmp_path / WEIGHTS, model, made.recipe, "cpu")
    graph = recorded.model()
    onnx.save(graph, tmp_path / "model.onnx")
    inputs = {value.name for value in graph.graph.input}
    opened = session(tmp_path / "model.onnx")

    specs = list(model.states(made.recipe))
    states = [tuple(s.zeros(2) for s in block.states(made.recipe)) for block in model.blocks]
    feed = {name: spec.zeros(2).numpy() for name, spec in specs}
    for position, part, logits, after in in_pieces(made, random_ids(2, TOKENS, seed=7), states):
        scalars = {"position": np.array(position), "logits_to_keep": np.array(part.shape[1])}
        called = {"input_ids": part.int().numpy(), **scalars, **feed}
        found = opened.run(None, {k: v for k, v in called.items() if k in inputs})
        wanted = [logits, *(state for carried in after for state in carried)]
        feed = dict(zip(feed, found[1:], strict=True))
        for got, want in zip(found, wanted, strict=True):
            if method == "fp16":
                np.testing.assert_allclose(got, want.numpy(), rtol=0.01, atol=0.02)
            else:
                assert np.array_equal(got, want.numpy())


def test_states_of_each_cache(nemotron: FloatModel) -> None:
    """INT8 with scales per token and head, or FP16; the baseline has FP16 whatever it says."""
    attention = nemotron.description.with_context(32).blocks[2]

    def declared(method: str, **changes: Any) -> dict[str, tuple[Any, ...]]:
        states = attention.states(dataclasses.replace(METHODS[method], **changes))
        assert {state.update for state in states} == {"append"}
        return {state.name: (state.shape, state.dtype) for state in states}

    cache, scale = (2, 32, 16), (2, 32)
    assert declared("edge-w8a8") == {
        "k_cache": (cache, "int8"),
        "k_scale": (scale, "fp16"),
        "v_cache": (cache, "int8"),
        "v_scale": (scale, "fp16"),
    }
    fp16 = {"k_cache": (cache, "fp16"), "v_cache": (cache, "fp16")}
    assert declared("edge-w8a8", kv="fp16") == fp16
    assert declared("fp16") == declared("fp16", kv="int8") == fp16


def test_out_proj_is_rotated_as_its_input_is(family: FloatModel) -> None:
    """By the whole width, by blocks, by blocks with signs, or not: what each kind says."""
    made = quantized(family, "edge-w8a8", gptq=False, compensation=0.0, correction="none")
    for i, block in enumerate(family.description.blocks):
        p = layer_of(made, i)
        found = p["out_proj.weight"].float() * p["out_proj.scale"][:, None]
        weight = family.state_dict()[f"layers.{i}.out_proj.weight"]
        rotated = hadamard.apply(hadamard.transform(weight.t()).t(), block.rotation)
        assert relative_error(found, rotated) < 0.01
    kinds = {block.kind: block.rotation for block in family.description.blocks}
    assert kinds.get("attention", "none") == "none"
    assert kinds.get("parallel", "blocks") == "blocks"


def test_static_scales_are_calibrated(family: FloatModel) -> None:
    made = quantized(family, "ssdi8-w8a8")
    for i in range(family.description.n_layer):
        assert {"u_scale", "r_scale"} <= layer_of(made, i).keys()
    assert max(made.saturation.values(), default=0) < 0.01


def test_groups_of_4_bits_fit_every_width(nemotron: FloatModel) -> None:
    """240 and 144 columns are no multiples of 32: groups of 16 there, of 32 elsewhere."""
    made = quantized(nemotron, "edge-w4a8")
    for i, block in enumerate(nemotron.description.blocks):
        p = layer_of(made, i)
        for name, columns in (("in_proj", 64), ("out_proj", block.width)):
            size = 32 if columns % 32 == 0 else 16
            assert p[f"{name}.group_scale"].shape == (len(p[f"{name}.packed"]), columns // size)
    recipe = METHODS["edge-w4a8"]
    assert recipe.for_columns(64) == recipe
    assert recipe.for_columns(72) == recipe  # none fits: the quantizer says so


@pytest.mark.parametrize("method", ["edge-w8a8", "edge-w4a8", "had-w8a8", "fp16"])
def test_biases_of_linear_layers(nemotron: FloatModel, method: str) -> None:
    """A large bias is kept, rotated as the stream is; the mean correction is added to it."""
    model = hybrid(with_biases(nemotron.description))
    with torch.no_grad():
        for layer in model.layers:
            layer.in_proj.bias.uniform_(-0.5, 0.5)
            layer.out_proj.bias.uniform_(-2, 2)
    made = quantized(model, method)
    for i in range(model.description.n_layer):
        p, source = layer_of(made, i), model.layers[i]
        assert torch.equal(p["in_proj.bias"], source.in_proj.bias)
        wanted = source.out_proj.bias.detach().double()
        if made.recipe.quantized:
            wanted = hadamard.transform(wanted)
        assert relative_error(p["out_proj.bias"], wanted) < 0.1
        corrects = made.recipe.correction != "none"
        assert torch.equal(p["out_proj.bias"], wanted.float()) is not corrects
    ids = random_ids(2, TOKENS, seed=8)
    with torch.no_grad():
        expected = model(ids)[0]
    found = made.model.forward(ids, keep=TOKENS)[0]
    bound = BOUNDS.get(method, BOUNDS["w4a8" if "w4a8" in method else "w8a8"])
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (Mlp, {"hidden": 8, "activation": "gelu"}, "activation must be relu2 or swiglu"),
        (Attention, {"n_heads": 4, "n_kv_heads": 3, "head_dim": 8}, "4 heads cannot share"),
        (
            Attention,
            {"n_heads": 4, "n_kv_heads": 2, "head_dim": 9, "rope_theta": 1e4},
            "rotary positions turn pairs, and head_dim = 9",
        ),
        (Mamba2, {"d_inner": 64, "gate_norm": "last"}, "gate_norm must be one of grouped, norm"),
    ],
)
def test_sizes_that_do_not_fit(kind: type[Block], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        kind(**sizes)


def test_sizes_without_a_kernel_are_named() -> None:
    """In the sentence that a build for a board ends with."""
    mamba = {"headdim": 64, "d_state": 128}
    heads = {"n_heads": 40, "n_kv_heads": 8}
    parallel = Parallel(Mamba2(d_inner=1536, **mamba), Attention(head_dim=64, **heads))
    for misfit, words in (
        (Mlp(hidden=144).misfit(), "hidden is 144, .* multiples of 32 up to 16384"),
        (Mlp(hidden=20480).misfit(), "hidden is 20480, .*"),
        (Attention(head_dim=256, **heads).misfit(), "head_dim is 256, .* 64, 80, 96, 128"),
        (Mamba2(d_inner=20480, **mamba).misfit(), "d_inner is 20480, .*"),
        (
            dataclasses.replace(parallel, mamba=Mamba2(d_inner=64, **SSM)).misfit(),
            "d_state is 16, .*",
        ),
        (
            dataclasses.replace(parallel, mamba=Mamba2(d_inner=15360, **mamba)).misfit(),
            "attention together is 17920, .*",
        ),
    ):
        with pytest.raises(UsageError, match=rf"the model's .*{words} on a board; go"):
            require_kernels(misfit, "a board", "go on.")


def test_sizes_of_the_families_have_kernels() -> None:
    """Of every published model; the three gates stand for each other."""
    blocks: list[Block] = [
        *(Mlp(hidden=n) for n in (12544, 15680)),
        *(Mlp(hidden=n, activation="swiglu") for n in (2048, 3072, 4096, 4608, 6144, 8192)),
        *(
            Attention(n_heads=heads, n_kv_heads=kv, head_dim=d)
            for heads, kv, d in ((40, 8, 128), (12, 4, 64), (32, 8, 64), (6, 2, 128))
        ),
        *(
            Mamba2(d_inner=n, headdim=p, d_state=128, gate_norm=gate, ngroups=8)
            for n, p in ((1536, 32), (3072, 64), (4096, 128), (7680, 80), (10240, 80))
            for gate in ("grouped", "norm_first", "none")
        ),
    ]
    assert [block for block in blocks if block.misfit()] == []
    # A norm alone rotates nothing.
    assert all(width_misfit("d_model", n) is None for n in (768, 3136, 4480))
