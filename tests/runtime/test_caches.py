"""Bundles of models with attention: caches and positions; `test_context` has where they end.

One build of a tiny hybrid serves all of it; onnxruntime computes, also under the stand-in for
TensorRT, and the torch reference is what it must agree with bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import torch
from hybrid_builds import CONTEXT, build_hybrid, for_board, request, toy_layout
from serving import Served
from tiny_model import one_thread

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions, States
from runtime.backends.tensorrt import TensorRtBackend
from runtime.bundle import Bundle, open_bundle
from runtime.command_line import run as run_engine
from runtime.command_line import run_build
from runtime.files import sha256
from runtime.session import Session
from runtime.text import TextCodec
from runtime.verify import relative_error
from ssdi8_edge.checkpoints.quantized import load_quantized
from ssdi8_edge.compile.pipeline import Build
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.models.network import QuantizedModel

__all__ = ["one_thread", "toy_layout"]  # fixtures, taken over
VOCAB = 256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hybrid(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return run / "bundle"


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return open_bundle(folder)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Session:
    return Session(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.fixture(scope="module")
def model(run: Path) -> QuantizedModel:
    return load_quantized(run / "quantized")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def engine(capsys: pytest.CaptureFixture[str]) -> Command:
    """run_engine.py in this process: exit code, stdout, stderr."""

    def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_engine([str(folder), *arguments], folder)
        return code, *capsys.readouterr()

    return command


def random_ids(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def in_pieces(
    session: Session, ids: np.ndarray, lengths: Sequence[int]
) -> tuple[np.ndarray, States]:
    """Logits of all positions, and the last states."""
    states, position, found = None, 0, []
    for length in lengths:
        part = ids[:, position : position + length]
        logits, states = session.prefill(part, length, states, position)
        found.append(logits.copy())
        position += length
    assert states is not None
    return np.concatenate(found, 1), states


def torch_in_pieces(
    model: QuantizedModel, ids: np.ndarray, lengths: Sequence[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    states, position, found = None, 0, []
    for length in lengths:
        part = torch.from_numpy(ids[:, position : position + length])
        logits, states = model.forward(part, states, length, position=position)
        found.append(logits.numpy())
        position += length
    assert states is not None
    named = {name: state.numpy() for name, state in model.named_states(states).items()}
    return np.concatenate(found, 1), named


# --------------------------------------------------------------------------------------------------
# what it computes


def test_the_manifest_says_what_grows(bundle: Bundle) -> None:
    grown = {name: state for name, state in bundle.model.states.items() if state.grows}
    kinds = ("k_cache", "k_scale", "v_cache", "v_scale")
    assert list(grown) == [f"{kind}.{i}" for i in (1, 3) for kind in kinds]
    assert bundle.model.context == CONTEXT
    assert {state.shape[:2] for state in grown.values()} == {(2, CONTEXT)}
    assert grown["k_cache.1"].dtype == np.int8 and grown["v_scale.3"].dtype == np.float16
    assert bundle.model.cache_bytes() == 2 * 2 * 2 * CONTEXT * (16 + 2)


@pytest.mark.parametrize("lengths", [[45], [16, 29], [32, 5, 8], [16] + [1] * 12, [CONTEXT]])
@pytest.mark.parametrize("batch", [1, 2])
def test_torch_and_onnxruntime_agree_bit_for_bit(
    session: Session, model: QuantizedModel, lengths: list[int], batch: int
) -> None:
    """Whole, in pieces and step by step; torch's caches are as long as the text.

    Only lm_head, in FP16, may add in another order.
    """
    ids = random_ids(batch, sum(lengths))
    logits, states = in_pieces(session, ids, lengths)
    wanted, wanted_states = torch_in_pieces(model, ids, lengths)
    assert relative_error(logits, wanted) < 1e-4
    for name, value in wanted_states.items():
        got = np.asarray(states[name])
        if session.bundle.model.states[name].grows:
            assert not got[:, :, len(ids[0]) :].any() and value.shape[2] == len(ids[0])
            got = got[:, :, : len(ids[0])]
        np.testing.assert_array_equal(got, value)


def test_a_prompt_gives_the_same_whole_in_pieces_and_step_by_step(session: Session) -> None:
    """But for Mamba-2's states, which are rounded between calls."""
    ids = random_ids(2, 45)
    whole, _ = in_pieces(session, ids, [45])
    pieces, states = in_pieces(session, ids, [16, 16, 13])
    steps, _ = in_pieces(session, ids, [1] * 45)
    assert relative_error(pieces, whole) < 0.01
    assert relative_error(steps, whole) < 0.05
    # As the runtime cuts it, where a call takes less.
    short = Session(dataclasses.replace(session.bundle, max_tokens=16), session.backend)
    cut, cut_states = short.prefill(ids, 13)
    np.testing.assert_array_equal(cut, pieces[:, -13:])
    for name, value in states.items():
        np.testing.assert_array_equal(value, cut_states[name])


def test_sequences_of_a_batch_are_apart(session: Session) -> None:
    ids = random_ids(2, 30)
    both, _ = in_pieces(session, ids, [16, 13, 1])
    for row in range(2):
        alone, _ = in_pieces(session, ids[row : row + 1], [16, 13, 1])
        np.testing.assert_array_equal(alone[0], both[row])


def test_the_baseline_has_a_cache_in_fp16(tmp_path: Path) -> None:
    """Its bundle is verified by onnxruntime as it is made."""
    bundle = open_bundle(build_hybrid(tmp_path, "fp16") / "bundle")
    grown = [name for name, state in bundle.model.states.items() if state.grows]
    assert grown == [f"{kind}_cache.{i}" for i in (1, 3) for kind in "kv"]


# --------------------------------------------------------------------------------------------------
# verify


def test_verify_names_the_block(folder: Path, tmp_path: Path, engine: Command) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    golden = dict(np.load(copy / "golden.npz"))
    assert golden["k_cache.1"].shape == (1, 2, golden["input_ids"].shape[1], 16)
    golden["k_cache.1"] = golden["k_cache.1"][:, ::-1]
    np.savez(copy / "golden.npz", **golden)
    manifest = json.loads((copy / "manifest.json").read_text())
    made = copy / "golden.npz"
    manifest["files"]["golden.npz"] = {"sha256": sha256(made), "bytes": made.stat().st_size}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = engine(copy, "--verify", "--json")
    report = json.loads(out)
    assert code == 1
    assert "layer 1: k_cache" in report["problem"]
    assert "layers.1/Attention" in report["suspects"]


# --------------------------------------------------------------------------------------------------
# conversations


def test_a_conversation_goes_on_like_one_text(session: Session) -> None:
    """Its tokens are counted: what it says is what the whole text leads to."""
    ids = random_ids(1, 20)

    def greedy(logits: np.ndarray) -> int:
        return int(logits.argmax())

    talk = session.conversation()
    first = [step.token for step in talk.generate(ids[:, :16], greedy, 4, ())]
    rest = [step.token for step in talk.generate(ids[:, 16:], greedy, 4, ())]
    states, tokens = None, []
    for part, position in (
        (ids[:, :16], 0),
        *((np.array([[t]]), 16 + i) for i, t in enumerate(first[:3])),
    ):
        _, states = session.prefill(part.astype(np.int32), 1, states, position)
    part, position = np.concatenate([[[first[3]]], ids[:, 16:]], 1).astype(np.int32), 19
    for _ in range(4):
        logits, states = session.prefill(part, 1, states, position)
        position += part.shape[1]
        tokens.append(greedy(logits[0, -1]))
        part = np.array([[tokens[-1]]], np.int32)
    assert tokens == rest


# --------------------------------------------------------------------------------------------------
# TensorRT's protocol


def test_caches_lie_once_on_a_gpu(folder: Path, session: Session, tmp_path: Path) -> None:
    """One address for input and output, the position beside the token: the same bits, by graphs."""
    board = for_board(folder, tmp_path / "board")
    with fake_tensorrt.installed() as (cuda, _):
        assert run_build(["--json"], board) == 0
        backend = TensorRtBackend(open_bundle(board), BackendOptions())
        try:
            found = Session(open_bundle(board), backend)
            same_pieces = Session(found.bundle, session.backend)
            for batch in (1, 2, 1):
                ids = random_ids(batch, 40, seed=batch)
                logits, states = found.prefill(ids)
                wanted, wanted_states = same_pieces.prefill(ids)
                np.testing.assert_array_equal(logits, wanted)
                for position in range(40, CONTEXT):
                    token = random_ids(batch, 1, seed=position)
                    logits, states = backend.forward(token, states, 1, position)
                    wanted, wanted_states = session.backend.forward(
                        token, wanted_states, 1, position
                    )
                    np.testing.assert_array_equal(logits, wanted)
                assert list(states) == list(wanted_states)
                for name, value in wanted_states.items():
                    np.testing.assert_array_equal(states[name], value)
            assert cuda.launches
        finally:
            backend.close()
        assert cuda.leaks() == []


def test_a_target_whose_engines_lack_an_op_gets_no_bundle(tmp_path: Path) -> None:
    asked = request(tmp_path, "fp16")
    target = asked.target.model_copy(update={"engines": ["kernels"]})
    with pytest.raises(UsageError, match=r"kernels alone, and there is none for the op \w+"):
        Build(dataclasses.replace(asked, target=target)).run()
    assert not (asked.out / "bundle").exists()


# --------------------------------------------------------------------------------------------------
# a server


def test_served_side_by_side_to_the_end_of_the_context(folder: Path, session: Session) -> None:
    """Four at once say what each says alone; a prompt that is held goes on from its cache."""
    pytest.importorskip("uvicorn")
    prompts = [random_ids(1, 20 + i, seed=i)[0].tolist() for i in range(4)]

    def alone(prompt: list[int]) -> list[int]:
        ids = np.array([prompt], np.int32)
        steps = session.generate(ids, lambda logits: int(logits.argmax()), CONTEXT, ())
        return [step.token for step in steps]

    def asked(prompt: list[int], **fields: object) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": CONTEXT - len(prompt)}
        status, answer, _ = server.ask("/v1/completions", {**body, **fields})
        assert status == 200, answer
        return dict(answer)

    with Served(folder, "--parallel=4") as server, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(asked, prompts))
        texts = [answer["choices"][0]["text"] for answer in answers]
        codec = TextCodec(session.bundle)
        assert texts == [codec.decode(alone(prompt)[: CONTEXT - len(prompt)]) for prompt in prompts]
        assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"length"}
        again = asked(prompts[0])
        assert again["choices"][0]["text"] == texts[0]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        status, refused, _ = server.ask("/v1/completions", {"prompt": [1] * (CONTEXT + 1)})
        assert status == 400 and f"{CONTEXT} tokens" in refused["error"]["message"]
