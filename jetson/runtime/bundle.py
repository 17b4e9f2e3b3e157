"""A bundle on disk: its manifest, and whether its files are the ones it lists."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files import HASHED_AT_LOAD, MANIFEST, MANIFEST_SCHEMA, sha256
from runtime.problems import BundleProblem

ENGINES = ("onnxruntime", "tensorrt", "kernels")
STATE_DTYPES: Mapping[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
UPDATES: Mapping[str, bool] = {"replace": False, "append": True}
PARTS = {
    "model": dict,
    "interface": dict,
    "recipe": dict,
    "target": dict,
    "text": dict,
    "files": dict,
    "created": dict,
    "steps": list,
    "not_run": list,
}


@dataclass(frozen=True)
class State:
    """A tensor that the graph carries from call to call, as the manifest declares it."""

    name: str  # of the graph's input
    output: str  # of the graph's output, which is the input of the next call
    shape: tuple[int, ...]  # without the batch
    dtype: np.dtype
    grows: bool  # a call writes the rows of its tokens, on axis 1 of the shape, and not all
    suspects: tuple[str, ...]  # ops where an error is looked for that shows here first
    shallow: bool  # errors of kernels have not added up over layers yet

    @property
    def bytes(self) -> int:
        """Of one sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Interface:
    """What the manifest says of the graph."""

    vocab_size: int  # rows of the embedding, padding included
    prompt_multiple: int  # tokens; pieces of a long prompt are multiples of it
    context: int | None  # tokens that a sequence may have; None: any number
    states: Mapping[str, State]  # by name, in the order of the data
    logits_suspects: tuple[str, ...]
    decode_suspects: tuple[str, ...]
    # Names that layers of an inference library carry, without prefixes -> part of the model, or "".
    ops: Mapping[str, str]
    blocks: tuple[str, ...]  # their kinds, in order

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Interface:
        """From the manifest; raises KeyError, TypeError or ValueError where it is not right."""
        context = fields["context"]
        if any(state["update"] not in UPDATES for state in fields["states"]):
            raise ValueError("a state is updated in a way that this script does not know")
        states = [
            State(
                name=str(state["name"]),
                output=str(state["output"]),
                shape=tuple(int(size) for size in state["shape"]),
                dtype=STATE_DTYPES[state["dtype"]],
                grows=UPDATES[state["update"]],
                suspects=tuple(map(str, state["suspects"])),
                shallow=bool(state["shallow"]),
            )
            for state in fields["states"]
        ]
        read = cls(
            vocab_size=int(fields["vocab_size"]),
            prompt_multiple=int(fields["prompt_multiple"]),
            context=None if context is None else int(context),
            states={state.name: state for state in states},
            logits_suspects=tuple(map(str, fields["logits_suspects"])),
            decode_suspects=tuple(map(str, fields["decode_suspects"])),
            ops={str(op): str(part) for op, part in dict(fields["ops"]).items()},
            blocks=tuple(map(str, fields["blocks"])),
        )
        sizes = (read.vocab_size, read.prompt_multiple, *(n for s in states for n in s.shape))
        if min(sizes) < 1 or len(read.states) != len(states):
            raise ValueError("a size is not positive, or a state stands there twice")
        if any(state.shape[1] != read.context for state in states if state.grows):
            raise ValueError("a state that grows has no room for the context")
        return read

    @property
    def grows(self) -> bool:
        """Whether a call has to know how many tokens came before."""
        return any(state.grows for state in self.states.values())

    def state_bytes(self) -> int:
        """Bytes that the states of a sequence take."""
        return sum(state.bytes for state in self.states.values())

    def cache_bytes(self) -> int:
        """Of these, what the states take that grow."""
        return sum(state.bytes for state in self.states.values() if state.grows)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Graph name -> shape with the batch."""
        return {name: (batch, *state.shape) for name, state in self.states.items()}


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest that this runtime understands; `check_files` looks at the rest."""

    root: Path
    manifest: Mapping[str, Any]
    name: str
    model: Interface
    recipe: str
    target: str
    engines: tuple[str, ...]  # that may run it, the preferred one first
    max_tokens: int  # longest prefill piece
    end_ids: frozenset[int]  # tokens that end a text

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Relative path -> {"sha256", "bytes"}, the manifest itself excepted."""
        return self.manifest["files"]

    @property
    def quantized(self) -> bool:
        """Whether the graph has our INT8 ops; the FP16 baseline is made of standard ops alone."""
        return self.manifest["recipe"].get("linear") != "fp16"

    @property
    def key(self) -> str:
        """Of everything that the bundle was made from."""
        return str(self.manifest.get("key", ""))

    def path(self, name: str) -> Path:
        """Where a listed file lies."""
        if name not in self.files:
            raise BundleProblem(
                f"bundle {self.name} has no {name}",
                f"pack it again, {MANIFEST} has to list every file that a run needs",
            )
        return self.root / name

    def require_room(self, tokens: int, what: str, remedy: str) -> None:
        """Raises BundleProblem where `what`, a sequence of `tokens` tokens, passes the context."""
        context = self.model.context
        if context is not None and tokens > context:
            raise BundleProblem(
                f"{what} and the context of {self.name} is {context} tokens",
                f"{remedy}, or build it with --context {tokens} or more",
            )

    def state_dtypes(self) -> dict[str, np.dtype]:
        """Graph name -> dtype of that state."""
        return {name: state.dtype for name, state in self.model.states.items()}

    def check_files(self, hash_up_to: int | None = HASHED_AT_LOAD) -> int:
        """Compare every listed file with the manifest; returns the number of bytes hashed.

        Presence and size are checked for all, SHA-256 for files of at most `hash_up_to` bytes
        (None: all of them).
        """
        for name, listed in self.files.items():
            self._check_size(name, listed["bytes"])
        hashed = 0
        for name, listed in self.files.items():
            if hash_up_to is not None and listed["bytes"] > hash_up_to:
                continue
            if sha256(self.root / name) != listed["sha256"]:
                raise BundleProblem(
                    f"{name} was altered after the bundle was packed (SHA-256 differs)",
                    "copy the bundle again or pack it again",
                )
            hashed += listed["bytes"]
        return hashed

    def _check_size(self, name: str, expected: int) -> None:
        path = self.root / name
        if not path.is_file():
            raise BundleProblem(
                f"{name} is missing from {self.root}", "copy the whole bundle again"
            )
        found = path.stat().st_size
        if found != expected:
            raise BundleProblem(
                f"{name} has {found} bytes and {MANIFEST} lists {expected}",
                "copy the whole bundle again",
            )


def open_bundle(root: Path) -> Bundle:
    """Read and check `root`/manifest.json; the other files are looked at by `check_files`."""
    manifest = _read_manifest(root)
    try:
        for key, kind in PARTS.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is not a {kind.__name__}")
        model = Interface.read(manifest["interface"])
        if not all(isinstance(step, dict) for step in manifest["steps"]):
            raise TypeError("a step is not a dict")
        bundle = Bundle(
            root=root,
            manifest=manifest,
            name=str(manifest["name"]),
            model=model,
            recipe=str(manifest["recipe"]["name"]),
            target=str(manifest["target"]["name"]),
            engines=tuple(map(str, manifest["target"]["engines"])),
            max_tokens=int(manifest["target"]["max_tokens"]),
            end_ids=frozenset(map(_token, manifest["text"]["end_ids"])),
        )
        if not bundle.files or not all({"sha256", "bytes"} <= {*f} for f in bundle.files.values()):
            raise ValueError("files")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleProblem(
            f"{root / MANIFEST} is incomplete or has a wrong value ({error!r})",
            "pack the bundle again",
        ) from error
    unknown = next((name for name in bundle.engines if name not in ENGINES), None)
    if unknown is not None or not bundle.engines:
        raise BundleProblem(
            f"{root / MANIFEST} asks for the engine {unknown!r}",
            f"this script knows {', '.join(ENGINES)}",
        )
    if bundle.max_tokens < model.prompt_multiple:
        raise BundleProblem(
            f"{root / MANIFEST} allows prefill pieces of {bundle.max_tokens} tokens, less than one"
            f" chunk of {model.prompt_multiple}",
            "pack the bundle again with a larger max_tokens",
        )
    return bundle


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"end_ids has {value!r}, which is no token id")
    return value


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise BundleProblem(
            f"{root} is not a bundle, it has no {MANIFEST}",
            "name a bundle folder: run_engine.py BUNDLE",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleProblem(
            f"{path} is not the manifest of a bundle ({error!r})", "copy the bundle again"
        ) from error
    if schema != MANIFEST_SCHEMA:
        raise BundleProblem(
            f"{path} has schema {schema!r} and this script reads schema {MANIFEST_SCHEMA}",
            "pack the bundle again, or use the run_engine.py that came with it",
        )
    return manifest
