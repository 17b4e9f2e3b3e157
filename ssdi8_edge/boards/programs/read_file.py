"""Sends a file."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import refuse_os_error
    from ssdi8_edge.boards.programs.wire import Wire


def main(wire: Wire) -> None:
    """Arguments: path, limit (bytes, or None), missing_ok.

    An answer with `bytes`, those, one with `sha256`; `bytes` None alone where nothing is there.
    """
    path = os.path.expanduser(wire.arguments["path"])
    limit = wire.arguments["limit"]
    if wire.arguments["missing_ok"] and not os.path.lexists(path):
        wire.answer(bytes=None)
        return
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                wire.refuse(f"{path} is no regular file", "name another one.")
            left = found.st_size
            if limit is not None and left > limit:
                wire.refuse(f"{path} holds {left} bytes, too many", "look at it there.")
            wire.answer(bytes=left)
            digest = hashlib.sha256()
            while left:
                data = file.read(min(left, 1 << 20))
                if not data:
                    raise OSError(5, "cut while it was read")
                digest.update(data)
                wire.send(data)
                left -= len(data)
    except OSError as error:
        refuse_os_error(wire, path, error)
    wire.answer(sha256=digest.hexdigest())
