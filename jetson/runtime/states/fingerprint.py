"""What the numbers in a state depend on; a state of another fingerprint is another model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from runtime.backends.protocol import Backend
from runtime.bundle import Bundle
from runtime.files import PORTABLE_MODEL, TENSORRT_MODEL, TOKENIZER, WEIGHTS

LETTERS = 32  # of a SHA-256 in hex

# Part -> hash of it, in the order in which a message names those that differ.
Fingerprint = Mapping[str, str]


def fingerprint(bundle: Bundle, backend: Backend) -> dict[str, str]:
    """Of model, method, tokenizer and what computes.

    Two engines round differently, so that a state of one, carried on by the other, would be neither
    one's numbers. Versions of a library and the machine do not count.
    """

    def hashes(*names: str) -> list[Any]:
        return [bundle.files.get(name, {}).get("sha256") for name in names]

    engine = backend.engine or {}
    parts = {
        "model": [hashes(WEIGHTS), bundle.manifest["interface"]],
        "method": bundle.manifest["recipe"],
        "tokenizer": hashes(TOKENIZER),
        "engine": [backend.runtime, engine.get("key"), hashes(PORTABLE_MODEL, TENSORRT_MODEL)],
    }
    return {part: digest(value) for part, value in parts.items()}


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LETTERS]
