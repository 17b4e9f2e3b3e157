"""The files of a bundle, and of an engine built from it: their names and their hash.

The host writes the first ones and fetches the others under these names. Imports the standard
library alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 3
WEIGHTS = "model.safetensors"
PORTABLE_MODEL = "model.portable.onnx"
TENSORRT_MODEL = "model.onnx"
PROGRAM = "program.json"
PROGRAM_SCHEMA = 1
TOKENIZER = "tokenizer.json"
GOLDEN = "golden.npz"

ENGINE = "model.engine"
BUILD_LOG = "build_log.json"
BUILD_MESSAGES = "build.txt"  # of the last build in a store, also of one that failed
TIMING_CACHE = "timing.cache"

# Hashing costs seconds per GB on a board. Larger files (the weights) are hashed by --verify only.
HASHED_AT_LOAD = 64 * 2**20  # bytes
_BLOCK = 1 << 20  # bytes


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces so that large weights do not fill a small board."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
