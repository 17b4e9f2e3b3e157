"""cli.py as a user meets it: real processes, exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMAND, Result, assert_one_sentence, data, environment, ssdi8
from safetensors.torch import load_file, save_file
from tiny_model import BOOKKEEPING, write_model, write_text

from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER

PROMPT = "The sea"


@dataclass(frozen=True)
class Scene:
    """Files that the commands of this module are given; nobody changes them."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "tiny"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def build(self, *arguments: object, **options: Any) -> Result:
        """`build` of the tiny model on the short text; later options replace earlier ones."""
        return ssdi8(
            *("build", "--model", self.model, "--calibration", self.text), *arguments, **options
        )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The tiny model, a text, and a finished run folder that the command made."""
    scene = Scene(tmp_path_factory.mktemp("scene"))
    write_model(scene.model)
    write_text(scene.text)
    result = scene.build("--out", scene.run)
    assert result.returncode == 0, result.stderr
    return scene


# --------------------------------------------------------------------------------------------------
# good paths


def test_help_of_every_command() -> None:
    """Help is on stdout and names the options that are promised."""
    promised = {
        "build": "target model method calibration tokenizer out lm-head embedding kv until device "
        "host dry-run json",
        "run": "prompt prompt-file interactive max-new-tokens top-p stop threads device json",
        "evaluate": "text tasks methods data limit long-context device save json",
        "inspect": "json",
        "verify": "help",
        "targets": "json",
        "methods": "json",
        "serve": "host listen port api-key-file parallel queue state-dir stop status detach",
    }
    overview = ssdi8("--help")
    assert overview.returncode == 0
    for command, options in promised.items():
        assert command in overview.stdout
        text = re.sub(r"\x1b\[[0-9;]*m", "", ssdi8(command, "--help").stdout)
        for option in options.split():
            assert f"--{option}" in text


def test_commands_stand_in_the_order_of_their_use() -> None:
    """As --help lists them."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", ssdi8("--help").stdout)
    shown = re.findall(r"(?m)^\W{1,3}([a-z]+) ", text.partition("Commands")[2])
    order = "plan build run serve verify evaluate inspect targets methods doctor deploy sweep"
    assert shown == [*order.split(), "profile", "report"]


@pytest.mark.parametrize("module", ["torch", "onnx", "onnxruntime", "numpy", "rich.progress"])
def test_help_loads_nothing_heavy(module: str) -> None:
    """The command line itself imports in a tenth of a second."""
    code = f"import sys, ssdi8_edge.cli; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lists() -> None:
    """Names and one line each, the same as JSON."""
    targets = {target["name"]: target for target in data("targets")}
    assert targets["orin-nx"]["board"]["memory_gb"] == 16
    assert targets["host-cpu"]["engines"] == ["onnxruntime"]
    methods = {method["name"]: method for method in data("methods")}
    assert {"fp16", "edge-w8a8", "edge-w4a8", "ssdi8-w8a8", "ssdi8-w4a8"} <= set(methods)
    assert methods["edge-w4a8"]["linear"] == "w4"
    for command, names in (("targets", targets), ("methods", methods)):
        table = ssdi8(command)
        assert table.returncode == 0 and table.stderr == ""
        assert all(name in table.stdout for name in names)


def test_build_reports_and_repeats(scene: Scene, tmp_path: Path) -> None:
    """--json is data on stdout; a repeated build says what it reused and changes nothing."""
    result = scene.build("--out", scene.run, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ran"] == [] and len(report["reused"]) == 4
    assert report["bundle"] == str(scene.run / "bundle")
    files = [p for p in (scene.run / "bundle").rglob("*") if p.is_file()]
    assert report["bytes"] == sum(p.stat().st_size for p in files if p.name != "manifest.json")
    assert report["not_run"] == []
    assert "calibrate: up to date" in result.stderr


def test_build_for_a_board_says_what_is_left(scene: Scene, tmp_path: Path) -> None:
    """Any target builds anywhere; the engine is announced, not pretended. The command is kept."""
    out = Path(shutil.copytree(scene.run, tmp_path / "run"))
    result = scene.build("--out", out, "--target", "orin-nx")
    assert result.returncode == 0, result.stderr
    assert "engine: to be built on the board" in result.stderr
    manifest = json.loads((out / "bundle" / "manifest.json").read_text())
    assert manifest["created"]["command"].startswith("ssdi8-edge build --model ")
    assert manifest["created"]["command"].endswith("--target orin-nx")


def test_build_for_the_users_own_target_until_a_stage(scene: Scene, tmp_path: Path) -> None:
    """A TOML file works like a name, and --until stops where it says."""
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "own"\nabout = "mine"\nengines = ["onnxruntime"]\nwhere = "here"\n'
        "[engine]\nbatch = [1, 1, 1]\ntokens = [1, 32, 64]\nworkspace_mb = 0\n"
    )
    result = scene.build("--target", own, "--out", tmp_path / "run", "--until", "calibrate")
    assert result.returncode == 0, result.stderr
    assert "stopped as asked" in result.stderr
    present = {path.name for path in (tmp_path / "run").iterdir()} - BOOKKEEPING
    assert present == {"calibration.safetensors"}


def test_build_with_tables_of_another_kind(scene: Scene, tmp_path: Path) -> None:
    """The choices are in the bundle's recipe, `inspect` shows them, a wrong one is one sentence."""
    out = tmp_path / "run"
    result = scene.build("--out", out, "--lm-head", "w4", "--embedding", "int8_row", "--kv", "fp16")
    assert result.returncode == 0, result.stderr
    recipe = data("inspect", out)["recipe"]
    assert (recipe["lm_head"], recipe["embedding"], recipe["kv"]) == ("w4", "int8_row", "fp16")
    shown = ssdi8("inspect", out).stdout
    assert "embedding int8_row, lm_head w4" in shown
    refused = scene.build("--out", out, "--lm-head", "w5")
    assert refused.returncode == 2 and "lm_head is 'w5'" in refused.stderr


def test_dry_run(scene: Scene, tmp_path: Path) -> None:
    """Says what would be done, and leaves no trace, not even an empty folder."""
    result = scene.build("--out", tmp_path / "run", "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["plan"].values()) == {"run"}
    assert list(tmp_path.iterdir()) == []


def test_default_run_folder(scene: Scene, tmp_path: Path) -> None:
    """runs/MODEL--METHOD--TARGET below the working folder."""
    result = scene.build("--method", "fp16", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["out"] == "runs/tiny--fp16--host-cpu"


def test_run_streams_and_times(scene: Scene) -> None:
    """Text on stdout; TTFT and tokens/s on stderr; the same seed says the same."""
    arguments = ["run", scene.run, "--prompt", PROMPT, "--max-new-tokens", "12"]
    sampled = [*arguments, "--temperature", "2", "--top-k", "50"]
    first, again, other = (ssdi8(*sampled, "--seed", seed) for seed in (3, 3, 4))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert "TTFT" in first.stderr and "tokens/s" in first.stderr
    report = data(*arguments)
    assert report["new_tokens"] == 12 and report["prompt_tokens"] == len(PROMPT)
    assert report["ttft_s"] > 0 and report["tokens_per_s"] > 0
    printed = ssdi8(*arguments).stdout  # text mode reads every line end as \n
    assert re.sub("\r\n?", "\n", report["text"]).strip() == printed.strip()


def test_verify(scene: Scene) -> None:
    result = ssdi8("verify", scene.run)
    assert result.returncode == 0, result.stderr
    assert "agree" in result.stdout


def test_evaluate(scene: Scene) -> None:
    """Several models at once: the first is the one compared with."""
    report = data("evaluate", scene.model, scene.run, "--text", scene.text)
    assert [row["model"] for row in report] == ["fp32", "edge-w8a8"]
    assert report[1]["perplexity"] == pytest.approx(report[0]["perplexity"], rel=0.02)
    table = ssdi8("evaluate", scene.run, "--text", scene.text, "--limit", "1")
    assert table.returncode == 0 and f"{report[1]['perplexity']:.4f}" in table.stdout


def test_inspect(scene: Scene) -> None:
    """Sizes, scales per layer, saturation counters, what ran where."""
    report = data("inspect", scene.run)
    assert report["bytes"] == sum(report["files"].values())
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert {"b_scale", "c_scale", "cb_scale"} <= set(layer["scales"])
        assert all(0 < low <= high for low, high in layer["scales"].values())
        assert layer["saturation"] and all(0 <= f <= 1 for f in layer["saturation"].values())
    text = ssdi8("inspect", scene.run).stdout
    for word in ("tiny--edge-w8a8--host-cpu", "model.safetensors", "saturat", "ran on host: quant"):
        assert word in text


def test_inspect_of_a_bundle_without_scales(scene: Scene, tmp_path: Path) -> None:
    """The FP16 baseline has nothing to show there, and shows the rest."""
    assert scene.build("--method", "fp16", "--out", tmp_path / "run").returncode == 0
    result = ssdi8("inspect", tmp_path / "run")
    assert result.returncode == 0 and "recipe fp16" in result.stdout


@pytest.mark.slow
def test_demo_model_builds_without_a_network(tmp_path: Path) -> None:
    """From the shipped files alone: every connection and every name look-up fails loudly."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*arguments, **options):\n"
        "    raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
    )
    text = write_text(tmp_path / "text.txt", size=1500)
    offline = environment(PYTHONPATH=str(blocked))
    arguments = ["--model", "demo", "--calibration", text, "--out", tmp_path / "run"]
    result = ssdi8("build", *arguments, env=offline)
    assert result.returncode == 0, result.stderr
    generated = ssdi8(
        *("run", tmp_path / "run", "--prompt", "The old man", "--max-new-tokens", "8"), env=offline
    )
    assert generated.returncode == 0 and generated.stdout.strip(), generated.stderr
    # The block does block.
    code = "import socket; socket.create_connection(('localhost', 9))"
    probe = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True)
    assert probe.returncode == 1 and b"the network was used" in probe.stderr


# --------------------------------------------------------------------------------------------------
# what does not fit: each case prepares its files and gives the arguments

Case = Callable[[Scene, Path], list[object]]


def edited_model(scene: Scene, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the tiny model with other tensors."""
    folder = Path(shutil.copytree(scene.model, place / "model"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def build_of(model: Callable[[Scene, Path], Path], *more: object) -> Case:
    def arguments(scene: Scene, place: Path) -> list[object]:
        found = model(scene, place)
        return [
            *("build", "--model", found, "--calibration", scene.text, "--out", place / "out"),
            *more,
        ]

    return arguments


def build_with(*more: object) -> Case:
    """The tiny model with one option changed; `HERE/` in it is the folder of the case."""

    def arguments(scene: Scene, place: Path) -> list[object]:
        base = [*("build", "--model", scene.model, "--calibration", scene.text)]
        base += ["--out", place / "out"]
        return [*base, *(str(part).replace("HERE/", f"{place}/") for part in more)]

    return arguments


def build_on(content: bytes) -> Case:
    """Another calibration text."""

    def arguments(scene: Scene, place: Path) -> list[object]:
        (place / "odd.txt").write_bytes(content)
        model, out = scene.model, place / "out"
        return ["build", "--model", model, "--calibration", place / "odd.txt", "--out", out]

    return arguments


def with_tokenizer(content: bytes) -> Case:
    def arguments(scene: Scene, place: Path) -> list[object]:
        (place / "tokenizer.json").write_bytes(content)
        return build_with("--tokenizer", "HERE/tokenizer.json")(scene, place)

    return arguments


def no_tokenizer(scene: Scene, place: Path) -> Path:
    folder = Path(shutil.copytree(scene.model, place / "model"))
    (folder / "tokenizer.json").unlink()
    return folder


def cut_weights(scene: Scene, place: Path) -> Path:
    folder = Path(shutil.copytree(scene.model, place / "model"))
    os.truncate(folder / "model.safetensors", 10_000)
    return folder


def no_config(scene: Scene, place: Path) -> Path:
    folder = Path(shutil.copytree(scene.model, place / "model"))
    (folder / "config.json").unlink()
    return folder


D_0 = "backbone.layers.0.mixer.D"


def wrong_shape(scene: Scene, place: Path) -> Path:
    return edited_model(scene, place, lambda tensors: tensors.update({D_0: torch.ones(3)}))


def missing_tensor(scene: Scene, place: Path) -> Path:
    return edited_model(scene, place, lambda tensors: tensors.pop(D_0))


def not_a_number(scene: Scene, place: Path) -> Path:
    """A checkpoint whose training diverged."""
    return edited_model(scene, place, lambda tensors: tensors[D_0].fill_(float("nan")))


def out_below_a_file(scene: Scene, place: Path) -> list[object]:
    (place / "file").write_text("in the way")
    return build_with("--out", "HERE/file/run")(scene, place)


def on_bundle(*command: object, spoil: Callable[[Path], None] | None = None) -> Case:
    """`BUNDLE` in the command is a copy of the finished bundle, spoilt as asked."""

    def arguments(scene: Scene, place: Path) -> list[object]:
        copy = Path(shutil.copytree(scene.run / "bundle", place / "bundle"))
        if spoil is not None:
            spoil(copy)
        names = {"BUNDLE": copy, "TEXT": scene.text, "MODEL": scene.model}
        return [names.get(part, part) if isinstance(part, str) else part for part in command]

    return arguments


def alter(bundle: Path) -> None:
    text = bytearray((bundle / "tokenizer.json").read_bytes())
    text[len(text) // 2] ^= 1
    (bundle / "tokenizer.json").write_bytes(text)


def alter_weights(bundle: Path) -> None:
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)


def drop_golden(bundle: Path) -> None:
    (bundle / "golden.npz").unlink()


def other_schema(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))


def no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


DEMO_TOKENIZER = DEMO_FOLDER / "tokenizer.json"
GO = ("--prompt", PROMPT)

CASES: dict[str, tuple[Case, list[str]]] = {
    "unknown target": (build_with("--target", "orin-xx"), ["'orin-xx'", "orin-nx"]),
    "no target file": (build_with("--target", "HERE/no.toml"), ["no.toml", "name an existing"]),
    "unknown method": (build_with("--method", "w2a2"), ["'w2a2'", "edge-w8a8"]),
    "unknown stage": (build_with("--until", "ship"), ["'ship'", "quantize"]),
    "no model": (build_with("--model", "HERE/absent"), ["absent", "folder"]),
    "model is a file": (build_with("--model", __file__), ["test_cli.py", "folder"]),
    "no config": (build_of(no_config), ["config.json"]),
    "tensor of a wrong shape": (build_of(wrong_shape), [D_0, "(3,)"]),
    "missing tensor": (build_of(missing_tensor), [D_0]),
    "weights cut short": (build_of(cut_weights), ["model.safetensors", "again"]),
    "not a number": (build_of(not_a_number), ["layers.0", "checkpoint"]),
    "no calibration": (
        build_with("--calibration", "HERE/absent.txt"),
        ["absent.txt does not exist", "name a text file"],
    ),
    "calibration is a folder": (build_with("--calibration", "HERE/"), ["name a text file"]),
    "calibration is not UTF-8": (build_on(b"caf\xe9 " * 50), ["odd.txt is not UTF-8", "plain"]),
    "calibration is empty": (build_on(b""), ["odd.txt holds 0 tokens", "at least 16"]),
    "no tokenizer": (build_of(no_tokenizer), ["no tokenizer.json", "--tokenizer"]),
    "tokenizer is absent": (
        build_with("--tokenizer", "HERE/absent.json"),
        ["absent.json does not exist", "tokenizer.json"],
    ),
    "tokenizer is none": (with_tokenizer(b"{}"), ["not a tokenizer file", "tokenizer.json"]),
    "tokenizer of another model": (
        with_tokenizer(DEMO_TOKENIZER.read_bytes()),
        ["has 256", "--tokenizer"],
    ),
    "out below a file": (out_below_a_file, ["file/run", "--out"]),
    "out is no place for files": (build_with("--out", "/proc/run"), ["/proc/run", "--out"]),
    "4-bit groups do not fit": (
        build_of(
            lambda _, place: write_model(place / "odd", d_model=72, headdim=16),
            "--method=ssdi8-w4a8",
        ),
        ["72 input columns", "8-bit method"],
    ),
    "no kernels for the heads": (
        build_of(lambda _, place: write_model(place / "odd", headdim=16), "--target=orin-nx"),
        [
            "the model's headdim is 16",
            "kernels for 32, 64, 80, 128 on orin-nx",
            "--target host-cpu",
        ],
    ),
    "run: no bundle": (on_bundle("run", "/nowhere", *GO), ["/nowhere is not a bundle"]),
    "run: no manifest": (
        on_bundle("run", "BUNDLE", *GO, spoil=no_manifest),
        ["no manifest.json", "name a bundle"],
    ),
    "run: altered file": (
        on_bundle("run", "BUNDLE", *GO, spoil=alter),
        ["tokenizer.json was altered", "again"],
    ),
    "run: missing file": (
        on_bundle("run", "BUNDLE", *GO, spoil=drop_golden),
        ["golden.npz is missing", "again"],
    ),
    "run: other schema": (
        on_bundle("run", "BUNDLE", *GO, spoil=other_schema),
        ["schema 99", "schema 3"],
    ),
    "run: empty prompt": (on_bundle("run", "BUNDLE", "--prompt", ""), ["prompt is empty"]),
    "run: no tokens": (
        on_bundle("run", "BUNDLE", *GO, "--max-new-tokens", "0"),
        ["--max-new-tokens", "at least 1"],
    ),
    "run: cold": (
        on_bundle("run", "BUNDLE", *GO, "--temperature", "-1"),
        ["--temperature", "at least 0"],
    ),
    "run: negative top-k": (on_bundle("run", "BUNDLE", *GO, "--top-k", "-2"), ["--top-k"]),
    "run: negative seed": (on_bundle("run", "BUNDLE", *GO, "--seed", "-2"), ["--seed"]),
    "inspect: altered weights": (
        on_bundle("inspect", "BUNDLE", spoil=alter_weights),
        ["model.safetensors was altered", "again"],
    ),
    "inspect: missing file": (
        on_bundle("inspect", "BUNDLE", spoil=drop_golden),
        ["golden.npz is missing", "again"],
    ),
    "inspect: other schema": (
        on_bundle("inspect", "BUNDLE", spoil=other_schema),
        ["schema 99", "schema 3"],
    ),
    "inspect: no bundle": (on_bundle("inspect", "/nowhere"), ["/nowhere is not a bundle"]),
    "evaluate: no text": (
        on_bundle("evaluate", "BUNDLE", "--text", "/absent.txt"),
        ["/absent.txt", "text file"],
    ),
    "evaluate: altered file": (
        on_bundle("evaluate", "BUNDLE", "--text", "TEXT", spoil=alter),
        ["tokenizer.json was altered", "again"],
    ),
    "evaluate: no model": (
        on_bundle("evaluate", "/nowhere/at/all", "--text", "TEXT"),
        ["/nowhere/at/all", "folder"],
    ),
    "evaluate: no windows": (
        on_bundle("evaluate", "BUNDLE", "--text", "TEXT", "--limit", "0"),
        ["--limit 0", "at least 1"],
    ),
    "evaluate: tokenizer of another model": (
        on_bundle("evaluate", "MODEL", "--text", "TEXT", "--tokenizer", DEMO_TOKENIZER),
        ["token", "has 256", "--tokenizer"],
    ),
    "evaluate: tokenizer is absent": (
        on_bundle("evaluate", "MODEL", "--text", "TEXT", "--tokenizer", "/absent.json"),
        ["/absent.json", "tokenizer.json"],
    ),
}


@pytest.fixture(scope="module")
def answers(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Future[Result]]]:
    """All cases, two at a time: a process spends most of its life importing torch."""
    pool = ThreadPoolExecutor(2)
    found = {}
    for name, (case, _) in CASES.items():
        place = tmp_path_factory.mktemp("case")
        found[name] = (place, pool.submit(ssdi8, *case(scene, place)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_one_sentence(
    answers: dict[str, tuple[Path, Future[Result]]], name: str
) -> None:
    """Exit code 2, the thing and the remedy, no traceback, nothing half-written."""
    place, future = answers[name]
    result = future.result()
    leftovers = {path.name for path in (place / "out").rglob("*")}
    assert leftovers <= {*BOOKKEEPING, "calibration.safetensors"}
    assert_one_sentence(result, CASES[name][1])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["build", "--nonsense"], "--nonsense"),
        (["bulid"], "bulid"),
        (["run", "bundle"], "--prompt"),
        (["run", "bundle", "--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["evaluate", "--text", "a.txt"], "models"),
    ],
    ids=" ".join,
)
def test_misspelt_command_line(arguments: list[str], word: str) -> None:
    """The parser's own complaints: exit code 2, the word in question, no traceback."""
    result = ssdi8(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert word in result.stderr and "Traceback" not in result.stderr


def test_output_that_nobody_reads(scene: Scene) -> None:
    """`ssdi8-edge methods | head -1` ends without a traceback."""
    command = [*COMMAND, "inspect", str(scene.run), "--json"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors, errors


# --------------------------------------------------------------------------------------------------
# Ctrl-C


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_ctrl_c_during_a_build(scene: Scene, tmp_path: Path, stage: str) -> None:
    """One sentence, exit code 130, finished stages kept, nothing half-written; then it resumes."""
    text = write_text(tmp_path / "long.txt", size=60_000)
    out = tmp_path / "run"
    command = [*COMMAND, "build", "--model", str(scene.model), "--calibration", str(text)]
    command += ["--out", str(out)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for((out / ".lock").exists, process)
        if stage == "quantize":
            wait_for(lambda: any(out.glob(".quantized.*.partial/quantized")), process)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "ssdi8-edge: stopped; what was finished is kept."
    present = {path.name for path in out.iterdir()} - BOOKKEEPING
    assert present == (set() if stage == "calibrate" else {"calibration.safetensors"})
    result = scene.build("--out", out, "--calibration", text, "--dry-run", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert plan["calibrate"] == ("run" if stage == "calibrate" else "reuse")


@pytest.mark.parametrize("delay", [0.2, 0.6, 1.2])
def test_ctrl_c_while_libraries_load(scene: Scene, tmp_path: Path, delay: float) -> None:
    """An impatient user: no traceback from the middle of an import."""
    command = [*COMMAND, "build", "--model", str(scene.model), "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), stderr
    if delay >= 0.6:  # before that, Python itself is still starting
        assert "Traceback" not in stderr, stderr
