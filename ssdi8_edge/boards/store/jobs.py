"""Jobs: commands on a board that outlive the link, with a log that is read where it was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssdi8_edge.boards.link.connection import Connection, OnLine, Say
from ssdi8_edge.boards.link.lines import LineReader
from ssdi8_edge.ground.errors import BoardBusy, BoardError

PATIENCE_S = 600.0


@dataclass(frozen=True)
class JobState:
    """Attributes:
    running: whether it still runs.
    exit: its status once it ended; None where it was killed, or never ran.
    """

    running: bool
    exit: int | None


class Job:
    """A job by its name; it need not have been started by this process.

    Attributes:
        picked_up: whether it ran already when it was asked for.
    """

    def __init__(self, connection: Connection, name: str, picked_up: bool = False) -> None:
        self.name = name
        self.picked_up = picked_up
        self._connection = connection

    def state(self) -> JobState:
        """Whether it runs, and how it ended."""
        return self._read(LineReader())

    def log(self) -> str:
        """All it has written so far."""
        lines = LineReader()
        self._read(lines)
        return lines.text

    def cancel(self) -> None:
        """End it, gently and then not."""
        self._read(LineReader(), cancel=True)

    def follow(
        self, on_line: OnLine, *, patience_s: float = PATIENCE_S, say: Say = lambda _: None
    ) -> int:
        """Wait for its end; a lost link is made again and the log goes on where it stopped.

        Args:
            on_line: gets each line of the log once.
            patience_s: how long the link may be down.

        Returns:
            The exit status.

        Raises:
            LinkLost: the patience is over; the job goes on.
            BoardError: it was killed, or the board restarted.
        """
        lines = LineReader(on_line)
        state = self._connection.patiently(
            lambda: self._read(lines, wait=True), patience_s=patience_s, say=say
        )
        lines.end()
        if state.exit is None:
            raise BoardError(
                f"job {self.name} on {self._connection.name} ended without an exit status;",
                "it was killed or the board restarted: see whether memory ran out, then repeat.",
            )
        return state.exit

    def _read(self, lines: LineReader, wait: bool = False, cancel: bool = False) -> JobState:
        """Append the log to `lines`, from where they end."""
        arguments = {"name": self.name, "offset": lines.bytes, "wait": wait, "cancel": cancel}
        with self._connection.open_program(
            "job_follow", arguments, what=f"job {self.name}", silence=None
        ) as call:
            for answer in call.answers():
                if "log" in answer:
                    call.read(int(answer["log"]), lines.add)
                else:
                    return JobState(bool(answer["running"]), answer["exit"])
        raise BoardError(f"job {self.name} on {self._connection.name} gave no state;", "repeat.")


def start_job(
    connection: Connection,
    name: str,
    argv: Sequence[str],
    *,
    folder: str = "~",
    environment: Mapping[str, str] | None = None,
    lock: str | None = None,
) -> Job:
    """Start a command that outlives the link, or pick up the one of this name that still runs.

    Its streams go to one log. A job that ended is started anew. Safe to repeat after a lost link.

    Args:
        name: of the job: letters, digits, `.`, `_`, `-`.
        lock: to hold exclusively while the job runs.

    Raises:
        BoardBusy: `lock` is held by others.
        BoardError: as for `Connection.run`.
    """
    arguments = {
        "name": name,
        "argv": list(argv),
        "folder": folder,
        "environment": dict(environment or {}),
        "lock": lock,
    }
    answer = connection.call("job_start", arguments, what=f"starting job {name}")
    if "busy" in answer:
        raise BoardBusy(
            f"{connection.name} is in use by {answer['busy'] or 'someone else'};",
            "wait until it is done, then repeat.",
        )
    return Job(connection, name, picked_up=not answer["started"])
