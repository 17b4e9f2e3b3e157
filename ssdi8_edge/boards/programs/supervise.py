"""Runs a command as long as the host is there: a lost link ends the command too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.wire import Wire

GRACE_S = 5.0


def main(wire: Wire) -> None:
    """Arguments: argv, folder, environment, input_bytes. Exits as the command does."""
    given = wire.arguments
    with tempfile.TemporaryFile() as spool:
        # A file, since a command that does not read its input must not keep us from listening.
        left = given["input_bytes"]
        while left:
            data = wire.read(min(left, 1 << 20))
            spool.write(data)
            left -= len(data)
        spool.seek(0)
        wire.begin()
        try:
            child = subprocess.Popen(
                [os.path.expanduser(given["argv"][0]), *given["argv"][1:]],
                cwd=os.path.expanduser(given["folder"]),
                env={**os.environ, **given["environment"]},
                stdin=spool,
                start_new_session=True,
            )
        except OSError as error:
            print(f"{error.filename or given['argv'][0]}: {error.strerror}", file=sys.stderr)
            sys.stderr.flush()
            wire.exit(127)

    stopping = threading.Event()

    def stop(*_: object) -> None:
        if not stopping.is_set():
            stopping.set()
            _signal_group(child.pid, signal.SIGTERM)
            threading.Timer(GRACE_S, _signal_group, (child.pid, signal.SIGKILL)).start()

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    wire.watch(stop)
    status = child.wait()
    if stopping.is_set():
        _signal_group(child.pid, signal.SIGKILL)  # what the command left behind in its session
    wire.exit(status if status >= 0 else 128 - status)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
