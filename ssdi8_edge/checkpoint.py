"""Checkpoints on disk -> plain sizes and tensors under one set of names.

Three layouts are read; all key renaming happens here.

    state-spaces   config.json (d_model, n_layer, ssm_cfg, ...) with pytorch_model.bin or
                   model.safetensors: state-spaces/mamba2-*, NVIDIA's converted 8B, ours
    Hugging Face   config.json of Mamba2ForCausalLM (hidden_size, ...), single or sharded weights

Values that a config leaves out are the class defaults of state-spaces/mamba (`MambaConfig`,
`Mamba2`) and of transformers' `Mamba2Config`. Opening a checkpoint checks the name, shape and type
of every tensor without reading its data.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssdi8_edge.errors import CheckpointError
from ssdi8_edge.progress import Track, silent

DEMO_FOLDER = Path(__file__).parent / "demo"
HASH_BLOCK_BYTES = 4 << 20
FLOAT_TYPES = {"F16": 2, "BF16": 2, "F32": 4}  # safetensors name: bytes per value
TORCH_FLOAT_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"
# What a hub model may say about its text.
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "chat_template.jinja"),
]

# ---------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------

# Keys that must hold one value, because the model computes nothing else.
STATE_SPACES_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
SSM_CFG_FIXED = {
    "layer": "Mamba2",
    "bias": False,
    "conv_bias": True,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "activation": "swish",
    "d_ssm": None,
}
SSM_CFG_SIZES = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "chunk_size": 256,
}
# Initialisation and implementation: they do not change what a trained model computes.
SSM_CFG_IRRELEVANT = {
    *("A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor", "dt_limit"),
    *("use_mem_eff_path", "sequence_parallel", "process_group"),
}
HUGGING_FACE_FIXED = {
    "model_type": "mamba2",
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
}


# What helps where config.json and weights do not fit together.
AGAIN = "fetch the checkpoint again, or correct its config.json."


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if value is None:
        raise CheckpointError(f"config.json lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected a positive integer.")
    return value


def _require(config: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str = "") -> None:
    for key, expected in fixed.items():
        found = config.get(key)
        if found is not None and found != expected:
            raise CheckpointError(
                f"config.json sets {prefix}{key} = {json.dumps(found)}; only "
                f"{json.dumps(expected)} is supported."
            )


def _dt_limit(limits: Any, key: str) -> tuple[float, float]:
    """Two bounds; transformers writes infinity as {"__float__": "Infinity"}, we as null."""
    try:
        low, high = (
            float(v["__float__"]) if isinstance(v, dict) else math.inf if v is None else float(v)
            for v in limits
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"config.json sets {key} = {limits!r}; expected two bounds."
        ) from None
    return low, high


def _state_spaces_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, STATE_SPACES_FIXED)
    ssm = config.get("ssm_cfg")
    if not isinstance(ssm, dict) or "layer" not in ssm:
        raise CheckpointError('config.json lacks ssm_cfg.layer = "Mamba2": a Mamba-1 model.')
    _require(ssm, SSM_CFG_FIXED, "ssm_cfg.")
    known = {*SSM_CFG_FIXED, *SSM_CFG_SIZES, *SSM_CFG_IRRELEVANT}
    for key in ssm:
        if key not in known:
            raise CheckpointError(f"config.json sets ssm_cfg.{key}, which is not supported.")
    multiple = _size(config, "pad_vocab_size_multiple", 8)
    return {
        "d_model": _size(config, "d_model"),
        "n_layer": _size(config, "n_layer"),
        "vocab_size": math.ceil(_size(config, "vocab_size") / multiple) * multiple,
        **{key: _size(ssm, key, default) for key, default in SSM_CFG_SIZES.items()},
        "dt_limit": _dt_limit(ssm.get("dt_limit", (0.0, math.inf)), "ssm_cfg.dt_limit"),
        "norm_eps": 1e-5,
        "tie_embeddings": bool(config.get("tie_embeddings", True)),
    }


def _hugging_face_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, HUGGING_FACE_FIXED)
    d_model, expand = _size(config, "hidden_size"), _size(config, "expand", 2)
    heads, headdim = _size(config, "num_heads", 128), _size(config, "head_dim", 64)
    if heads * headdim != expand * d_model:
        raise CheckpointError(
            f"config.json sets num_heads * head_dim = {heads * headdim}, "
            f"but expand * hidden_size = {expand * d_model}."
        )
    return {
        "d_model": d_model,
        "n_layer": _size(config, "num_hidden_layers", 64),
        "vocab_size": _size(config, "vocab_size", 32768),
        "d_state": _size(config, "state_size", 128),
        "d_conv": _size(config, "conv_kernel", 4),
        "expand": expand,
        "headdim": headdim,
        "ngroups": _size(config, "n_groups", 8),
        "chunk_size": _size(config, "chunk_size", 256),
        "dt_limit": _dt_limit(config.get("time_step_limit", (0.0, math.inf)), "time_step_limit"),
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def expected_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model of these sizes, in the order of the data."""
    D, V = sizes["d_model"], sizes["vocab_size"]
    E, GN = sizes["expand"] * D, sizes["ngroups"] * sizes["d_state"]
    H, remainder = divmod(E, sizes["headdim"])
    if remainder or H % sizes["ngroups"]:
        raise CheckpointError(
            f"config.json does not fit together: d_inner {E}, headdim {sizes['headdim']}, "
            f"ngroups {sizes['ngroups']}."
        )
    layer = {
        "norm.weight": (D,),
        "mixer.in_proj.weight": (2 * E + 2 * GN + H, D),
        "mixer.conv1d.weight": (E + 2 * GN, 1, sizes["d_conv"]),
        "mixer.conv1d.bias": (E + 2 * GN,),
        "mixer.dt_bias": (H,),
        "mixer.A_log": (H,),
        "mixer.D": (H,),
        "mixer.norm.weight": (E,),
        "mixer.out_proj.weight": (D, E),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D)}
    for i in range(sizes["n_layer"]):
        shapes.update({f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()})
    return {**shapes, "backbone.norm_f.weight": (D,), HEAD: (V, D)}


# ---------------------------------------------------------------------------------------------
# Weight files
# ---------------------------------------------------------------------------------------------


class _SafetensorsFile:
    """Memory-mapped for as long as a tensor read from it lives.

    A map held open would keep every page ever read in memory: in the end the whole model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class _PickleFile:
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
        for name, value in held.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(f"{path} holds {name!r}, which is not a tensor.")
        self._tensors: dict[str, Tensor] = held
        self.names = list(held)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type."""
        tensor = self._tensors[name]
        return tuple(tensor.shape), TORCH_FLOAT_TYPES.get(tensor.dtype, str(tensor.dtype))

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


_WeightFile = _SafetensorsFile | _PickleFile


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The files of the preferred form; safetensors before pickle, one file before shards."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            continue
        places = _read_json(index).get("weight_map")
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


def _open_weights(path: Path) -> _WeightFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


# ---------------------------------------------------------------------------------------------
# Checkpoint
# ---------------------------------------------------------------------------------------------


class Checkpoint:
    """A verified checkpoint folder.

    config           complete keyword arguments of `model.Mamba2Config`
    names            every tensor of the model, state-spaces names, `lm_head.weight` included
    tokenizer_path   tokenizer.json beside the weights, or None
    parameter_bytes  bytes of the stored parameters; a tied head counts once

    Raises CheckpointError for whatever does not fit; the message names the file, key or tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_path = folder / "config.json"
        if not self._config_path.is_file():
            raise CheckpointError(
                f"{folder} has no config.json.", "name a folder that holds config.json and weights."
            )
        raw = _read_json(self._config_path)
        if "d_model" in raw:
            self.config = _state_spaces_sizes(raw)
        elif raw.get("model_type") is not None or "hidden_size" in raw:
            self.config = _hugging_face_sizes(raw)
        else:
            raise CheckpointError(
                f"{self._config_path} has neither d_model (state-spaces) nor hidden_size "
                "(Hugging Face): not a Mamba-2 model."
            )
        self._weight_paths = _weight_files(folder)
        self._places: dict[str, tuple[_WeightFile, str]] = {}
        self.parameter_bytes = 0
        self._verify()
        tokenizer = folder / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None

    def _verify(self) -> None:
        for path in self._weight_paths:
            weights = _open_weights(path)
            for stored in weights.names:
                # transformers writes "embeddings" where state-spaces writes "embedding".
                name = EMBEDDING if stored == "backbone.embeddings.weight" else stored
                self._places[name] = (weights, stored)
        shapes = expected_shapes(self.config)
        self.names = list(shapes)
        if self.config["tie_embeddings"]:
            # Some writers store the tied head a second time.
            self._places.pop(HEAD, None)
            del shapes[HEAD]
        for name, shape in shapes.items():
            if name not in self._places:
                raise CheckpointError(f"{self.folder} lacks the tensor {name}.", AGAIN)
            weights, stored = self._places[name]
            found, dtype = weights.describe(stored)
            if found != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {found} where config.json implies {shape}.", AGAIN
                )
            if dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"tensor {name} has type {dtype}.", "give a floating-point checkpoint."
                )
            self.parameter_bytes += math.prod(shape) * FLOAT_TYPES[dtype]
        extra = sorted(self._places.keys() - shapes.keys())
        if extra:
            raise CheckpointError(f"{self.folder} holds an unexpected tensor {extra[0]}.", AGAIN)

    def tensor(self, name: str) -> Tensor:
        """The tensor of this state-spaces name, in its stored type, on the CPU."""
        if name == HEAD and self.config["tie_embeddings"]:
            name = EMBEDDING
        if name not in self._places:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        weights, stored = self._places[name]
        return weights.read(stored)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block, under the names that `model.Mamba2Block` gives them."""
        prefix = f"backbone.layers.{index}."
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


def _fetch(repository: str, download: Callable[..., str]) -> Path:
    """Safetensors first: some repositories hold the same weights in both forms."""
    small = ["config.json", "generation_config.json", "*.index.json", *TOKENIZER_FILES]
    folder = Path(download(repository, allow_patterns=[*small, "model*.safetensors"]))
    if not any(folder.glob("model*.safetensors")):
        folder = Path(download(repository, allow_patterns=[*small, "pytorch_model*.bin"]))
    return folder


def fetch_tokenizer(repository: str) -> Path:
    """Folder with the tokenizer of a hub model (`organisation/name`) and what belongs to it.

    Raises CheckpointError when it cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, allow_patterns=TOKENIZER_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repository} is neither a file nor a hub model with a tokenizer.json ({reason}).",
            "check the spelling and the network, or name a tokenizer.json.",
        ) from error


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

        fetched = _fetch(str(source), snapshot_download)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source} is neither a folder nor a hub model that can be fetched ({reason}).",
            "check the spelling and the network, or give a folder.",
        ) from error
    return Checkpoint(fetched)
