"""A checkpoint on disk: what the model is, and its tensors under our names.

A layout (`layouts/`) says how sizes and tensors are named, and which stored tensors are joined to
one of ours. Opening a checkpoint checks the name, shape and type of every tensor; data is read only
where a name is stored twice. A tensor that is read holds finite FP32 numbers, or is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.files import TOKENIZER
from ssdi8_edge.checkpoints.config import ORIGINAL, read_config
from ssdi8_edge.checkpoints.files import FLOAT_TYPES, WeightFile, open_weights, weight_files
from ssdi8_edge.checkpoints.hub import fetch_checkpoint, reason
from ssdi8_edge.checkpoints.layout import (
    EMBEDDING,
    HEAD,
    NORM_F,
    Piece,
    Shape,
    expected_shapes,
    whole,
)
from ssdi8_edge.checkpoints.outline import DEMO_FOLDER, layout_of
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.models.description import Description
from ssdi8_edge.numerics.fp16_range import all_finite

HASH_BLOCK_BYTES = 4 << 20

# Parts of names of adapters that lie beside the weights, and of quantized weights.
ADAPTER_MARKS = ("lora_", "base_layer.", "base_model.")
QUANTIZED_SUFFIXES = (
    *(".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".weight_scale", ".weight_packed"),
    *(".weight_scale_inv", ".quant_map"),
)

# What helps where config.json and weights do not fit together.
AGAIN = "fetch the checkpoint again, or correct its config.json."
MERGE = "merge it into its base model (`merge_and_unload` of peft) and save that."
SAVE_HEAD = (
    "save the whole model, or set tie_embeddings in config.json if its head is the embedding."
)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored, and under which name."""

    path: Path
    weights: WeightFile
    stored: str

    def describe(self) -> tuple[tuple[int, ...], str]:
        """Shape and type, without reading data."""
        return self.weights.describe(self.stored)

    def read(self) -> Tensor:
        return self.weights.read(self.stored)


def _at_most_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (first, second)))


def _same_weights(embedding: _Place, head: _Place) -> bool:
    """Whether the head is the embedding, perhaps rounded to another type or without its padding."""
    (shape, dtype), (head_shape, head_dtype) = embedding.describe(), head.describe()
    if (
        len(shape) != 2
        or shape[1:] != head_shape[1:]
        or not {dtype, head_dtype} <= set(FLOAT_TYPES)
    ):
        return False
    rows = min(shape[0], head_shape[0])
    first, second = embedding.read()[:rows], head.read()[:rows]
    return torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype))


class Checkpoint:
    """A verified checkpoint folder.

    description      what the model is
    names            every tensor of the model, our names, `lm_head.weight` included
    notes            sentences for the user: where weights and config.json disagree
    tokenizer_path   tokenizer.json beside the weights, or None
    parameter_bytes  bytes of the stored parameters; a tied head counts once

    Raises CheckpointError for whatever does not fit; the message names the file, key or tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_path = folder / "config.json"
        if not self._config_path.is_file():
            if (folder / "adapter_config.json").is_file():
                raise CheckpointError(f"{folder} holds an adapter, not a model", MERGE)
            raise CheckpointError(
                f"{folder} has no config.json.", "name a folder that holds config.json and weights."
            )
        raw = read_config(self._config_path)
        self._layout = layout_of(raw, self._config_path)
        self.description: Description = self._layout.describe(raw)
        self._sources = dict(self._layout.sources(raw, self.description))
        self._weight_paths = weight_files(folder)
        self._places: dict[str, _Place] = {}
        self._finite: set[tuple[str, Piece]] = set()
        self.notes: list[str] = []
        self.parameter_bytes = 0
        self._locate()
        self._settle_head()
        self._verify()
        tokenizer = folder / TOKENIZER
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None

    def _tie(self, tied: bool) -> None:
        self.description = dataclasses.replace(self.description, tie_embeddings=tied)

    def _locate(self) -> None:
        """Where each tensor is stored."""
        left_out: list[str] = []
        for path in self._weight_paths:
            weights = open_weights(path)
            for stored in weights.names:
                if any(mark in stored for mark in ADAPTER_MARKS):
                    raise CheckpointError(f"{path} holds the adapter tensor {stored}", MERGE)
                if stored.endswith(QUANTIZED_SUFFIXES):
                    raise CheckpointError(
                        f"{path} is already quantized: it holds the tensor {stored}", ORIGINAL
                    )
                name, place = self._layout.canonical(stored), _Place(path, weights, stored)
                said = [said for start, said in self._layout.left_out if name.startswith(start)]
                if said:
                    left_out += said
                    continue
                other = self._places.setdefault(name, place)
                if other is not place and not _same_bits(other.read(), place.read()):
                    raise CheckpointError(
                        f"{self.folder} holds two different tensors {name}: {other.stored} in "
                        f"{other.path.name} and {stored} in {path.name}",
                        "remove the one that does not belong to it.",
                    )
        self.notes += [f"{self.folder}: {said}" for said in dict.fromkeys(left_out)]

    def _settle_head(self) -> None:
        """Whether the head is the embedding: the weights decide, config.json where they do not."""
        stored_embedding, stored_head = self.stored_name(EMBEDDING), self.stored_name(HEAD)
        embedding, head = self._places.get(stored_embedding), self._places.get(stored_head)
        tied = self.description.tie_embeddings
        if head is None and embedding is not None:
            # A base model is saved without prefix, and without a head whatever config.json says.
            if not tied and self._is_base():
                self._tie(True)
                self.notes.append(
                    f"{self.folder} holds a base model without {HEAD}: the embedding is used as "
                    "its head; if the model has a head of its own, save the whole model."
                )
        elif embedding is None and head is not None and tied:
            self._places[stored_embedding] = self._places.pop(stored_head)
        elif embedding is not None and head is not None and tied:
            if _same_weights(embedding, head):
                del self._places[stored_head]
            else:
                self._tie(False)
                self.notes.append(
                    f"config.json ties {HEAD} to the embedding, but {self.folder} stores another "
                    "one: the stored one is used."
                )
        if self.description.tie_embeddings:
            self._take_back_factor()

    def _take_back_factor(self) -> None:
        """Divide the norm before a tied head by what the embedding is multiplied by.

        So the table stays one: the head reads it with the factor of the embedding.
        """
        (table,), (norm,) = (self._sources[name].pieces for name in (EMBEDDING, NORM_F))
        if not table.factors:
            return
        (factor,) = table.factors
        if factor == 0:
            raise CheckpointError(
                "config.json multiplies the embedding, which is the head as well, by 0.", AGAIN
            )
        self._sources[NORM_F] = whole(norm.stored, math.prod(norm.factors) / factor)

    def _is_base(self) -> bool:
        """Whether no stored name has the prefix that a whole model gives."""
        parts = {part for place in self._places.values() for part in place.stored.split(".")}
        return parts.isdisjoint(self._layout.prefixes)

    def _pieces(self, name: str, shape: Shape) -> Iterator[tuple[Piece, Shape]]:
        """The stored pieces of this tensor of ours, and their shapes."""
        source = self._sources[name]
        for piece, part in zip(source.pieces, source.shapes(shape), strict=True):
            if piece.stored:
                yield piece, part

    def _verify(self) -> None:
        ours = expected_shapes(self.description)
        self.names = list(ours)
        self._shapes = ours
        shapes = {
            piece.stored: part
            for name, shape in ours.items()
            if not (name == HEAD and self.description.tie_embeddings)
            for piece, part in self._pieces(name, shape)
        }
        for name, shape in shapes.items():
            if name not in self._places:
                hint = SAVE_HEAD if name == self.stored_name(HEAD) else AGAIN
                raise CheckpointError(f"{self.folder} lacks the tensor {name}.", hint)
            found, dtype = self._places[name].describe()
            if found != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {found} where config.json implies {shape}.", AGAIN
                )
            if dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"tensor {name} has type {dtype}.",
                    f"give a floating-point checkpoint ({', '.join(FLOAT_TYPES)}).",
                )
            self.parameter_bytes += math.prod(shape) * FLOAT_TYPES[dtype]
        extra = sorted(self._places.keys() - shapes.keys())
        if extra:
            stored = self._places[extra[0]].stored
            raise CheckpointError(f"{self.folder} holds an unexpected tensor {stored}.", AGAIN)

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name of ours, on the CPU.

        In its stored type (F64 as F32); in FP32 where it is multiplied or joined of several types.

        Raises CheckpointError when a value is not a finite FP32 number.
        """
        if name == HEAD and self.description.tie_embeddings:
            name = EMBEDDING
        if name not in self._sources:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        source, ours = self._sources[name], self._shapes[name]
        return source.joined(
            [
                self._read(name, piece, source.axis) if piece.stored else torch.zeros(shape)
                for piece, shape in zip(source.pieces, source.shapes(ours), strict=True)
            ]
        )

    def _read(self, name: str, piece: Piece, axis: int) -> Tensor:
        """A piece of this tensor of ours, times its factors."""
        place = self._places[piece.stored]
        tensor = place.read()
        checked = (name, piece) in self._finite
        if not checked:
            self._require_finite(place.stored, tensor)
            if name.endswith(".A_log"):
                self._require_finite(f"exp({place.stored})", tensor.double().exp())
        scaled = piece.scaled(_at_most_fp32(tensor), axis)
        if not checked:
            if piece.factors:
                self._require_finite(f"{place.stored} times its multiplier", scaled)
            self._finite.add((name, piece))
        return scaled

    def require_finite(self, track: Track = silent) -> None:
        """Reads every tensor once.

        Raises CheckpointError when a value is not a finite FP32 number.
        """
        for name in track(self.names, "check the weights"):
            self.tensor(name)

    def _require_finite(self, name: str, tensor: Tensor) -> None:
        narrow = _at_most_fp32(tensor)
        if all_finite(narrow):
            return
        bad = ~narrow.isfinite()
        first = bad.nonzero()[0].tolist()
        count = int(bad.sum())
        raise CheckpointError(
            f"tensor {name} of {self.folder} holds {count} value{'s' if count > 1 else ''} of NaN, "
            f"infinity or beyond FP32, the first at {first}: {tensor[tuple(first)].item():g}",
            "the checkpoint is damaged or its training diverged: fetch it again, or take an "
            "earlier one.",
        )

    def stored_name(self, name: str) -> str:
        """What messages call the tensor of this name of ours: all that it is made of."""
        pieces = self._sources[name].pieces
        return " + ".join(piece.stored for piece in pieces if piece.stored) or name

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block, under the names that its kind gives them."""
        prefix = f"layers.{index}."
        found = {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.names
            if name.startswith(prefix)
        }
        if not found:
            raise CheckpointError(f"{self.folder} has no layer {index}.")
        return found

    def fingerprint(self, track: Track = silent) -> str:
        """SHA-256, hexadecimal, over the bytes of config.json and of the weight files."""
        digest = hashlib.sha256()
        for path in (self._config_path, *self._weight_paths):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for _ in track(range(-(-size // HASH_BLOCK_BYTES)), f"hash {path.name}"):
                    digest.update(file.read(HASH_BLOCK_BYTES))
        return digest.hexdigest()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens a local folder, the shipped model (`demo`) or a hub model (`organisation/name`).

    Raises CheckpointError when there is no such checkpoint or it does not fit.
    """
    if source == "demo":
        return Checkpoint(DEMO_FOLDER)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Checkpoint(folder)
    parts = str(source).split("/")
    if folder.exists() or isinstance(source, Path) or len(parts) != 2 or not all(parts):
        raise CheckpointError(
            f"{source} is not a folder.",
            "give a checkpoint folder, the word demo, or a hub model as organisation/name.",
        )
    try:
        from huggingface_hub import snapshot_download

        fetched = fetch_checkpoint(str(source), snapshot_download)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        raise CheckpointError(
            f"{source} is neither a folder nor a hub model that can be fetched ({reason(error)}).",
            "check the spelling and the network, or give a folder.",
        ) from error
    return Checkpoint(fetched)
