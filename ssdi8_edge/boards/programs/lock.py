"""Holds a lock as long as the host is heard."""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import checked_name, lock_file, store_folder
    from ssdi8_edge.boards.programs.wire import Wire


def main(wire: Wire) -> None:
    """Arguments: name, holder, wait_s, shared. Answers held or busy, then stays."""
    given = wire.arguments
    path = os.path.join(store_folder(wire, "locks"), checked_name(wire, given["name"]))
    wire.watch(lambda: wire.exit(0))
    how = fcntl.LOCK_SH if given["shared"] else fcntl.LOCK_EX
    descriptor = lock_file(wire, path, how, given["wait_s"])
    if descriptor is None:
        with open(path, encoding="utf-8", errors="replace") as file:
            wire.answer(busy=file.read(200))
        wire.exit(0)
    else:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, given["holder"].encode("utf-8", "replace")[:200], 0)
        wire.answer(held=True)
        while True:
            time.sleep(3600)
