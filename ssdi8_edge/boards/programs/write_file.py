"""Writes a small file, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import refuse_os_error
    from ssdi8_edge.boards.programs.wire import Wire


def main(wire: Wire) -> None:
    """Arguments: path, bytes; then so many bytes."""
    data = b""
    while len(data) < wire.arguments["bytes"]:
        data += wire.read(1 << 20)
    path = os.path.expanduser(wire.arguments["path"])
    folder = os.path.dirname(path) or "."
    scratch = ""
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=folder, prefix=".ssdi8-edge-")
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if os.path.exists(scratch):
            os.unlink(scratch)
        refuse_os_error(wire, path, error)
    wire.answer(written=True)
