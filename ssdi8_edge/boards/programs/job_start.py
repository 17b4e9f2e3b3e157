"""Starts a job that outlives the link, or finds it running.

A job is its lock: `running` is held by the runner and by the command, and the kernel frees it when
both are gone, whatever killed them. No process id is trusted after that.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import (
        checked_name,
        lock_file,
        refuse_os_error,
        store_folder,
    )
    from ssdi8_edge.boards.programs.wire import Wire


def main(wire: Wire) -> None:
    """Arguments: name, argv, folder, environment, lock or None. Answers started, or busy."""
    given = wire.arguments
    folder = store_folder(wire, "jobs", given["name"])
    # Who only asks whether it runs holds the lock for a moment, too.
    running = lock_file(wire, os.path.join(folder, "running"), fcntl.LOCK_EX, wait_s=0.3)
    if running is None:
        wire.answer(started=False)
        wire.exit(0)
    held = [running]
    if given["lock"] is not None:
        path = os.path.join(store_folder(wire, "locks"), checked_name(wire, given["lock"]))
        lock = lock_file(wire, path, fcntl.LOCK_EX)
        if lock is None:
            with open(path, encoding="utf-8", errors="replace") as file:
                wire.answer(busy=file.read(200))
            wire.exit(0)
        os.truncate(lock, 0)
        os.pwrite(lock, ("job " + given["name"]).encode(), 0)
        held.append(lock)
    try:
        for stale in ("exit", "log", "group"):
            if os.path.lexists(os.path.join(folder, stale)):
                os.unlink(os.path.join(folder, stale))
        log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        refuse_os_error(wire, folder, error)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _run(given, folder, log, held)
        os._exit(0)
    os.wait()
    wire.answer(started=True)


def _run(given: dict, folder: str, log: int, held: list[int]) -> None:
    """In a session of its own: run the command, then say how it ended."""
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in held:
        os.set_inheritable(descriptor, True)
    _write(folder, "group", {"group": os.getpgrp()})
    try:
        status = subprocess.call(
            [os.path.expanduser(given["argv"][0]), *given["argv"][1:]],
            cwd=os.path.expanduser(given["folder"]),
            env={**os.environ, **given["environment"]},
            pass_fds=held,
        )
    except OSError as error:
        words = f"{error.filename or given['argv'][0]}: {os.strerror(error.errno or 0)}\n"
        os.write(2, words.encode("utf-8", "replace"))
        status = 127
    _write(folder, "exit", {"exit": status if status >= 0 else 128 - status})
    os._exit(0)


def _write(folder: str, name: str, value: dict) -> None:
    scratch = os.path.join(folder, name + ".new")
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, os.path.join(folder, name))
