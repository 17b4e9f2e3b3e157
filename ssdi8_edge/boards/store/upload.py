"""Bringing a bundle to a board: what is there does not travel, what travelled is not sent again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.files import MANIFEST
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.ground.errors import BundleError

# Of (bytes so far, bytes in all) of this upload.
OnBytes = Callable[[int, int], None]

PIECE = 1 << 15  # what one SSH packet takes
SILENCE_S = 150.0  # hashing what had arrived before, and waiting for another deploy
_NAME_LETTERS = 100


@dataclass(frozen=True)
class Placed:
    """A bundle on a board.

    Attributes:
        folder: absolute path over there.
        sent: files that travelled, at least in part; their bytes in `sent_bytes`.
    """

    folder: str
    sent: int
    sent_bytes: int


@dataclass(frozen=True)
class Cargo:
    """A bundle here, as it travels.

    Attributes:
        name: of its folder on the board; the end says which content it is.
        files: path -> {sha256, bytes}, the manifest included.
    """

    folder: Path
    name: str
    files: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, folder: Path, manifest: Mapping[str, Any]) -> Cargo:
        """The cargo of an opened bundle."""
        content = (folder / MANIFEST).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files = {
            path: {"sha256": listed["sha256"], "bytes": listed["bytes"]}
            for path, listed in manifest["files"].items()
        }
        files[MANIFEST] = {"sha256": digest, "bytes": len(content)}
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", str(manifest["name"])).strip("._-")
        return cls(folder, f"{plain[:_NAME_LETTERS] or 'bundle'}--{digest[:12]}", files)


class _Mismatch(Exception):
    """Content arrived that is not what the manifest lists.

    Attributes:
        resumed: whether its beginning was from an earlier attempt.
    """

    def __init__(self, path: str, resumed: bool) -> None:
        super().__init__(path)
        self.path = path
        self.resumed = resumed


def upload(
    connection: Connection,
    cargo: Cargo,
    *,
    rehash: bool = False,
    on_bytes: OnBytes = lambda done, total: None,
) -> Placed:
    """Bring a bundle; it is in place whole when this returns, and not at all before.

    After a lost link the same call goes on at the byte where the link broke.

    Args:
        rehash: also compare by content what is there, and bring anew what differs.

    Raises:
        LinkLost: the network failed.
        BundleError: a file is not what the manifest lists.
        BoardError: the disk over there is full, or the store is in use.
    """
    try:
        return _attempt(connection, cargo, rehash, on_bytes)
    except _Mismatch as mismatch:
        if not mismatch.resumed:
            raise _altered(cargo, mismatch.path) from mismatch
    try:
        # The part that was there was bad, and is gone.
        return _attempt(connection, cargo, False, on_bytes)
    except _Mismatch as mismatch:
        raise _altered(cargo, mismatch.path) from mismatch


def _altered(cargo: Cargo, path: str) -> BundleError:
    return BundleError(
        f"{cargo.folder / path} is not the file that the manifest lists (SHA-256 differs);",
        "pack the bundle again.",
    )


def _attempt(connection: Connection, cargo: Cargo, rehash: bool, on_bytes: OnBytes) -> Placed:
    paths = {listed["sha256"]: path for path, listed in cargo.files.items()}
    arguments = {"bundle": cargo.name, "files": dict(cargo.files), "rehash": rehash}
    with connection.open_program(
        "receive", arguments, what="bringing the bundle", silence=SILENCE_S, beats=False
    ) as call:
        answer = call.next_answer()
        wanted: list[tuple[str, int]] = []
        try:
            if not answer["present"]:
                wanted = [(paths[sha256], int(offset)) for sha256, offset in answer["wanted"]]
                call.send(_contents(cargo, wanted, on_bytes))
                mismatched = None
                for answer in call.answers():
                    if "mismatch" in answer:
                        mismatched = _Mismatch(paths[answer["mismatch"]], bool(answer["resumed"]))
                if mismatched is not None:
                    raise mismatched
            folder = str(answer["folder"])
        except (KeyError, TypeError, ValueError) as error:
            raise call.rubbish(repr(answer)[:80]) from error
        sent = sum(cargo.files[path]["bytes"] - offset for path, offset in wanted)
        return Placed(folder, len(wanted), sent)


def _contents(cargo: Cargo, wanted: list[tuple[str, int]], on_bytes: OnBytes) -> Iterator[bytes]:
    total = sum(cargo.files[path]["bytes"] - offset for path, offset in wanted)
    done = 0
    for path, offset in wanted:
        left = cargo.files[path]["bytes"] - offset
        with (cargo.folder / path).open("rb") as file:
            file.seek(offset)
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise BundleError(
                        f"{cargo.folder / path} became shorter while it was sent;",
                        "pack the bundle again.",
                    )
                left -= len(piece)
                done += len(piece)
                yield piece
                on_bytes(done, total)


def prune(connection: Connection, keep: list[str]) -> tuple[list[str], int]:
    """Remove all bundles but those named in `keep`, and content that none refers to.

    Returns:
        Names of removed bundles, and bytes freed.

    Raises:
        BoardError: a deploy, build or measurement is running there.
    """
    answer = connection.call("prune", {"keep": keep}, what="pruning", timeout=None)
    return list(answer["removed"]), int(answer["freed"])
