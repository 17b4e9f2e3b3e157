"""The console: what is read from stdin, and how results are shown."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from runtime.problems import BundleProblem


def stdin() -> TextIO:
    """sys.stdin; Python has none when a program is started with it closed.

    Raises:
        BundleProblem: it is closed.
    """
    if sys.stdin is None:
        raise BundleProblem("stdin is closed", "pipe text into it, or use a terminal")
    return sys.stdin


_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def print_json(report: Mapping[str, Any], indent: int | None = 2) -> None:
    """One object on stdout; in ASCII, so that no console's encoding can spoil it.

    JSON has no word for infinity and NaN: they become null.
    """
    print(json.dumps(_finite(report), indent=indent, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def text_on_stdout(wanted: bool) -> Iterator[Callable[[str], None]]:
    """What prints text piece by piece, and ends the line with the block; silent unless wanted."""
    if not wanted:
        yield lambda text: None
        return
    try:
        yield lambda text: print(text, end="", flush=True)
    finally:
        print(flush=True)


def show_notes(notes: Sequence[str]) -> None:
    """What the user should know of this run, to stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def visible(text: str, keep: str = "") -> str:
    """`text` with escapes for what would steer a terminal, or is no character at all.

    That is control characters, marks that turn the direction of writing, other ends of line, and
    bytes of a file name that are not UTF-8. `keep` holds characters that pass.
    """
    return "".join(c if c in keep or not _steers(c) else _escaped(c) for c in text)


def _steers(c: str) -> bool:
    kind = unicodedata.category(c)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in _DIRECTIONS


def _escaped(c: str) -> str:
    # A byte that is not UTF-8 comes as a lone surrogate.
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else ascii(c)[1:-1]


def pairs(values: Mapping[str, Any]) -> str:
    """{"a": 1, "b": {"c": 2}, "d": [{"e": 3}]} -> a 1, b (c 2), d (e 3)"""
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({pairs(value)})"
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return " ".join(map(_plain, value))
    return str(value)


def size(count: float) -> str:
    """Bytes for people: 1536 -> 1.5 KiB"""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines: the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
