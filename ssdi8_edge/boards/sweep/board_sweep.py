"""One board's part of a sweep: what is left is measured, whatever happens to the link."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from ssdi8_edge.boards.facts.power_modes import Mode, clock_limits, needs_reboot
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.points.points import PointFile, PointId
from ssdi8_edge.boards.points.records import Point, Settings, plain
from ssdi8_edge.boards.sweep.interpret import PointFailed, State, to_point
from ssdi8_edge.boards.sweep.measuring import (
    LOCK_WAIT_S,
    Deploy,
    Session,
    Source,
    holder,
    measuring,
)
from ssdi8_edge.boards.sweep.restored import Before, unknown, verdict
from ssdi8_edge.boards.sweep.sweep_commands import (
    BOOT_ID,
    QUERY,
    Installed,
    call_arguments,
    point_plan,
)
from ssdi8_edge.ground.errors import BoardBusy, LinkLost, UsageError

CURRENT = "current"
ALL = "all"
# How long a board may be away without a new point before it is given up.
PATIENCE_S = 300.0
RETRY_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
# How often a mode is set that the board does not come back from.
MOST_TRIES = 3


@dataclass(frozen=True)
class SweepRequest:
    """What to measure.

    Attributes:
        modes: names of power modes, `current`, or `all` that a board has.
        settings: the same for every point of a file.
    """

    sources: Sequence[Source]
    lengths: Sequence[int]
    modes: Sequence[str]
    settings: Settings
    allow_reboot: bool = False
    allow_unrestored: bool = False


class Watcher(Protocol):
    """Shows a sweep while it runs; called from several threads."""

    def planned(self, board: str, total: int, done: int) -> None: ...
    def say(self, board: str, sentence: str) -> None: ...
    def running(self, board: str, what: str) -> None: ...
    def measured(self, board: str, point: Point) -> None: ...
    def ended(self, board: str, how: str) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """A point to be measured on one board; `mode` is None where it stays as it is."""

    source: Source
    id: PointId
    mode: Mode | None

    def __str__(self) -> str:
        mode = f", {self.id.mode}" if self.id.mode else ""
        return f"{self.source.bundle.method}{mode}, {self.id.length} tokens"


class _Stopped(Exception):
    """Ctrl-C, in the thread of a board. Leaving the call makes the board put itself back."""


T = TypeVar("T")


class BoardSweep:
    """One board, in its own thread.

    Attributes:
        failed: what was tried and is not measured, and why.
        error: why the board was given up, if it was.
        measuring: whether the board may be changed just now.
        ended: set when nothing more will happen.
    """

    def __init__(
        self,
        connection: Connection,
        request: SweepRequest,
        file: PointFile,
        deploy: Deploy,
        watcher: Watcher,
        stop: threading.Event,
    ) -> None:
        self.name = plain(connection.name)  # as the file of points will have it
        self.measured = self.kept = 0
        self.failed: dict[Wanted, str] = {}
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._connection = connection
        self._request = request
        self._file = file
        self._deploy = deploy
        self._watcher = watcher
        self._stop = stop
        self.measuring = False
        # The mode that was being set when the link was lost: the board may have rebooted for it.
        self._changing: str | None = None
        self._tries: dict[str, int] = {}
        self._no_power: str | None = None
        # How it was before this sweep, and whether it may be otherwise now.
        self._first: State | None = None
        self._changed = False
        self._progress = time.monotonic()

    def run(self) -> None:
        """Everything; ends in `error` where that is not possible."""
        try:
            with self._connection:
                try:
                    self._measure_all()
                except _Stopped:
                    self._see_put_back()
        except Exception as error:
            self.error = error
            self.say_unknown()
        finally:
            stopped = "stopped" if self._stop.is_set() else "done"
            self._watcher.ended(self.name, "given up" if self.error else stopped)
            self.ended.set()

    def say_unknown(self) -> None:
        """Of a board that does not answer any more: what nobody has read is not claimed."""
        if self._changed:
            self._say(unknown(self._before(), self._first))

    def _measure_all(self) -> None:
        self._watcher.running(self.name, "connecting")
        self._first = self._look()  # a board that was never there is not waited for
        wanted = self._plan(self._first)
        self.kept = len(wanted) - len(self._left(wanted))
        self._watcher.planned(self.name, len(wanted), self.kept)
        installed: dict[str, Installed] = {}
        for source in {w.source.bundle.digest: w.source for w in self._left(wanted)}.values():
            self._watcher.running(self.name, f"deploying {source.bundle.name}")
            installed[source.bundle.digest] = self._patiently(partial(self._bring, source))
            self._progress = time.monotonic()
        while self._left(wanted) and not self._stop.is_set():
            self._patiently(lambda: self._measure(wanted, installed))

    def _bring(self, source: Source) -> Installed:
        return self._deploy(self._connection, source.folder, self._say)

    def _say(self, sentence: str) -> None:
        self._watcher.say(self.name, plain(sentence))

    # ----------------------------------------------------------------------------------------------
    # the plan

    def _look(self) -> State:
        """The board's state, after what was left changed was put back; tells how that went."""
        with self._begin([]) as session:
            for _ in session:
                pass
            state = session.state
            reboots = session.put_back is not None and bool(session.put_back.get("reboots"))
        if reboots:
            return self._after_reboot(state.files.get(BOOT_ID))
        if session.put_back is None and self._changed:  # the board did it when we left
            self._say(verdict(self._before(), state))
        self._changed = False
        return state

    def _after_reboot(self, boot: str | None) -> State:
        """What a board that goes down for its old mode tells when it is up again."""
        self._changed = True
        self._progress = time.monotonic()
        end = self._progress + PATIENCE_S
        state = self._patiently(self._peek)
        while boot and state.files.get(BOOT_ID) == boot and time.monotonic() < end:
            self._stop.wait(RETRY_S[-1])
            state = self._patiently(self._peek)
        self._say(verdict(self._before() if self._first else Before.of(state), state))
        self._changed = False
        return state

    def _peek(self) -> State:
        with self._begin([]) as session:
            for _ in session:
                pass
            return session.state

    def _before(self) -> Before:
        return Before.of(self._first) if self._first else Before(None, None)

    def _plan(self, state: State) -> list[Wanted]:
        request, current = self._request, state.mode
        modes: dict[str | None, Mode | None] = {}
        for name in self._names(state):
            if name.casefold() == CURRENT:
                modes.setdefault(current.name if current else None, None)
                continue
            found = state.modes.named(name)
            if found is None:
                known = ", ".join(mode.name for mode in state.modes.modes)
                has = f"has the power modes {plain(known)}" if known else "has no power modes"
                raise UsageError(
                    f"{self.name} {has} and no {name!r};",
                    "choose others, or --power-modes current.",
                )
            if found != current:
                modes[found.name] = found
            else:
                modes.setdefault(found.name, None)
        if current is None and any(modes.values()):
            self._say_not_restorable(state)
        # The current mode first, so that nothing is changed before it has to be.
        names = sorted(modes, key=lambda name: modes[name] is not None)
        return [
            Wanted(source, PointId(source.bundle.digest, self.name, name, length), modes[name])
            for name in names
            for source in request.sources
            for length in request.lengths
        ]

    def _names(self, state: State) -> list[str]:
        """Of the modes to measure; one that a board has twice is measured once."""
        asked = [[name] for name in self._request.modes]
        offered = [mode.name for mode in state.modes.modes] or [CURRENT]
        every = [offered if names[0].casefold() == ALL else names for names in asked]
        return [name for names in every for name in names]

    def _say_not_restorable(self, state: State) -> None:
        """Before a mode is set on a board that does not tell which one it has."""
        words = plain(" ".join(state.commands.get(QUERY, "").split())) or "no word"
        default = state.modes.default
        first = f"sudo nvpmodel -m {default.id}, for {default.name}" if default else "nvpmodel -m"
        if not self._request.allow_unrestored:
            raise UsageError(
                f"{self.name} does not tell its power mode (nvpmodel -q: {words}), which could not "
                "be put back after the sweep;",
                f"set one there ({first}), or permit the change by --allow-unrestored.",
            )
        self._say(
            f"does not tell its power mode (nvpmodel -q: {words}): it cannot be put back, and is "
            "changed all the same, as --allow-unrestored permits"
        )

    def _left(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        return [w for w in wanted if w.id not in self._file.points and w not in self.failed]

    # ----------------------------------------------------------------------------------------------
    # measuring

    def _measure(self, wanted: Sequence[Wanted], installed: Mapping[str, Installed]) -> None:
        """One call for all that is left; points are written as they come."""
        for each in self._left(wanted):
            if self._tries.get(each.id.mode or "", 0) >= MOST_TRIES:
                self.failed[each] = "the board went away whenever this mode was set"
        left = {f"point {i}": w for i, w in enumerate(self._left(wanted))}
        self.measuring = True
        if not left:  # the link was lost behind the last point: see that the board is put back
            self._changing = None
            self._look()
            return
        pinned = self._request.settings.pin_clocks
        self._changed = self._changed or pinned or any(each.mode for each in left.values())
        state: State | None = None
        boot: tuple[str | None] | None = None
        with self._begin(self._modes(left, installed)) as session:
            for answer in session:
                if self._stop.is_set():
                    raise _Stopped
                if isinstance(answer.get("put_back"), dict):
                    state = session.state_of(answer)
                    self._tell_put_back(answer["put_back"], state)
                    if answer["put_back"].get("reboots"):
                        boot = (state.files.get(BOOT_ID),)
                if "changing" in answer:
                    self._changing = str(answer["changing"])
                    self._tries[self._changing] = self._tries.get(self._changing, 0) + 1
                elif "mode" in answer:
                    state = self._mode_answer(session, answer, left.values())
                elif "running" in answer:
                    self._watcher.running(self.name, str(left.get(str(answer["running"]), "")))
                elif "point" in answer:
                    found = left.get(str(answer["point"]))
                    if found is None or state is None:
                        raise session.rubbish("a point that nobody asked for")
                    self._point_answer(found, answer, state)
            if len(self._left(wanted)) == len(left):
                raise session.rubbish("it ended without measuring")
        if boot is not None:
            self._after_reboot(*boot)
        self._changed = False

    def _modes(
        self, left: Mapping[str, Wanted], installed: Mapping[str, Installed]
    ) -> list[dict[str, Any]]:
        """The plan for the board: modes in order, each with its points."""
        settings = self._request.settings
        modes: dict[str | None, dict[str, Any]] = {}
        for tag, each in left.items():
            mode = modes.setdefault(
                each.id.mode,
                {
                    "name": each.id.mode,
                    "id": each.mode.id if each.mode else None,
                    "pin_clocks": settings.pin_clocks,
                    "points": [],
                },
            )
            where = installed[each.id.bundle]
            mode["points"].append(point_plan(tag, where, each.id.length, settings))
        return list(modes.values())

    def _mode_answer(
        self, session: Session, answer: Mapping[str, Any], wanted: Iterable[Wanted]
    ) -> State | None:
        name = answer["mode"]
        self._changing = None
        state, problem = session.state_of(answer), str(answer.get("problem") or "")
        now = state.mode.name if state.mode else None
        if not problem and now != name:
            problem = f"the board is in mode {now}, not in {name}"
        if problem:
            reason = self._mode_problem(problem, bool(answer.get("unrestored")))
            for each in wanted:
                if each.id.mode == name:
                    self.failed[each] = reason
            self._say(f"mode {name} is left out: {reason}")
        return state

    def _mode_problem(self, text: str, unrestored: bool = False) -> str:
        if needs_reboot(text):
            return "it needs a reboot, which only --allow-reboot permits"
        if "not found" not in text and (
            "sudo" in text or "root" in text.lower() or "permission" in text.lower()
        ):
            return (
                "not permitted; let this user run nvpmodel and jetson_clocks by sudo without a"
                " password (sudo visudo -f /etc/sudoers.d/ssdi8-edge)"
            )
        words = plain(" ".join(text.split()))
        if unrestored:
            return f"it could not be put back ({words}); --allow-unrestored permits that"
        return words

    def _point_answer(self, wanted: Wanted, answer: Mapping[str, Any], state: State) -> None:
        source, settings = wanted.source, self._request.settings
        try:
            point = to_point(
                answer, source.bundle, source.key, self.name, state, wanted.id.length, settings
            )
        except PointFailed as error:
            self.failed[wanted] = str(error)
            self._say(f"{wanted} failed: {error}")
            return
        if settings.power_seconds and point.power_missing not in (None, self._no_power):
            self._no_power = point.power_missing
            self._say(f"no power is measured: {self._no_power}")
        if self._file.append(point):
            self.measured += 1
            self._watcher.measured(self.name, point)
        self._progress = time.monotonic()

    def _see_put_back(self) -> None:
        """After Ctrl-C: leaving the call makes the board put itself back; wait for it and look."""
        self._say("is asked to end measuring")
        self._look()

    def _tell_put_back(self, done: Mapping[str, Any], state: State) -> None:
        """What the board undid, by what it tells after that."""
        if done.get("reboots"):
            self._say("reboots for the power mode that it had before; waiting for it")
            return
        listed = done.get("problems") or []
        problems = "; ".join(map(str, listed if isinstance(listed, list) else [listed]))
        mode = done.get("mode")
        before = Before(
            mode if isinstance(mode, int) else None, clock_limits(str(done.get("show") or ""))
        )
        self._say(verdict(before, state, self._mode_problem(problems) if problems else ""))

    # ----------------------------------------------------------------------------------------------
    # calls

    @contextmanager
    def _begin(self, modes: Sequence[Mapping[str, Any]]) -> Iterator[Session]:
        """A call; what an earlier one of ours still holds is waited for."""

        def enter(wait_s: float) -> Session:
            arguments = call_arguments(
                holder("a sweep"),
                modes,
                wait_s=wait_s,
                keep_changes=self._changing is not None,
                allow_reboot=self._request.allow_reboot,
                allow_unrestored=self._request.allow_unrestored,
            )
            return stack.enter_context(measuring(self._connection, arguments))

        with ExitStack() as stack:
            try:
                session = enter(LOCK_WAIT_S if self._stop.is_set() else 0.0)
            except BoardBusy as error:
                why = error.message.rstrip(";").removeprefix(f"{self.name} ")
                self._say(f"{why}; waiting for at most {LOCK_WAIT_S:.0f} s")
                session = enter(LOCK_WAIT_S)
            if session.put_back is not None:
                self._tell_put_back(session.put_back, session.state)
            yield session

    def _why_away(self, error: LinkLost) -> str:
        if self._changing is not None:
            return f"went away while the power mode {self._changing} was set; waiting for it"
        return f"{error.message.rstrip(';')}; trying again"

    def _patiently(self, action: Callable[[], T]) -> T:
        """Repeat `action` while the network fails, until there was no progress for long."""
        for attempt in range(1 << 30):
            try:
                return action()
            except LinkLost as error:
                away = time.monotonic() - self._progress
                if self._stop.is_set() or away > PATIENCE_S:
                    raise
                wait = RETRY_S[min(attempt, len(RETRY_S) - 1)]
                if attempt == 0:
                    self._say(self._why_away(error))
                self._connection.close()
                self._stop.wait(wait)
        raise AssertionError
