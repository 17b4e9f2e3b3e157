"""Data sets in files of the user's own: `--data FOLDER`, so that nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded

Row = dict[str, Any]

AGAIN = "fetch the data set again, or leave out --data."


def find_file(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, or below it.

    Raises:
        UsageError: there is none, or more than one.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder;", "name the folder of the data sets by --data."
        )
    found = sorted(path for path in folder.rglob(name) if path.is_file())
    if not found:
        raise UsageError(f"there is no {name} below {folder};", "put it there or leave out --data.")
    if len(found) > 1:
        raise UsageError(f"{found[0]} and {found[1]} have the same name;", "narrow --data.")
    return found[0]


def read_rows(path: Path, valid: Callable[[Row], bool], form: str) -> list[Row]:
    """The objects of a file of JSON lines; `form` says in words what `valid` checks.

    Raises:
        UsageError: the file is not of that form; the message names the line.
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                rows.append(json.loads(line))
                if not _holds(valid, rows[-1]):
                    raise UsageError(f"{path}, line {number}, has not the form {form};", AGAIN)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path} as JSON lines ({error});", AGAIN) from error
    if not rows:
        raise UsageError(f"{path} is empty;", AGAIN)
    return rows


def _holds(valid: Callable[[Row], bool], row: Row) -> bool:
    try:
        return valid(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
