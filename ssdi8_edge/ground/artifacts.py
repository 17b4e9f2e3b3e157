"""Files a build leaves behind: names, hashes, and writing that is whole or absent.

A run folder (`--out`) holds one artifact per stage; each records the key of what it was made from,
so that a repeated build redoes only what changed:

    calibration.safetensors   statistics of the activations
    quantized/                model.safetensors, config.json
    onnx/                     model.portable.onnx, model.onnx, export.json
    bundle/                   what travels to a board; manifest.json
    steps.json                when and where each stage ran
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.files import HASHED_AT_LOAD, sha256
from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ground.json_text import to_json

CALIBRATION = "calibration.safetensors"
QUANTIZED = "quantized"
ONNX = "onnx"
BUNDLE = "bundle"

# What a disk can say no with.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

ASIDE = ".old"

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def key_of(parts: dict[str, Any]) -> str:
    """A short name of everything an artifact was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def whole_or_absent(final: Path) -> Iterator[Path]:
    """A temporary path beside `final` (a file or a folder) that takes its name on success.

    Whatever happens, also kill -9, `final` is either the old artifact or the new one. A full disk
    is reported with the path and the remedy.

    Raises:
        Ssdi8Error: the disk is full, or the folder cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final)
        scratch = Path(
            tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
        )
    except OSError as error:
        raise disk_error(final, error) from error
    try:
        yield scratch / final.name
        _publish(scratch / final.name, final)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise disk_error(final, error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(final: Path) -> None:
    """Scratch folders of killed writers; one may have died between the renames of `_exchange`,
    another after its artifact was whole, so that nobody writes it again."""
    for stale in final.parent.glob(f".{final.name}.*.partial"):
        aside = stale / f"{final.name}{ASIDE}"
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        shutil.rmtree(stale, ignore_errors=True)


def _publish(scratch: Path, final: Path) -> None:
    for path in [scratch, *scratch.rglob("*")] if scratch.is_dir() else [scratch]:
        _sync(path)
    if scratch.is_dir() and final.is_dir():
        _exchange(scratch, final)
    else:
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(scratch, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step, so that no moment is without a whole `b`."""
    libc = ctypes.CDLL(None, use_errno=True)
    swapped = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if swapped != 0:  # a file system without exchange: the old folder steps aside first
        aside = a.with_name(a.name + ASIDE)
        os.rename(b, aside)
        os.rename(a, b)


def read_json(path: Path) -> Any:
    """What a JSON file holds; a byte order mark, which some editors write, is no part of it.

    Raises ValueError where it is no JSON, or is nested deeper than anyone means.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(to_json(value) + "\n", encoding="utf-8")


def listing(folder: Path, without: str) -> dict[str, dict[str, Any]]:
    """Relative path -> {sha256, bytes} of every file but `without`, the record itself."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != without
    }


def is_intact(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether every listed file is there in its size, and the smaller ones in their content.

    Hashing the weights of a large model at each build would cost more than most stages.
    """
    for name, listed in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != listed["bytes"]:
            return False
        if listed["bytes"] <= HASHED_AT_LOAD and sha256(path) != listed["sha256"]:
            return False
    return True


def disk_error(place: Path, error: OSError) -> Ssdi8Error:
    """A full or read-only disk in one sentence; exit code 2."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or choose another place; what was finished is kept."
    else:
        remedy = "choose a folder that can be written."
    failure = Ssdi8Error(f"cannot write {place}: {os.strerror(error.errno or 0)}", remedy)
    failure.exit_code = 2
    return failure
