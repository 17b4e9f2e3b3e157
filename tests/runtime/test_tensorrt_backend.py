"""runtime/backends/tensorrt.py on stand-ins for TensorRT and CUDA that enforce their rules.

Onnxruntime computes underneath, so that real tokens come out: those of the onnxruntime backend.
None of this shows how the real libraries behave; it has not run on a board.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import tiny_bundle  # noqa: F401, puts jetson/ on the path
from fake_cuda import Cuda
from fake_tensorrt import Faults
from tiny_bundle import CHAIN, MAX_TOKENS, PLUGINS, make_board_bundle

from runtime.backends.choose import open_backend
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions, States
from runtime.backends.tensorrt import TensorRtBackend
from runtime.bundle import open_bundle
from runtime.command_line import run, run_build
from runtime.files import sha256
from runtime.machine import Board, Machine
from runtime.problems import BundleProblem, RunFailure
from runtime.session import Session

Fakes = tuple[Cuda, Faults]
JETSON_CLOCK = 918_000_000


def jetson(
    power_mode: str = "15W", gpu_max_hz: int = JETSON_CLOCK, model: str = "Fake Orin NX"
) -> Machine:
    board = Board(model, "36.4.3", power_mode, gpu_max_hz, None)
    return Machine("jetson", "Linux", model, 8, "3.10.12", board)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """The stand-ins, and a machine that is a board. Whatever a test does, nothing is left held."""
    with fake_tensorrt.installed() as (cuda, faults):
        set_machine(monkeypatch, jetson())
        yield cuda, faults
        assert cuda.leaks() == []


def set_machine(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    for module in ("backends.tensorrt", "commands.build", "commands.verify", "commands.bench"):
        monkeypatch.setattr(f"runtime.{module}.this_machine", lambda: machine)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plugins and an engine; tests only read it."""
    folder = make_board_bundle(tmp_path_factory.mktemp("board") / "tiny")
    with fake_tensorrt.installed(), pytest.MonkeyPatch.context() as monkeypatch:
        set_machine(monkeypatch, jetson())
        assert run_build(["--json"], folder) == 0
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A bundle with an engine that a test may spoil; the plan goes on naming the first one."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


@pytest.fixture
def backend(built: Path) -> Iterator[TensorRtBackend]:
    backend = TensorRtBackend(open_bundle(built), BackendOptions())
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(built: Path) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(open_bundle(built), threads=1)


def tokens_of(backend: Any, folder: Path, prompt: np.ndarray, count: int) -> list[int]:
    session = Session(open_bundle(folder), backend)
    steps = session.generate(prompt, lambda x: int(x.argmax()), count, ())
    return [step.token for step in steps]


def random_ids(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (batch, length)).astype(np.int32)


# --------------------------------------------------------------------------------------------------
# what it computes


@pytest.mark.parametrize("length", [1, 2, MAX_TOKENS, MAX_TOKENS + 1, 23])
def test_tokens_are_those_of_the_portable_graph(
    built: Path, backend: TensorRtBackend, reference: OnnxRuntimeBackend, length: int
) -> None:
    """From one token to prompts in pieces, and 12 tokens after each."""
    prompt = random_ids(1, length)
    assert tokens_of(backend, built, prompt, 12) == tokens_of(reference, built, prompt, 12)
    assert tokens_of(backend, built, prompt, 3) == tokens_of(reference, built, prompt, 3)


def test_logits_and_states_of_a_batch(
    built: Path, backend: TensorRtBackend, reference: OnnxRuntimeBackend
) -> None:
    """One sequence, then two, in turns: graphs of another batch are not used."""
    bundle = open_bundle(built)
    for batch in (1, 2, 1, 2):
        ids = random_ids(batch, 9, seed=batch)
        logits, states = Session(bundle, backend).prefill(ids)
        expected, expected_states = Session(bundle, reference).prefill(ids)
        np.testing.assert_array_equal(logits, expected)
        for step in range(6):
            token = random_ids(batch, 1, seed=step)
            logits, states = backend.forward(token, states)
            expected, expected_states = reference.forward(token, expected_states)
            np.testing.assert_array_equal(logits, expected)
        assert list(states) == list(expected_states)
        for name, value in expected_states.items():
            assert states[name].dtype == value.dtype
            np.testing.assert_array_equal(states[name], value)


def test_decode_runs_by_two_graphs(built: Path, backend: TensorRtBackend, fakes: Fakes) -> None:
    """Each direction runs once plainly, is recorded once, and is replayed from then on."""
    cuda, faults = fakes
    tokens_of(backend, built, random_ids(1, 5), 21)  # a prefill and 20 steps
    assert (len(cuda.graphs), cuda.launches) == (2, 18)
    assert (faults.captured_enqueues, faults.enqueues) == (2, 1 + 2 + 2)
    tokens_of(backend, built, random_ids(1, 5), 11)
    assert (len(cuda.graphs), cuda.launches) == (2, 28)
    assert backend.notes == []


@pytest.mark.parametrize("fault", ["refuse_in_capture", "refuse_capture"])
def test_without_graphs_it_runs_all_the_same_and_says_so_once(
    built: Path, backend: TensorRtBackend, reference: OnnxRuntimeBackend, fakes: Fakes, fault: str
) -> None:
    """TensorRT refuses to enqueue while recording, or CUDA refuses to record."""
    cuda, faults = fakes
    setattr(faults if fault == "refuse_in_capture" else cuda, fault, True)
    prompt = random_ids(1, 4)
    assert tokens_of(backend, built, prompt, 9) == tokens_of(reference, built, prompt, 9)
    assert cuda.launches == 0 and cuda.graphs == {}
    (note,) = backend.notes
    assert note.startswith("decode runs without CUDA graphs")


def test_states_of_an_earlier_call_are_refused(backend: TensorRtBackend) -> None:
    """They are overwritten, so that going on from them would compute something else."""
    first = backend.zero_states(1)
    _, second = backend.forward(random_ids(1, 3), first)
    for states in (first, backend_states_after(backend, second)):
        with pytest.raises(ValueError, match="are gone"):
            backend.forward(random_ids(1, 1), states)
        with pytest.raises(ValueError, match="are gone"):
            np.asarray(states["ssm_state.0"])


def backend_states_after(backend: TensorRtBackend, states: States) -> States:
    """`states`, which are not the last any more."""
    backend.forward(random_ids(1, 1), states)
    return states


def test_an_interrupted_call_leaves_its_states_intact(
    backend: TensorRtBackend, reference: OnnxRuntimeBackend, fakes: Fakes
) -> None:
    """Ctrl-C while the GPU works; the same call again gives the right logits."""
    ids, token = random_ids(1, 7), random_ids(1, 1)
    _, states = backend.forward(ids, backend.zero_states(1))
    for _ in range(4):  # plain, then by graph
        fakes[0].interrupt_next_wait = True
        with pytest.raises(KeyboardInterrupt):
            backend.forward(token, states)
        logits, states = backend.forward(token, states)
    _, expected_states = reference.forward(ids, reference.zero_states(1))
    for _ in range(4):
        expected, expected_states = reference.forward(token, expected_states)
    np.testing.assert_array_equal(logits, expected)


def test_a_refused_call_can_be_followed_by_another(
    backend: TensorRtBackend, reference: OnnxRuntimeBackend, fakes: Fakes
) -> None:
    """What was set of the refused one is set anew, even for shapes that were in use before it."""
    ids = random_ids(1, 3)
    expected, _ = reference.forward(ids, reference.zero_states(1))
    backend.forward(ids, backend.zero_states(1))
    fakes[1].refuse_address = True
    with pytest.raises(RunFailure, match="refuses the address"):
        backend.forward(random_ids(1, 4), backend.zero_states(1))
    fakes[1].refuse_address = False
    logits, _ = backend.forward(ids, backend.zero_states(1))
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(("batch", "length"), [(3, 1), (1, MAX_TOKENS + 1), (2, 3)])
def test_shapes_that_the_engine_does_not_take(
    backend: TensorRtBackend, batch: int, length: int
) -> None:
    with pytest.raises(BundleProblem, match=r"the engine takes .* not "):
        states = backend.zero_states(batch if batch == 3 else 1)
        backend.forward(random_ids(batch, length), states)


# --------------------------------------------------------------------------------------------------
# what it frees


def test_closing_frees_everything_and_may_be_repeated(
    backend: TensorRtBackend, built: Path, fakes: Fakes
) -> None:
    tokens_of(backend, built, random_ids(1, 3), 8)
    assert backend.gpu_bytes is not None and backend.gpu_bytes > 1000
    assert fakes[0].leaks() != []
    backend.close()
    assert fakes[0].leaks() == []
    backend.close()


def test_memory_that_runs_out_is_a_sentence_and_nothing_is_kept(built: Path, fakes: Fakes) -> None:
    """At every allocation in turn; the fixture looks for leaks."""
    cuda, _ = fakes
    backend = TensorRtBackend(open_bundle(built), BackendOptions())
    needed = cuda.used()
    backend.close()
    for limit in np.linspace(0, needed - 1, 12).astype(int):
        cuda.memory_limit = int(limit)
        with pytest.raises(BundleProblem, match=r"the GPU has no .* left"):
            TensorRtBackend(open_bundle(built), BackendOptions())
        assert cuda.leaks() == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [("refuse_stream", "no room for a stream"), ("refuse_pinned", "no page-locked memory left")],
)
def test_a_refusal_of_cuda_is_a_sentence_and_nothing_is_kept(
    built: Path, fakes: Fakes, fault: str, words: str
) -> None:
    setattr(fakes[0], fault, True)
    with pytest.raises(BundleProblem, match=words):
        TensorRtBackend(open_bundle(built), BackendOptions())
    assert fakes[0].leaks() == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [("no_context", "cannot create an execution context"), ("refuse_address", "refuses the addr")],
)
def test_a_refusal_of_tensorrt_is_a_sentence(
    built: Path, fakes: Fakes, fault: str, words: str
) -> None:
    setattr(fakes[1], fault, True)
    with pytest.raises(RunFailure, match=words):
        backend = TensorRtBackend(open_bundle(built), BackendOptions())
        try:
            backend.forward(random_ids(1, 2), backend.zero_states(1))
        finally:
            backend.close()


# --------------------------------------------------------------------------------------------------
# which engine it takes


def only_engine(folder: Path) -> Path:
    (engine,) = folder.glob("engine/*/model.engine")
    return engine


def edit_log(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = only_engine(folder).with_name("build_log.json")
        log = json.loads(path.read_text())
        change(log)
        path.write_text(json.dumps(log))

    return edit


def foreign(**requirements: Any) -> Callable[[Path], None]:
    return edit_log(lambda log: log["requirements"].update(requirements))


BAD_ENGINES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "none": (
        lambda f: shutil.rmtree(f / "engine"),
        ["no TensorRT engine yet", "built on the board", "build_engine.py", "--backend onnxrun"],
    ),
    "unreadable log": (
        lambda f: only_engine(f).with_name("build_log.json").write_text("{"),
        ["no TensorRT engine yet", "none that is whole", "build_engine.py"],
    ),
    "half a log": (
        edit_log(lambda log: log["engine"].pop("sha256")),
        ["no TensorRT engine yet", "none that is whole", "build_engine.py"],
    ),
    "a log of other types": (
        edit_log(lambda log: log.update(layers=None)),
        ["no TensorRT engine yet", "none that is whole", "build_engine.py"],
    ),
    "cut short": (
        lambda f: os.truncate(only_engine(f), 20),
        ["has 20 bytes", "build_log.json lists", "build it again"],
    ),
    "gone": (lambda f: only_engine(f).unlink(), ["model.engine is missing", "build it again"]),
    "altered": (
        lambda f: only_engine(f).write_bytes(bytes(only_engine(f).stat().st_size)),
        ["was altered", "build it again"],
    ),
    "another GPU": (
        foreign(gpu="Orin Nano", compute_capability="8.7"),
        ["built for the GPU Orin Nano, here Fake Orin", "build one here"],
    ),
    "another TensorRT": (
        foreign(tensorrt="10.16.2", cuda="13.2"),
        ["TensorRT 10.16.2, here 10.3.0", "CUDA 13.2, here 12.6"],
    ),
    "another graph": (foreign(onnx="0" * 64), ["another version of the graph"]),
    "other weights": (foreign(weights="0" * 64), ["another version of the weights"]),
    "new plugins": (
        lambda f: (f / PLUGINS).write_bytes(b"fake plugins, built again"),
        ["another version of the plugin library"],
    ),
    "no plugins": (
        lambda f: shutil.rmtree(f / "build"),
        ["needs the plugin library", "setup.sh", "--plugins"],
    ),
}


@pytest.mark.parametrize("case", BAD_ENGINES)
def test_an_engine_that_does_not_fit_is_one_sentence(copy: Path, case: str) -> None:
    """Which version or GPU it was built for, and how to build one."""
    # The copy's engine was built with the first bundle's library.
    edit_log(lambda log: log.update(plugins=str(copy / PLUGINS)))(copy)
    spoil, words = BAD_ENGINES[case]
    spoil(copy)
    with pytest.raises(BundleProblem) as caught:
        open_backend(open_bundle(copy), "tensorrt", BackendOptions())
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_a_large_engine_is_hashed_by_verify_only(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing gigabytes takes seconds at each start; --verify looks at every byte."""
    monkeypatch.setattr("runtime.backends.tensorrt.HASHED_AT_LOAD", 10)
    edit_log(lambda log: log["engine"].update(sha256="0" * 64))(copy)
    library = copy / PLUGINS
    TensorRtBackend(open_bundle(copy), BackendOptions(plugins=library)).close()
    with pytest.raises(BundleProblem, match="was altered"):
        TensorRtBackend(open_bundle(copy), BackendOptions(plugins=library, hash_all=True))
    assert run(["--verify", "--plugins", str(copy / PLUGINS)], copy) == 2


def test_an_engine_that_tensorrt_refuses(copy: Path) -> None:
    """Its size and hash are as logged, and still it does not load: TensorRT's reason is told."""
    data = b"FAKEPLAN not a plan"
    only_engine(copy).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_log(lambda log: log.update(engine=entry))(copy)
    with pytest.raises(
        RunFailure, match=r"does not load .* of another version or not whole\); build"
    ):
        TensorRtBackend(open_bundle(copy), BackendOptions())


def test_another_power_mode_is_a_note(
    copy: Path, monkeypatch: pytest.MonkeyPatch, fakes: Fakes
) -> None:
    """It runs, tuned for another state; after a build in this one there is nothing to note."""
    fakes[0].sms = 4
    set_machine(monkeypatch, jetson("MAXN", 1_173_000_000))
    options = BackendOptions(plugins=copy / PLUGINS)
    backend = TensorRtBackend(open_bundle(copy), options)
    backend.close()
    assert [note.split("; ")[0] for note in backend.notes] == [
        "the engine was built for SMs 8, here 4",
        "the engine was built for power mode 15W, here MAXN",
        "the engine was built for GPU clock 918000000, here 1173000000",
    ]
    assert backend.engine is not None and len(backend.engine["differs"]) == 3
    assert run_build([], copy) == 0
    assert len(list(copy.glob("engine/*/model.engine"))) == 2
    for machine, sms in ((jetson("MAXN", 1_173_000_000), 4), (jetson(), 8)):
        set_machine(monkeypatch, machine)
        fakes[0].sms = sms
        backend = TensorRtBackend(open_bundle(copy), options)
        backend.close()
        assert backend.notes == []


def test_an_engine_of_another_board_is_a_note(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To CUDA, the GPU of every Orin has one name: the model of the board tells them apart."""
    set_machine(monkeypatch, jetson(model="Fake Orin Nano"))
    backend = TensorRtBackend(open_bundle(copy), BackendOptions(plugins=copy / PLUGINS))
    backend.close()
    (note,) = backend.notes
    assert note.startswith("the engine was built for the board Fake Orin NX, here Fake Orin Nano")


def test_plugin_libraries_that_do_not_load(copy: Path) -> None:
    for data, words in (
        (b"ELF", "cannot be loaded"),
        (b"fake but empty", "is not a plugin library of ours"),
        (b"fake plugins for 11", r"built for TensorRT 11, this is 10\.3\.0; build it again"),
    ):
        (copy / PLUGINS).write_bytes(data)
        foreign(plugins=sha256(copy / PLUGINS))(copy)
        with pytest.raises(BundleProblem, match=words):
            TensorRtBackend(open_bundle(copy), BackendOptions(plugins=copy / PLUGINS))


# --------------------------------------------------------------------------------------------------
# the scripts


def script(folder: Path, name: str, *arguments: str, **options: Any) -> Any:
    """build_engine.py or run_engine.py of a bundle, on the stand-ins, as a user runs it."""
    command = [sys.executable, fake_tensorrt.__file__, str(folder / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_build_and_run_by_the_scripts(tmp_path: Path) -> None:
    """build_engine.py, then every command of run_engine.py, in their own processes."""
    folder = make_board_bundle(tmp_path / "tiny")
    assert "no TensorRT engine yet" in script(folder, "run_engine.py", "--verify").stderr
    done = script(folder, "build_engine.py")
    assert done.returncode == 0, done.stderr
    assert "building for Fake Orin, 8 SMs" in done.stderr and "built in" in done.stdout
    assert "up to date, kept" in script(folder, "build_engine.py").stdout

    done = script(folder, "run_engine.py", "--prompt", CHAIN, "--max-new-tokens", "25")
    assert done.returncode == 0, done.stderr
    assert done.stdout == CHAIN * 2 + " é\ufffd\n"
    assert "TensorRT 10.3.0 on Fake Orin, 8 SMs" in done.stderr

    done = script(folder, "run_engine.py", "--verify", "--json")
    report = json.loads(done.stdout)
    assert report["verified"], report["problem"]
    tolerances = {entry["name"]: entry["tolerance"] for entry in report["comparisons"]}
    assert len(tolerances) == 9
    assert tolerances["conv_state.1"] == 0.01 and tolerances["logits"] == 0.1

    bench = ["--bench", "--seq-lens", "3,12", "--new-tokens", "6", "--repeat", "2"]
    done = script(folder, "run_engine.py", *bench)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt_tokens"] for record in records] == [3, 12]
    for record in records:
        assert record["runtime"] == "tensorrt" and record["memory"]["gpu_bytes"] > 1000
        assert record["versions"]["tensorrt"] == "10.3.0" and record["versions"]["cuda"] == "12.6"
        assert record["engine"]["built_for"]["gpu"] == "Fake Orin"

    profile = ["--profile", "--seq-lens", "12", "--repeat", "2", "--json"]
    phases = json.loads(script(folder, "run_engine.py", *profile).stdout)["phases"]
    modules = {module["module"] for module in phases[1]["modules"]}
    assert modules >= {"SsdScan", "CausalConv1d", "Linear", "Embedding"}
    nodes = len(phases[1]["layers"])
    # Two pieces of prefill, each node of the fake takes half a millisecond.
    assert phases[0]["seconds"] == pytest.approx(2 * nodes * 0.5e-3)
    assert phases[1]["seconds"] == pytest.approx(nodes * 0.5e-3)

    done = script(folder, "run_engine.py", "--info", "--json")
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["state"] == "whole" and engine["built_for"]["gpu"] == "Fake Orin"
    assert "engine   key" in script(folder, "run_engine.py", "--info").stdout


def test_ctrl_c_frees_everything(built: Path) -> None:
    """In the middle of endless decoding; the driver of the script reports what was left held."""
    command = [sys.executable, fake_tensorrt.__file__, str(built / "run_engine.py")]
    command += ["--prompt", CHAIN, "--max-new-tokens", "1000000", "--plugins", str(built / PLUGINS)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"LEAKS" not in errors and b"Traceback" not in errors and b"tokens/s" in errors


def test_a_bundle_without_plugins(tmp_path: Path) -> None:
    """The FP16 baseline is standard ops: neither the builder nor the runtime asks for a library."""
    folder = make_board_bundle(tmp_path / "tiny", plugins=False)
    assert script(folder, "build_engine.py").returncode == 0
    done = script(folder, "run_engine.py", "--prompt", CHAIN, "--max-new-tokens", "10")
    assert done.stdout == CHAIN + "\n", done.stderr


@pytest.mark.parametrize("module", ["tensorrt", "pycuda"])
def test_missing_library_is_one_sentence(built: Path, module: str) -> None:
    # Undone before the stand-ins go, which would otherwise come back.
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(BundleProblem, match=f"{module} cannot be imported"):
            TensorRtBackend(open_bundle(built), BackendOptions())


def test_tensorrt_of_jetpack_5_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "8.5.2.2")
    with pytest.raises(BundleProblem, match=r"8\.5\.2\.2 is too old.*JetPack 6\.1"):
        TensorRtBackend(open_bundle(built), BackendOptions())
