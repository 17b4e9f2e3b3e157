"""The FP reference against the recurrence in float64, and against transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from conftest import mamba, stored_tensors
from torch import Tensor
from torch.nn import functional as F

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import States
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.ops.ssd.float import ssd_chunked, ssd_step

CHUNK = 16
LENGTHS = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
UNLIMITED = (0.0, math.inf)


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def ssd_inputs(length: int, ngroups: int, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    heads, headdim, d_state = 8, 4, 6
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "x": normal(batch, length, heads, headdim),
        "dt_raw": normal(batch, length, heads),
        "dt_bias": normal(heads) - 2.0,
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, ngroups, d_state),
        "C": normal(batch, length, ngroups, d_state),
        "D": normal(heads),
    }


def sequential(
    t: dict[str, Tensor], dt_limit: tuple[float, float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h <- exp(A dt) h + dt x B; y = h C + D x, token by token in float64."""
    t = {name: value.double() for name, value in t.items()}
    batch, length, heads, headdim = t["x"].shape
    per_group = heads // t["B"].shape[2]
    B, C = (t[name].repeat_interleave(per_group, dim=2) for name in "BC")
    h = torch.zeros(batch, heads, headdim, B.shape[-1], dtype=torch.float64)
    h = h if state is None else state.double()
    ys = []
    for i in range(length):
        dt = F.softplus(t["dt_raw"][:, i] + t["dt_bias"]).clamp(*dt_limit)
        decay = torch.exp(dt * t["A"])[..., None, None]
        x = t["x"][:, i]
        h = decay * h + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B[:, i])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, i]) + t["D"][:, None] * x)
    return torch.stack(ys, dim=1), h


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrence(length: int, ngroups: int) -> None:
    inputs = ssd_inputs(length, ngroups)
    want_y, want_state = sequential(inputs, UNLIMITED, None)
    y, state = ssd_chunked(**inputs, chunk_size=CHUNK, dt_limit=UNLIMITED)
    assert relative_error(y, want_y) < 2e-6
    assert relative_error(state, want_state) < 2e-6


@pytest.mark.parametrize("dt_limit", [UNLIMITED, (0.1, 0.3)], ids=["unlimited", "limited"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_continues_a_state(length: int, dt_limit: tuple[float, float]) -> None:
    """A lower bound above zero must not let the padded positions decay the state."""
    inputs = ssd_inputs(length, 2)
    start = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(9))
    want_y, want_state = sequential(inputs, dt_limit, start)
    y, state = ssd_chunked(**inputs, chunk_size=CHUNK, dt_limit=dt_limit, initial_state=start)
    assert relative_error(y, want_y) < 2e-6
    assert relative_error(state, want_state) < 2e-6


@pytest.mark.parametrize("dt_limit", [UNLIMITED, (0.1, 0.3)], ids=["unlimited", "limited"])
@pytest.mark.parametrize("ngroups", [1, 2, 8])
def test_step_equals_recurrence(ngroups: int, dt_limit: tuple[float, float]) -> None:
    inputs = ssd_inputs(1, ngroups)
    start = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(9))
    want_y, want_state = sequential(inputs, dt_limit, start)
    token = {k: v[:, 0] if v.ndim > 1 else v for k, v in inputs.items()}
    y, state = ssd_step(**token, state=start, dt_limit=dt_limit)
    assert relative_error(y, want_y[:, 0]) < 2e-6
    assert relative_error(state, want_state) < 2e-6


def test_extreme_steps_stay_finite() -> None:
    """Steps of 100 decay by exp(-270000) in a chunk; nothing may overflow, backward included."""
    inputs = ssd_inputs(2 * CHUNK, 1)
    inputs["dt_raw"] = inputs["dt_raw"] + 100.0
    inputs["x"].requires_grad_()
    inputs["dt_raw"].requires_grad_()
    want_y, _ = sequential({k: v.detach() for k, v in inputs.items()}, UNLIMITED, None)
    y, _ = ssd_chunked(**inputs, chunk_size=CHUNK, dt_limit=UNLIMITED)
    assert relative_error(y.detach(), want_y) < 2e-6
    y.square().sum().backward()
    for name in ("x", "dt_raw"):
        gradient = inputs[name].grad
        assert gradient is not None and torch.isfinite(gradient).all()


def test_half_precision_inputs_are_computed_in_fp32() -> None:
    inputs = {name: value.bfloat16() for name, value in ssd_inputs(CHUNK + 1, 2).items()}
    want_y, _ = sequential(inputs, UNLIMITED, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd_chunked(**inputs, chunk_size=CHUNK, dt_limit=UNLIMITED)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, want_y) < 2e-6


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("pieces", [[37, 1, 1, 1], [1] * 6, [2, 1, 20, 16, 1, 3]])
def test_pieces_equal_one_prefill(
    pieces: list[int],
    ngroups: int,
    tiny_config: Callable[..., Description],
    tiny_model: Callable[..., FloatModel],
) -> None:
    model = tiny_model(tiny_config(ngroups))
    ids = torch.randint(256, (2, sum(pieces)), generator=torch.Generator().manual_seed(3))
    states: list[States] | None = None
    logits = []
    with torch.no_grad():
        want, want_states = model(ids)
        for piece in ids.split(pieces, dim=1):
            part, states = model(piece, states)
            logits.append(part)
    assert states is not None
    assert relative_error(torch.cat(logits, dim=1), want) < 1e-5
    for state, want_state in zip(states, want_states, strict=True):
        assert relative_error(state[0], want_state[0]) < 1e-5
        assert relative_error(state[1], want_state[1]) < 1e-5


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers(
    ngroups: int,
    tied: bool,
    tiny_config: Callable[..., Description],
    tiny_model: Callable[..., FloatModel],
) -> None:
    """Two chunks and a piece, so that state passing and padding take part."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    config = tiny_config(ngroups, headdim=16, d_state=32, chunk_size=32, tie_embeddings=tied)
    model, block = tiny_model(config), mamba(config)
    oracle = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            vocab_size=config.vocab_size,
            state_size=block.d_state,
            head_dim=block.headdim,
            num_heads=block.nheads,
            n_groups=block.ngroups,
            chunk_size=block.chunk_size,
            tie_word_embeddings=tied,
        )
    ).eval()
    renamed = {
        name.replace("backbone.embedding.", "backbone.embeddings."): tensor
        for name, tensor in stored_tensors(model).items()
    }
    oracle.load_state_dict(renamed)
    ids = torch.randint(256, (2, 77), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = oracle(ids, use_cache=False).logits
        got, _ = model(ids)
    assert relative_error(got, want) < 1e-4


def test_observe_names_shapes_and_silence(
    tiny_config: Callable[..., Description], tiny_model: Callable[..., FloatModel]
) -> None:
    config = tiny_config(2)
    block = tiny_model(config).layers[0]
    residual = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    seen: dict[str, Tensor] = {}

    def observe(name: str, tensor: Tensor) -> None:
        assert name not in seen
        seen[name] = tensor

    with torch.no_grad():
        want, want_state = block(residual)
        got, state = block(residual, observe=observe)
    assert torch.equal(got, want) and torch.equal(state[1], want_state[1])
    assert {name: tuple(t.shape) for name, t in seen.items()} == {
        "u": (2, 20, 64),
        "in_proj": (2, 20, 328),
        "x": (2, 20, 8, 16),
        "B": (2, 20, 2, 16),
        "C": (2, 20, 2, 16),
        "dt": (2, 20, 8),
        "chunk_state": (2, 2, 8, 16, 16),
        "passed_state": (2, 3, 8, 16, 16),
        "y": (2, 20, 8, 16),
        "r": (2, 20, 128),
        "out": (2, 20, 64),
    }
    assert torch.equal(seen["passed_state"][:, -1], state[1])
    assert (seen["dt"] > 0).all()
    torch.testing.assert_close(got, residual + seen["out"])


def test_observed_single_token_equals_step(
    tiny_config: Callable[..., Description], tiny_model: Callable[..., FloatModel]
) -> None:
    block = tiny_model(tiny_config()).layers[0]
    residual = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.no_grad():
        _, state = block(residual[:, :8])
        want, _ = block(residual[:, 8:], state)
        got, _ = block(residual[:, 8:], state, lambda name, _: seen.append(name))
    assert "chunk_state" in seen
    assert relative_error(got, want) < 1e-5


def test_half_precision_block_keeps_an_fp32_residual(
    tiny_config: Callable[..., Description], tiny_model: Callable[..., FloatModel]
) -> None:
    model = tiny_model(tiny_config())
    residual = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, _ = model.layers[0](residual)
        got, state = model.half().layers[0](residual)
    assert got.dtype == state[1].dtype == torch.float32
    assert relative_error(got, want) < 2e-3


def test_gradients_reach_every_parameter(tiny_config: Callable[..., Description]) -> None:
    model = FloatModel(tiny_config(2))
    logits, _ = model(torch.randint(256, (2, 20)))
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_generate_is_greedy(
    tiny_config: Callable[..., Description], tiny_model: Callable[..., FloatModel]
) -> None:
    model = tiny_model(tiny_config())
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    got = model.generate(prompt, 5)
    want = prompt
    with torch.no_grad():
        for _ in range(5):
            want = torch.cat([want, model(want)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, want)


def test_config_sizes_of_the_published_models() -> None:
    """The table of state-spaces sizes: in_proj rows and convolution channels."""
    small, large = Mamba2(d_inner=1536), Mamba2(d_inner=8192, ngroups=8, chunk_size=128)
    assert (small.nheads, sum(small.parts.values()), small.conv_dim) == (24, 3352, 1792)
    assert (large.nheads, sum(large.parts.values()), large.conv_dim) == (128, 18560, 10240)


@pytest.mark.parametrize("dt_limit", [UNLIMITED, (0.001, 0.1)])
def test_config_survives_json(
    dt_limit: tuple[float, float], tiny_config: Callable[..., Description]
) -> None:
    config = tiny_config(2, dt_limit=dt_limit)
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert Description.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model must be a positive integer"),
        ({"blocks": []}, "n_layer must be a positive integer"),
        ({"kind": "mamba9"}, "unknown kind 'mamba9'; this version knows attention, mamba2, mlp"),
        ({"headdim": 48}, "d_inner = 128 is not a multiple of headdim = 48"),
        ({"ngroups": 3}, "8 heads cannot be shared by ngroups = 3"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"n_heads": 8}, "unexpected keyword argument 'n_heads'"),
    ],
)
def test_config_refuses(
    change: dict[str, object], message: str, tiny_config: Callable[..., Description]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fields = tiny_config().to_dict()
        (blocks,) = fields["blocks"]
        blocks |= {k: v for k, v in change.items() if k not in fields}
        Description.from_dict({**fields, **{k: v for k, v in change.items() if k in fields}})
