"""Removes bundles, content that no bundle refers to, and what interrupted deploys left."""

from __future__ import annotations

import fcntl
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import lock_file, refuse_os_error, store_folder
    from ssdi8_edge.boards.programs.wire import Wire

WAIT_S = 2.0  # for what is just ending


def main(wire: Wire) -> None:
    """Arguments: keep, names of bundles. Answers removed (names) and freed, in bytes."""
    folders = {kind: store_folder(wire, kind) for kind in ("objects", "partial", "bundles")}
    locks = store_folder(wire, "locks")
    for name, who in (("store", "a deploy"), ("board", "a measurement or a build")):
        if lock_file(wire, os.path.join(locks, name), fcntl.LOCK_EX, WAIT_S) is None:
            wire.refuse(f"{who} is running there", "wait until it is done, then repeat.")
    try:
        removed, freed = [], 0
        for name in sorted(os.listdir(folders["bundles"])):
            if name not in wire.arguments["keep"]:
                freed += _remove(folders["bundles"], name)
                if not name.startswith("."):  # one that never got its name
                    removed.append(name)
        for kind in ("objects", "partial"):
            for name in os.listdir(folders[kind]):
                path = os.path.join(folders[kind], name)
                freed += _last_link_bytes(path)
                if kind == "partial" or os.lstat(path).st_nlink == 1:  # in no bundle
                    os.unlink(path)
        wire.answer(removed=removed, freed=freed)
    except OSError as error:
        refuse_os_error(wire, error.filename or folders["bundles"], error)


def _remove(folder: str, name: str) -> int:
    """First out of sight, so that an interrupted removal leaves no half of a bundle.

    Returns the bytes of what the board had added to it.
    """
    path = os.path.join(folder, name)
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return 0
    hidden = os.path.join(folder, ".removed." + name)
    if not name.startswith("."):
        os.rename(path, hidden)
        path = hidden
    freed = sum(
        _last_link_bytes(os.path.join(place, file))
        for place, _, files in os.walk(path)
        for file in files
    )
    shutil.rmtree(path)
    return freed


def _last_link_bytes(path: str) -> int:
    found = os.lstat(path)
    return found.st_size if found.st_nlink == 1 else 0
