"""jetson/: --bench, --profile, --interactive, the facts of a machine, and which op is suspected."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle  # noqa: F401, puts jetson/ on the path
from tiny_bundle import CHAIN, make_bundle, run_engine, run_json

from runtime import machine
from runtime.backends.onnxruntime import OnnxRuntimeBackend, _own_times
from runtime.bench import summary
from runtime.bundle import open_bundle
from runtime.command_line import _guarded
from runtime.layer_times import Modules, kind_times, median_times, model_layer_of, module_times
from runtime.machine import this_machine
from runtime.verify import suspects


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests only read."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


# --------------------------------------------------------------------------------------------------
# bench


def bench(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run_engine(folder, "--bench", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_bench_records(packed: Path) -> None:
    """All that runtime/bench.py promises, for two lengths, one of them in several pieces."""
    records = bench(
        packed, "--seq-lens", "3,23", "--new-tokens", "5", "--repeat", "3", "--threads=1"
    )
    assert [record["prompt_tokens"] for record in records] == [3, 23]
    for record in records:
        assert list(record) == [
            "schema", "kind", "bundle", "key", "recipe", "target", "runtime", "backend", "engine",
            "machine", "versions", "threads", "batch", "prompt_tokens", "new_tokens", "warmup",
            "repeats", "ttft_s", "tpot_s", "token_p50_s", "token_p95_s", "tokens_per_s", "load_s",
            "started_unix", "memory",
        ]  # fmt: skip
        assert (record["schema"], record["kind"], record["batch"]) == (1, "bench", 1)
        assert (record["runtime"], record["engine"], record["threads"]) == ("onnxruntime", None, 1)
        assert (record["new_tokens"], record["warmup"], len(record["repeats"])) == (5, 1, 3)
        assert set(record["versions"]) == {"numpy", "onnxruntime"}
        assert record["machine"]["kind"] == "other" and record["machine"]["board"] is None
        end = 0.0
        for repeat in record["repeats"]:
            assert list(repeat) == ["start_s", "end_s", "ttft_s", "token_s"]
            assert len(repeat["token_s"]) == 4 and min(repeat["token_s"]) > 0
            assert end <= repeat["start_s"] < repeat["end_s"]
            took = repeat["ttft_s"] + sum(repeat["token_s"])
            assert took <= repeat["end_s"] - repeat["start_s"]
            end = repeat["end_s"]
        assert abs(record["started_unix"] - time.time()) < 600
        assert record["tokens_per_s"] == pytest.approx(1 / record["tpot_s"])
        memory = record["memory"]
        assert memory["gpu_bytes"] is None
        assert 0 < memory["rss_bytes"] <= memory["peak_rss_bytes"]
        assert 0 < memory["available_bytes"] <= memory["available_before_bytes"]


def test_bench_statistics() -> None:
    repeats = [
        {"ttft_s": 3.0, "token_s": [0.1, 0.2, 0.3]},
        {"ttft_s": 1.0, "token_s": [0.2, 0.2, 0.2]},
        {"ttft_s": 2.0, "token_s": [0.5, 0.5, 1.1]},
    ]
    found = summary(repeats)
    assert found["ttft_s"] == 2.0
    assert found["tpot_s"] == pytest.approx(0.2)  # the median of 0.2, 0.2 and 0.7
    assert found["tokens_per_s"] == pytest.approx(5.0)
    assert found["token_p50_s"] == pytest.approx(0.2)
    assert found["token_p95_s"] == pytest.approx(0.5 + 0.6 * 0.6)


def test_bench_of_single_tokens_has_no_rate(packed: Path) -> None:
    (record,) = bench(packed, "--seq-lens", "2", "--new-tokens", "1", "--repeat", "1")
    assert record["repeats"][0]["token_s"] == [] and record["ttft_s"] > 0
    for name in ("tpot_s", "token_p50_s", "token_p95_s", "tokens_per_s"):
        assert record[name] is None


def test_bench_repeats_for_a_time(packed: Path) -> None:
    """For power passes: as many repeats as fill the time, at least --repeat."""
    (record,) = bench(
        packed, "--seq-lens=2", "--new-tokens=4", "--repeat=2", "--seconds=0.3", "--warmup=0"
    )
    repeats = record["repeats"]
    assert repeats[-1]["end_s"] - repeats[0]["start_s"] >= 0.29 and len(repeats) > 2


def test_bench_prints_each_length_when_it_is_measured(packed: Path) -> None:
    """Ctrl-C during the second, endless length: the first one's line is whole, exit code 130."""
    command = [sys.executable, "run_engine.py", "--bench", "--seq-lens=2,10000000"]
    with subprocess.Popen(
        [*command, "--new-tokens=2", "--repeat=1", "--warmup=0"],
        cwd=packed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        record = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (record["prompt_tokens"], rest, process.returncode) == (2, b"", 130)
    assert b"Traceback" not in errors


# --------------------------------------------------------------------------------------------------
# profile


# As a manifest lists them.
OPS_OF_A_GRAPH = (
    *("RmsNorm", "Linear", "LinearW4", "ChunkCumsum", "ChunkState", "SsdScan", "RmsNormGated"),
    "OfTomorrow",
)


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("layers.3/Ssdi8SsdScan", "SsdScan", 3),
        ("layers.12/Ssdi8Linear.1", "Linear", 12),
        ("layers.0/Ssdi8LinearW4", "LinearW4", 0),
        ("layers.0/Ssdi8RmsNormGated", "RmsNormGated", 0),
        ("layers.0/Ssdi8ChunkCumsum", "ChunkCumsum", 0),
        ("head/Ssdi8RmsNorm", "RmsNorm", None),
        ("layers.2/Ssdi8OfTomorrow.1", "OfTomorrow", 2),
        ("SsdScan/MatMul.7__2", "SsdScan", None),
        ("_inlfunc_Ssdi8ChunkState_token_4_Ssdi8ChunkState/Pad.3", "ChunkState", None),
        ("InsertedPrecisionFreeCast__inlfunc_SsdScan_x_chunks", "SsdScan", None),
        ("layers.1/RmsNorm/Mul.2 + layers.1/RmsNorm/Cast.3", "RmsNorm", 1),
        ("[ONNX Layer: layers.1/Linear/a.1] + [ONNX Layer: layers.2/RmsNorm/b.2]",
         "Linear + RmsNorm", None),
        ("Reformatting CopyNode for Input Tensor 0", "other", None),
        ("Transpose_token_14", "other", None),
        ("Linearity", "other", None),
    ],
)  # fmt: skip
def test_modules_of_layer_names(name: str, module: str, layer: int | None) -> None:
    assert Modules(OPS_OF_A_GRAPH).of(name) == module
    assert model_layer_of(name) == layer


def test_times_are_added_up_by_module() -> None:
    """A name that comes twice in a run, as the pieces of a prefill do, is two layers."""
    runs = [
        [("a/SsdScan", 1.0), ("a/Linear", 0.25), ("a/Linear", 0.5), ("copy", 0.25)],
        [("a/SsdScan", 3.0), ("a/Linear", 0.75), ("a/Linear", 0.5), ("copy", 0.25)],
        [("a/SsdScan", 2.0), ("a/Linear", 0.5), ("a/Linear", 0.5), ("copy", 99.0)],
    ]
    layers = median_times(runs, Modules(OPS_OF_A_GRAPH))
    assert [(layer.name, layer.seconds) for layer in layers] == [
        ("a/SsdScan", 2.0), ("a/Linear", 0.5), ("a/Linear", 0.5), ("copy", 0.25),
    ]  # fmt: skip
    modules = module_times(layers, {"SsdScan": "SSD", "Linear": ""})
    assert [(m.module, m.part, m.layers, m.seconds) for m in modules] == [
        ("SsdScan", "SSD", 1, 2.0), ("Linear", "", 2, 1.0), ("other", "", 1, 0.25),
    ]  # fmt: skip
    assert sum(m.share for m in modules) == pytest.approx(1)
    assert kind_times(layers, ["mamba2"]) == []


def test_times_are_added_up_by_kind_of_block() -> None:
    """Where names tell the block; ops that are fused belong to the part that all belong to."""
    times = {"layers.0/Linear": 1.0, "layers.1/Linear": 2.0, "layers.2/SsdScan": 3.0}
    times |= {"layers.0/ChunkState + layers.0/ChunkScan": 5.0, "head/Linear": 4.0}
    ops = {"Linear": "", "SsdScan": "SSD", "ChunkState": "SSD", "ChunkScan": "SSD"}
    layers = median_times([list(times.items())], Modules(ops))
    kinds = kind_times(layers, ["mamba2", "mlp", "mamba2"])
    assert [(k.kind, k.layers, k.seconds) for k in kinds] == [
        ("mamba2", 3, 9.0), ("other", 1, 4.0), ("mlp", 1, 2.0),
    ]  # fmt: skip
    parts = {module.module: module.part for module in module_times(layers, ops)}
    assert parts == {"Linear": "", "SsdScan": "SSD", "ChunkState + ChunkScan": "SSD"}


def test_a_node_around_others_counts_only_its_own_time() -> None:
    """An If of 100 us that holds a Scan of 60 us that holds a MatMul of 10 us."""
    nodes = [
        {"name": name + "_kernel_time", "ts": ts, "dur": dur}
        for name, ts, dur in [
            ("Add", 0, 5), ("MatMul", 20, 10), ("If", 10, 100), ("Scan", 15, 60), ("Mul", 110, 7),
        ]
    ]  # fmt: skip
    own = dict(_own_times(nodes))
    expected = {"Add": 5e-6, "If": 40e-6, "Scan": 50e-6, "MatMul": 10e-6, "Mul": 7e-6}
    assert own == pytest.approx(expected)


def test_profile_of_the_portable_graph(packed: Path) -> None:
    options = ("--profile", "--seq-lens", "23", "--repeat", "3", "--threads", "1")
    report = run_json(packed, *options)
    assert report["kind"] == "profile" and report["runtime"] == "onnxruntime"
    prefill, decode = report["phases"]
    assert (prefill["phase"], prefill["tokens"]) == ("prefill", 23)
    assert (decode["phase"], decode["tokens"]) == ("decode", 1)
    for phase in report["phases"]:
        modules = {module["module"]: module for module in phase["modules"]}
        assert modules.keys() >= {"SsdScan", "CausalConv1d", "Linear", "Embedding"}
        assert sum(m["seconds"] for m in modules.values()) == pytest.approx(phase["seconds"])
        assert sum(m["layers"] for m in modules.values()) == len(phase["layers"])
        assert {layer["model_layer"] for layer in phase["layers"]} >= {0, 1}
    assert len(prefill["layers"]) == 3 * len(decode["layers"])  # three pieces of at most 10
    text = run_engine(packed, *options).stdout.decode()
    for word in ("prefill, 23 tokens:", "decode, 1 tokens:", "module", "SsdScan", "longest layers"):
        assert word in text


def test_profiling_leaves_no_trace_behind(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backend = OnnxRuntimeBackend(open_bundle(packed), threads=1, profiling=True)
    states = backend.zero_states(1)
    for _ in range(2):
        _, states = backend.forward(np.ones((1, 3), np.int32), states)
    assert len(list(tmp_path.iterdir())) == 1
    first, second = backend.layer_times()
    backend.close()
    assert list(tmp_path.iterdir()) == []
    assert [name for name, _ in first] == [name for name, _ in second] and len(first) > 20


# --------------------------------------------------------------------------------------------------
# interactive


def test_each_line_is_continued(packed: Path) -> None:
    """Text goes on from what was said; the tokens of the last answer are not forgotten."""
    done = run_engine(
        packed, "--interactive", "--max-new-tokens", "10", input=f"{CHAIN}\n\n{CHAIN}\n".encode()
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{CHAIN}\n{CHAIN}\n"
    errors = done.stderr.decode()
    # The second turn reads the last answer's last token and a newline, too.
    assert "10 prompt tokens, 10 new" in errors
    assert "12 prompt tokens behind 19 kept, 10 new" in errors


def test_interactive_json_is_a_line_a_turn(packed: Path) -> None:
    done = run_engine(packed, "--interactive", "--json", "--max-new-tokens=3", input=b"a\nb\n")
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["a", "b"]
    assert all(len(turn["tokens"]) == 3 and turn["finish"] == "length" for turn in turns)


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(packed: Path) -> None:
    """On a terminal: an endless answer is stopped, the next turn works, Ctrl-D ends with 0."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "run_engine.py", "--interactive", "--max-new-tokens", "1000000000"]
    with subprocess.Popen(
        command,
        cwd=packed,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(terminal)
        seen = ""

        def read_until(text: str) -> None:
            """Wait for `text` after what was waited for before."""
            nonlocal seen
            while text not in seen:
                seen += os.read(controller, 4096).decode(errors="replace")
            seen = seen.partition(text)[2]

        for _ in range(2):
            read_until("> ")
            os.write(controller, f"{CHAIN}\n".encode())
            read_until(CHAIN * 3)
            process.send_signal(signal.SIGINT)
            read_until("tokens/s")
        read_until("> ")
        time.sleep(0.3)  # Python shows the prompt a moment before it waits for the line
        process.send_signal(signal.SIGINT)  # here it only says how to end
        read_until("Ctrl-D ends.")
        read_until("> ")
        os.write(controller, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(controller)


def test_errors_of_the_system_have_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    for number, words in ((errno.ENOSPC, "free some space."), (errno.EACCES, "may read and write")):

        def fail(number: int = number) -> int:
            raise OSError(number, os.strerror(number), "/some/file")

        assert _guarded("run_engine", fail) == 2
        said = capsys.readouterr().err
        assert said.startswith("run_engine: [Errno ") and "/some/file" in said and words in said


# --------------------------------------------------------------------------------------------------
# machine and verify


def make_root(root: Path, tegra: bool) -> Path:
    """What a Jetson Orin NX with JetPack 6.2 shows of itself, or some other machine."""
    files = {"proc/meminfo": "MemTotal: 16 kB\nMemAvailable:    7000 kB\nSwapFree:   100 kB\n"}
    if tegra:
        files |= {
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0",
            "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Kit\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: g",
            "sys/devices/platform/17000000.gpu/devfreq_dev/max_freq": "918000000\n",
            "sys/kernel/nvpmodel_clk_cap/emc": "0",
        }
    else:
        files["proc/cpuinfo"] = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def make_nvpmodel(folder: Path, text: str, exit_code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "nvpmodel"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {exit_code}\n")
    program.chmod(0o755)


def test_machine_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson is what its kernel says; tools alone make a simulated one, which always says so."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    board, other = make_root(tmp_path / "board", True), make_root(tmp_path / "other", False)

    plain = this_machine(other)
    assert (plain.kind, plain.cpu, plain.board) == ("other", "Some CPU @ 3 GHz", None)
    alone = this_machine(board)
    assert alone.kind == "jetson" and alone.board is not None
    assert (alone.board.l4t, alone.board.power_mode) == ("36.4.3", None)

    make_nvpmodel(tools, "NV Power Mode: MAXN_SUPER\n0\n")
    real = this_machine(board)
    assert real.kind == "jetson" and real.board is not None
    assert real.cpu == "NVIDIA Jetson Orin NX Engineering Reference Kit"
    assert (real.board.power_mode, real.board.gpu_max_hz) == ("MAXN_SUPER", 918_000_000)
    assert str(real).endswith("power mode MAXN_SUPER") and "SIMULATED" not in str(real)
    simulated = this_machine(other)
    assert simulated.kind == "simulated" and simulated.board is not None
    assert str(simulated).startswith("SIMULATED board on ") and simulated.board.model is None

    for text, mode in (
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE 15 W\n2\n", "MODE 15 W"),
        ("NV Power Mode: \n0\n", None),
    ):
        make_nvpmodel(tools, text)
        told = this_machine(board)
        assert told.board is not None and told.board.power_mode == mode

    for text, code in (("bad input!", 0), ("", 1)):
        make_nvpmodel(tools, text, code)
        silent = this_machine(board)
        assert silent.board is not None and silent.board.power_mode is None


def test_memory_of_the_machine(tmp_path: Path) -> None:
    root = make_root(tmp_path, False)
    assert machine.available_memory(root) == 7000 * 1024
    assert machine.swap_free(root) == 100 * 1024
    assert machine.available_memory(tmp_path / "absent") is None
    resident, peak = machine.process_memory()
    assert resident is not None and peak is not None and 0 < resident <= peak


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("conv_state.0", "layers.0/Linear (in_proj)", "layers.0/Linear (in_proj)"),
        ("ssm_state.0", "layers.0/CausalConv1d", "layers.0/ChunkState"),
        ("logits", "layers.1/ChunkScan", "head/Linear (lm_head)"),
        ("decode_logits[2]", "the decode step", "of any layer"),
    ],
)
def test_ops_under_suspicion(packed: Path, name: str, first: str, last: str) -> None:
    """What the manifest says: the runtime knows no op."""
    found = suspects(name, open_bundle(packed))
    assert found[0].startswith(first) and found[-1].endswith(last)
