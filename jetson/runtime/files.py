"""The files of a bundle, and of an engine built from it: their names, their hash, how to write one.

The host writes the first ones and fetches the others under these names. Imports the standard
library alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 3
WEIGHTS = "model.safetensors"
PORTABLE_MODEL = "model.portable.onnx"
TENSORRT_MODEL = "model.onnx"
PROGRAM = "program.json"
PROGRAM_SCHEMA = 1
TOKENIZER = "tokenizer.json"
CHAT = "chat.json"
GOLDEN = "golden.npz"

ENGINE = "model.engine"
BUILD_LOG = "build_log.json"
BUILD_MESSAGES = "build.txt"  # of the last build in a store, also of one that failed
TIMING_CACHE = "timing.cache"

# Hashing costs seconds per GB on a board. Larger files (the weights) are hashed by --verify only.
HASHED_AT_LOAD = 64 * 2**20  # bytes
_BLOCK = 1 << 20  # bytes
PARTIAL = ".partial"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces so that large weights do not fill a small board."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that has its old content or all of the new one, also after kill -9.

    What a killed writer left beside it goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        if not _runs(left.suffixes[-2][1:]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()
