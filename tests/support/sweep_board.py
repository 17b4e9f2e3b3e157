"""For tests of sweeps: an engine that takes no time, and boards that can be broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from board_simulator.machine import make_board

from ssdi8_edge.boards.link.connection import Connection, Say
from ssdi8_edge.boards.link.local import LocalConnection, _LocalChannel
from ssdi8_edge.boards.link.process import Channel
from ssdi8_edge.boards.points.points import open_points
from ssdi8_edge.boards.points.records import Bundle, Point, Settings
from ssdi8_edge.boards.sweep.board_sweep import SweepRequest
from ssdi8_edge.boards.sweep.measuring import Source
from ssdi8_edge.boards.sweep.sweep import Outcome, sweep
from ssdi8_edge.boards.sweep.sweep_commands import Installed

SETTINGS = Settings(new_tokens=4, repeat=2, warmup=1, pin_clocks=False, power_seconds=0.0)
LENGTHS = (8, 16, 32)

# Prints what run_engine.py --bench prints, as a bundle's `engine.json` says it shall.
ENGINE = """
import argparse, json, pathlib, shutil, sys, time

parser = argparse.ArgumentParser()
for name in ("--seq-lens", "--new-tokens", "--repeat", "--warmup"):
    parser.add_argument(name, type=int, default=1)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--bench", action="store_true")
parser.add_argument("--profile", action="store_true")
parser.add_argument("--json", action="store_true")
given = parser.parse_args()
plan = json.loads((pathlib.Path(__file__).parent / "engine.json").read_text())
if "print" in plan:
    print(plan["print"], end="")
    sys.exit(plan.get("exit", 0))
repeats, begin = [], time.monotonic()
while len(repeats) < given.repeat or time.monotonic() - begin < given.seconds:
    start = time.monotonic()
    time.sleep(plan["pace"])
    repeats.append({"start_s": start, "end_s": time.monotonic(), "ttft_s": given.seq_lens / 1e4,
                    "token_s": [0.001] * (given.new_tokens - 1)})
machine = {"kind": "simulated" if shutil.which("nvpmodel") else "other", "platform": "Linux",
           "cpu": "none", "cores": 1, "python": "3"}
if given.profile:
    phases = [{"phase": phase, "tokens": tokens, "seconds": 0.003, "layers": [], "modules": [
        {"module": "ChunkScan", "part": "SSD", "layers": 2, "seconds": 0.002, "share": 0.67},
        {"module": "Linear", "part": "linears", "layers": 4, "seconds": 0.001, "share": 0.33}]}
        for phase, tokens in (("prefill", given.seq_lens), ("decode", 1))]
    print(json.dumps({"schema": 1, "kind": "profile", "key": plan["key"], "backend": "fake",
                      "machine": machine, "versions": {}, "phases": phases}))
else:
    print(json.dumps({"schema": 1, "kind": "bench", "key": plan["key"], "backend": "fake",
                      "machine": machine, "versions": {"fake": "1"}, "batch": 1,
                      "prompt_tokens": given.seq_lens, "new_tokens": given.new_tokens,
                      "warmup": given.warmup, "repeats": repeats, "ttft_s": given.seq_lens / 1e4,
                      "tpot_s": 0.001, "tokens_per_s": 1000.0, "load_s": 0.1,
                      **plan.get("says", {})}))
"""


def make_source(folder: Path, method: str = "edge-w8a8", **plan: object) -> Source:
    """A bundle whose engine does as `plan` says: pace (s a repeat), print, exit, says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_engine.py").write_text(ENGINE)
    (folder / "engine.json").write_text(json.dumps({"key": method, "pace": 0.0, **plan}))
    return source_of(folder, method)


def source_of(folder: Path, method: str) -> Source:
    """One that was made before."""
    bundle = Bundle(
        digest=f"digest-{method}",
        name=f"toy--{method}--host-cpu",
        model="toy",
        checkpoint="c" * 64,
        method=method,
        target="host-cpu",
        bytes=1000,
    )
    return Source(folder, bundle, method)


def lies_there(connection: Connection, folder: Path, say: Say) -> Installed:
    """The deploy of a board that shares our disk."""
    return Installed(str(folder), sys.executable)


class Record:
    """A watcher that remembers; `on_measured` is called for each point."""

    def __init__(self, on_measured: Callable[[Point], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self.points: list[Point] = []
        self._on_measured = on_measured

    def planned(self, board: str, total: int, done: int) -> None:
        self.total, self.done = total, done

    def say(self, board: str, sentence: str) -> None:
        self.said.append(sentence)

    def running(self, board: str, what: str) -> None:
        pass

    def measured(self, board: str, point: Point) -> None:
        self.points.append(point)
        self._on_measured(point)

    def ended(self, board: str, how: str) -> None:
        pass


def run_sweep(
    out: Path,
    sources: Sequence[Source],
    connections: Sequence[Connection],
    *,
    lengths: Sequence[int] = LENGTHS,
    modes: Sequence[str] = ("current",),
    settings: Settings = SETTINGS,
    allow_reboot: bool = False,
    allow_unrestored: bool = False,
    watcher: Record | None = None,
) -> Outcome:
    request = SweepRequest(sources, lengths, modes, settings, allow_reboot, allow_unrestored)
    with open_points(out, settings) as file:
        return sweep(request, connections, file, lies_there, watcher or Record())


class NamedBoard(LocalConnection):
    """This machine under another name, with a store of its own; remembers what it started."""

    def __init__(self, name: str, store: Path) -> None:
        super().__init__(str(store))
        self.name = name
        self.pids: list[int] = []

    def open_channel(self, program: str) -> Channel:
        channel = super().open_channel(program)
        assert isinstance(channel, _LocalChannel)
        self.pids.append(channel._process.pid)
        return channel


class Rubbish(LocalConnection):
    """A machine that answers every program with `text`."""

    def __init__(self, name: str, text: bytes, store: Path, after_mark: bool) -> None:
        super().__init__(str(store))
        self.name = name
        self._text, self._after_mark = text, after_mark

    def open_channel(self, program: str) -> Channel:
        begin = program.partition("[exec(")[0]  # says that it runs, and reads what it gets
        mark = 'print(m["mark"]);' if self._after_mark else ""
        return super().open_channel(
            f"{begin}{mark}sys.stdout.flush();sys.stdout.buffer.write({self._text!r})"
        )


def become_board(folder: Path, setenv: Callable[[str, str], None]) -> Path:
    """Let what is started from here run on a simulated board; returns its root."""
    for name, value in make_board(folder).items():
        setenv(name, value)
    return folder / "root"


def fake_tool(folder: Path, name: str, script: str, setenv: Callable[[str, str], None]) -> None:
    """Put a shell script before the simulated board's own tool, which it finds as $REAL."""
    folder.mkdir(exist_ok=True)
    real = shutil.which(name)
    (folder / name).write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
    (folder / name).chmod(0o755)
    setenv("PATH", f"{folder}:{os.environ['PATH']}")


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = threading.Event()
    for _ in range(int(seconds * 50)):
        if condition():
            return
        end.wait(0.02)
    raise AssertionError("it never came to be")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
