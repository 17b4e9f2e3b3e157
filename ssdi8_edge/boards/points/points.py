"""The file of measured points: one JSON line each, appended when measured, never rewritten.

A sweep that is killed leaves whole lines, and at most one torn line at the end, which the next one
cuts off. One sweep at a time writes a file; reading needs no lock.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ssdi8_edge.boards.points.records import Point, Settings
from ssdi8_edge.ground.artifacts import disk_error
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.json_text import to_json


class PointId(NamedTuple):
    """What makes a point: measured once per file."""

    bundle: str  # digest
    board: str
    mode: str | None
    length: int

    @classmethod
    def of(cls, point: Point) -> PointId:
        return cls(point.bundle.digest, point.board, point.mode, point.length)


class PointFile:
    """An open, locked file of points. `append` may be called from several threads."""

    def __init__(self, path: Path, descriptor: int, points: dict[PointId, Point]) -> None:
        self.path = path
        self.points = points
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def append(self, point: Point) -> bool:
        """Write a point through to the disk; False if the file has it already.

        Raises:
            Ssdi8Error: the disk is full; nothing of the point stays in the file.
        """
        line = to_json(point.to_json(), indent=None) + "\n"
        with self._lock:
            if PointId.of(point) in self.points:
                return False
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                _write_all(self._descriptor, line.encode())
            except OSError as error:
                os.ftruncate(self._descriptor, end)
                raise disk_error(self.path, error) from error
            self.points[PointId.of(point)] = point
        return True


@contextmanager
def open_points(path: Path, settings: Settings) -> Iterator[PointFile]:
    """Open a file to append to, or begin it; a torn last line is cut off.

    Raises:
        UsageError: another sweep writes it, it is no file of points, or its points were measured
            with other settings.
        Ssdi8Error: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if path.is_dir():
            raise UsageError(f"{path} is a folder;", "name a file with -o.") from error
        raise disk_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another sweep is writing {path};", "wait for it, or name another file with -o."
            ) from error
        points = {PointId.of(point): point for point in _repair(path, descriptor)}
        for point in points.values():
            if point.settings != settings:
                raise UsageError(
                    f"{path} holds points measured with {_describe(point.settings)};",
                    "give the same options, or name another file with -o.",
                )
        yield PointFile(path, descriptor, points)
    finally:
        os.close(descriptor)


def read_points(path: Path) -> list[Point]:
    """The points of a file, in its order; a torn last line, of a sweep that runs, is left out.

    Raises:
        UsageError: a line is no point; the message names its number.
    """
    whole, rest = _split(path.read_bytes())
    points = [_parse(path, number, line) for number, line in enumerate(whole, 1)]
    last = _point_or_none(rest)
    return [*points, last] if last else points


def _repair(path: Path, descriptor: int) -> list[Point]:
    with open(path, "rb") as file:
        content = file.read()
    whole, rest = _split(content)
    points = [_parse(path, number, line) for number, line in enumerate(whole, 1)]
    if rest:
        last = _point_or_none(rest)
        if last:
            points.append(last)
            _write_all(descriptor, b"\n")
        else:
            os.ftruncate(descriptor, len(content) - len(rest))
            os.fsync(descriptor)
    return points


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and what follows the last of them."""
    *lines, rest = content.split(b"\n")
    return lines, rest


def _parse(path: Path, number: int, line: bytes) -> Point:
    try:
        return Point.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{key}: {first['msg']}" if key else "it is not JSON"
        raise UsageError(
            f"{path} line {number} is not a measured point ({reason});",
            "name a file that `ssdi8-edge sweep` wrote, or delete that line.",
        ) from error


def _point_or_none(line: bytes) -> Point | None:
    try:
        return Point.model_validate_json(line)
    except ValidationError:
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    """One write and a sync; a second write only where the system took a part."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _describe(settings: Settings) -> str:
    pinned = "--pin-clocks" if settings.pin_clocks else "no --pin-clocks"
    return (
        f"--new-tokens {settings.new_tokens}, --repeat {settings.repeat}"
        f" --power-seconds {settings.power_seconds:g} and {pinned}"
    )
