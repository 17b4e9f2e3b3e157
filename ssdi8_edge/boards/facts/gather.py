"""Files and tools of a board, read in one call without changing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.ground.errors import BoardError


@dataclass(frozen=True)
class Gathered:
    """What `gather` brings: files {path: text}, paths, answers of tools {label: text}."""

    simulated: bool
    files: Mapping[str, str]
    names: Sequence[str]
    tools: Mapping[str, str]
    failed: frozenset[str]
    disk: Mapping[str, int]


def gather(
    connection: Connection,
    files: Sequence[str],
    names: Sequence[str] = (),
    tools: Mapping[str, Sequence[str]] | None = None,
) -> Gathered:
    """Read files that match patterns and ask tools, in one call.

    Args:
        files: patterns of absolute paths, to be read.
        names: patterns whose matches are only named.
        tools: label -> command; one that is not there is left out.
    """
    arguments = {
        "files": list(files),
        "names": list(names),
        "tools": {label: list(argv) for label, argv in (tools or {}).items()},
        "disk": connection.store,
    }
    found = connection.call("gather", arguments, what="reading its state", timeout=120, silence=90)
    try:
        return Gathered(
            simulated=bool(found["simulated"]),
            files=dict(found["files"]),
            names=list(found["names"]),
            tools={label: str(answer["text"]) for label, answer in found["tools"].items()},
            failed=frozenset(k for k, answer in found["tools"].items() if answer["exit"] != 0),
            disk={key: int(value) for key, value in found["disk"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BoardError(
            f"{connection.name} describes itself in a way that makes no sense ({error!r});",
            "see whether it is the right machine.",
        ) from error
