"""target/sweep.py: every point once, and the board as it was, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import commands
import pytest
from board_simulator.lab import FAULT_SEEDS
from board_simulator.machine import make_board
from board_simulator.server import SshServer, sshd_path
from sweep_board import (
    LENGTHS,
    SETTINGS,
    NamedBoard,
    Record,
    Rubbish,
    become_board,
    fake_tool,
    is_running,
    lies_there,
    make_source,
    run_sweep,
    wait_for,
)
from tiny_bundle import make_bundle, pack

from ssdi8_edge.boards.link.hosts import connect
from ssdi8_edge.boards.points import points
from ssdi8_edge.boards.points.points import PointFile, PointId, open_points, read_points
from ssdi8_edge.boards.sweep import board_sweep, measuring, sweep_commands
from ssdi8_edge.boards.sweep.profile import profile
from ssdi8_edge.boards.sweep.restored import AS_BEFORE
from ssdi8_edge.ground.errors import BoardBusy, BoardError, LinkLost, Ssdi8Error, UsageError

needs_sshd = pytest.mark.skipif(sshd_path() is None, reason="sshd is missing (openssh-server)")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs the patience of real boards."""
    monkeypatch.setattr(sweep_commands, "INTERVAL_S", 0.02)
    monkeypatch.setattr(sweep_commands, "IDLE_S", 0.2)
    monkeypatch.setattr(board_sweep, "RETRY_S", (0.05, 0.1))


def ids_in(path: Path) -> list[PointId]:
    return [PointId.of(point) for point in read_points(path)]


def mode_of(root: Path) -> int:
    return int((root / "var/lib/nvpmodel/status").read_text().split(":")[1].split()[0])


def gpu(root: Path, name: str) -> str:
    folder = root / "sys/devices/platform/17000000.gpu/devfreq_dev"
    return (folder / name).read_text().strip()


# --------------------------------------------------------------------------------------------------
# what is measured


def test_every_point_once_and_a_repeated_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "runs/sweep.jsonl"
    sources = [make_source(tmp_path / "a", "fp16"), make_source(tmp_path / "b", "edge-w8a8")]
    board = NamedBoard("desk", tmp_path / "store")
    first = run_sweep(out, sources, [board], lengths=(8, 16))
    assert (first.measured, first.kept, first.failed, first.errors) == (4, 0, [], {})
    before = out.read_bytes()
    again = run_sweep(out, sources, [board], lengths=(8, 16))
    assert (again.measured, again.kept) == (0, 4)
    assert out.read_bytes() == before
    more = run_sweep(out, sources, [board], lengths=(8, 16, 32))
    assert (more.measured, more.kept) == (2, 4)
    assert out.read_bytes().startswith(before)
    wanted = {(f"digest-{m}", "desk", None, n) for m in ("fp16", "edge-w8a8") for n in (8, 16, 32)}
    assert len(ids_in(out)) == 6 and set(ids_in(out)) == wanted
    point = read_points(out)[0]
    assert (point.timing.ttft_s, point.timing.tokens_per_s) == (0.0008, 1000.0)
    assert point.power is None and point.power_missing == "not asked for"
    assert point.bundle.method == "fp16" and point.machine.kind == "other"
    assert point.conditions.memory_mb is not None


def test_boards_run_side_by_side(tmp_path: Path) -> None:
    """Each engine waits until the other board's has started too: one after the other would fail."""
    meet = textwrap.dedent(
        """
        import pathlib, sys, time, os
        here = pathlib.Path(__file__).parent
        (here / ("here-" + os.environ.get("SSDI8_TEST_BOARD", str(os.getppid())))).touch()
        end = time.monotonic() + 20
        while len(list(here.glob("here-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        """
    )
    source = make_source(tmp_path / "a")
    engine = source.folder / "run_engine.py"
    engine.write_text(meet + engine.read_text())
    boards = [NamedBoard(name, tmp_path / name) for name in ("left", "right")]
    begin = time.monotonic()
    outcome = run_sweep(tmp_path / "out.jsonl", [source], boards, lengths=(8,))
    assert outcome.measured == 2 and time.monotonic() - begin < 15
    assert {point.board for point in read_points(tmp_path / "out.jsonl")} == {"left", "right"}


def test_power_and_conditions_of_a_simulated_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant power: energy is that times the window. Everything of it is marked as simulated."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    settings = SETTINGS.model_copy(update={"power_seconds": 0.4})
    source = make_source(tmp_path / "a", pace=0.05)
    out = tmp_path / "out.jsonl"
    board = NamedBoard("toy", tmp_path / "store")
    run_sweep(out, [source], [board], lengths=(8,), settings=settings)
    (point,) = read_points(out)
    assert point.simulated and point.mode == "MAXN_SUPER"
    power = point.power
    assert power is not None and power.source == "ina3221"
    assert (power.total, power.whole_module) == (["VDD_IN"], True)
    watts = 4.984 * 1.480
    assert power.mean_w == pytest.approx(watts) and power.idle_w == pytest.approx(watts)
    assert power.window_s >= 0.4
    assert power.j_per_token == pytest.approx(watts * power.window_s / power.tokens)
    assert power.above_idle_j_per_token == pytest.approx(0.0, abs=1e-9)
    assert set(power.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    state = point.conditions
    assert (state.mode_id, state.sms, state.clocks_pinned, state.l4t) == (0, 8, False, "36.4.3")
    assert state.gpu_mhz is not None and state.gpu_mhz.mean == 306
    assert state.over_current_events == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert state.temperature_highest_c["tj"] == 48.5

    # Without a power monitor of its own, the lines of tegrastats serve.
    for path in root.glob("sys/bus/i2c/devices/*/hwmon/hwmon*/*"):
        path.unlink()
    run_sweep(tmp_path / "2.jsonl", [source], [board], lengths=(8,), settings=settings)
    (point,) = read_points(tmp_path / "2.jsonl")
    assert point.power is not None and point.power.source == "tegrastats"
    assert point.power.mean_w == pytest.approx(7.376)


def test_a_machine_without_sensors_says_so(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"power_seconds": 0.1})
    out = tmp_path / "out.jsonl"
    board = NamedBoard("desk", tmp_path / "store")
    run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,), settings=settings)
    (point,) = read_points(out)
    assert point.power is None and "no power sensor" in (point.power_missing or "")


def test_profile_of_a_board(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a")
    board = NamedBoard("desk", tmp_path / "store")
    found = profile(board, source, 8, 2, lies_there, lambda _: None)
    assert [(phase.phase, phase.tokens) for phase in found.phases] == [
        ("prefill", 8),
        ("decode", 1),
    ]
    assert found.phases[0].modules[0].module == "ChunkScan"
    broken = make_source(tmp_path / "b", print="no such option", exit=2)
    with pytest.raises(Ssdi8Error, match="desk could not profile"):
        profile(board, broken, 8, 2, lies_there, lambda _: None)


# --------------------------------------------------------------------------------------------------
# power modes and clocks


def test_modes_are_set_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    settings = SETTINGS.model_copy(update={"pin_clocks": True})
    out, watcher = tmp_path / "out.jsonl", Record()
    outcome = run_sweep(
        out,
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8, 16),
        modes=("40W", "current"),
        settings=settings,
        watcher=watcher,
    )
    assert outcome.failed == [] and outcome.errors == {}
    assert [p.mode for p in read_points(out)] == ["MAXN_SUPER", "MAXN_SUPER", "40W", "40W"]
    assert all(p.conditions.clocks_pinned for p in read_points(out))
    assert mode_of(root) == 0 and gpu(root, "min_freq") == "306000000"
    assert not list((tmp_path / "store").glob("changes.json*"))
    assert "power mode and clocks are as they were before" in watcher.said


def test_all_modes_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a reboot are left out as ever, and the board is as before; a machine without
    modes is measured as it is."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    out, watcher = tmp_path / "out.jsonl", Record()
    board = NamedBoard("toy", tmp_path / "store")
    source = make_source(tmp_path / "a")
    run_sweep(out, [source], [board], lengths=(8,), modes=("all", "current"), watcher=watcher)
    modes = [p.mode for p in read_points(out)]
    assert modes[0] == "MAXN_SUPER" and "40W" in modes and len({*modes}) == len(modes)
    assert mode_of(root) == 0
    assert "power mode and clocks are as they were before" in watcher.said


def test_a_mode_that_needs_a_reboot_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of nvpmodel is answered with no; the other modes are measured."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    out = tmp_path / "out.jsonl"
    outcome = run_sweep(
        out,
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8,),
        modes=("15W", "40W"),
    )
    assert [p.mode for p in read_points(out)] == ["40W"]
    assert outcome.failed == [
        ("toy", "edge-w8a8, 15W, 8 tokens", "it needs a reboot, which only --allow-reboot permits")
    ]
    assert mode_of(root) == 0 and not (root / "reboot").exists()


def test_modes_that_a_board_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names those it has; a machine without any says so. Other boards go on."""
    source, out = make_source(tmp_path / "a"), tmp_path / "out.jsonl"
    plain = NamedBoard("desk", tmp_path / "0")
    outcome = run_sweep(out, [source], [plain], lengths=(8,), modes=("15W",))
    assert "desk has no power modes" in str(outcome.errors["desk"])
    become_board(tmp_path / "board", monkeypatch.setenv)
    outcome = run_sweep(
        out, [source], [NamedBoard("toy", tmp_path / "1")], lengths=(8,), modes=("60W",)
    )
    error = outcome.errors["toy"]
    assert isinstance(error, UsageError)
    assert "has the power modes MAXN_SUPER, 10W, 15W, 25W, 40W and no '60W'" in str(error)
    assert not ids_in(out)


def test_without_permission_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    refusal = "echo 'sudo: a password is required' >&2; exit 1"
    fake_tool(tmp_path / "fakes", "sudo", refusal, monkeypatch.setenv)
    outcome = run_sweep(
        tmp_path / "out.jsonl",
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8,),
        modes=("current", "40W"),
    )
    assert [mode for _, mode, _ in outcome.failed] == ["edge-w8a8, 40W, 8 tokens"]
    assert "sudo visudo" in outcome.failed[0][2]
    assert outcome.measured == 1 and mode_of(root) == 0


def test_a_mode_that_cannot_be_put_back_needs_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvpmodel -q fails where none was ever set: said before anything changes; then the truth."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    status = root / "var/lib/nvpmodel/status"
    status.unlink()
    source, out = make_source(tmp_path / "a"), tmp_path / "out.jsonl"
    board, watcher = NamedBoard("toy", tmp_path / "store"), Record()
    refused = run_sweep(out, [source], [board], lengths=(8,), modes=("25W",), watcher=watcher)
    error = refused.errors["toy"]
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert "toy does not tell its power mode" in str(error) and "NVPM ERROR" in str(error)
    assert "sudo nvpmodel -m 4, for 40W" in str(error) and "--allow-unrestored" in str(error)
    assert not status.exists() and refused.measured == 0 and watcher.said == []
    # Measuring in the mode that it has changes nothing and needs no flag.
    assert run_sweep(out, [source], [board], lengths=(8,), watcher=watcher).measured == 1
    assert watcher.said == []
    done = run_sweep(
        out, [source], [board], lengths=(8,), modes=("25W",), watcher=watcher, allow_unrestored=True
    )
    assert done.measured == 1 and done.failed == [] and mode_of(root) == 3
    assert "it cannot be put back" in watcher.said[0]
    assert watcher.said[-1] == (
        "the power mode is 25W, and what it was before is not known (sudo nvpmodel -m 4 sets the "
        "board's default, 40W)"
    )


def test_clocks_that_cannot_be_stored_need_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    script = '[ "$1" = --store ] && { echo disk is full; exit 1; }; exec "$REAL" "$@"'
    fake_tool(tmp_path / "fakes", "jetson_clocks", script, monkeypatch.setenv)
    source, out = make_source(tmp_path / "a"), tmp_path / "out.jsonl"
    board, watcher = NamedBoard("toy", tmp_path / "store"), Record()
    outcome = run_sweep(out, [source], [board], lengths=(8,), modes=("40W",), watcher=watcher)
    ((_, _, why),) = outcome.failed
    assert why == "it could not be put back (disk is full); --allow-unrestored permits that"
    assert mode_of(root) == 0
    run_sweep(
        out, [source], [board], lengths=(8,), modes=("40W",), watcher=watcher, allow_unrestored=True
    )
    assert len(ids_in(out)) == 1 and mode_of(root) == 0
    assert watcher.said[-1] == AS_BEFORE


@pytest.mark.parametrize(
    ("tool", "script", "last"),
    [
        (  # says that it did, and did not
            "nvpmodel",
            '[ "$1 $2" = "-m 0" ] && exit 0; exec "$REAL" "$@"',
            "the power mode is 40W and NOT MAXN_SUPER as before",
        ),
        (
            "jetson_clocks",
            '[ "$1" = --restore ] && exec "$REAL"; exec "$REAL" "$@"',
            "the power mode is MAXN_SUPER as before; the clocks of GPU are NOT as before",
        ),
        (
            "jetson_clocks",
            '[ "$1" = --show ] && { echo broken; exit 1; }; exec "$REAL" "$@"',
            "the power mode is MAXN_SUPER as before; the clocks cannot be compared",
        ),
        (
            "nvpmodel",
            '[ "$1 $2" = "-m 0" ] && touch "$0.off"; [ -e "$0.off" ] && exit 1; exec "$REAL" "$@"',
            "the power mode cannot be read, it was MAXN_SUPER",
        ),
    ],
)
def test_the_last_sentence_is_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, script: str, last: str
) -> None:
    """Tools that fail without a word: not their exit status counts, but how the board is then."""
    become_board(tmp_path / "board", monkeypatch.setenv)
    fake_tool(tmp_path / "fakes", tool, script, monkeypatch.setenv)
    watcher = Record()
    outcome = run_sweep(
        tmp_path / "out.jsonl",
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8,),
        modes=("40W",),
        settings=SETTINGS.model_copy(update={"pin_clocks": True}),
        watcher=watcher,
    )
    assert outcome.measured == 1
    assert watcher.said[-1].startswith(last), watcher.said
    assert AS_BEFORE not in watcher.said


def test_warnings_beside_the_mode_do_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that warns and exits with 1, and no name: host and board read the same id."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    script = (
        '[ "$1" = -q ] || exec "$REAL" "$@"\n"$REAL" -q | sed "s/Mode: MAXN_SUPER/Mode: /"\n'
        "echo 'NVPM ERROR: failed to read PARAM EMC'; echo 5 of 9; exit 1"
    )
    fake_tool(tmp_path / "fakes", "nvpmodel", script, monkeypatch.setenv)
    out, watcher = tmp_path / "out.jsonl", Record()
    outcome = run_sweep(
        out,
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8,),
        modes=("current", "40W"),
        watcher=watcher,
    )
    assert outcome.errors == {} and outcome.failed == []
    assert [p.mode for p in read_points(out)] == ["MAXN_SUPER", "40W"]
    assert mode_of(root) == 0 and watcher.said[-1] == AS_BEFORE


def test_a_mode_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    hidden = '[ "$1$SSDI8_SIMULATED_SUDO" = -q ] && { echo NVPM ERROR: 13; exit 1; }'
    fake_tool(tmp_path / "fakes", "nvpmodel", f'{hidden}; exec "$REAL" "$@"', monkeypatch.setenv)
    watcher = Record()
    outcome = run_sweep(
        tmp_path / "out.jsonl",
        [make_source(tmp_path / "a")],
        [NamedBoard("toy", tmp_path / "store")],
        lengths=(8,),
        modes=("40W",),
        watcher=watcher,
    )
    assert outcome.measured == 1 and mode_of(root) == 0 and watcher.said[-1] == AS_BEFORE


def test_a_tool_that_never_ends_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said counts; nothing waits for its pipes."""
    from ssdi8_edge.boards.programs import measure

    monkeypatch.setattr(measure, "TOOL_S", 0.3)
    begin = time.monotonic()
    status, text = measure.tool(["sh", "-c", "echo REBOOT REQUIRED; sleep 5 & sleep 5"])
    assert status == 124 and "REBOOT REQUIRED" in text and time.monotonic() - begin < 3


def test_a_board_that_is_lost_is_not_said_to_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program there is killed in another mode: not known, and how to look."""
    become_board(tmp_path / "board", monkeypatch.setenv)
    board = NamedBoard("toy", tmp_path / "store")
    source, out = make_source(tmp_path / "a", pace=0.25), tmp_path / "out.jsonl"

    def kill_later(_: object) -> None:
        threading.Timer(0.3, os.kill, (board.pids[-1], signal.SIGKILL)).start()

    watcher = Record(kill_later)
    run_sweep(out, [source], [board], modes=("40W",), watcher=watcher)
    assert "is not known" in watcher.said[-1] and "the mode was MAXN_SUPER" in watcher.said[-1]
    assert "sudo nvpmodel -q" in watcher.said[-1]


def test_ctrl_c_puts_the_board_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second point; the first one stays."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    source = make_source(tmp_path / "a", pace=0.3)
    settings = SETTINGS.model_copy(update={"pin_clocks": True})
    out = tmp_path / "out.jsonl"
    in_mode: list[int] = []

    def interrupt(_: object) -> None:
        in_mode.append(mode_of(root))
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()

    watcher = Record(interrupt)
    board = NamedBoard("toy", tmp_path / "store")
    monkeypatch.setattr(signal, "raise_signal", lambda n: os.kill(os.getpid(), n))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(out, [source], [board], modes=("40W",), settings=settings, watcher=watcher)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert in_mode == [4] and mode_of(root) == 0 and gpu(root, "min_freq") == "306000000"
    assert watcher.said[-1] == AS_BEFORE
    assert len(ids_in(out)) == 1
    wait_for(lambda: not any(map(is_running, board.pids)))


def test_what_a_killed_sweep_left_changed_is_put_back_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program on the board is killed while an engine runs: the lock stays with the engine."""
    root = become_board(tmp_path / "board", monkeypatch.setenv)
    source, out = make_source(tmp_path / "a", pace=0.25), tmp_path / "out.jsonl"
    board = NamedBoard("toy", tmp_path / "store")

    def kill_later(_: object) -> None:
        threading.Timer(0.3, os.kill, (board.pids[-1], signal.SIGKILL)).start()

    killed = run_sweep(out, [source], [board], modes=("40W",), watcher=Record(kill_later))
    assert isinstance(killed.errors["toy"], BoardError) and killed.measured == 1
    assert mode_of(root) == 4
    watcher = Record()
    ended = run_sweep(out, [source], [board], modes=("current",), watcher=watcher)
    assert ended.measured == 3 and mode_of(root) == 0
    assert any("in use by a sweep of" in sentence for sentence in watcher.said)
    assert "power mode and clocks are as they were before" in watcher.said
    assert [p.mode for p in read_points(out)] == ["40W", *["MAXN_SUPER"] * 3]


# --------------------------------------------------------------------------------------------------
# the file of points


def test_a_line_torn_anywhere_is_cut_off_and_measured_again(tmp_path: Path) -> None:
    """Whole lines stay; a last line without its end is completed."""
    out, source = tmp_path / "out.jsonl", make_source(tmp_path / "a")
    run_sweep(out, [source], [NamedBoard("desk", tmp_path / "store")], lengths=(8, 16))
    content = out.read_bytes()
    first = content.index(b"\n") + 1
    random.seed(7)
    for cut in [first, first + 1, len(content) - 1, *random.sample(range(first, len(content)), 40)]:
        out.write_bytes(content[:cut])
        with open_points(out, SETTINGS) as file:
            assert len(file.points) == (2 if cut == len(content) - 1 else 1)
        assert out.read_bytes() == (content if cut == len(content) - 1 else content[:first])
    out.write_bytes(content[: first + 100] + b"\0" * 50)
    assert len(read_points(out)) == 1
    outcome = run_sweep(out, [source], [NamedBoard("desk", tmp_path / "store")], lengths=(8, 16))
    assert (outcome.kept, outcome.measured) == (1, 1) and len(ids_in(out)) == 2


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    out, source = tmp_path / "out.jsonl", make_source(tmp_path / "a")
    run_sweep(out, [source], [NamedBoard("desk", tmp_path / "store")], lengths=(8, 16))
    lines = out.read_text().splitlines()
    for damage in ("{", "[]", lines[0].replace('"ttft_s":', '"ttft_s":-'), "{}"):
        out.write_text(f"{damage}\n{lines[1]}\n")
        with pytest.raises(UsageError, match="line 1 is not a measured point"), _open(out):
            pass
        assert out.read_text() == f"{damage}\n{lines[1]}\n"


def _open(out: Path) -> AbstractContextManager[PointFile]:
    return open_points(out, SETTINGS)


def test_other_settings_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    board = NamedBoard("desk", tmp_path / "store")
    run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,))
    other = SETTINGS.model_copy(update={"repeat": 7})
    with pytest.raises(UsageError, match="--new-tokens 4, --repeat 2"), open_points(out, other):
        pass


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with _open(out), pytest.raises(UsageError, match="another sweep is writing"), _open(out):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="is a folder"), _open(tmp_path / "folder"):
        pass


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    board = NamedBoard("desk", tmp_path / "store")
    run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,))
    before, write = out.read_bytes(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 300:
            return write(descriptor, data[:200])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def short(descriptor: int, data: bytes) -> int:
        if len(data) < 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:700])

    for broken in (full, short):
        monkeypatch.setattr(points.os, "write", broken)
        outcome = run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8, 16))
        monkeypatch.undo()
        error = outcome.errors["desk"]
        assert isinstance(error, Ssdi8Error) and error.exit_code == 2
        assert "cannot write" in str(error)
        assert out.read_bytes() == before


# --------------------------------------------------------------------------------------------------
# two at once


def test_a_second_sweep_of_a_board_waits_and_is_told_who(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not disturbed, and both files hold every point once."""
    monkeypatch.setattr(board_sweep, "LOCK_WAIT_S", 0.2)
    source = make_source(tmp_path / "a", pace=0.15)
    store, second = tmp_path / "store", {}

    def start_second(_: object) -> None:
        if not second:
            board = NamedBoard("desk", store)
            second["refused"] = run_sweep(tmp_path / "2.jsonl", [source], [board])

    first = run_sweep(
        tmp_path / "1.jsonl", [source], [NamedBoard("desk", store)], watcher=Record(start_second)
    )
    assert (first.measured, first.errors) == (3, {})
    error = second["refused"].errors["desk"]
    assert isinstance(error, BoardBusy) and "is in use by a sweep of" in str(error)
    assert error.exit_code == 3 and second["refused"].measured == 0
    assert run_sweep(tmp_path / "2.jsonl", [source], [NamedBoard("desk", store)]).measured == 3
    for name in ("1.jsonl", "2.jsonl"):
        assert len(ids_in(tmp_path / name)) == len(set(ids_in(tmp_path / name))) == 3


# --------------------------------------------------------------------------------------------------
# rubbish


ENGINE_RUBBISH: dict[str, tuple[dict[str, object], str]] = {
    "control characters": ({"print": "\x1b[2J\x07 not JSON \ud7ff"}, "makes no sense"),
    "an empty object": ({"print": "{}"}, "makes no sense"),
    "nothing": ({"print": ""}, "exit status 0"),
    "nothing but a status": ({"print": "", "exit": 3}, "exit status 3"),
    "deep brackets": ({"print": "[" * 100_000}, "makes no sense"),
    "another bundle": ({"says": {"key": "another"}}, "another bundle"),
    "another length": ({"says": {"prompt_tokens": 9}}, "another length"),
    "no number": ({"says": {"ttft_s": float("nan")}}, "makes no sense (ttft_s"),
    "negative": ({"says": {"ttft_s": -1.0}}, "makes no sense (ttft_s"),
    "words": ({"says": {"ttft_s": "fast"}}, "makes no sense (ttft_s"),
    "infinity": ({"says": {"tokens_per_s": float("inf")}}, "makes no sense (tokens_per_s"),
    "no repeats": ({"says": {"repeats": []}}, "makes no sense (repeats"),
    "no machine": ({"says": {"machine": 7}}, "makes no sense (machine"),
}


def test_engines_that_print_rubbish(tmp_path: Path) -> None:
    """Their points fail, each with its sentence; the others are measured, and the next run tries
    again.
    """
    out, board = tmp_path / "out.jsonl", NamedBoard("desk", tmp_path / "store")
    good = make_source(tmp_path / "good", "good")
    sources = [
        make_source(tmp_path / name, name, **plan) for name, (plan, _) in ENGINE_RUBBISH.items()
    ]
    outcome = run_sweep(out, [*sources, good], [board], lengths=(8,))
    reasons = {point.removesuffix(", 8 tokens"): why for _, point, why in outcome.failed}
    assert set(reasons) == set(ENGINE_RUBBISH) and outcome.errors == {}
    for name, (_, words) in ENGINE_RUBBISH.items():
        assert words in reasons[name] and reasons[name].isprintable(), name
    assert [found.bundle for found in ids_in(out)] == ["digest-good"]
    sources = [make_source(tmp_path / name, name) for name in ENGINE_RUBBISH]
    ended = run_sweep(out, [*sources, good], [board], lengths=(8,))
    assert (ended.kept, ended.measured) == (1, len(sources))


STATE = b'"state": {"files": {}, "commands": {}, "simulated": false}'
BOARD_RUBBISH = [
    b"",
    b"\xff\xfe\x00 rubbish",
    b"\x1b[31mWelcome!\n" * 50,
    b"{}\n",
    b'{"state": 1}\n',
    b"{" + STATE + b', "put_back": 5}\n',
    b"{" + STATE + b'}\n{"mode": "x"}\n',
    b'{"busy": {"a": [1]}}\n',
    b'{"refused": ["\\u001b[2J no", "never"]}\n',
    b"1" * 100_000,
]


def test_boards_that_answer_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is given up with one sentence; a good board beside them is measured."""
    monkeypatch.setattr(board_sweep, "LOCK_WAIT_S", 0.1)
    out = tmp_path / "out.jsonl"
    bad = [
        Rubbish(f"{i}{'' if after_mark else ' without mark'}", text, tmp_path / "bad", after_mark)
        for i, text in enumerate(BOARD_RUBBISH)
        for after_mark in (True, False)
    ]
    boards = [*bad, NamedBoard("desk", tmp_path / "store")]
    outcome = run_sweep(out, [make_source(tmp_path / "a")], boards, lengths=(8,))
    assert set(outcome.errors) == {board.name for board in bad}
    for name, error in outcome.errors.items():
        assert isinstance(error, BoardError) and error.exit_code == 3, name
        assert str(error).count("\n") == 0, name
    assert [point.board for point in read_points(out)] == ["desk"]


def test_rubbish_in_the_middle_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that nobody asked for, twice the same, without a state: none gets into the file."""
    source = (Path(measuring.__file__).parents[1] / "programs/measure.py").read_text()
    from ssdi8_edge.boards.link import connection

    real = connection._program_text
    for answer in (
        'self._answer(point="point 9")',
        'self._answer(mode="?")',
        'self._answer(mode=None, problem="", state={})',
        "self._answer(running=[1])",
        'self._wire.send(b"garbage\\n")',
    ):
        marker = 'for mode in self._given["modes"]:'
        broken = source.replace(marker, f"{answer}\n        {marker}")
        assert broken != source
        monkeypatch.setattr(
            connection,
            "_program_text",
            lambda name, broken=broken: broken if name == "measure" else real(name),
        )
        out = tmp_path / "out.jsonl"
        board = NamedBoard("desk", tmp_path / "store")
        outcome = run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,))
        error = outcome.errors.get("desk")
        assert isinstance(error, BoardError) or outcome.measured == 1, (answer, error)
        monkeypatch.setattr(connection, "_program_text", real)
        assert run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,)).kept <= 1
        assert len(ids_in(out)) == 1
        out.unlink()


def test_names_from_a_board_cannot_steer_a_terminal(tmp_path: Path) -> None:
    says = {"backend": "\x1b]0;owned\x07 $(reboot)\n" + "x" * 10_000}
    out = tmp_path / "out.jsonl"
    board = NamedBoard("desk\x1b[2J", tmp_path / "store")
    run_sweep(out, [make_source(tmp_path / "a", says=says)], [board], lengths=(8,))
    (point,) = read_points(out)
    assert point.backend.isprintable() and len(point.backend) <= 300
    assert point.board.isprintable()
    # The same board again: its name in the file is the one that is looked for.
    assert run_sweep(out, [make_source(tmp_path / "a")], [board], lengths=(8,)).kept == 1


# --------------------------------------------------------------------------------------------------
# as a user meets it: a real bundle, real processes


COMMAND = [sys.executable, "-c", "from ssdi8_edge.cli import main; main()"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    pack(folder, key="k" * 32, checkpoint={"source": "tiny", "sha256": "c" * 64})
    return folder


def ssdi8(folder: Path, *arguments: object) -> commands.Result:
    return commands.ssdi8(*arguments, folder=folder)


def test_sweep_profile_and_report_of_a_bundle_on_this_machine(bundle: Path, tmp_path: Path) -> None:
    """From a bundle to the page by three commands, and the first one again."""
    places = ("--store", tmp_path / "store")
    options = ("--seq-lens", "4,8", "--new-tokens", 3, "--repeat", 2, "-o", "runs/s.jsonl")
    done = ssdi8(tmp_path, "sweep", bundle, *options, *places, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"] == 2
    assert "this machine: 2/2 edge-w8a8, 8 tokens: " in done.stderr
    assert "no power is measured: no power sensor" in done.stderr
    assert [point.length for point in read_points(tmp_path / "runs/s.jsonl")] == [4, 8]
    again = ssdi8(tmp_path, "sweep", bundle, *options, *places)
    assert "measured 0 points, 2 were there before" in again.stderr
    done = ssdi8(tmp_path, "profile", bundle, "--seq-len", 8, "--repeat", 2, *places)
    assert done.returncode == 0, done.stderr
    assert "prefill, 8 tokens, this machine" in done.stdout
    done = ssdi8(tmp_path, "report", "runs", "--csv", "p.csv", "--markdown", "p.md")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "wrote report.html\nwrote p.csv\nwrote p.md\n"
    page = (tmp_path / "report.html").read_text()
    assert "Time to first token: tiny on this machine" in page and "ms per module" in page
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3


def test_wrong_requests_are_one_sentence(bundle: Path, tmp_path: Path) -> None:
    sweep_it = ("sweep", bundle, "--store", tmp_path / "store")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for arguments, words in (
        (("sweep", tmp_path), "is not a bundle"),
        ((*sweep_it, "--seq-lens", "8,x"), "--seq-lens '8,x'"),
        ((*sweep_it, "--seq-lens", "0"), "--seq-lens '0'"),
        ((*sweep_it, "--repeat", "0"), "'--repeat'"),
        ((*sweep_it, "--power-modes", ","), "--power-modes names none"),
        ((*sweep_it, "--host", "a b"), "a b"),
        ((*sweep_it, "-o", "bad.jsonl"), "bad.jsonl line 1"),
        ((*sweep_it, "--seq-lens", "4", "--power-modes", "15W"), "has no power modes"),
        (("report", "nowhere"), "nowhere does not exist"),
        (("report", "bad.jsonl"), "line 1 is not a measured point"),
        (("profile", tmp_path), "is not a bundle"),
    ):
        done = ssdi8(tmp_path, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr and words in done.stderr.splitlines()[-1], done.stderr
    done = ssdi8(tmp_path, *sweep_it, "--host", "nobody@127.0.0.1:9", "--seq-lens", "4")
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_sweep_with_130(bundle: Path, tmp_path: Path) -> None:
    options = ("--seq-lens", "8", "--new-tokens", "5000", "--store", tmp_path / "store")
    child = subprocess.Popen(
        [*COMMAND, "sweep", str(bundle), *map(str, options)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stderr is not None
    seen = []
    for line in child.stderr:
        seen.append(line)
        if "verified" in line:
            break
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=60)[1]
    assert child.returncode == 130, (seen, rest)
    assert "stopped" in rest and "Traceback" not in rest
    assert (tmp_path / "runs/sweep.jsonl").read_bytes() == b""


# --------------------------------------------------------------------------------------------------
# over SSH


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    """A simulated board behind sshd; `board` is its name in our ~/.ssh/config."""
    environment = make_board(tmp_path / "board")
    home = tmp_path / "our-home"
    (home / ".ssh").mkdir(parents=True)
    server = SshServer(tmp_path / "ssh", environment=environment)
    server.restart_after(tmp_path / "board/root/reboot")
    known = tmp_path / "known_hosts"
    known.write_text(server.known_host())
    (home / ".ssh/config").write_text(
        server.client_config("board", UserKnownHostsFile=f'"{known}"')
    )
    monkeypatch.setenv("HOME", str(home))
    with server:
        yield server


@needs_sshd
def test_modes_that_need_a_reboot_over_ssh(server: SshServer, tmp_path: Path) -> None:
    """Only with --allow-reboot: the board goes down, comes back, is measured, and goes back."""
    root, out = tmp_path / "board/root", tmp_path / "out.jsonl"
    source, watcher = make_source(tmp_path / "a"), Record()
    with connect("board", store=str(tmp_path / "store")) as board:
        outcome = run_sweep(
            out,
            [source],
            [board],
            lengths=(8,),
            modes=("current", "15W"),
            allow_reboot=True,
            watcher=watcher,
        )
        assert outcome.errors == {} and outcome.failed == []
        assert [p.mode for p in read_points(out)] == ["MAXN_SUPER", "15W"]
        assert [p.conditions.sms for p in read_points(out)] == [8, 4]
        assert "went away while the power mode 15W was set; waiting for it" in watcher.said
        assert mode_of(root) == 0
        # The board goes down for its old mode; a board that is away at the start is not waited for.
        board.patiently(lambda: board.run(["true"]))
        again = run_sweep(out, [source], [board], lengths=(8, 16), modes=("current",))
        assert again.measured == 1 and again.errors == {}


@needs_sshd
def test_a_board_that_stays_away_is_given_up(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured stays, and the next run finishes."""
    monkeypatch.setattr(board_sweep, "PATIENCE_S", 0.5)
    source, out = make_source(tmp_path / "a", pace=0.1), tmp_path / "out.jsonl"
    with connect("board", store=str(tmp_path / "store")) as board:
        outcome = run_sweep(out, [source], [board], watcher=Record(lambda _: server.kill() or None))
        error = outcome.errors["board"]
        assert isinstance(error, LinkLost) and error.exit_code == 3
        assert 1 <= outcome.measured < len(LENGTHS)
        server.start()
        ended = run_sweep(out, [source], [board])
    assert (ended.kept, ended.measured) == (outcome.measured, len(LENGTHS) - outcome.measured)
    assert len(ids_in(out)) == len(set(ids_in(out))) == len(LENGTHS)


@needs_sshd
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAULT_SEEDS or 2))
def test_a_sweep_with_faults_at_random_moments(
    seed: int,
    server: SshServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Sessions cut, the server killed, our own process killed: no point lost, none doubled."""
    chance = random.Random(seed)
    root, out = tmp_path / "board/root", tmp_path / "out.jsonl"
    for method in ("fp16", "edge-w8a8"):
        make_source(tmp_path / method, method, pace=0.02)
    stop = threading.Event()
    killed = {"sessions": 0, "servers": 0, "sweeps": 0}

    def sabotage() -> None:
        while not stop.wait(chance.uniform(0.1, 1.2)):
            if chance.random() < 0.6:
                killed["sessions"] += 1
                server.kill_sessions()
            else:
                killed["servers"] += 1
                server.kill()
                stop.wait(chance.uniform(0.0, 0.5))
                server.start()

    saboteur = threading.Thread(target=sabotage)
    saboteur.start()
    seen: list[bytes] = []
    try:
        for _ in range(chance.randint(1, 3)):  # our own process is killed
            child = sweep_process(tmp_path, out)
            time.sleep(chance.uniform(0.5, 2.5))
            child.kill()
            killed["sweeps"] += 1
            child.communicate()
            content = out.read_bytes() if out.exists() else b""
            assert content.startswith(b"".join(seen[-1:])), "a point was lost"
            seen.append(content[: content.rfind(b"\n") + 1])
        child = sweep_process(tmp_path, out)
        time.sleep(chance.uniform(0.5, 2.5))
    finally:
        stop.set()
        saboteur.join()
    for what, count in killed.items():
        record_property(f"killed {what}", count)
    said = child.communicate(timeout=60)[1]
    # Only a board that is away at the first word is not waited for.
    assert child.returncode == 0 or "measured=0, kept=0" in said, said
    child = sweep_process(tmp_path, out)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 0, said
    found = ids_in(out)
    assert len(found) == len(set(found)) == 2 * 2 * len(LENGTHS)
    assert {mode for _, _, mode, _ in found} == {"MAXN_SUPER", "40W"}
    assert mode_of(root) == 0 and gpu(root, "min_freq") == "306000000"
    assert not list((tmp_path / "store").glob("changes.json*"))


def sweep_process(tmp_path: Path, out: Path) -> subprocess.Popen[str]:
    """A sweep in a process of its own, which can be killed."""
    program = f"""
        import sys
        from pathlib import Path
        from sweep_board import Record, SETTINGS, run_sweep, source_of
        from ssdi8_edge.boards.sweep import board_sweep, sweep_commands
        from ssdi8_edge.boards.link.hosts import connect
        sweep_commands.INTERVAL_S = 0.02
        board_sweep.RETRY_S = (0.05, 0.1)
        folder = Path({str(tmp_path)!r})
        with connect("board", store=str(folder / "store")) as board:
            outcome = run_sweep(
                Path({str(out)!r}),
                [source_of(folder / m, m) for m in ("fp16", "edge-w8a8")],
                [board],
                modes=("current", "40W"),
                settings=SETTINGS.model_copy(update={{"pin_clocks": True}}),
                watcher=(watcher := Record()),
            )
        print(outcome, watcher.said, file=sys.stderr)
        sys.exit(bool(outcome.errors or outcome.failed))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests / 'support'}"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
