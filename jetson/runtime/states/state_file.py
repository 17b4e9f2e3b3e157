"""One snapshot as a file, in the format of safetensors, written whole or not at all.

Its metadata hold the fingerprint of what computed it, the bundle's name, messages and text of a
chat, and a SHA-256 of all of the file with that hash left out. Its tensors are `ids`, `pending` and
the states; of a state that grows it has the rows that are filled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle, Interface
from runtime.files import write_whole
from runtime.problems import BundleProblem
from runtime.states.fingerprint import Fingerprint
from runtime.states.slot import ROWS, Snapshot

FORMAT = "ssdi8-edge state 1"
SUFFIX = ".state"
DTYPES: Mapping[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")  # bytes of the header, at the start of the file
# What reading a file raises that another program wrote.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError)
MAX_HEADER = 64 << 20  # bytes; a chat of a long context has a few


@dataclass(frozen=True)
class Chat:
    """What a chat is besides its state."""

    messages: Sequence[Mapping[str, str]]  # role and content of each
    text: str  # that the tokens stand for


@dataclass(frozen=True)
class Saved:
    """What a state file holds; `chat` is None where it is that of a text."""

    snapshot: Snapshot
    chat: Chat | None = None


def save(path: Path, saved: Saved, bundle: Bundle, fingerprint: Fingerprint) -> None:
    """Write the file; after a kill at any time it is the old one or the new one.

    Raises:
        BundleProblem: it cannot be written.
    """
    snapshot = saved.snapshot
    tensors = {
        "ids": snapshot.ids,
        "pending": np.array(snapshot.pending, np.int32),
        **{name: np.ascontiguousarray(state) for name, state in snapshot.states.items()},
    }
    metadata = {
        "format": FORMAT,
        "bundle": bundle.name,
        "fingerprint": _json(fingerprint),
        "chat": _json(asdict(saved.chat) if saved.chat else None),
    }
    data = [array.tobytes() for array in tensors.values()]
    table, end = {}, 0
    for (name, array), held in zip(tensors.items(), data, strict=True):
        table[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + len(held)],
        }
        end += len(held)
    digest = _digest(_header(table, metadata), data)
    header = _header(table, {**metadata, "sha256": digest})
    try:
        write_whole(path, [LENGTH.pack(len(header)), header, *data])
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BundleProblem(
            f"the state cannot be written to {path} ({getattr(error, 'strerror', error)})",
            "free some space, or name another file",
        ) from error


def load(path: Path, bundle: Bundle, fingerprint: Fingerprint) -> Saved:
    """Read the file.

    Raises:
        BundleProblem: it cannot be read, is torn or altered, or was saved by something else than
            what has this fingerprint.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise BundleProblem(
            f"the state file {path} cannot be read ({getattr(error, 'strerror', error)})",
            "check its name",
        ) from error
    try:
        table, metadata, data = _parse(content)
        maker, made_by = metadata["bundle"], dict(json.loads(metadata["fingerprint"]))
        chat = _chat(json.loads(metadata["chat"]))
    except MALFORMED as error:
        raise BundleProblem(
            f"{path} is no whole state file: it is torn, was altered or is something else"
            f" ({error})",
            "save the state again",
        ) from error
    differ = [part for part, value in fingerprint.items() if made_by.get(part) != value]
    if differ:
        raise BundleProblem(
            f"the state file {path} was saved by {maker} with another"
            f" {' and another '.join(differ)} than what runs here",
            f"run that bundle as it was run then, or save a state with {bundle.name}",
        )
    try:
        snapshot = _snapshot(table, data, bundle.model)
    except MALFORMED as error:
        raise BundleProblem(
            f"the state file {path} does not fit {bundle.name} ({error})", "save the state again"
        ) from error
    return Saved(snapshot, chat)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _header(table: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The one way in which a header is written, so that no byte of it can differ unseen."""
    text = json.dumps({"__metadata__": metadata, **table}, sort_keys=True)
    return text.encode() + b" " * (-len(text) % 8)  # tensors begin at a multiple of 8


def _digest(header: bytes, data: Sequence[bytes | memoryview]) -> str:
    digest = hashlib.sha256(header)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, str], memoryview]:
    """Table of tensors, metadata and data; raises ValueError and the like if anything is amiss."""
    (length,) = LENGTH.unpack_from(content)
    if length > min(MAX_HEADER, len(content) - LENGTH.size):
        raise ValueError("it is cut short")
    start = LENGTH.size + length
    header, data = content[LENGTH.size : start], memoryview(content)[start:]
    table = json.loads(header)
    metadata = table.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r}")
    unsigned = {key: value for key, value in metadata.items() if key != "sha256"}
    if header != _header(table, metadata) or metadata["sha256"] != _digest(
        _header(table, unsigned), [data]
    ):
        raise ValueError("SHA-256 differs")
    return table, metadata, data


def _chat(held: Any) -> Chat | None:
    if held is None:
        return None
    messages = [
        {key: str(message[key]) for key in ("role", "content")} for message in held["messages"]
    ]
    return Chat(messages, str(held["text"]))


def _snapshot(table: Mapping[str, Any], data: memoryview, model: Interface) -> Snapshot:
    """The tensors, of the shapes and types that the model has; raises ValueError and KeyError."""
    if table.keys() != {"ids", "pending", *model.states}:
        raise ValueError("it has other tensors")

    def read(name: str) -> np.ndarray:
        entry = table[name]
        begin, end = entry["data_offsets"]
        # A copy: what is read from a file shall not be read-only.
        array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).copy()
        return array.reshape(entry["shape"])

    ids, states = read("ids"), {}
    for name, state in model.states.items():
        states[name] = held = read(name)
        shape = [1, *state.shape]
        if state.grows:
            shape[ROWS] = len(ids)
        if held.dtype != state.dtype or list(held.shape) != shape:
            raise ValueError(f"{name} has another shape or type")
    return Snapshot(ids, states, tuple(read("pending").tolist()))
