"""jetson/: what a bundle carries to run itself, driven as a user drives it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_bundle  # puts jetson/ on the path, so it comes first
from onnx import TensorProto, helper
from tiny_bundle import (
    CHAIN,
    MAX_TOKENS,
    SENTENCE,
    SIZES,
    VOCAB,
    assert_one_sentence,
    make_bundle,
    pack,
    run_engine,
    run_json,
)

import runtime
from runtime.answer import Timings
from runtime.backends.choose import open_backend
from runtime.backends.onnxruntime import UNWANTED_OPTIMIZERS, OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions
from runtime.bundle import Bundle, open_bundle
from runtime.files import sha256
from runtime.problems import BundleProblem, RunFailure
from runtime.sampling import Sampler, settings
from runtime.session import Session, prefill_pieces
from runtime.text import REPLACEMENT, TextCodec, TextStream
from runtime.verify import relative_error


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests only read."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(packed, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def bundle(packed: Path) -> Bundle:
    return open_bundle(packed)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, threads=1)


@pytest.fixture(scope="module")
def codec(bundle: Bundle) -> TextCodec:
    return TextCodec(bundle)


# --------------------------------------------------------------------------------------------------
# parts


def test_jetson_imports_only_what_a_board_has() -> None:
    allowed = {*sys.stdlib_module_names, "runtime", "run_engine"}
    allowed |= {"numpy", "onnxruntime", "tensorrt", "pycuda", "tokenizers", "jinja2"}
    allowed |= {"starlette", "uvicorn", "prometheus_client", "llguidance"}  # of a server
    files = list(tiny_bundle.JETSON.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            assert name.split(".")[0] in allowed, f"{file} imports {name}"


def imported(file: Path) -> list[str]:
    """Modules that a file imports at any place; `from runtime import x` is runtime.x."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            folder = module in ("runtime", "runtime.commands")
            names += [f"{module}.{alias.name}" for alias in node.names] if folder else [module]
    return names


def test_imports_of_the_runtime_go_down_its_map() -> None:
    """The map of files in runtime/__init__.py names all of them, users above what they use."""
    root = tiny_bundle.JETSON / "runtime"
    lines = (runtime.__doc__ or "").splitlines()
    place = {}
    for file in root.rglob("*.py"):
        if file.stem != "__init__" and file.parent.name != "commands":
            at = [i for i, line in enumerate(lines) if re.search(rf"(^|  ){file.stem}  ", line)]
            assert len(at) == 1, f"{file.stem} stands {len(at)} times in the map"
            place[".".join(file.relative_to(root.parent).with_suffix("").parts)] = at[0]
    for name, line in place.items():
        folder = name.rpartition(".")[0]
        for other in imported(tiny_bundle.JETSON / f"{name.replace('.', '/')}.py"):
            near = folder != "runtime" and other.startswith(f"{folder}.")
            assert near or place.get(other, line) >= line, f"{name} imports {other}"


def test_commands_are_imported_by_the_command_line_alone() -> None:
    """A command reads options and prints; what two of them need lies elsewhere."""
    for file in (tiny_bundle.JETSON / "runtime").rglob("*.py"):
        if file.stem != "command_line":
            assert not [name for name in imported(file) if name.startswith("runtime.commands")], (
                file
            )


def test_session_closes_its_backend_whatever_happens(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(bundle, BackendOptions(threads=1))
    assert isinstance(session.backend, OnnxRuntimeBackend) and session.load_s > 0
    closed: list[bool] = []
    monkeypatch.setattr(session.backend, "close", lambda: closed.append(True))
    with pytest.raises(RunFailure), session:
        raise RunFailure("it went wrong", "try again")
    assert closed == [True]


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (1, [(0, 1)]),
        (10, [(0, 10)]),
        (11, [(0, 8), (8, 11)]),
        (16, [(0, 8), (8, 16)]),
        (17, [(0, 8), (8, 17)]),
        (19, [(0, 8), (8, 16), (16, 19)]),
    ],
)
def test_prefill_pieces(length: int, pieces: list[tuple[int, int]]) -> None:
    assert prefill_pieces(length, max_tokens=10, multiple=4) == pieces


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("length", "keep"), [(1, 1), (10, 3), (23, 1), (23, 2), (23, 11), (23, 23)]
)
def test_prefill_in_pieces_equals_one_prefill(
    tmp_path: Path, state_dtype: str, length: int, keep: int
) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny", state_dtype))
    backend = OnnxRuntimeBackend(bundle, threads=1)
    ids = np.random.default_rng(2).integers(0, 300, (2, length)).astype(np.int32)
    whole_logits, whole = backend.forward(ids, backend.zero_states(2), keep)
    logits, states = Session(bundle, backend).prefill(ids, keep)
    tolerance = 1e-5 if state_dtype == "fp32" else 2e-3
    assert logits.shape == (2, keep, VOCAB) and logits.dtype == np.float32
    assert relative_error(logits, whole_logits) < tolerance
    for name, value in whole.items():
        assert states[name].dtype == value.dtype == bundle.state_dtypes()[name]
        assert relative_error(states[name], value) < tolerance, name


def test_decode_continues_a_prefill(backend: OnnxRuntimeBackend, bundle: Bundle) -> None:
    ids = np.arange(9, dtype=np.int32)[None]
    whole, _ = backend.forward(ids, backend.zero_states(1))
    _, states = Session(bundle, backend).prefill(ids[:, :8])
    step, _ = backend.forward(ids[:, 8:], states)
    fresh, _ = backend.forward(ids[:, 8:], backend.zero_states(1))
    assert relative_error(step, whole) < 1e-5
    assert relative_error(fresh, whole) > 1e-3  # so the states do matter in this graph


def test_forward_leaves_its_states_intact(backend: OnnxRuntimeBackend) -> None:
    states = backend.zero_states(1)
    backend.forward(np.ones((1, 5), np.int32), states)
    assert not any(value.any() for value in states.values())


def test_onnxruntime_is_kept_from_an_op_that_it_may_lack(tmp_path: Path) -> None:
    """The optimization has the name by which it is switched off."""
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y", "z")
    ]
    nodes = [
        helper.make_node("Transpose", ["y"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["z"]),
    ]
    graph = helper.make_graph(nodes, "product", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for unwanted in ([], UNWANTED_OPTIMIZERS):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=unwanted,
        )
        ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert ("FusedMatMul" in ops) == (not unwanted)


def test_backend_failure_is_a_sentence(backend: OnnxRuntimeBackend) -> None:
    with pytest.raises(RunFailure, match="failed on 3 tokens"):
        backend.forward(np.full((1, 3), VOCAB, np.int32), backend.zero_states(1))


def test_a_conversation_goes_on_where_it_stopped(
    backend: OnnxRuntimeBackend, bundle: Bundle
) -> None:
    """Two turns, the first one left early, give what one run over all of their tokens gives."""
    first, second = np.array([[1, 2, 3]], np.int32), np.array([[7, 8]], np.int32)
    seen: list[np.ndarray] = []

    def sample(logits: np.ndarray) -> int:
        seen.append(logits.copy())
        return int(logits.argmax())

    session = Session(bundle, backend)
    conversation = session.conversation()
    steps = conversation.generate(first, sample, 10, ())
    tokens = [next(steps).token for _ in range(4)]  # the fourth is sampled and not run yet
    steps.close()
    next(conversation.generate(second, sample, 1, ()))
    whole = np.concatenate([first, np.array([tokens], np.int32), second], axis=1)
    expected, _ = session.prefill(whole)
    assert relative_error(seen[-1], expected[0, -1]) < 1e-5
    assert relative_error(seen[-1], session.prefill(second)[0][0, -1]) > 1e-3


def test_generate_ends_after_the_end_token(backend: OnnxRuntimeBackend, bundle: Bundle) -> None:
    tokens = iter([5, 6, 0, 7])
    prompt = np.array([[1, 2]], np.int32)
    steps = list(Session(bundle, backend).generate(prompt, lambda _: next(tokens), 10, end_ids={0}))
    assert [step.token for step in steps] == [5, 6, 0]
    assert all(step.seconds > 0 for step in steps)


def test_timings() -> None:
    timings = Timings.of(7, [0.5, 0.1, 0.3])
    assert (timings.prompt_tokens, timings.ttft_s, timings.tpot_s) == (7, 0.5, 0.2)
    assert timings.tokens_per_s == 5.0
    assert Timings.of(7, [0.5]).tokens_per_s is None
    assert Timings.of(7, []).ttft_s is None


def draw(count: int, logits: np.ndarray, **options: Any) -> list[int]:
    sample = Sampler(len(logits) - 2, **options)
    return [sample(logits) for _ in range(count)]


def test_sampling() -> None:
    logits = np.array([0.0, 3.0, 2.0, 1.0, -1.0, 99.0, 99.0], np.float32)  # the last two: padding
    assert draw(3, logits) == [1, 1, 1]
    free = draw(400, logits, temperature=2.0, seed=3)
    assert free == draw(400, logits, temperature=2.0, seed=3)
    assert free != draw(400, logits, temperature=2.0, seed=4)
    assert set(free) == {0, 1, 2, 3, 4}
    assert set(draw(200, logits, temperature=2.0, top_k=2)) == {1, 2}
    assert set(draw(200, logits, temperature=2.0, top_k=50)) == {0, 1, 2, 3, 4}
    # Probabilities at temperature 1: 0.64, 0.24, 0.09, 0.03, 0.01.
    assert set(draw(200, logits, temperature=1.0, top_p=0.8)) == {1, 2}
    assert set(draw(200, logits, temperature=1.0, top_p=0.9)) == {1, 2, 3}
    assert set(draw(50, logits, temperature=1.0, top_p=0.0)) == {1}
    assert draw(400, logits, temperature=2.0, seed=3, top_p=1.0) == free
    assert draw(20, logits, temperature=1e-310) == [1] * 20
    # Frequencies follow the softmax: exp((3 - 2) / 2) between the two likeliest.
    many = draw(4000, logits, temperature=2.0, top_k=2, seed=5)
    assert many.count(1) / many.count(2) == pytest.approx(np.exp(0.5), rel=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sampling_refuses_logits_that_are_not_numbers(bad: float) -> None:
    with pytest.raises(RunFailure, match="NaN or infinite"):
        Sampler(3)(np.array([0, bad, 1], np.float32))
    assert Sampler(3)(np.array([0, 1, 0, bad], np.float32)) == 1  # padding may hold anything


@pytest.mark.parametrize(
    "text", ["héllo 🙂 日本語 done", "the board", "👩‍👩‍👧 x", " spaces  kept "]
)
def test_stream_gives_whole_characters(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text)[0].tolist()
    stream = TextStream(codec)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces)
    # Nothing is held back longer than needed: each prefix shows all of its complete characters.
    for end in range(1, len(ids) + 1):
        shown = "".join(pieces[:end])
        assert shown == codec.decode(ids[:end]).rstrip(REPLACEMENT)


def test_stream_shows_bytes_that_are_no_text_and_goes_on(codec: TextCodec) -> None:
    lead, space = codec.encode("é")[0].tolist()[0], codec.encode(" ")[0].tolist()[0]
    stream = TextStream(codec)
    assert [stream.add(token) for token in (lead, lead, space)] == ["", REPLACEMENT, "\ufffd "]
    assert stream.add(lead) == ""  # an incomplete end waits
    assert (stream.finish(), stream.finish()) == (REPLACEMENT, "")


def test_sha256_is_checked_for_small_files_at_load_and_for_all_when_asked(copy: Path) -> None:
    weights = copy / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    bundle = open_bundle(copy)
    bundle.check_files(hash_up_to=len(data) - 1)
    with pytest.raises(BundleProblem, match=r"weights\.bin was altered"):
        bundle.check_files(hash_up_to=None)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one piece
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_relative_error_never_passes_nan() -> None:
    a = np.array([3.0, 4.0], np.float16)
    assert relative_error(a, a) == 0
    assert relative_error(a + np.array([0, 0.5]), a) == pytest.approx(0.1)
    assert relative_error(a, np.zeros(2)) == float("inf")
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(a, a[:1]) == float("inf")
    for bad in (np.nan, np.inf):
        assert relative_error(np.array([3, bad]), a) == float("inf")
        assert relative_error(np.array([3, bad]), np.array([3, bad])) == float("inf")


# --------------------------------------------------------------------------------------------------
# generating


def test_text_goes_to_stdout_and_the_rest_to_stderr(packed: Path) -> None:
    result = run_engine(packed, "--prompt", CHAIN, "--max-new-tokens", "25", "--threads", "1")
    assert result.returncode == 0
    # Twenty-five bytes of the ten-byte chain: the last two are the first half of the face.
    assert result.stdout.decode() == CHAIN * 2 + f" é{REPLACEMENT}\n"
    errors = result.stderr.decode()
    for word in ("10 prompt tokens, 25 new", "TTFT", "TPOT", "tokens/s", "cores", "onnxruntime"):
        assert word in errors


def test_json_of_a_run(packed: Path) -> None:
    report = run_json(packed, "--prompt", CHAIN, "--max-new-tokens", "12", "--seed", "5")
    assert list(report) == [
        "bundle", "recipe", "backend", "notes", "machine", "threads", "sampling", "stop", "prompt",
        "text", "tokens", "finish", "prompt_tokens", "kept_tokens", "new_tokens", "load_s",
        "ttft_s", "tpot_s", "tokens_per_s",
    ]  # fmt: skip
    assert report["bundle"] == "tiny--edge-w8a8--host-cpu"
    assert report["recipe"] == "edge-w8a8"
    assert report["backend"] == f"onnxruntime {onnxruntime.__version__} (CPU)"
    assert set(report["machine"]) == {"kind", "platform", "cpu", "cores", "python", "board"}
    assert report["threads"] is None
    assert report["sampling"] == settings({"max_new_tokens": 12, "seed": 5})
    assert report["stop"] == []
    assert (report["prompt"], report["text"]) == (CHAIN, f"{CHAIN} {REPLACEMENT}")
    assert (report["prompt_tokens"], report["new_tokens"], len(report["tokens"])) == (10, 12, 12)
    assert report["finish"] == "length"
    assert report["ttft_s"] > 0 and report["tpot_s"] > 0 and report["load_s"] > 0
    assert report["tokens_per_s"] == pytest.approx(1 / report["tpot_s"])


def test_sampling_is_reproducible_and_never_takes_padding(packed: Path, codec: TextCodec) -> None:
    options = ("--prompt", SENTENCE, "--temperature", "3", "--top-k", "100")
    first = run_json(packed, *options, "--seed", "1")
    assert first["tokens"] == run_json(packed, *options, "--seed", "1")["tokens"]
    assert first["tokens"] != run_json(packed, *options, "--seed", "2")["tokens"]
    assert len(set(first["tokens"])) > 5
    assert max(first["tokens"]) < codec.vocabulary < VOCAB


def test_generation_stops_at_the_end_of_the_text(tmp_path: Path) -> None:
    report = run_json(make_bundle(tmp_path / "tiny", stops=True), "--prompt", "the board")
    assert (report["finish"], report["text"], report["new_tokens"]) == ("stop", "", 0)
    assert report["ttft_s"] > 0 and report["tpot_s"] is None and report["tokens_per_s"] is None


def test_prompt_from_a_file_and_from_stdin(packed: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes((CHAIN + "\n").encode())
    length = ("--max-new-tokens", "10")
    assert run_json(packed, "--prompt-file", str(prompt), *length)["text"] == CHAIN
    piped = run_engine(packed, "--prompt-file", "-", *length, input=CHAIN.encode())
    assert piped.stdout.decode() == CHAIN + "\n"


def test_bundle_can_be_named_from_elsewhere(packed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(tiny_bundle.JETSON / "run_engine.py"),
        str(packed),
        "--info",
        "--json",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=True)
    assert json.loads(result.stdout)["bundle"] == "tiny--edge-w8a8--host-cpu"


def test_console_without_unicode(packed: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = run_engine(packed, "--prompt", "the é", "--max-new-tokens", "9", env=environment)
    assert result.returncode == 0, result.stderr


def start_endless(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "run_engine.py", "--prompt", CHAIN, "--max-new-tokens", "1000000000"]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A suite that itself runs in the background has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_cleanly(packed: Path) -> None:
    with start_endless(packed) as process:
        assert process.stdout is not None
        start = process.stdout.read(50)  # it streams: text arrives while the run goes on
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    text = (start + rest).decode()
    # A character that Ctrl-C cut is shown as such.
    whole = text.removesuffix("\n").removesuffix("\N{REPLACEMENT CHARACTER}")
    assert text.endswith("\n") and (CHAIN * (len(text) // 5 + 1)).startswith(whole)
    assert b"Traceback" not in errors and b"tokens/s" in errors


def test_closed_pipe_ends_quietly(packed: Path) -> None:
    with start_endless(packed) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == b""


# --------------------------------------------------------------------------------------------------
# verify and info


def change_golden(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    change(golden[name])
    np.savez(folder / "golden.npz", **golden)
    pack(folder)


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16"])
def test_verify_passes(tmp_path: Path, state_dtype: str) -> None:
    folder = make_bundle(tmp_path / "tiny", state_dtype)
    result = run_engine(folder, "--verify")
    assert result.returncode == 0, result.stderr.decode()
    assert "golden vectors: 9 tensors agree" in result.stdout.decode()
    report = run_json(folder, "--verify")
    assert list(report) == [
        "bundle", "verified", "problem", "backend", "notes", "machine", "comparisons", "suspects",
    ]  # fmt: skip
    assert report["verified"] is True and report["problem"] is None
    assert [c["name"] for c in report["comparisons"]] == [
        "conv_state.0", "ssm_state.0", "conv_state.1", "ssm_state.1", "logits",
        "decode_logits[0]", "decode_logits[1]", "decode_logits[2]", "decode_logits[3]",
    ]  # fmt: skip
    for entry in report["comparisons"]:
        assert list(entry) == ["name", "relative_error", "tolerance", "agrees"]
        assert entry["agrees"] and entry["relative_error"] < entry["tolerance"] == 1e-3


def test_verify_lets_fp16_sums_differ(tmp_path: Path) -> None:
    """Of the baseline, which has no exact arithmetic: deep states may be further apart."""
    folder = make_bundle(tmp_path / "tiny", "fp32")
    change_golden(folder, "ssm_state.1", lambda array: np.multiply(array, 1.01, out=array))
    assert run_engine(folder, "--verify").returncode == 1
    recipe = json.loads((folder / "manifest.json").read_text())["recipe"]
    pack(folder, recipe={**recipe, "linear": "fp16"})
    tolerances = [c["tolerance"] for c in run_json(folder, "--verify")["comparisons"]]
    assert tolerances == [1e-2] * 3 + [1e-1] * 6


def poison(array: np.ndarray) -> None:
    array.flat[-1] = np.nan


def shift(array: np.ndarray) -> None:
    array *= 1.01


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        ("ssm_state.1", shift, "layer 1: ssm_state"),
        ("conv_state.0", poison, "layer 0: conv_state"),
        ("logits", shift, "logits"),
        ("decode_logits", poison, "decode_logits[3]"),
    ],
)
def test_verify_names_the_first_difference(
    copy: Path, name: str, change: Callable[[np.ndarray], None], place: str
) -> None:
    change_golden(copy, name, change)
    result = run_engine(copy, "--verify")
    assert result.returncode == 1
    assert f"run_engine: {place} is the first of " in result.stderr.decode()
    report = run_json(copy, "--verify", exit_code=1)
    assert report["verified"] is False and place in report["problem"]


def test_verify_finds_wrong_weights_that_hash_right(copy: Path) -> None:
    weights = copy / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    pack(copy)
    report = run_json(copy, "--verify", exit_code=1)
    assert report["problem"].startswith("layer 0: conv_state is the first of 9 tensors")


def test_verify_names_an_altered_file(copy: Path) -> None:
    weights = copy / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    result = run_engine(copy, "--verify")
    assert_one_sentence(result, ["weights.bin was altered", "copy the bundle again"], exit_code=1)
    report = run_json(copy, "--verify", exit_code=1)
    assert "weights.bin" in report["problem"] and report["comparisons"] == []


def test_info(packed: Path) -> None:
    report = run_json(packed, "--info")
    assert list(report) == [
        "bundle", "model", "recipe", "target", "files", "bytes", "state_bytes_per_sequence",
        "context", "chat", "created", "steps", "not_run", "engines",
    ]  # fmt: skip
    assert report["model"] == SIZES
    assert report["bytes"] == sum(report["files"].values())
    assert report["state_bytes_per_sequence"] == 2 * (3 * 24 * 2 + 2 * 8 * 4 * 4)
    text = run_engine(packed, "--info").stdout.decode()
    for word in (
        "edge-w8a8",
        "host-cpu",
        "count 2, kind tiny",
        "weights.bin",
        "not run  engine: to be built",
    ):
        assert word in text


# --------------------------------------------------------------------------------------------------
# what does not fit


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return edit


def drop_and_pack(name: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        (folder / name).unlink()
        pack(folder)

    return drop


def overwrite_and_pack(name: str, data: bytes) -> Callable[[Path], None]:
    def overwrite(folder: Path) -> None:
        (folder / name).write_bytes(data)
        pack(folder)

    return overwrite


BAD_BUNDLES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        ["no manifest.json", "name a bundle"],
    ),
    "manifest cut short": (
        lambda f: (f / "manifest.json").write_text('{"schema": 3,'),
        ["not the manifest of a bundle", "copy"],
    ),
    "another schema": (
        edit_manifest(lambda m: m.update(schema=1)),
        ["schema 1", "schema 3", "pack the bundle again"],
    ),
    "no sizes": (
        edit_manifest(lambda m: m["interface"].pop("prompt_multiple")),
        ["prompt_multiple", "pack"],
    ),
    "no files": (edit_manifest(lambda m: m.update(files={})), ["files", "pack"]),
    "a size of nothing": (
        edit_manifest(lambda m: m["interface"]["states"][0].update(shape=[3, 0])),
        ["not positive", "pack"],
    ),
    "a step is text": (edit_manifest(lambda m: m.update(steps=["x"])), ["a step is not a dict"]),
    "steps are text": (edit_manifest(lambda m: m.update(steps="x")), ["steps is not a list"]),
    "unknown state dtype": (
        edit_manifest(lambda m: m["interface"]["states"][1].update(dtype="int4")),
        ["int4", "pack"],
    ),
    "unknown engine": (
        edit_manifest(lambda m: m["target"].update(engines=["abacus"])),
        ["abacus", "onnxruntime, tensorrt, kernels"],
    ),
    "pieces shorter than a chunk": (
        edit_manifest(lambda m: m["target"].update(max_tokens=3)),
        ["3 tokens", "chunk of 4", "max_tokens"],
    ),
    "missing file": (lambda f: (f / "weights.bin").unlink(), ["weights.bin is missing", "copy"]),
    "file cut short": (
        lambda f: os.truncate(f / "weights.bin", 100),
        ["weights.bin has 100 bytes", "copy"],
    ),
    "altered file": (
        lambda f: (f / "weights.bin").write_bytes(bytes((f / "weights.bin").stat().st_size)),
        ["weights.bin was altered", "copy"],
    ),
    "no graph": (drop_and_pack("model.portable.onnx"), ["no model.portable.onnx", "pack"]),
    "no tokenizer": (drop_and_pack("tokenizer.json"), ["no tokenizer.json", "pack"]),
    "unreadable graph": (overwrite_and_pack("model.portable.onnx", b"x"), ["cannot load", "copy"]),
    "unreadable tokenizer": (overwrite_and_pack("tokenizer.json", b"{}"), ["cannot read", "pip"]),
    "one layer too many": (
        edit_manifest(
            lambda m: m["interface"]["states"].append(
                {**m["interface"]["states"][0], "name": "conv_state.2"}
            )
        ),
        ["model.portable.onnx", "conv_state.2"],
    ),
    "a state twice": (
        edit_manifest(lambda m: m["interface"]["states"].append(m["interface"]["states"][0])),
        ["stands there twice", "pack"],
    ),
    "a state that is updated in another way": (
        edit_manifest(lambda m: m["interface"]["states"][0].update(update="shift")),
        ["does not know", "pack"],
    ),
    "a state without room": (
        edit_manifest(lambda m: m["interface"]["states"][0].update(update="append")),
        ["no room for the context", "pack"],
    ),
    "tokenizer of a larger model": (
        edit_manifest(lambda m: m["interface"].update(vocab_size=2)),
        ["the model has 2", "tokenizer"],
    ),
}


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_bad_bundle_is_one_sentence(copy: Path, case: str) -> None:
    spoil, words = BAD_BUNDLES[case]
    spoil(copy)
    assert_one_sentence(run_engine(copy, "--prompt", "the board"), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to do", "--prompt"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt-file", "absent.txt"], ["absent.txt", "No such file"]),
        (["--prompt-file", "weights.bin"], ["not UTF-8"]),
        (["--prompt", "a", "--max-new-tokens", "-1"], ["--max-new-tokens", "'-1'", "at least 1"]),
        (["--prompt", "a", "--max-new-tokens", "many"], ["--max-new-tokens", "'many'"]),
        (["--prompt", "a", "--temperature", "-0.5"], ["--temperature", "at least 0"]),
        (["--prompt", "a", "--temperature", "nan"], ["--temperature", "'nan'"]),
        (["--prompt", "a", "--temperature", "inf"], ["--temperature", "'inf'"]),
        (["--prompt", "a", "--top-k", "-3"], ["--top-k", "'-3'"]),
        (["--prompt", "a", "--top-p", "1.5"], ["--top-p", "'1.5'", "from 0 to 1"]),
        (["--prompt", "a", "--seed", "-3"], ["--seed", "'-3'"]),
        (["--bench", "--seq-lens", "256,0"], ["--seq-lens", "'0'", "at least 1"]),
        (["--bench", "--seq-lens", "256,,512"], ["--seq-lens", "''"]),
        (["--bench", "--seq-lens", "1000000000000000"], ["memory ran out", "fewer tokens"]),
        (["--bench", "--repeat", "0"], ["--repeat", "'0'"]),
        (["--bench", "--seconds", "inf"], ["--seconds", "'inf'"]),
        (["--bench", "--profile"], ["--profile", "not allowed with"]),
        (["--prompt", "a", "--threads", "0"], ["--threads", "from 1 to 1024"]),
        (["--prompt", "a", "--backend", "abacus"], ["--backend", "abacus"]),
        (["--prompt", "a", "--verify"], ["--verify", "not allowed with"]),
        (["--prompt", "a", "--backend", "tensorrt"], ["no TensorRT engine", "--backend onnxrun"]),
        (["absent", "--info"], ["absent is not a bundle", "run_engine.py BUNDLE"]),
    ],
    ids=" ".join,
)
def test_bad_option_is_one_sentence(packed: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_sentence(run_engine(packed, *arguments), words)


def test_prompt_that_is_no_text(packed: Path) -> None:
    command: list[Any] = [sys.executable, "run_engine.py", "--prompt", b"caf\xe9"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    result = subprocess.run(command, cwd=packed, capture_output=True, timeout=60, env=environment)
    assert_one_sentence(result, ["not UTF-8"])


@pytest.mark.parametrize("module", ["numpy", "onnxruntime", "tokenizers"])
def test_missing_library_is_one_sentence(packed: Path, tmp_path: Path, module: str) -> None:
    # A module of that name, found first, that fails as an absent one does.
    stand_in = f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n"
    (tmp_path / f"{module}.py").write_text(stand_in)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run_engine(packed, "--prompt", "the board", env=environment)
    assert_one_sentence(result, [module, f"-m pip install {module}"])


def test_script_without_its_folder(tmp_path: Path) -> None:
    shutil.copy(tiny_bundle.JETSON / "run_engine.py", tmp_path)
    assert_one_sentence(run_engine(tmp_path, "--info"), ["runtime", "copy the whole bundle"])


def test_bundle_for_tensorrt_says_so_and_runs_its_portable_graph_when_asked(copy: Path) -> None:
    pack(copy, target={"name": "orin-nx", "engines": ["tensorrt"], "max_tokens": MAX_TOKENS})
    words = ["no TensorRT engine yet", "built on the board", "use --backend onnxruntime"]
    assert_one_sentence(run_engine(copy, "--prompt", CHAIN), words)
    with pytest.raises(BundleProblem, match="built on the board"):
        open_backend(open_bundle(copy), "tensorrt", BackendOptions())
    portable = ("--backend", "onnxruntime")
    assert run_json(copy, "--prompt", CHAIN, "--max-new-tokens", "10", *portable)["text"] == CHAIN
    assert run_json(copy, "--verify", *portable)["verified"]
    assert run_json(copy, "--info")["target"]["name"] == "orin-nx"
