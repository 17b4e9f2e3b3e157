"""Measures points, one after the other, and puts the board back as it was.

The lock `board` is held all the while; an engine that still runs when this program is killed keeps
it until it ends, so that no two engines ever run at once. What has to be put back is written into
the store before it is changed. It is put back when the points are done, when the host ends the call
or is not heard any more, on a signal, or, if this program had no chance to, by the next one.

Nothing is judged here but whether a mode was reached: texts go to the host as they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import lock_file, store_folder
    from ssdi8_edge.boards.programs.wire import Wire

TOOL_S = 60  # nvpmodel and jetson_clocks; they may wait for the power daemon
REBOOT_S = 180  # for the board to go down
ALIVE_S = 1  # how often the host hears of a run that takes long, and may give it up
GRACE_S = 5
TEXT_BYTES = 1 << 24  # of what an engine prints
FILE_BYTES = 1 << 18  # of a file of /sys or /etc; an nvpmodel.conf can have 20 kB
# `NV Power Mode: 15W`, and the id alone on a later line; warnings stand anywhere. What
# power_modes.parse_nvpmodel_query reads on the host.
MODE_ID = re.compile(r"(?ims)^[ \t]*NV Power Mode:.*?^\s*([0-9]{1,4})\s*$")
QUERY = ["nvpmodel", "-q"]
SHOW = ["jetson_clocks", "--show"]
# A simulated board's /etc, /proc and /sys lie here.
ROOT = os.environ.get("SSDI8_BOARD_ROOT", "")


def main(wire: Wire) -> None:
    """Arguments: as target/sweep_commands.py makes them.

    Answers busy, or: state and put_back; for each mode changing, where it is set, then its name,
    problem and state; for each point its texts, and running meanwhile; at last put_back, the state
    behind it, and done.
    """
    given = wire.arguments
    locks = store_folder(wire, "locks")
    descriptor = lock_file(wire, os.path.join(locks, "board"), fcntl.LOCK_EX, given["wait_s"])
    if descriptor is None:
        with open(os.path.join(locks, "board"), encoding="utf-8", errors="replace") as file:
            wire.answer(busy=file.read(200))
        wire.exit(0)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, given["holder"].encode()[:200], 0)
    changes = Changes(os.path.join(store_folder(wire), "changes.json"))
    Session(wire, descriptor, changes).run()


# --------------------------------------------------------------------------------------------------
# the board's tools


def tool(argv: Sequence[str], answer: str = "", *, root: bool = False) -> tuple[int, str]:
    """Exit status and all output of a tool; 127 if it is not there. sudo never asks."""
    command = ["sudo", "-n", *argv] if root and shutil.which("sudo") else list(argv)
    # Files, and no `with` for the child: what runs as root cannot be killed from here, and neither
    # its pipes nor its end are waited for.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
        given.write(answer.encode())
        given.seek(0)
        try:
            child = subprocess.Popen(
                command, stdin=given, stdout=output, stderr=output, start_new_session=True
            )
        except FileNotFoundError:
            return 127, f"{command[0]}: not found"
        except OSError as error:
            return 126, str(error)
        try:
            status = child.wait(TOOL_S)
        except subprocess.TimeoutExpired:
            kill_group(child)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            return 124, f"{content(output)}\n{argv[0]} did not end within {TOOL_S} s"
        return status, content(output)


def query_mode() -> str:
    """What nvpmodel -q says; by root where its files are hidden from others."""
    text = tool(QUERY)[1]
    by_root = "" if MODE_ID.search(text) else tool(QUERY, root=True)[1]
    return by_root if MODE_ID.search(by_root) else text


def current_mode() -> int | None:
    """Its id; None where there are no modes, or none was ever set."""
    found = MODE_ID.search(query_mode())
    return int(found[1]) if found else None


def set_mode(number: int, allow_reboot: bool) -> tuple[bool, str]:
    """Whether the mode is set, and what the tool said: with "reboot" in it, the board goes down."""
    if current_mode() == number:
        return True, ""
    answer = "YES\n" if allow_reboot else "no\n"
    _, text = tool(["nvpmodel", "-m", str(number)], answer, root=True)
    return current_mode() == number, text


def asks_reboot(text: str) -> bool:
    return "reboot" in text.lower()


class Changes:
    """What was changed on the board and has to be put back: a file in the store.

    {"mode": id before, or null, "clocks": whether they were stored, "show": what `jetson_clocks
    --show` told of them}
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._clocks = path + ".clocks"

    def pending(self) -> dict[str, Any] | None:
        """None where nothing was changed."""
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            return {"mode": None, "clocks": os.path.exists(self._clocks), "show": ""}
        return found

    def remember(self, needs_mode: bool, allow_unrestored: bool) -> str:
        """Write down how things are, unless an earlier state is still to be put back.

        Returns why what is about to change could not be put back; empty where it can, or need not
        be. `needs_mode`: the power mode will be changed.
        """
        if self.pending() is not None:
            return ""
        try:
            if os.path.exists(self._clocks):
                os.unlink(self._clocks)  # jetson_clocks would ask whether to replace it
            mode = current_mode()
            if needs_mode and mode is None and not allow_unrestored:
                return "nvpmodel -q does not tell the mode that would have to be put back"
            status, text = tool(["jetson_clocks", "--store", self._clocks], root=True)
            if status != 0 and not allow_unrestored:
                return text.strip() or "jetson_clocks --store failed"
            state = {"mode": mode, "clocks": status == 0, "show": tool(SHOW, root=True)[1]}
            with open(self._path + ".partial", "w", encoding="utf-8") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._path + ".partial", self._path)
        except OSError as error:
            return str(error)
        return ""

    def put_back(self, allow_reboot: bool = False) -> dict[str, Any] | None:
        """Undo what is pending; what could not be undone stays pending. None if nothing was.

        mode and show are those from before; whether they are so again, the host reads.
        """
        state = self.pending()
        if state is None:
            return None
        mode, problems, reached, reboots = state.get("mode"), [], True, False
        if isinstance(mode, int):
            reached, text = set_mode(mode, allow_reboot)
            reboots = allow_reboot and asks_reboot(text)
            if not reached and not reboots:
                problems.append(text.strip() or "nvpmodel did not say why")
        if state.get("clocks"):
            status, text = tool(["jetson_clocks", "--restore", self._clocks], root=True)
            if status != 0:
                problems.append(text.strip() or "jetson_clocks did not say why")
        if reached and not problems:
            for path in (self._path, self._clocks):
                if os.path.exists(path):
                    os.unlink(path)
        before = {"mode": mode, "show": state.get("show") or ""}
        return {**before, "problems": problems, "reboots": reboots}


# --------------------------------------------------------------------------------------------------
# reading


def read_files(patterns: Sequence[str]) -> dict[str, str]:
    """Path -> content of all files that match and can be read."""
    found = {}
    for pattern in patterns:
        for path in sorted(glob.glob(ROOT + pattern)):
            text = read_text(path[len(ROOT) :])
            if text is not None:
                found[path[len(ROOT) :]] = text
    return found


def read_text(path: str) -> str | None:
    try:
        with open(ROOT + path, "rb") as file:
            return file.read(FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def content(file: IO[bytes]) -> str:
    """The end of what was written into a file, as text."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - TEXT_BYTES))
    return file.read().decode("utf-8", "replace")


class Sampler:
    """Reads files, and lines of tegrastats, with the time of each on CLOCK_MONOTONIC."""

    def __init__(self, patterns: Sequence[str], interval_s: float, tegrastats: bool) -> None:
        self._paths = list(read_files(patterns))
        self._values: list[tuple[float, list[str | None]]] = []
        self._lines: list[tuple[float, str]] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True)]
        self._tool: subprocess.Popen[bytes] | None = None
        if tegrastats and shutil.which("tegrastats"):
            self._tool = subprocess.Popen(
                ["tegrastats", "--interval", str(max(1, int(interval_s * 1000)))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._threads.append(threading.Thread(target=self._listen, daemon=True))
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        wake = time.monotonic()
        while self._paths and not self._stop.is_set():
            begin = time.monotonic()
            texts = [read_text(path) for path in self._paths]
            self._values.append(((begin + time.monotonic()) / 2, texts))
            wake = max(wake + self._interval_s, time.monotonic())
            self._stop.wait(max(0.0, wake - time.monotonic()))

    def _listen(self) -> None:
        assert self._tool is not None and self._tool.stdout is not None
        for line in self._tool.stdout:
            self._lines.append((time.monotonic(), line[:4096].decode("utf-8", "replace")))

    def end(self) -> dict[str, Any]:
        """Stop; what was read."""
        self._stop.set()
        if self._tool is not None:
            kill_group(self._tool)
            self._tool.wait()
        for thread in self._threads:
            thread.join()
        return {
            "paths": self._paths,
            "values": self._values,
            "lines": self._lines,
            "interval_s": self._interval_s,
        }


def kill_group(child: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


# --------------------------------------------------------------------------------------------------
# the session


class Session:
    """One call. `_guard` is held while the board is being changed, and for ever once it ends."""

    def __init__(self, wire: Wire, lock: int, changes: Changes) -> None:
        self._wire = wire
        self._given = wire.arguments
        self._lock = lock
        self._changes = changes
        self._guard = threading.RLock()
        self._speaking = threading.Lock()
        self._engine: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=self._abort).start())
        wire.watch(self._abort)

    def run(self) -> None:
        """Everything, in order; whatever goes wrong, the board is put back."""
        try:
            self._measure_all()
        except BaseException:
            with self._guard:
                self._end_engine()
                self._changes.put_back()
            raise

    def _measure_all(self) -> None:
        with self._guard:
            keep, allow_reboot = self._given["keep_changes"], self._given["allow_reboot"]
            left_over = None if keep else self._changes.put_back(allow_reboot)
        self._answer(state=self._state(), put_back=left_over)
        for mode in self._given["modes"]:
            if self._enter(mode):
                for point in mode["points"]:
                    self._measure(point)
        with self._guard:
            put_back = self._changes.put_back(self._given["allow_reboot"])
            self._answer(put_back=put_back, state=self._state(), done=True)
            self._wire.exit(0)

    def _abort(self) -> None:
        with self._guard:
            try:
                self._end_engine()
                self._changes.put_back()
            finally:
                self._wire.exit(1)

    def _end_engine(self) -> None:
        if self._engine is not None:
            kill_group(self._engine, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._engine.wait(GRACE_S)
            kill_group(self._engine)

    def _answer(self, **fields: Any) -> None:
        with self._speaking:
            self._wire.answer(**fields)

    def _state(self) -> dict[str, Any]:
        reading = self._given["reading"]
        return {
            "files": read_files(reading["files"]),
            "commands": {
                name: query_mode() if argv == QUERY else tool(argv, root=root)[1]
                for name, (root, argv) in reading["commands"].items()
            },
            "simulated": bool(ROOT),
        }

    def _enter(self, mode: dict[str, Any]) -> bool:
        """Set mode and clocks as asked for, and tell how that went."""
        number, pin = mode["id"], mode["pin_clocks"]
        problem = text = ""
        unrestored = False
        with self._guard:
            change = number is not None and current_mode() != number
            if change or pin:
                problem = self._changes.remember(change, self._given["allow_unrestored"])
                unrestored = bool(problem)
            if change and not problem:
                # Before the fact: a reboot may leave no time to tell.
                self._answer(changing=mode["name"])
                reached, text = set_mode(number, self._given["allow_reboot"])
                if self._given["allow_reboot"] and asks_reboot(text):
                    time.sleep(REBOOT_S)  # the link breaks meanwhile, and the host comes back
                    self._wire.exit(1)
                problem = "" if reached else text or "nvpmodel did not say why"
            if pin and not problem:
                status, text = tool(["jetson_clocks"], root=True)
                problem = "" if status == 0 else text or "jetson_clocks did not say why"
        self._answer(mode=mode["name"], problem=problem, unrestored=unrestored, state=self._state())
        return not problem

    def _measure(self, point: dict[str, Any]) -> None:
        """Idle, timing, power; the texts of all of them in one answer."""
        reading = self._given["reading"]
        files, clocks, rails = reading["files"], reading["clocks"], reading["power"]
        idle = power = None
        before = read_files(files)
        if point["power"] and (read_files(rails) or shutil.which("tegrastats")):
            sampler = Sampler(rails, point["interval_s"], True)
            time.sleep(point["idle_s"])
            idle = sampler.end()
        timing = self._run(point, point["timing"], Sampler(clocks, 1.0, False))
        if timing["exit"] == 0 and idle is not None:
            sampler = Sampler([*clocks, *rails], point["interval_s"], True)
            power = self._run(point, point["power"], sampler)
        self._answer(
            point=point["tag"],
            idle=idle,
            timing=timing,
            power=power,
            before=before,
            after=read_files(files),
        )

    def _run(self, point: dict[str, Any], argv: Sequence[str], sampler: Sampler) -> dict[str, Any]:
        """Run the engine; the samples reach from before it to after it."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            time.sleep(2 * point["interval_s"])
            with self._guard:
                try:
                    self._engine = subprocess.Popen(
                        [os.path.expanduser(argv[0]), *argv[1:]],
                        cwd=os.path.expanduser(point["folder"]),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=errors,
                        start_new_session=True,
                        pass_fds=[self._lock],
                    )
                except OSError as error:
                    words = f"{error.filename or argv[0]}: {error.strerror}"
                    return {"exit": 127, "stdout": "", "stderr": words, "samples": sampler.end()}
            status = self._wait(self._engine, point)
            with self._guard:
                kill_group(self._engine)  # what it left behind in its session
                self._engine = None
            time.sleep(2 * point["interval_s"])
            return {
                "exit": status,
                "stdout": content(output),
                "stderr": content(errors),
                "samples": sampler.end(),
            }

    def _wait(self, engine: subprocess.Popen[bytes], point: dict[str, Any]) -> int:
        end = time.monotonic() + point["limit_s"]
        while True:
            try:
                return engine.wait(min(ALIVE_S, max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                self._answer(running=point["tag"])
            if time.monotonic() >= end:
                kill_group(engine)
                engine.wait()
                return 124
