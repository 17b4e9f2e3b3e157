"""The store on a board: folders that are ours, names that stay inside them, locks.

objects/<sha256>            content, read-only
partial/<sha256>            content that is still arriving
bundles/<name>--<digest>/   hard links to objects, and what the board adds (engine, logs)
jobs/<name>/                log, exit status
locks/<name>
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.wire import Wire

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")


def store_folder(wire: Wire, *inside: str) -> str:
    """A folder of the store, made where missing; refuses a link, which may lead elsewhere."""
    if not wire.arguments["store"]:
        wire.refuse("the store has no name", "name a folder by --store.")
    path = os.path.realpath(os.path.expanduser(wire.arguments["store"]))
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        for part in inside:
            path = os.path.join(path, checked_name(wire, part))
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                wire.refuse(
                    f"{path!r} in the store is no folder of its own", "remove it and repeat."
                )
    except OSError as error:
        refuse_os_error(wire, path, error)
    return path


def checked_name(wire: Wire, name: str) -> str:
    """`name`, if it can only name something directly inside a folder."""
    if not _NAME.match(name):
        wire.refuse(
            f"{name!r} cannot be a name in the store", "use letters, digits, '.', '_', '-'."
        )
    return name


def lock_file(wire: Wire, path: str, how: int, wait_s: float = 0.0) -> int | None:
    """Descriptor of a lock file that is held, None if others hold it. The kernel frees it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        refuse_os_error(wire, path, error)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= end:
                os.close(descriptor)
                return None
            time.sleep(0.1)


def refuse_os_error(wire: Wire, path: str, error: OSError) -> NoReturn:
    """End with a sentence about a file."""
    reason = os.strerror(error.errno or 0)
    wire.refuse(f"{path}: {reason}", "put that right there and repeat.")
