"""A bundle on disk: its manifest, the sizes in it, and whether its files are the ones it lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 2
RUNTIMES = ("onnxruntime", "tensorrt")
STATE_DTYPES: Mapping[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
MANIFEST = "manifest.json"
PARTS = {
    "model": dict,
    "recipe": dict,
    "target": dict,
    "text": dict,
    "files": dict,
    "created": dict,
    "steps": list,
    "not_run": list,
}

# Hashing costs seconds per GB on a board. Larger files (the weights) are hashed by --verify only.
HASHED_AT_LOAD = 64 * 2**20  # bytes


class BundleProblem(Exception):
    """Something the user can put right: one sentence, the thing first and then the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return " ".join(f"{self.message}; {self.hint}.".split())


class MemoryRanOut(BundleProblem):
    """There is not enough memory; the message says for what."""


class RunFailure(BundleProblem):
    """The bundle was loaded and then did not compute what it should."""

    exit_code = 1


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a Mamba-2 model, as in the manifest, and the shapes that follow from them."""

    d_model: int
    n_layer: int
    vocab_size: int  # rows of the embedding, padding included
    d_state: int
    d_conv: int  # taps of the causal convolution
    expand: int
    headdim: int
    ngroups: int
    chunk_size: int  # tokens

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Graph name -> shape, layer by layer: conv_state (b, k-1, c), ssm_state (b, h, p, n)."""
        conv = (batch, self.d_conv - 1, self.conv_dim)
        ssm = (batch, self.d_inner // self.headdim, self.headdim, self.d_state)
        return {
            f"{kind}.{layer}": shape
            for layer in range(self.n_layer)
            for kind, shape in (("conv_state", conv), ("ssm_state", ssm))
        }


def output_name(state: str) -> str:
    """conv_state.3 -> conv_state_out.3, the graph's output that is the input of the next call."""
    kind, layer = state.split(".")
    return f"{kind}_out.{layer}"


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest that this runtime understands; `check_files` looks at the rest."""

    root: Path
    manifest: Mapping[str, Any]
    name: str
    model: ModelSizes
    recipe: str
    state_dtype: np.dtype  # of ssm_state; conv_state is always float16
    target: str
    runtime: str
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

    def state_dtypes(self) -> dict[str, np.dtype]:
        """Graph name -> dtype of that state."""
        half = STATE_DTYPES["fp16"]
        return {
            name: self.state_dtype if name.startswith("ssm_state") else half
            for name in self.model.state_shapes(1)
        }

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
        model = ModelSizes(**{f.name: int(manifest["model"][f.name]) for f in fields(ModelSizes)})
        if min(asdict(model).values()) < 1:
            raise ValueError("a size of the model is not positive")
        if not all(isinstance(step, dict) for step in manifest["steps"]):
            raise TypeError("a step is not a dict")
        bundle = Bundle(
            root=root,
            manifest=manifest,
            name=str(manifest["name"]),
            model=model,
            recipe=str(manifest["recipe"]["name"]),
            state_dtype=STATE_DTYPES[manifest["recipe"]["state_dtype"]],
            target=str(manifest["target"]["name"]),
            runtime=manifest["target"]["runtime"],
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
    if bundle.runtime not in RUNTIMES:
        raise BundleProblem(
            f"{root / MANIFEST} asks for the runtime {bundle.runtime!r}",
            f"this script knows {' and '.join(RUNTIMES)}",
        )
    if bundle.max_tokens < model.chunk_size:
        raise BundleProblem(
            f"{root / MANIFEST} allows prefill pieces of {bundle.max_tokens} tokens, less than one"
            f" chunk of {model.chunk_size}",
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
    if schema != SCHEMA:
        raise BundleProblem(
            f"{path} has schema {schema!r} and this script reads schema {SCHEMA}",
            "pack the bundle again, or use the run_engine.py that came with it",
        )
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces so that large weights do not fill a small board."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
