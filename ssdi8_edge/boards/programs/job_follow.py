"""Sends the log of a job from an offset until the job has ended, then how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import lock_file, store_folder
    from ssdi8_edge.boards.programs.wire import Wire

TICK_S = 0.1


def main(wire: Wire) -> None:
    """Arguments: name, offset, wait, cancel.

    Without `wait`, only what is there by now. Answers `log` (bytes that follow) as they come, then
    running, exit (None where it was killed, or runs).
    """
    given = wire.arguments
    folder = store_folder(wire, "jobs", given["name"])
    wire.watch(lambda: wire.exit(0))
    if given["cancel"]:
        _cancel(wire, folder)
    offset = given["offset"]
    while True:
        running = _is_running(wire, folder)
        # The state is taken before the log is read: what a job wrote before its end is not missed.
        offset = _send_log(wire, folder, offset)
        if not (running and given["wait"]):
            break
        time.sleep(TICK_S)
    wire.answer(running=running, exit=None if running else _read(folder, "exit"))
    wire.exit(0)


def _is_running(wire: Wire, folder: str) -> bool:
    descriptor = lock_file(wire, os.path.join(folder, "running"), fcntl.LOCK_SH)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def _send_log(wire: Wire, folder: str, offset: int) -> int:
    try:
        with open(os.path.join(folder, "log"), "rb") as log:
            log.seek(offset)
            while True:
                data = log.read(1 << 16)
                if not data:
                    return offset
                wire.answer(log=len(data))
                wire.send(data)
                offset += len(data)
    except FileNotFoundError:
        return offset


def _read(folder: str, name: str) -> int | None:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)[name]
    except (OSError, ValueError, KeyError):
        return None


def _cancel(wire: Wire, folder: str) -> None:
    """The group is that of a live member while `running` is held, so no other gets the signal."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            if not _is_running(wire, folder):
                return
            group = _read(folder, "group")
            if group is not None:
                try:
                    os.killpg(group, number)
                except OSError:
                    return
            time.sleep(TICK_S)
