"""pipeline.py: builds of a tiny model, end to end: resumed, interrupted, killed, out of space."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import start_forked
from conftest import make_config, make_model, state_spaces_config, stored_tensors
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import BOOKKEEPING, byte_tokenizer, write_model, write_text

from ssdi8_edge import __version__
from ssdi8_edge.checkpoints.quantized import load_quantized
from ssdi8_edge.compile.pipeline import STAGES, Build, BuildRequest, BuildResult
from ssdi8_edge.ground.board_runtime import open_checked_bundle
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

KILLS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


Ask = Callable[..., BuildRequest]


@pytest.fixture(scope="module")
def ask(model: Path, text: Path) -> Ask:
    """Factory: a request for the tiny model; `method` and `target` by name."""

    def request(
        out: Path, method: str = "edge-w8a8", target: str = "host-cpu", **fields: Any
    ) -> BuildRequest:
        fields = {"calibration": text, **fields}
        return BuildRequest(str(model), METHODS[method], load_target(target), out, **fields)

    return request


@pytest.fixture(scope="module")
def clean(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder that tests only read."""
    out = tmp_path_factory.mktemp("clean") / "run"
    Build(ask(out)).run()
    return out


@pytest.fixture
def finished(clean: Path, tmp_path: Path) -> Path:
    """A finished run folder that a test may spoil."""
    return Path(shutil.copytree(clean, tmp_path / "run"))


def build(request: BuildRequest) -> BuildResult:
    return Build(request).run()


def _without_times(path: Path) -> bytes:
    """What a file holds but for what differs from build to build: times, and the command."""
    data = path.read_bytes()
    if path.name == "manifest.json":
        manifest = json.loads(data)
        manifest["created"] = {**manifest["created"], "time": "", "command": ""}
        manifest["steps"] = []  # see test_manifest_of_a_resumed_build_lists_every_step
        data = json.dumps(manifest).encode()
    return data


def digests(out: Path) -> dict[str, str]:
    """Every file below `out` but the bookkeeping; hidden ones too, so that leftovers show."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(_without_times(path)).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in BOOKKEEPING
    }


def assert_whole(out: Path) -> None:
    """Whatever artifact is there can be read to its end and belongs together."""
    if (out / "calibration.safetensors").exists():
        with safe_open(out / "calibration.safetensors", framework="pt") as file:
            assert "key" in file.metadata()
            for name in file.keys():  # noqa: SIM118
                assert file.get_tensor(name).isfinite().all()
    if (out / "quantized").exists():
        load_quantized(out / "quantized")
        assert (out / "quantized" / "tokenizer.json").is_file()
    if (out / "onnx").exists():
        assert "key" in json.loads((out / "onnx" / "export.json").read_text())
        for name in ("model.onnx", "model.portable.onnx"):
            onnx.load(out / "onnx" / name, load_external_data=False)
    if (out / "bundle").exists():
        open_checked_bundle(out / "bundle", hash_all=True)


# --------------------------------------------------------------------------------------------------
# whole builds


ACCURACY_ONLY = [name for name, recipe in METHODS.items() if recipe.ssd == "dequantized"]


@pytest.mark.parametrize("method", ACCURACY_ONLY)
def test_methods_without_an_engine_quantize_only(ask: Ask, tmp_path: Path, method: str) -> None:
    """A bundle is refused before anything is computed."""
    with pytest.raises(UsageError, match="for comparing accuracy only"):
        build(ask(tmp_path / "run", method))
    assert not (tmp_path / "run").exists()
    assert build(ask(tmp_path / "run", method, until="quantize")).ran == ["calibrate", "quantize"]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ACCURACY_ONLY])
def test_every_method_builds(ask: Ask, tmp_path: Path, method: str) -> None:
    """From checkpoint to a bundle that onnxruntime verified; a second time, nothing is to do."""
    first = build(ask(tmp_path / "run", method))
    assert (first.ran, first.reused) == (list(STAGES), [])
    assert first.manifest is not None and first.manifest["recipe"]["name"] == method
    assert_whole(tmp_path / "run")
    before = digests(tmp_path / "run")
    second = build(ask(tmp_path / "run", method))
    assert (second.ran, second.reused) == ([], list(STAGES))
    assert second.manifest == first.manifest
    assert digests(tmp_path / "run") == before


def test_two_builds_are_equal_byte_by_byte(ask: Ask, clean: Path, tmp_path: Path) -> None:
    """The ground that all comparisons below stand on."""
    build(ask(tmp_path / "run"))
    assert digests(tmp_path / "run") == digests(clean)


def test_manifest(ask: Ask, model: Path, tmp_path: Path) -> None:
    """Schema, hash of every file, versions, command, recipe, model, what ran where."""
    out = tmp_path / "run"
    manifest = build(ask(out, command="ssdi8-edge build --method edge-w8a8")).manifest
    assert manifest is not None
    assert json.loads((out / "bundle" / "manifest.json").read_text()) == manifest
    assert manifest["schema"] == 3 and manifest["name"] == "tiny--edge-w8a8--host-cpu"
    on_disk = {p.relative_to(out / "bundle").as_posix() for p in (out / "bundle").rglob("*.*")}
    assert set(manifest["files"]) == {
        name for name in on_disk if (out / "bundle" / name).is_file()
    } - {"manifest.json"}
    for name, listed in manifest["files"].items():
        data = (out / "bundle" / name).read_bytes()
        assert listed == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    created = manifest["created"]
    assert created["command"] == "ssdi8-edge build --method edge-w8a8"
    assert created["ssdi8_edge"] == __version__ and created["torch"] == torch.__version__
    assert {"time", "host", "python", "numpy", "onnx", "onnxruntime"} <= set(created)
    assert manifest["recipe"] == METHODS["edge-w8a8"].to_dict()
    assert manifest["model"]["d_model"] == 128 and manifest["model"]["blocks"][0]["count"] == 2
    assert manifest["checkpoint"]["source"] == "tiny"
    assert manifest["checkpoint"]["bytes"] < (model / "model.safetensors").stat().st_size
    assert manifest["target"]["name"] == "host-cpu" and manifest["target"]["max_tokens"] == 2048
    assert [step["step"] for step in manifest["steps"]] == [*STAGES, "verify portable graph"]
    assert all(step["where"] == "host" and step["seconds"] >= 0 for step in manifest["steps"])
    assert manifest["saturation"] and all(0 <= f < 0.01 for f in manifest["saturation"].values())
    assert manifest["not_run"] == []


def test_nothing_in_a_bundle_names_this_machine(clean: Path, model: Path) -> None:
    """A bundle travels: no file of it holds a path of the machine that built it."""
    for path in (clean / "bundle").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for private in (str(clean.parent), str(model), str(Path.home() / "")):
                assert private.encode() not in data or private == "/", f"{path} holds {private}"


def test_long_steps_report_their_progress(ask: Ask, tmp_path: Path) -> None:
    """Each loop that grows with the model goes through `track`, to its last item."""
    seen: dict[str, int] = {}

    def track(items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            yield item
            seen[label] = seen.get(label, 0) + 1

    build = Build(ask(tmp_path / "run"), track)
    build.run()
    layers = build.model.n_layer
    assert seen.pop("hash config.json") == 1 and seen.pop("hash model.safetensors") >= 1
    assert seen.pop("check the weights") == len(build.checkpoint.names)
    assert seen == {"calibrate": layers, "quantize": layers, "golden vectors": layers + 1}


# --------------------------------------------------------------------------------------------------
# resume: what is redone, and what is not


def test_until_each_stage(ask: Ask, clean: Path, tmp_path: Path) -> None:
    """Every stage ends where it should, and the next call goes on from there."""
    artifacts = ("calibration.safetensors", "quantized", "onnx", "bundle")
    for i, stage in enumerate(STAGES):
        result = build(ask(tmp_path / "run", until=stage))
        assert (result.ran, result.reused) == ([stage], list(STAGES[:i]))
        assert (result.manifest is None) == (stage != "bundle")
        present = {path.name for path in (tmp_path / "run").iterdir()} - BOOKKEEPING
        assert present == set(artifacts[: i + 1])
    assert digests(tmp_path / "run") == digests(clean)


def test_manifest_of_a_resumed_build_lists_every_step(ask: Ask, finished: Path) -> None:
    """What ran where is true of the artifact, not of the last command."""
    shutil.rmtree(finished / "onnx")
    manifest = build(ask(finished)).manifest
    assert manifest is not None
    assert [step["step"] for step in manifest["steps"]] == [*STAGES, "verify portable graph"]


def remove(name: str) -> Callable[[Path], None]:
    def act(out: Path) -> None:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def cut(name: str) -> Callable[[Path], None]:
    """Half a file, under its own name, beside any other name that it is linked to."""

    def act(out: Path) -> None:
        data = (out / name).read_bytes()
        (out / name).unlink()
        (out / name).write_bytes(data[: len(data) // 2])

    return act


def flip(name: str) -> Callable[[Path], None]:
    """One other byte near the end, the size unchanged."""

    def act(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[-40] ^= 0x55
        (out / name).unlink()
        (out / name).write_bytes(data)

    return act


@pytest.mark.parametrize(
    ("spoil", "first_redone"),
    [
        pytest.param(remove("calibration.safetensors"), "calibrate", id="no calibration"),
        pytest.param(cut("calibration.safetensors"), "calibrate", id="calibration cut"),
        pytest.param(remove("quantized"), "quantize", id="no quantized"),
        pytest.param(cut("quantized/config.json"), "quantize", id="quantized config cut"),
        pytest.param(remove("quantized/model.safetensors"), "quantize", id="no weights"),
        pytest.param(cut("quantized/model.safetensors"), "quantize", id="weights cut"),
        pytest.param(remove("quantized/tokenizer.json"), "quantize", id="no tokenizer"),
        pytest.param(remove("onnx"), "export", id="no onnx"),
        pytest.param(remove("onnx/model.onnx"), "export", id="no TensorRT graph"),
        pytest.param(remove("onnx/model.portable.onnx"), "export", id="no portable graph"),
        pytest.param(remove("bundle"), "bundle", id="no bundle"),
        pytest.param(remove("bundle/manifest.json"), "bundle", id="no manifest"),
        pytest.param(remove("bundle/golden.npz"), "bundle", id="no golden vectors"),
        pytest.param(cut("bundle/model.safetensors"), "bundle", id="bundle weights cut"),
        pytest.param(flip("bundle/golden.npz"), "bundle", id="golden vectors altered"),
        pytest.param(flip("bundle/run_engine.py"), "bundle", id="script altered"),
    ],
)
def test_what_is_missing_or_damaged_is_made_again(
    ask: Ask, clean: Path, finished: Path, spoil: Callable[[Path], None], first_redone: str
) -> None:
    """The stage of the damaged file and those behind it run again; the result is as if new."""
    spoil(finished)
    at = STAGES.index(first_redone)
    result = build(ask(finished))
    assert (result.ran, result.reused) == (list(STAGES[at:]), list(STAGES[:at]))
    assert digests(finished) == digests(clean)


def test_other_text_redoes_all(ask: Ask, finished: Path, tmp_path: Path) -> None:
    result = build(ask(finished, calibration=write_text(tmp_path / "other.txt", start=1000)))
    assert result.ran == list(STAGES)


def test_same_text_under_another_name_redoes_nothing(
    ask: Ask, finished: Path, tmp_path: Path
) -> None:
    """Keys are of contents, not of paths."""
    result = build(ask(finished, calibration=write_text(tmp_path / "same.txt")))
    assert result.ran == []


def test_other_checkpoint_redoes_all(ask: Ask, finished: Path, model: Path, tmp_path: Path) -> None:
    """One changed weight is another checkpoint."""
    other = Path(shutil.copytree(model, tmp_path / "tiny"))
    flip("model.safetensors")(other)
    request = dataclasses.replace(ask(finished), model=str(other))
    assert build(request).ran == list(STAGES)


def test_other_recipe_redoes_what_depends_on_it(ask: Ask, finished: Path) -> None:
    """4-bit weights need no other statistics; other windows do."""
    assert build(ask(finished, "edge-w4a8")).ran == ["quantize", "export", "bundle"]
    request = ask(finished)
    longer = dataclasses.replace(request.recipe, calibration_tokens=100)
    assert build(dataclasses.replace(request, recipe=longer)).ran == list(STAGES)


def test_other_target_redoes_the_bundle_only(ask: Ask, finished: Path) -> None:
    result = build(ask(finished, target="orin-nano"))
    assert (result.ran, result.reused) == (["bundle"], list(STAGES[:3]))
    assert result.manifest is not None and result.manifest["target"]["name"] == "orin-nano"


@pytest.mark.parametrize("most", [64, 130])
def test_target_that_takes_fewer_tokens_than_the_golden_vectors(
    ask: Ask, finished: Path, most: int
) -> None:
    """They are of a prefill in pieces then, of which the last is shorter than the kept logits."""
    request = ask(finished)
    engine = request.target.engine.model_copy(update={"tokens": [1, 32, most]})
    target = request.target.model_copy(update={"engine": engine})
    assert build(dataclasses.replace(request, target=target)).ran == ["bundle"]
    with np.load(finished / "bundle" / "golden.npz") as golden:
        assert golden["input_ids"].shape == (1, 131) and golden["logits"].shape[1] == 4


def test_plan_touches_nothing(ask: Ask, clean: Path, tmp_path: Path) -> None:
    """A dry run neither makes the run folder nor changes a finished one."""
    everything = dict.fromkeys(STAGES, "run")
    assert Build(ask(tmp_path / "run")).plan() == everything
    assert list(tmp_path.iterdir()) == []
    before = digests(clean)
    changed = Build(ask(clean, "edge-w4a8")).plan()
    assert changed == {**everything, "calibrate": "reuse"}
    assert Build(ask(clean, until="quantize")).plan() == dict.fromkeys(STAGES[:2], "reuse")
    assert digests(clean) == before


def test_second_build_in_one_folder_is_refused(ask: Ask, finished: Path) -> None:
    """While another process holds the folder; the lock file alone, left by a kill, is no lock."""
    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"another build is writing to .*; wait for it or"):
            build(ask(finished))
    assert build(ask(finished)).ran == []


# --------------------------------------------------------------------------------------------------
# full disks


@pytest.fixture
def leaks_show_here() -> Iterator[None]:
    """A file left open by a failed stage warns when it is collected: now, not in a later test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("leaks_show_here")
@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_at_each_stage(ask: Ask, clean: Path, tmp_path: Path, stage: str) -> None:
    """A real file system fills up: one sentence, finished stages kept, and then it goes on."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        at = STAGES.index(stage)
        if at:
            build(ask(place / "run", until=STAGES[at - 1]))
        else:
            (place / "run").mkdir()
        before = digests(place / "run")
        free = shutil.disk_usage(place).free
        (place / "filler").write_bytes(bytes(free - 4096))
        with pytest.raises(Ssdi8Error) as caught:
            build(ask(place / "run"))
        assert caught.value.exit_code == 2
        assert "No space left on device; free some space" in str(caught.value)
        assert str(place / "run") in str(caught.value)
        assert digests(place / "run") == before
        (place / "filler").unlink()
        assert build(ask(place / "run")).ran == list(STAGES[at:])
        assert digests(place / "run") == digests(clean)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_full_temporary_folder_is_no_matter(
    ask: Ask, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be small, or memory: the streams between layers lie on the disk of --out."""
    place = tmp_path / "tmp"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        monkeypatch.setattr("tempfile.tempdir", str(place))
        build(ask(tmp_path / "run"))
        assert digests(tmp_path / "run") == digests(clean)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# --------------------------------------------------------------------------------------------------
# kill -9


def start_build(arguments: list[str]) -> BaseProcess:
    return start_forked(arguments, Path(os.devnull), Path(os.devnull))


def test_leftovers_beside_artifacts_that_are_up_to_date_are_removed(
    ask: Ask, clean: Path, finished: Path
) -> None:
    """A build killed after an artifact took its name leaves a folder that no later stage writes."""
    for name in ("calibration.safetensors", "quantized", "onnx", "bundle", "steps.json"):
        scratch = finished / f".{name}.abc123.partial"
        scratch.mkdir()
        (scratch / "old").write_text("old")
    result = build(ask(finished))
    assert not result.ran and digests(finished) == digests(clean)


@pytest.mark.slow
def test_kill_at_random_moments(
    ask: Ask, clean: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """SIGKILL spread over the whole build, every second time over an older finished build.

    What is there afterwards is whole, the old or the new; the next build completes, equals a clean
    one byte by byte and leaves no scratch behind.
    """
    out = tmp_path / "run"
    arguments = ["build", "--model", str(model), "--calibration", str(text), "--out", str(out)]
    timed = start_build(arguments)
    begin = time.monotonic()
    timed.join()
    whole = time.monotonic() - begin
    assert timed.exitcode == 0 and digests(out) == digests(clean)

    older = tmp_path / "older"
    build(ask(older, calibration=write_text(tmp_path / "old.txt", start=2000)))
    old, new = digests(older), digests(clean)
    chance = random.Random(8)
    killed, attempts = 0, 0
    while killed < KILLS:
        attempts += 1
        assert attempts <= 3 * KILLS, "builds end sooner than they can be killed"
        shutil.rmtree(out)
        if killed % 2:
            shutil.copytree(older, out)
        process = start_build(arguments)
        begin = time.monotonic()
        process.join(whole * (killed + chance.random()) / KILLS)
        if process.exitcode is not None:  # faster than the one that was timed: aim again
            whole = min(whole, time.monotonic() - begin)
            continue
        process.kill()
        process.join()
        killed += 1
        if out.exists():
            assert_whole(out)
            for name, digest in digests(out).items():
                if ".partial" not in name:
                    assert digest in (old.get(name), new[name]), f"kill {killed}: {name}"
        build(ask(out))
        assert digests(out) == new, f"kill {killed}"


# --------------------------------------------------------------------------------------------------
# a bundle for a board


@pytest.fixture(scope="module")
def board_bundle(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("board") / "run"
    Build(ask(out, "edge-w4a8", "orin-nx")).run()
    return out / "bundle"


def test_bundle_for_a_board_is_complete(board_bundle: Path) -> None:
    """Everything that the board needs, nothing of this build's scratch, and what is left to do."""
    manifest = json.loads((board_bundle / "manifest.json").read_text())
    files = set(manifest["files"])
    assert {
        "model.onnx",
        "model.portable.onnx",
        "model.safetensors",
        "tokenizer.json",
        "program.json",
        "golden.npz",
        "run_engine.py",
        "runtime/__init__.py",
        "runtime/command_line.py",
        "plugins/CMakeLists.txt",
    } <= files
    assert any(name.startswith("plugins/") and name.endswith(".cu") for name in files)
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    assert manifest["target"]["board"]["memory_gb"] == 16
    assert len(manifest["not_run"]) == 2
    assert all("on the board" in line for line in manifest["not_run"])
    assert not any("engine" in step["step"] for step in manifest["steps"])
    assert manifest["steps"][-1]["step"] == "verify portable graph"


def test_graph_for_tensorrt_carries_no_function_bodies(board_bundle: Path) -> None:
    """Old parsers prefer a body to a plugin of the same name; both attributes must be there."""
    lowered = onnx.load(board_bundle / "model.onnx", load_external_data=False)
    assert not lowered.functions
    own = [node for node in lowered.graph.node if node.op_type.startswith("Ssdi8")]
    assert own
    for node in own:
        attributes = {a.name for a in node.attribute}
        assert {"plugin_version", "plugin_namespace"} <= attributes
    portable = onnx.load(board_bundle / "model.portable.onnx", load_external_data=False)
    assert portable.functions


@pytest.mark.parametrize("name", ["model.onnx", "model.portable.onnx"])
def test_graphs_open_with_their_weights(board_bundle: Path, name: str) -> None:
    """As any ONNX tool opens them: onnx refuses weights that have a second hard link."""
    graph = onnx.load(board_bundle / name).graph
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) > 100_000


def test_bundle_runs_itself_elsewhere(board_bundle: Path, tmp_path: Path) -> None:
    """Copied away, without this package, from another working folder: it verifies and generates."""
    elsewhere = Path(shutil.copytree(board_bundle, tmp_path / "on the board"))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("ssdi8_edge", "torch", "onnx", "safetensors"):
        refusal = f"raise ImportError('{name} is not on a board')\n"
        (blocked / f"{name}.py").write_text(refusal)
    environment = {**os.environ, "PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(elsewhere / "run_engine.py"), *arguments]
        command += ["--backend", "onnxruntime"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    verified = run("--verify")
    assert verified.returncode == 0, verified.stderr
    assert "golden vectors" in verified.stdout
    generated = run("--prompt", "The sea", "--max-new-tokens", "5", "--json")
    assert generated.returncode == 0, generated.stderr
    assert len(json.loads(generated.stdout)["tokens"]) == 5


# --------------------------------------------------------------------------------------------------
# memory


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Layers are held one at a time: six more cost their mapped FP16 bytes and a little slack.

    Keeping their FP32 copies would cost three times that. The promised bound holds too.
    """
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from ssdi8_edge.compile.pipeline import Build, BuildRequest\n"
        "from ssdi8_edge.recipes.presets import METHODS\n"
        "from ssdi8_edge.targets import load_target\n"
        "model, text, out = sys.argv[1:]\n"
        "request = BuildRequest(model, METHODS['edge-w8a8'], load_target('host-cpu'), Path(out),\n"
        "                       Path(text), until='quantize')\n"
        "Build(request).run()\n"
        # Not getrusage: its peak survives exec, and would be that of the process that forked.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    text = write_text(tmp_path / "text.txt", size=64)
    peaks, layer_bytes = {}, 0
    for layers in (2, 8):
        folder = tmp_path / f"model-{layers}"
        folder.mkdir()
        config = make_config(d_model=512, n_layer=layers, headdim=64)
        tensors = {k: v.half() for k, v in stored_tensors(make_model(config)).items()}
        del tensors["lm_head.weight"]
        layer_bytes = sum(
            2 * v.numel() for k, v in tensors.items() if k.startswith("backbone.layers.0.")
        )
        (folder / "config.json").write_text(json.dumps(state_spaces_config(config)))
        save_file(tensors, folder / "model.safetensors")
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        arguments = [str(folder), str(text), str(tmp_path / f"run-{layers}")]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            # Freed memory goes back at once: what is measured is what is held.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = int(done.stdout.split()[-1]) * 1024
    growth = peaks[8] - peaks[2]
    assert growth < (6 + 6) * layer_bytes, f"{growth / layer_bytes:.1f} layers"
    assert peaks[8] < 8 * layer_bytes + 2e9
