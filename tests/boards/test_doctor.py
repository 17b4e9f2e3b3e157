"""doctor: what a board is, what it lacks, and the profile that fits it, without touching it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from board_simulator.lab import Lab, needs_sshd
from hypothesis import given
from hypothesis import strategies as st

from ssdi8_edge.boards.facts.board_facts import BoardFacts, read_facts
from ssdi8_edge.boards.facts.doctor import engine_for, examine, profile_toml, report
from ssdi8_edge.boards.facts.interpreter import Interpreter
from ssdi8_edge.boards.link.local import LocalConnection
from ssdi8_edge.ground.errors import BoardError, LinkLost
from ssdi8_edge.targets import load_target

pytestmark = needs_sshd

COMPLETE = ("numpy", "onnxruntime", "tokenizers", "tensorrt", "pycuda")
ORIN_NX = BoardFacts(
    simulated=False,
    model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    part="p3767-0000",
    cpu=None,
    machine="aarch64",
    kernel="5.15.148-tegra",
    l4t="36.4.3",
    jetpack="6.2",
    cuda="12.6.11",
    nvcc=True,
    tensorrt="10.3.0",
    tensorrt_headers=True,
    python=Interpreter("python3", "3.10.12", dict.fromkeys(COMPLETE, "1")),
    system_python=Interpreter("python3", "3.10.12", dict.fromkeys(COMPLETE, "1")),
    tools=["cmake", "g++", "nvpmodel", "tegrastats", "jetson_clocks"],
    root=True,
    power_mode="MAXN_SUPER",
    power_modes=["MAXN_SUPER", "15W"],
    sms=8,
    gpu_mhz=306.0,
    gpu_max_mhz=1173.0,
    cpu_mhz=729.6,
    cpu_max_mhz=1984.0,
    emc_max_mhz=3199.0,
    memory_mb=16338.0,
    memory_free_mb=14205.0,
    swap_mb=8169.0,
    disk_free_mb=90_000.0,
    rails_w={"VDD_IN": 7.4},
)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()


def findings(**changes: object) -> list[tuple[str, str]]:
    facts = dataclasses.replace(ORIN_NX, **changes)  # type: ignore[arg-type]
    found = examine(facts, LocalConnection("/store"))
    assert all(finding.remedy for finding in found)
    return [(finding.needed_for, finding.what) for finding in found]


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from ssdi8_edge.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_a_simulated_board_is_read_and_marked(lab: Lab) -> None:
    """Over SSH, by way of its fake tools and tree, and nothing is changed or added there."""
    lab.simulate("board")
    folder = lab.folder / "board"
    (folder / "root/sys/class/thermal/cooling_device3/cur_state").write_text("1\n")
    (folder / "root/usr/lib/aarch64-linux-gnu/libnvinfer.so.8.6.2").touch()  # left from before
    watched = [p for p in folder.rglob("*") if "sshd" not in p.parts]
    before = {path: path.stat().st_mtime_ns for path in watched}
    said = json.loads(cli("doctor", "--host", "board", "--json").stdout)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "sshd" not in p.parts} == before
    assert said["simulated"] is True
    assert said["model"].startswith("NVIDIA Jetson Orin NX") and said["part"] == "p3767-0000"
    assert (said["l4t"], said["jetpack"], said["cuda"]) == ("36.4.3", "6.2", "12.6.11")
    assert said["tensorrt"] == "10.3.0"
    assert said["power_mode"] == "MAXN_SUPER" and "15W" in said["power_modes"]
    assert (said["sms"], said["gpu_mhz"], said["gpu_max_mhz"]) == (8, 306.0, 1173.0)
    assert said["memory_mb"] == pytest.approx(16338.3, abs=0.1)
    assert said["temperatures_c"]["tj"] == 48.5 and said["rails_w"]["VDD_IN"] > 7
    assert (said["cpu_mhz"], said["cpu_max_mhz"], said["emc_max_mhz"]) == (729.6, 1984.0, 3199.0)
    assert said["over_current_events"] == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert said["throttle_alerts"] == ["oc3-throttle-alert"]
    assert said["runs"]["tensorrt"] is False  # there is no GPU behind it
    assert any("tensorrt module" in finding["what"] for finding in said["findings"])
    shown = cli("doctor", "--host", "board").stdout
    assert shown.startswith("SIMULATED BOARD") and "JetPack 6.2" in shown


def test_a_machine_that_is_no_jetson(lab: Lab) -> None:
    lab.serve("board")
    said = json.loads(cli("doctor", "--host", "board", "--json").stdout)
    assert said["simulated"] is False and said["l4t"] is None and said["power_modes"] == []
    assert said["python"]["version"] and said["disk_free_mb"] > 0
    assert not lab.store("board").exists()


@pytest.mark.parametrize("kind", ["simulate", "serve"])
def test_the_printed_profile_is_a_target(lab: Lab, tmp_path: Path, kind: str) -> None:
    getattr(lab, kind)("board")
    text = cli("doctor", "--host", "board", "--print-profile").stdout
    (tmp_path / "mine.toml").write_text(text)
    target = load_target(str(tmp_path / "mine.toml"))
    assert target.where == "board"
    if kind == "simulate":
        assert target.engines == ["tensorrt", "kernels"] and "(simulated)" in target.about
        shipped = load_target("orin-nx")
        assert target.board == shipped.board and target.engine == shipped.engine
        assert target.context == shipped.context
    else:
        assert target.engines == ["onnxruntime"] and target.board is None


@pytest.mark.parametrize(
    ("part", "memory_mb", "name", "memory_gb", "sms"),
    [
        ("p3767-0001", 7800.0, "orin-nx-8gb", 8, 8),
        ("p3767-0003", 7976.0, "orin-nx-8gb", 8, 8),
        ("p3767-0004", 3900.0, "orin-nx-4gb", 4, 4),
        ("p3701-0004", 32110.0, "orin-nx-32gb", 32, 14),
        ("p3701-0005", 65893.0, "orin-nx-64gb", 64, 16),
    ],
)
def test_modules_get_their_own_sizes(
    tmp_path: Path, part: str, memory_mb: float, name: str, memory_gb: int, sms: int
) -> None:
    facts = dataclasses.replace(ORIN_NX, part=part, memory_mb=memory_mb, sms=4)
    (tmp_path / "x.toml").write_text(profile_toml(facts))
    target = load_target(str(tmp_path / "x.toml"))
    assert target.board is not None
    assert (target.name, target.board.memory_gb, target.board.sms) == (name, memory_gb, sms)


@given(model=st.text(max_size=80), memory=st.none() | st.floats(0, 1e6), jetson=st.booleans())
def test_any_board_gets_a_profile_that_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, model: str, memory: float | None, jetson: bool
) -> None:
    """A board may call itself anything: quotes, newlines, nothing at all."""
    changes = {"model": model, "cpu": model, "memory_mb": memory, "part": None, "sms": None}
    facts = dataclasses.replace(ORIN_NX, l4t="36.4.3" if jetson else None, **changes)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("profile") / "x.toml"
    path.write_text(profile_toml(facts), encoding="utf-8")
    assert load_target(str(path)).where == "board"


def test_a_board_that_lacks_nothing() -> None:
    assert findings() == []
    runs = report("x", ORIN_NX, [])["runs"]
    assert runs == {"tensorrt": True, "kernels": True, "onnxruntime": True}


@pytest.mark.parametrize(
    ("changes", "needed_for", "words"),
    [
        ({"l4t": "35.4.1"}, "tensorrt", "older than JetPack 6.1"),
        ({"l4t": "36.3.0"}, "tensorrt", "older than JetPack 6.1"),
        ({"tensorrt": None}, "tensorrt", "TensorRT is not installed"),
        ({"tensorrt": "8.6.2"}, "tensorrt", "TensorRT 8.6.2 is older than 10.3"),
        ({"tensorrt_headers": False}, "tensorrt", "headers"),
        (
            {"system_python": Interpreter("python3", "3.10.12", {})},
            "tensorrt",
            "no tensorrt module",
        ),
        ({"nvcc": False}, "kernels", "nvcc"),
        ({"tools": ["nvpmodel", "tegrastats", "jetson_clocks", "g++"]}, "kernels", "cmake"),
        ({"tools": ["cmake", "g++"]}, "measuring", "tegrastats is not on PATH"),
        ({"root": False}, "measuring", "sudo asks for a password"),
        ({"rails_w": {}}, "measuring", "no power rails"),
        ({"disk_free_mb": 100.0}, "everything", "100 MB of disk"),
        ({"python": Interpreter("python3", None, {})}, "everything", "does not run"),
        (
            {"python": Interpreter("python3", "3.8.10", dict.fromkeys(COMPLETE, "1"))},
            "everything",
            "3.8.10 is older",
        ),
        (
            {"python": Interpreter("python3", "3.10.12", {"numpy": "1", "tensorrt": "1"})},
            "onnxruntime",
            "python3 has no onnxruntime, tokenizers",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    changes: dict[str, object], needed_for: str, words: str
) -> None:
    found = findings(**changes)
    assert any(kind == needed_for and words in what for kind, what in found), found
    facts = dataclasses.replace(ORIN_NX, **changes)  # type: ignore[arg-type]
    runs = report("x", facts, examine(facts, LocalConnection("/store")))["runs"]
    engines, board = ["tensorrt", "kernels"], LocalConnection("/store")
    if needed_for in ("tensorrt", "kernels"):
        with pytest.raises(BoardError, match=r"cannot build engines yet: .*;") as error:
            engine_for(["tensorrt"], facts, board)
        assert words in str(error.value)
    if needed_for == "kernels":
        with pytest.raises(BoardError, match=r"cannot build engines yet: .*;"):
            engine_for(engines, facts, board)
    else:
        chosen = engine_for(engines, facts, board)
        assert chosen == ("kernels" if needed_for == "tensorrt" else "tensorrt")
    assert runs["tensorrt"] is (needed_for in ("measuring", "onnxruntime"))
    assert runs["kernels"] is (needed_for in ("measuring", "onnxruntime", "tensorrt"))
    assert runs["onnxruntime"] is (needed_for in ("measuring", "tensorrt", "kernels"))


def test_sms_follow_the_mask_of_the_power_mode(lab: Lab) -> None:
    lab.simulate("board")
    connection = lab.connect("board")
    assert read_facts(connection).sms == 8
    root = lab.folder / "board/root"
    (root / "sys/devices/platform/gpu.0/tpc_pg_mask").write_text("252\n")
    assert read_facts(connection).sms == 4
    (root / "sys/devices/platform/gpu.0/tpc_pg_mask").write_text("rubbish")
    (root / "etc/nvpmodel.conf").write_bytes(b"\xff\x00rubbish")
    (root / "proc/meminfo").write_text("")
    facts = read_facts(connection)
    assert facts.sms is None and facts.power_modes == [] and facts.memory_mb is None


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_simulated_board_can_be_started_by_hand(lab: Lab, end: signal.Signals) -> None:
    """As its page says: one command prints the configuration and the next command. Its server ends
    with it.
    """
    command = [sys.executable, "-m", "tests.board_simulator", "--folder", str(lab.folder / "sim")]
    here = Path(__file__).parents[2]
    with subprocess.Popen(
        command,
        cwd=here,
        stdout=subprocess.PIPE,
        text=True,
        # Ignored in what a shell starts in the background, and inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as board:
        assert board.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("ssdi8-edge"):
            lines.append(board.stdout.readline())
        start = lines.index("Host simulated-board\n")
        lab.add("".join(lines[start:-1]))
        said = cli(*lines[-1].split()[1:], "--json")
        board.send_signal(end)
    assert json.loads(said.stdout)["simulated"] is True and board.returncode == 0
    with pytest.raises(LinkLost):
        lab.connect("simulated-board").run(["true"])


def test_a_simulated_board_changes_mode_and_reboots(lab: Lab) -> None:
    """A mode with other SMs wants a reboot, which the board survives; without root nothing goes."""
    lab.simulate("board")
    connection = lab.connect("board")
    refused = connection.run(["nvpmodel", "-m", "1"])
    assert refused.exit != 0 and "Permission denied" in refused.stderr
    asked = connection.run(["sudo", "-n", "nvpmodel", "-m", "1"])
    assert asked.exit != 0 and "Reboot required" in asked.stdout
    assert read_facts(connection).power_mode == "MAXN_SUPER"
    with contextlib.suppress(LinkLost):  # it may go down before it answers
        connection.run(["sudo", "-n", "nvpmodel", "-m", "1"], input=b"yes\n")
    time.sleep(0.5)
    facts = connection.patiently(lambda: read_facts(connection), patience_s=30)
    assert (facts.power_mode, facts.sms, facts.gpu_max_mhz) == ("10W", 4, 612.0)
    pinned = connection.run(["sudo", "-n", "jetson_clocks"])
    assert pinned.exit == 0 and read_facts(connection).gpu_mhz == 612.0
