"""Weight files: names, shapes and types without reading data, and tensors one by one."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.foreign_json import read_object

FLOAT_TYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # safetensors name: bytes per value
TORCH_FLOAT_TYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# Keys under which training loops keep the weights, beside an optimizer and a step.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


class SafetensorsFile:
    """Memory-mapped for as long as a tensor read from it lives.

    A map held open would keep every page ever read in memory: in the end the whole model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.open("rb").close()  # safetensors calls any file that it may not read a missing one
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}).",
                "check that it is there and that this user may read it.",
            ) from error
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self._described = {
                    name: (tuple(part.get_shape()), part.get_dtype())
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({error}).", "fetch it again."
            ) from error
        self.names = list(self._described)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type, without reading data."""
        return self._described[name]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored type."""
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class PickleFile:
    """A torch file; only tensors are unpickled, memory-mapped where the format allows it."""

    def __init__(self, path: Path) -> None:
        try:
            held = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged or holds more than tensors; it was not loaded.",
                "fetch it again, or convert it to safetensors on a machine that trusts it.",
            ) from error
        except Exception as error:  # on damaged bytes torch raises whatever it runs into
            raise CheckpointError(
                f"{path} is not a complete torch file.", "fetch it again."
            ) from error
        if not isinstance(held, dict):
            raise CheckpointError(f"{path} holds a {type(held).__name__}, not named tensors.")
        while inner := [held[k] for k in STATE_DICT_KEYS if isinstance(held.get(k), dict)]:
            held = inner[0]
        for name, value in held.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(f"{path} holds {name!r}, which is not a tensor.")
        self._tensors: dict[str, Tensor] = held
        self.names = list(held)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type."""
        tensor = self._tensors[name]
        if tensor.layout != torch.strided or tensor.is_meta:  # sparse, or without data
            return tuple(tensor.shape), "meta" if tensor.is_meta else str(tensor.layout)
        return tuple(tensor.shape), TORCH_FLOAT_TYPES.get(tensor.dtype, str(tensor.dtype))

    def read(self, name: str) -> Tensor:
        """The tensor in its stored type."""
        return self._tensors[name]


WeightFile = SafetensorsFile | PickleFile


def weight_files(folder: Path) -> list[Path]:
    """The files of the preferred form; safetensors before pickle, one file before shards."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            continue
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{index} has no weight_map.")
        shards = [folder / shard for shard in sorted(set(map(str, places.values())))]
        for shard in shards:
            # An index may only point into its own folder.
            if shard.parent != folder:
                raise CheckpointError(f"{index} names {shard.name} outside the checkpoint.")
            if not shard.is_file():
                raise CheckpointError(
                    f"{index} names {shard.name}, which is missing.", "fetch it again."
                )
        return shards
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin.",
        "Megatron files must be converted to the state-spaces layout first.",
    )


def open_weights(path: Path) -> WeightFile:
    """By its suffix. Raises CheckpointError where it is not complete."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
