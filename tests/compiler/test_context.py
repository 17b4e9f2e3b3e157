"""A model with a state that grows, from its blocks to a bundle that runs: `support/toy` has one.

The kind `recall` gives the mean over all tokens so far. Everything that a cache needs is here: the
position, room for the context, and an end where the context is full.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import torch
from commands import assert_one_sentence, ssdi8
from conftest import make_config, make_model
from safetensors.torch import save_file
from tiny_model import byte_tokenizer, one_thread, write_model, write_text
from typer.testing import CliRunner

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import Backend, BackendOptions
from runtime.backends.tensorrt import TensorRtBackend
from runtime.bundle import Bundle, open_bundle
from runtime.command_line import run as run_engine
from runtime.command_line import run_build
from runtime.problems import BundleProblem
from runtime.session import Session
from ssdi8_edge import ops
from ssdi8_edge.checkpoints import layouts
from ssdi8_edge.checkpoints.quantized import load_quantized
from ssdi8_edge.cli import app
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import open_subject
from ssdi8_edge.ground.errors import BundleError, UsageError
from ssdi8_edge.models import kinds
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds import kind_named
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import Target, load_target

TOY = Path(__file__).parents[1] / "support" / "toy"
CONTEXT = 48
CHUNK = 16
GOLDEN = 2 * CHUNK + 3

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(autouse=True, scope="module")
def toy_files() -> Iterator[None]:
    """As if they lay in the folders of the package; `OPS` looked there before."""
    with pytest.MonkeyPatch.context() as patch:
        for name, package in {"kinds": kinds, "ops": ops, "layouts": layouts}.items():
            patch.setattr(package, "__path__", [*package.__path__, str(TOY / name)])
        op = importlib.import_module("ssdi8_edge.ops.running_mean").RUNNING_MEAN
        patch.setitem(ops.OPS, op.name, op)
        yield


def recall(hidden: int) -> Any:
    return kind_named("recall").from_dict({"hidden": hidden})


def mixed() -> Description:
    blocks = (make_config(chunk_size=CHUNK).blocks[0], recall(64), recall(96))
    return Description(d_model=64, vocab_size=256, blocks=blocks)


def exact() -> Description:
    """Without Mamba-2, whose state is rounded between two calls."""
    return Description(d_model=64, vocab_size=256, blocks=(recall(64), recall(96)))


MODELS = {"mixed": mixed, "exact": exact}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def checkpoints(scene: Path) -> dict[str, Path]:
    found = {}
    for name, describe in MODELS.items():
        found[name] = folder = scene / name
        folder.mkdir()
        blocks = [block.to_dict() for block in describe().blocks]
        config = {"width": 64, "vocabulary": 256, "toy_blocks": blocks}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = make_model(describe()).state_dict()
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    return found


def host(**changes: Any) -> Target:
    return load_target("host-cpu").model_copy(update={"context": CONTEXT, **changes})


def request(scene: Path, model: Path, method: str, target: Target, name: str) -> BuildRequest:
    text = write_text(scene / "text.txt", size=300)
    return BuildRequest(str(model), METHODS[method], target, scene / name, text)


@pytest.fixture(scope="module")
def run(scene: Path, checkpoints: Mapping[str, Path]) -> Path:
    """A run folder with a bundle that the build has verified."""
    asked = request(scene, checkpoints["mixed"], "edge-w8a8", host(), "run")
    Build(asked).run()
    return asked.out


@pytest.fixture(scope="module")
def exact_run(scene: Path, checkpoints: Mapping[str, Path]) -> Path:
    """With an INT8 head: sums of an FP16 one come in an order that depends on the rows."""
    asked = request(scene, checkpoints["exact"], "edge-w8a8", host(), "exact-run")
    asked = dataclasses.replace(asked, recipe=asked.recipe.choosing(lm_head="w8_row"))
    Build(asked).run()
    return asked.out


@pytest.fixture
def bundle(run: Path) -> Bundle:
    return open_bundle(run / "bundle")


def random_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (batch, length)).astype(np.int32)


# --------------------------------------------------------------------------------------------------
# numbers


def test_states_have_the_context(bundle: Bundle) -> None:
    """In the manifest, and so in the runtime; the checkpoint knows of none."""
    fields = bundle.manifest["interface"]
    assert fields["context"] == bundle.model.context == CONTEXT
    updates = {state["name"]: state["update"] for state in fields["states"]}
    assert updates == {
        **dict.fromkeys(("conv_state.0", "ssm_state.0"), "replace"),
        **dict.fromkeys(("value_cache.1", "value_cache.2"), "append"),
    }
    assert bundle.model.states["value_cache.2"].shape == (1, CONTEXT, 96)
    assert bundle.model.cache_bytes() == CONTEXT * (64 + 96) * 2
    assert Description.from_dict(bundle.manifest["model"]).context == CONTEXT
    assert load_quantized(bundle.root.parent / "quantized").description.context == 0


def test_pieces_and_steps_are_the_whole(exact_run: Path) -> None:
    """Bit for bit, in torch and in onnxruntime, of a batch of two."""
    ids = random_ids(2, CONTEXT)
    model, session = load_quantized(exact_run / "quantized"), backend_session(exact_run)
    tensor = torch.from_numpy(ids)
    whole, _ = model.forward(tensor, None, CONTEXT)
    parts = [slice(0, 30), slice(30, 45), *(slice(i, i + 1) for i in range(45, CONTEXT))]
    states, found = None, []
    for part in parts:
        logits, states = model.forward(
            tensor[:, part], states, part.stop - part.start, position=part.start
        )
        found.append(logits)
    assert torch.equal(torch.cat(found, 1), whole)

    wanted, _ = session.prefill(ids, CONTEXT)
    np.testing.assert_array_equal(wanted, whole.numpy())
    carried = None
    for part in parts:
        logits, carried = session.prefill(ids[:, part], part.stop - part.start, carried, part.start)
        np.testing.assert_array_equal(logits, whole[:, part].numpy())


def backend_session(run: Path) -> Session:
    bundle = open_bundle(run / "bundle")
    return Session(bundle, OnnxRuntimeBackend(bundle, threads=1))


def test_room_that_is_not_used_changes_nothing(exact_run: Path) -> None:
    ids = torch.from_numpy(random_ids(1, 20))
    narrow, wide = (load_quantized(exact_run / "quantized", context=n) for n in (20, 300))
    (want, want_states), (got, got_states) = (m.forward(ids, None, 20) for m in (narrow, wide))
    assert torch.equal(got, want)
    assert got_states[1][0].shape[2] == 300
    assert torch.equal(got_states[1][0][:, :, :20], want_states[1][0])


def test_the_bundle_computes_the_bits_of_the_reference(run: Path, bundle: Bundle) -> None:
    """Mixed with Mamba-2: the same calls give the same bits, prefill and decode."""
    model, session = load_quantized(run / "quantized"), backend_session(run)
    ids = random_ids(2, 36)
    states, carried = None, None
    for start, end in [(0, 32), (32, 35), (35, 36)]:
        part = torch.from_numpy(ids[:, start:end])
        want, states = model.forward(part, states, end - start, position=start)
        got, carried = session.prefill(ids[:, start:end], end - start, carried, start)
        np.testing.assert_array_equal(got, want.numpy())
    for name, state in model.named_states(states).items():
        found = np.asarray(carried[name])
        if bundle.model.states[name].grows:
            assert found.shape[2] == CONTEXT
            found = found[:, :, :36]
        np.testing.assert_array_equal(found, state.numpy())


def test_the_quantized_model_is_near_the_checkpoint(
    checkpoints: Mapping[str, Path], run: Path
) -> None:
    ids = torch.from_numpy(random_ids(1, 40)).long()
    wanted, found = (
        open_subject(str(each)).logits(ids) for each in (checkpoints["mixed"], run / "quantized")
    )
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_golden_vectors_hold_the_rows_that_were_written(bundle: Bundle) -> None:
    with np.load(bundle.path("golden.npz")) as golden:
        assert golden["value_cache.1"].shape == (1, 1, GOLDEN, 64)


class Corrupting:
    """A backend that spoils one row of a cache."""

    def __init__(self, backend: Backend, row: int) -> None:
        self._backend, self._row = backend, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        logits, states = self._backend.forward(*arguments, **named)
        states = {name: np.array(state) for name, state in states.items()}
        states["value_cache.2"][:, :, self._row] += 1
        return logits, states


def test_verifying_finds_a_cache_that_is_not_right(bundle: Bundle) -> None:
    from runtime.verify import compare_with_golden

    session = backend_session(bundle.root.parent)
    assert all(each.agrees for each in compare_with_golden(session))
    spoilt = Session(bundle, Corrupting(session.backend, 7))
    differing = [each.name for each in compare_with_golden(spoilt) if not each.agrees]
    assert differing[0] == "value_cache.2"
    assert "layers.2/Linear (in_proj)" in bundle.model.states["value_cache.2"].suspects


def test_verifying_finds_positions_that_are_not_right(bundle: Bundle) -> None:
    from runtime.verify import compare_with_golden

    class Stuck(Corrupting):
        def forward(self, ids: Any, states: Any, keep: int = 1, position: int = 0) -> Any:
            return self._backend.forward(ids, states, keep, 0)

    session = backend_session(bundle.root.parent)
    spoilt = Session(bundle, Stuck(session.backend, 0))
    differing = [each.name for each in compare_with_golden(spoilt) if not each.agrees]
    assert differing[0] == "decode_logits[0]"


# --------------------------------------------------------------------------------------------------
# the end of the context


def generated(bundle: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run_engine([str(bundle), "--json", "--threads", "1", *words], bundle) == 0
    return json.loads(capsys.readouterr().out)


def test_an_answer_ends_where_the_context_is_full(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same tokens as before, and one sentence that says why."""
    prompt = ["--prompt", "a" * 40, "--max-new-tokens"]
    short = generated(run / "bundle", capsys, *prompt, "5")
    assert short["notes"] == [] and len(short["tokens"]) == 5
    full = generated(run / "bundle", capsys, *prompt, "100")
    assert (full["finish"], len(full["tokens"])) == ("length", CONTEXT - 40)
    assert full["tokens"][:5] == short["tokens"]
    (note,) = full["notes"]
    assert note.startswith(f"the context of {CONTEXT} tokens is full; ") and "--context" in note
    plain = [str(run / "bundle"), "--threads", "1", *prompt, "100"]
    assert run_engine(plain, run) == 0
    assert note in capsys.readouterr().err


def test_the_last_token_of_the_context_counts(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt that fills it has one token after it, which nothing can follow."""
    found = generated(run / "bundle", capsys, "--prompt", "b" * CONTEXT)
    assert len(found["tokens"]) == 1 and found["finish"] == "length"


def test_a_prompt_beyond_the_context_is_refused(run: Path) -> None:
    refused = ssdi8("run", run, "--prompt", "b" * (CONTEXT + 1))
    assert_one_sentence(refused, ["49 tokens", f"is {CONTEXT} tokens", "--context 49"])


def test_an_interactive_conversation_ends_where_the_context_is_full(run: Path) -> None:
    """A line that is too long for what is left is named and left out."""
    lines = f"{'a' * 20}\n{'b' * 40}\nccc\nddd\nnever read\n"
    done = ssdi8(
        *("run", run, "--interactive", "--json", "--max-new-tokens", "8", "--threads", "1"),
        input=lines,
    )
    assert done.returncode == 0, done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    counts = [(turn["prompt"][0], len(turn["tokens"])) for turn in turns]
    assert counts == [("a", 8), ("c", 8), ("d", 4)]
    said = [line for line in done.stderr.splitlines() if line.startswith("run_engine: ")]
    assert "the prompt has 41 tokens behind the 28 of this conversation" in said[0]
    assert f"the context of {CONTEXT} tokens is full" in said[-1]
    assert turns[-1]["finish"] == "length"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--bench", "--seq-lens", "16,40", "--new-tokens", "9"], "40 tokens and 9 new"),
        (["--profile", "--seq-lens", "48"], "48 tokens and a new one"),
    ],
)
def test_measuring_beyond_the_context_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert run_engine([str(run / "bundle"), *words], run) == 2
    said = capsys.readouterr()
    assert said.out == "" and named in said.err and "--seq-lens" in said.err
    assert f"is {CONTEXT} tokens" in said.err and said.err.count("\n") == 1


def test_measuring_up_to_the_context(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--bench", "--seq-lens", "40", "--new-tokens", "8", "--repeat", "1", "--warmup", "0"]
    record = generated(run / "bundle", capsys, *words)
    assert len(record["repeats"][0]["token_s"]) == 7
    words = ["--profile", "--seq-lens", "47", "--repeat", "1", "--warmup", "0"]
    (_, decode) = generated(run / "bundle", capsys, *words)["phases"]
    parts = {module["module"]: module["part"] for module in decode["modules"]}
    assert (parts["RunningMean"], parts["SsdScan"]) == ("", "SSD")


def test_a_sweep_and_a_profile_beyond_the_context_are_refused(run: Path) -> None:
    from ssdi8_edge.boards.sweep.measuring import open_source

    open_source(run, 40, 8)
    with pytest.raises(BundleError, match=r"40 tokens and 9 new .* is 48 tokens"):
        open_source(run, 40, 9)


def test_info_and_inspect_show_the_context(
    run: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    found = generated(run / "bundle", capsys, "--info")
    assert found["context"] == CONTEXT
    assert found["state_bytes_per_sequence"] == bundle.model.state_bytes()
    shown = CliRunner().invoke(app, ["inspect", str(run)])
    assert shown.exit_code == 0 and f"context {CONTEXT} tokens" in shown.output
    assert "blocks 1 mamba2, 2 recall" in shown.output


# --------------------------------------------------------------------------------------------------
# building


def test_another_context_exports_anew(
    scene: Path, checkpoints: Mapping[str, Path], run: Path
) -> None:
    """Nothing before the graph depends on it."""
    wider = request(scene, checkpoints["mixed"], "edge-w8a8", host(context=64), "run")
    plan = {"calibrate": "reuse", "quantize": "reuse", "export": "run", "bundle": "run"}
    assert Build(wider).plan() == plan


def test_a_context_that_verifying_does_not_fit_into_is_refused(
    scene: Path, checkpoints: Mapping[str, Path]
) -> None:
    small = request(scene, checkpoints["mixed"], "edge-w8a8", host(context=38), "never")
    with pytest.raises(UsageError, match=r"38 tokens is less than the 39 .* --context 39"):
        Build(small)
    just = dataclasses.replace(small, target=host(context=39))
    assert Build(just).context == 39


def test_pure_mamba_ignores_it(tmp_path: Path) -> None:
    """Another context makes nothing anew."""
    model = write_model(tmp_path / "pure")
    recipe, out = METHODS["edge-w8a8"], tmp_path / "run"
    builds = [Build(BuildRequest(str(model), recipe, host(context=n), out)) for n in (5, 4096)]
    assert builds[0].context is builds[1].context is None
    assert builds[0].keys == builds[1].keys


def test_a_context_of_nothing_is_refused() -> None:
    shown = CliRunner().invoke(app, ["build", "--context", "0"])
    assert shown.exit_code == 2 and "--context" in shown.output


# --------------------------------------------------------------------------------------------------
# evaluating


def test_evaluating_a_bundle_within_its_context(run: Path) -> None:
    """As the torch reference, whose caches grow; what is longer is refused."""
    from ssdi8_edge.evaluate.windows import require_context

    subjects = [open_subject(str(each)) for each in (run / "quantized", run)]
    ids = torch.from_numpy(random_ids(1, CONTEXT)).long()
    want, got = (each.logits(ids) for each in subjects)
    assert torch.equal(got, want)
    want_step, got_step = (each.sequence() for each in subjects)
    for part in ids.split(16, 1):
        assert torch.equal(got_step(part), want_step(part))
    require_context(subjects, CONTEXT, "a window")
    with pytest.raises(UsageError, match=r"a window takes 49; build it with --context 49"):
        require_context(subjects, CONTEXT + 1, "a window")
    with pytest.raises(BundleProblem, match="48 tokens"):
        got_step(ids[:, :1])


def test_a_text_longer_than_the_context_is_refused(run: Path) -> None:
    refused = ssdi8("evaluate", run, "--text", run.parent / "text.txt")
    assert_one_sentence(refused, ["context of 48 tokens", "text.txt takes", "--context"])


# --------------------------------------------------------------------------------------------------
# TensorRT, on stand-ins


@pytest.fixture(scope="module")
def board_bundle(scene: Path, checkpoints: Mapping[str, Path]) -> Path:
    """Of the FP16 baseline, whose graph is of standard ops, which the stand-in computes."""
    target = load_target("orin-nx").model_copy(update={"context": CONTEXT})
    engine = target.engine.model_copy(update={"batch": [1, 1, 2]})
    target = target.model_copy(update={"engine": engine})
    asked = request(scene, checkpoints["mixed"], "fp16", target, "board")
    Build(asked).run()
    folder = scene / "on-board"
    shutil.copytree(asked.out / "bundle", folder)
    return folder


def test_tensorrt_grows_states_in_place(board_bundle: Path) -> None:
    """Prefill, steps by graphs and a second conversation, of one sequence and of two."""
    bundle = open_bundle(board_bundle)
    reference = OnnxRuntimeBackend(bundle, threads=1)
    with fake_tensorrt.installed() as (cuda, _):
        assert run_build(["--json", "--no-memory-check"], board_bundle) == 0
        backend = TensorRtBackend(bundle, BackendOptions())
        for batch in (1, 2, 1):
            ids = random_ids(batch, 40 + batch)
            got, states = Session(bundle, backend).prefill(ids[:, :35])
            want, carried = Session(bundle, reference).prefill(ids[:, :35])
            np.testing.assert_allclose(got, want, atol=2e-2)
            for step in range(35, ids.shape[1]):
                token = ids[:, step : step + 1]
                got, states = backend.forward(token, states, position=step)
                want, carried = reference.forward(token, carried, position=step)
                np.testing.assert_allclose(got, want, atol=2e-2)
            assert list(states) == list(bundle.model.states)
            cache = np.asarray(states["value_cache.2"])
            np.testing.assert_allclose(cache, carried["value_cache.2"], atol=2e-2)
            assert np.any(cache[:, :, step]) and not np.any(cache[:, :, step + 1 :])
            addresses = backend._addresses(0)
            for name, state in bundle.model.states.items():
                assert (addresses[name] == addresses[state.output]) == state.grows
        assert cuda.launches > 0
        backend.close()
        assert cuda.leaks() == []


def test_an_engine_that_reads_the_position_on_the_host_is_refused(
    board_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorRT takes it where standard ops make shapes of it."""

    class Host(fake_tensorrt._Tensor):
        def __init__(self, value: Any) -> None:
            super().__init__(value)
            self.is_shape_tensor = not self.shape

    monkeypatch.setattr(fake_tensorrt, "_Tensor", Host)
    with fake_tensorrt.installed():
        capsys.readouterr()
        assert run_build(["--force", "--no-memory-check"], board_bundle) == 2
    assert "a state that grows by an op without a plugin" in capsys.readouterr().err


def test_an_interrupted_step_is_repeated_at_its_position(board_bundle: Path) -> None:
    bundle = open_bundle(board_bundle)
    with fake_tensorrt.installed() as (cuda, _):
        run_build(["--json", "--no-memory-check"], board_bundle)
        backend = TensorRtBackend(bundle, BackendOptions())
        ids = random_ids(1, 12)
        expected = []
        for interrupt in (False, True):
            _, states = backend.forward(ids[:, :8], backend.zero_states(1))
            for step in range(8, 12):
                token = ids[:, step : step + 1]
                if interrupt:
                    cuda.interrupt_next_wait = True
                    with pytest.raises(KeyboardInterrupt):
                        backend.forward(token, states, position=step)
                logits, states = backend.forward(token, states, position=step)
                if interrupt:
                    np.testing.assert_array_equal(logits, expected[step - 8])
                else:
                    expected.append(logits.copy())
        backend.close()
