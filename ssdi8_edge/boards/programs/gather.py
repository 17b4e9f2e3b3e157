"""Reads files and asks tools, without changing anything.

Where SSDI8_BOARD_ROOT is set, it names a folder that stands for the root of a simulated board.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.wire import Wire

TOOL_S = 20.0
MOST = 1 << 16  # bytes of a file or of what a tool says


def main(wire: Wire) -> None:
    """Arguments: files and names (patterns), tools {label: argv}, disk (a path).

    Answers simulated, files {path: text}, names [path], tools {label: {exit, text}}, disk {free,
    total} in bytes. What is not there is left out.
    """
    given = wire.arguments
    root = os.environ.get("SSDI8_BOARD_ROOT", "")
    wire.watch(lambda: wire.exit(1))
    files = {}
    for path in _matching(root, given["files"]):
        try:
            with open(root + path, "rb") as file:
                files[path] = file.read(MOST).decode("utf-8", "replace")
        except OSError:
            continue
    answers = {label: _ask(argv) for label, argv in given["tools"].items()}
    wire.answer(
        simulated=bool(root),
        files=files,
        names=_matching(root, given["names"]),
        tools={label: answer for label, answer in answers.items() if answer is not None},
        disk=_disk(os.path.expanduser(given["disk"])),
    )
    wire.exit(0)


def _matching(root: str, patterns: list[str]) -> list[str]:
    found = []
    for pattern in patterns:
        found += [path[len(root) :] for path in glob.glob(glob.escape(root) + pattern)]
    return sorted(found)


def _ask(argv: list[str]) -> dict | None:
    tool = shutil.which(os.path.expanduser(argv[0]))
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TOOL_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"exit": done.returncode, "text": done.stdout[:MOST].decode("utf-8", "replace")}


def _disk(path: str) -> dict:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    found = os.statvfs(path)
    return {"free": found.f_bavail * found.f_frsize, "total": found.f_blocks * found.f_frsize}
