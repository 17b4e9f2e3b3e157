"""Starts, follows and stops the server of a bundle on a board.

There is one per store: the job `serve`. What it is and where it listens is read from its log, so
that nothing else has to be kept in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssdi8_edge.boards.link.connection import Connection, OnLine, Say
from ssdi8_edge.boards.store.jobs import Job, start_job
from ssdi8_edge.ground.errors import BoardError

JOB = "serve"
KEYS = "serve.keys"  # in the store, for its user alone
SERVING = re.compile(r"serving (?P<model>\S+) on http://(?P<host>\S+):(?P<port>\d+)")
STOPPED = "stopped"  # the last line of a server that ended as it was asked to


@dataclass(frozen=True)
class Serving:
    """A server on a board.

    Attributes:
        model: name of its bundle.
        host: address over there that it listens on.
        port: of that.
    """

    model: str
    host: str
    port: int


def found_in(log: str) -> Serving | None:
    """What a server said of itself, None where it does not listen yet."""
    match = SERVING.search(log)
    return Serving(match["model"], match["host"], int(match["port"])) if match else None


def running(connection: Connection) -> tuple[Job, Serving | None] | None:
    """The server's job, and the server once it listens; None where there is none."""
    job = Job(connection, JOB, picked_up=True)
    return (job, found_in(job.log())) if job.state().running else None


def start(connection: Connection, folder: str, python: str, options: Sequence[str]) -> Job:
    """Serve the bundle in `folder` of the board, or pick up the server that runs there.

    Args:
        python: interpreter over there.
        options: of run_engine.py.

    Raises:
        BoardError: as for `start_job`.
    """
    argv = [python, "run_engine.py", "--serve", *options]
    return start_job(connection, JOB, argv, folder=folder, environment={"PYTHONUNBUFFERED": "1"})


def send_keys(connection: Connection, keys: bytes) -> str:
    """Bring a key file to the board, where its user alone reads it; returns its path there."""
    path = f"{connection.store}/{KEYS}"
    connection.write_bytes(path, keys)
    return path


def follow(
    connection: Connection,
    job: Job,
    on_line: OnLine,
    on_serving: Callable[[Serving], None],
    say: Say,
) -> None:
    """Show the log until the server ends; it goes on when this does not.

    Args:
        on_serving: is called once, when it listens.

    Raises:
        BoardError: it ended by itself.
    """
    last = [""]

    def take(line: str) -> None:
        last[0] = line or last[0]
        on_line(line)
        if serving := found_in(line):
            on_serving(serving)

    try:
        status: int | None = job.follow(take, say=say)
    except BoardError:
        if last[0] != STOPPED:
            raise
        return
    if last[0] != STOPPED:
        words = last[0].removeprefix("run_engine: ").rstrip(".")
        raise BoardError(
            f"the server on {connection.name} ended with status {status} ({words});",
            "put that right there, then serve again.",
        )


def stop(connection: Connection) -> bool:
    """End the server: answers under way have a few seconds; returns whether there was one."""
    found = running(connection)
    if found is None:
        return False
    found[0].cancel()
    return True
