"""jetson/build_engine.py with NVIDIA's real parser and builder, TensorRT-RTX, on a CPU.

The bundle is the FP16 baseline of a tiny model, which needs no plugins. TensorRT itself and a GPU
are stand-ins only where a built engine is loaded; see rtx_as_tensorrt.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bundle
import torch
from tiny_model import write_model, write_text

from runtime.commands import build
from runtime.engine import builder
from runtime.engine.store import engines_in
from runtime.engine.tensorrt_api import layer_information
from runtime.problems import BundleProblem
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip(
        "NVIDIA's parser is not installed: pip install tensorrt-rtx-cu13", allow_module_level=True
    )

STAND_IN = Path(__file__).parents[1] / "support" / "rtx_as_tensorrt.py"
MIB = 2**20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles fp16 and edge-w8a8 of a tiny model for orin-nx, which tests only read."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bundles")
    model, text = write_model(root / "model"), write_text(root / "text.txt")
    # Short prompts: NVIDIA's builder is done sooner.
    profile = (tiny_bundle.JETSON.parent / "profiles" / "orin-nx.toml").read_text()
    profile = profile.replace("[1, 512, 2048]", "[1, 32, 64]")
    (root / "short.toml").write_text(profile)
    for method in ("fp16", "edge-w8a8"):
        target = load_target(str(root / "short.toml"))
        out = root / method
        Build(BuildRequest(str(model), METHODS[method], target, out, calibration=text)).run()
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "fp16" / "bundle", tmp_path / "bundle"))


def start(bundle: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(STAND_IN)]
    return subprocess.Popen(
        [*command, str(bundle / "build_engine.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(bundle: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    with start(bundle, *arguments, **environment) as process:
        out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def run_json(bundle: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    code, out, errors = run(bundle, "--json", *arguments, **environment)
    assert code == 0, errors
    return json.loads(out)


def assert_one_sentence(result: tuple[int, str, str], words: list[str], code: int = 2) -> None:
    """Of stderr, its last line; before it TensorRT's own words may stand."""
    assert result[0] == code, result[2]
    last = result[2].splitlines()[-1]
    assert last.startswith("build_engine: ") and last.endswith("."), result[2]
    assert "Traceback" not in result[2] and result[1] == ""
    for word in words:
        assert word in last


def test_an_engine_and_its_log(bundle: Path, tmp_path: Path) -> None:
    """What the builder is given, what lies in the store, and what the log says."""
    given = tmp_path / "given.json"
    report = run_json(bundle, GIVEN=str(given))
    assert report["built"] is True
    told = json.loads(given.read_text())
    assert told["typed"] is True and told["tf32"] is False and told["formats"] == [1]
    assert told["workspace"] == 1024 * MIB and "DETAILED" in told["verbosity"]
    prefill, decode = told["profiles"]
    assert prefill["input_ids"] == [[1, 1], [1, 32], [1, 64]]
    assert decode["input_ids"] == [[1, 1]] * 3
    assert (
        prefill.keys()
        == decode.keys()
        == {
            *("input_ids", "conv_state.0", "ssm_state.0", "conv_state.1", "ssm_state.1"),
        }
    )
    assert prefill["conv_state.0"] == decode["conv_state.0"] == [[1, 3, 384]] * 3

    engine = Path(report["path"])
    assert engine.parent.parent == bundle / "engine" and engine.parent.name == report["key"]
    data = engine.read_bytes()
    assert report["engine"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    log = json.loads(engine.with_name("build_log.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert log["requirements"] == {
        "onnx": manifest["files"]["model.onnx"]["sha256"],
        "weights": manifest["files"]["model.safetensors"]["sha256"],
        "shapes": {"batch": [1, 1, 1], "tokens": [1, 32, 64]},
        "plugins": None,
        "tensorrt": "10.3.0",
        "cuda": "12.6",
        "gpu": "Fake Orin",
        "compute_capability": "8.7",
    }
    assert log["conditions"] == {
        "board": None, "sms": 8, "power_mode": None, "gpu_max_hz": None, "emc_cap_hz": None,
    }  # fmt: skip
    assert log["bundle_key"] == manifest["key"] and log["gpu"]["sms"] == 8
    assert set(log["seconds"]) == {"parse", "build", "load"} and log["peak_rss_bytes"] > MIB
    assert log["layers"][0]["Name"] == "layers.0/SsdScan" and log["tensors"] == ["input_ids"]
    assert (bundle / "engine" / "timing.cache").stat().st_size > 0
    assert "INFO:" in (bundle / "engine" / "build.txt").read_text()
    assert not list((bundle / "engine").glob(".*.partial"))


@pytest.mark.slow
def test_a_fitting_engine_is_kept_and_another_state_gets_its_own(bundle: Path) -> None:
    first = run_json(bundle)
    again = run_json(bundle)
    assert (again["built"], again["key"]) == (False, first["key"])
    assert again["built_unix"] == first["built_unix"]
    forced = run_json(bundle, "--force")
    assert forced["built"] and forced["key"] == first["key"]
    assert forced["built_unix"] > first["built_unix"]
    # A power mode with half of the SMs: its own engine, beside the other.
    half = run_json(bundle, SMS="4")
    assert half["built"] and half["key"] != first["key"]
    assert {engine.key for engine in engines_in(bundle / "engine")} == {first["key"], half["key"]}
    # One that was cut short is built again.
    os.truncate(half["path"], 10)
    assert run_json(bundle, SMS="4")["built"] is True


def test_the_baseline_needs_little_scratch_memory(bundle: Path) -> None:
    """TensorRT can bound every size from those of the profile: 20 MB; 3.6 GB where it had to guess
    how many chunks a prompt has."""
    assert run_json(bundle, "--workspace-mb=32")["built"]


def test_places_can_be_chosen(bundle: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "engines", tmp_path / "caches" / "timing"
    report = run_json(bundle, f"--out={out}", f"--timing-cache={cache}", "--workspace-mb=300")
    assert Path(report["path"]).parent.parent == out and cache.stat().st_size > 0
    log = json.loads(Path(report["path"]).with_name("build_log.json").read_text())
    assert log["workspace_bytes"] == 300 * MIB
    assert not (bundle / "engine").exists()
    # It fits as long as the same workspace is asked for.
    again = [f"--out={out}", f"--timing-cache={cache}"]
    assert not run_json(bundle, *again, "--workspace-mb=300")["built"]
    assert run_json(bundle, *again)["built"]
    # A cache of another machine, or no cache at all, is replaced.
    cache.write_bytes(b"of another version")
    assert run_json(bundle, f"--out={out}", f"--timing-cache={cache}", "--force")["built"]
    assert cache.read_bytes() != b"of another version"


def test_a_build_that_fails_says_why(bundle: Path) -> None:
    """Too little workspace for the graph: TensorRT's reason, and which way to turn."""
    result = run(bundle, "--workspace-mb", "1")
    assert_one_sentence(result, ["cannot build", "workspace limit", "--workspace-mb"], code=1)
    assert engines_in(bundle / "engine") == []


def test_nothing_is_left_where_the_engine_does_not_load(bundle: Path) -> None:
    """The plan was built and written, and then refused: no engine, but the timings are kept."""
    result = run(bundle, LOADS="no")
    assert_one_sentence(result, ["does not load the engine", "no kernel image"], code=1)
    assert engines_in(bundle / "engine") == []
    left = {path.name for path in (bundle / "engine").iterdir()}
    assert left == {".lock", "build.txt", "timing.cache"}
    assert "no kernel image" in (bundle / "engine" / "build.txt").read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(
    bundle: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    """At once, though TensorRT is in a long call; the next build finishes."""
    pause = tmp_path / "building"
    with start(bundle, PAUSE=str(pause)) as process:
        while not pause.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sign)
        process.communicate(timeout=10)
    assert process.returncode == -sign
    assert {path.name for path in (bundle / "engine").iterdir()} == {".lock", "build.txt"}
    (bundle / "engine" / ".0123456789abcdef.partial").mkdir()  # of one that died while writing
    assert run_json(bundle)["built"]
    assert not list((bundle / "engine").glob(".*.partial"))


def test_one_build_at_a_time(bundle: Path, tmp_path: Path) -> None:
    pause = tmp_path / "building"
    with start(bundle, PAUSE=str(pause)) as process:
        while not pause.exists():
            assert process.poll() is None
            time.sleep(0.02)
        assert_one_sentence(run(bundle), ["another build is under way", "wait for it"])
        process.kill()
        process.communicate(timeout=10)


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def relist(bundle: Path, name: str) -> None:
    """The manifest takes a changed file for the packed one."""
    data = (bundle / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(bundle, lambda m: m["files"].update({name: entry}))


def test_plugins_that_are_missing(packed: Path, tmp_path: Path) -> None:
    """Without a library nothing is tried; NVIDIA's parser names the op that it does not know."""
    bundle = Path(shutil.copytree(packed / "edge-w8a8" / "bundle", tmp_path / "bundle"))
    words = ["needs the plugin library", "setup.sh", "--plugins"]
    assert_one_sentence(run(bundle), words)
    assert_one_sentence(run(bundle, "--plugins", "absent.so"), ["there is no plugin library"])
    library = tmp_path / "libssdi8_plugins.so"
    library.write_bytes(b"no library")
    refused = run(bundle, "--plugins", str(library))
    assert_one_sentence(refused, ["cannot be loaded", "build it on this machine"])
    edit_manifest(bundle, lambda m: m["recipe"].update(linear="fp16"))
    assert_one_sentence(run(bundle), ["needs plugins that are not loaded", "Plugin not found"])
    assert engines_in(bundle / "engine") == []


def test_graphs_that_do_not_fit(bundle: Path) -> None:
    edit_manifest(
        bundle,
        lambda m: m["interface"]["states"].append(
            {**m["interface"]["states"][0], "name": "conv_state.2"}
        ),
    )
    assert_one_sentence(run(bundle), ["disagree about the tensor conv_state.2", "pack"])
    edit_manifest(bundle, lambda m: m["interface"]["states"].pop())
    (bundle / "model.onnx").write_bytes(b"no graph")
    assert_one_sentence(run(bundle), ["model.onnx", "copy the whole bundle again"])
    relist(bundle, "model.onnx")
    assert_one_sentence(run(bundle), ["cannot read", "model.onnx", "pack it again"])


@pytest.mark.parametrize(
    "shapes",
    [
        None,
        {"batch": [1, 1, 1], "tokens": [1, 32, 64]},
        {"batch": [1, 1], "tokens": [1, 32, 64], "workspace_mb": 1},
        {"batch": [1, 1, 1], "tokens": [1, 128, 64], "workspace_mb": 1},
        {"batch": [0, 1, 1], "tokens": [1, 32, 64], "workspace_mb": 1},
        {"batch": "111", "tokens": [1, 32, 64], "workspace_mb": 1},
        {"batch": [1, 1, 1], "tokens": [1, 32, 64], "workspace_mb": -1},
    ],
)
def test_engine_shapes_that_are_none(packed: Path, tmp_path: Path, shapes: Any) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copy(packed / "fp16" / "bundle" / "manifest.json", bundle)
    edit_manifest(bundle, lambda m: m["target"].update(engine=shapes))
    with pytest.raises(BundleProblem, match=r"names no engine shapes .*--target"):
        build.build(build.parse([], bundle))


def test_a_bundle_for_a_cpu_has_no_engine(packed: Path, tmp_path: Path) -> None:
    """Said at once, before TensorRT is looked for."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copy(packed / "fp16" / "bundle" / "manifest.json", bundle)
    edit_manifest(bundle, lambda m: m["target"].update(engines=["onnxruntime"]))
    with pytest.raises(BundleProblem, match=r"is for a CPU and has no TensorRT engine.*run_engine"):
        build.build(build.parse([], bundle))


def test_script_alone(tmp_path: Path) -> None:
    script = shutil.copy(tiny_bundle.JETSON / "build_engine.py", tmp_path)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert_one_sentence((done.returncode, done.stdout, done.stderr), ["copy the whole bundle"])


def test_wrong_options(bundle: Path) -> None:
    assert_one_sentence(run(bundle, "--workspace-mb", "-1"), ["--workspace-mb", "'-1'"])
    assert_one_sentence(run(bundle, "--bogus"), ["--bogus", "build_engine.py --help"])


# --------------------------------------------------------------------------------------------------
# parts


def test_memory_and_disk_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is free, what may be needed, and what to do."""
    weights = 1000 * MIB
    needed = builder.estimate_memory(weights, 512 * MIB)
    assert needed > 4 * weights
    monkeypatch.setattr(build, "swap_free", lambda: 100 * MIB)
    monkeypatch.setattr(build, "available_memory", lambda: needed - 100 * MIB)
    build._check_memory(weights, 512 * MIB)
    monkeypatch.setattr(build, "available_memory", lambda: None)
    build._check_memory(weights, 512 * MIB)
    monkeypatch.setattr(build, "available_memory", lambda: needed - 101 * MIB)
    with pytest.raises(BundleProblem, match=r"5\.2 GiB free and building may need 5\.2 GiB.*swap"):
        build._check_memory(weights, 512 * MIB)

    monkeypatch.setattr(build, "available_memory", lambda: needed + 100 * MIB)
    build._check_memory(weights, 512 * MIB, caches=100 * MIB)
    with pytest.raises(BundleProblem, match="building may need"):
        build._check_memory(weights, 512 * MIB, caches=101 * MIB)

    build._check_disk(tmp_path, 0)
    with pytest.raises(BundleProblem, match=r"free and the engine may need .*--out"):
        build._check_disk(tmp_path, shutil.disk_usage(tmp_path).free)


class _Inspector:
    def __init__(self, text: str) -> None:
        self._text = text

    def create_engine_inspector(self) -> _Inspector:
        return self

    def get_engine_information(self, _: str) -> str:
        return self._text


@pytest.mark.parametrize(
    ("text", "layers", "tensors"),
    [
        ('{"Layers": ["a"], "Bindings": ["x"]}', ["a"], ["x"]),  # TensorRT 10
        ('{"Layers": [{"Name": "a"}], "I/O Tensors": ["x"]}', [{"Name": "a"}], ["x"]),  # and 11
        ("{}", [], []),
        ("[]", [], []),
        ("no JSON\n", [], []),
    ],
)  # fmt: skip
def test_inspector_of_any_version(text: str, layers: list[Any], tensors: list[Any]) -> None:
    class Trt:
        class LayerInformationFormat:
            JSON = "json"

    found = layer_information(Trt, _Inspector(text))  # type: ignore[arg-type]
    assert (found["layers"], found["tensors"]) == (layers, tensors)
    assert found.get("unreadable") == (text if text[0] in "[n" else None)
