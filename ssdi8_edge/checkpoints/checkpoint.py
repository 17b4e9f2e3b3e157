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

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
HASH_BLOCK_BYTES = 4 << 20
FLOAT_TYPES = {"F16": 2, "BF16": 2, "F32": 4}  # safetensors name: bytes per value
TORCH_FLOAT_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
EMBEDDING = "embedding.weight"
HEAD = "lm_head.weight"

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


def _description(sizes: Mapping[str, Any]) -> Description:
    """From the sizes that both layouts have."""
    own = {k: sizes[k] for k in ("d_state", "d_conv", "headdim", "ngroups", "chunk_size")}
    d_inner, headdim, ngroups = sizes["expand"] * sizes["d_model"], own["headdim"], own["ngroups"]
    if d_inner % headdim or d_inner // headdim % ngroups:
        raise CheckpointError(
            f"config.json does not fit together: d_inner {d_inner}, headdim {headdim}, "
            f"ngroups {ngroups}."
        )
    block = Mamba2(
        d_inner=d_inner,
        **own,
        dt_limit=sizes["dt_limit"],
        norm_eps=sizes["norm_eps"],
    )
    return Description(
        d_model=sizes["d_model"],
        vocab_size=sizes["vocab_size"],
        blocks=(block,) * sizes["n_layer"],
        norm_eps=sizes["norm_eps"],
        tie_embeddings=sizes["tie_embeddings"],
    )


# Ours -> as stored, local to a block.
STORED = {
    "in_proj.weight": "mixer.in_proj.weight",
    "conv1d.weight": "mixer.conv1d.weight",
    "conv1d.bias": "mixer.conv1d.bias",
    "dt_bias": "mixer.dt_bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "gate_norm.weight": "mixer.norm.weight",
    "out_proj.weight": "mixer.out_proj.weight",
}


def stored_name(name: str) -> str:
    """The state-spaces name of one of ours: layers.0.D -> backbone.layers.0.mixer.D."""
    if name == HEAD:
        return name
    if not name.startswith("layers."):
        return f"backbone.{name}"
    _, index, local = name.split(".", 2)
    return f"backbone.layers.{index}.{STORED.get(local, local)}"


def expected_shapes(model: Description) -> dict[str, tuple[int, ...]]:
    """Our name and the shape of every tensor of a model, in the order of the data."""
    vocabulary = (model.vocab_size, model.d_model)
    return {
        EMBEDDING: vocabulary,
        **{
            f"layers.{i}.{name}": shape
            for i, block in enumerate(model.blocks)
            for name, shape in block.parameters(model.d_model).items()
        },
        "norm_f.weight": (model.d_model,),
        HEAD: vocabulary,
    }


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

    description      what the model is
    names            every tensor of the model, our names, `lm_head.weight` included
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
            self.description = _description(_state_spaces_sizes(raw))
        elif raw.get("model_type") is not None or "hidden_size" in raw:
            self.description = _description(_hugging_face_sizes(raw))
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
                name = stored.replace("backbone.embeddings.", "backbone.embedding.")
                self._places[name] = (weights, stored)
        ours = expected_shapes(self.description)
        self.names = list(ours)
        if self.description.tie_embeddings:
            # Some writers store the tied head a second time.
            self._places.pop(HEAD, None)
            del ours[HEAD]
        shapes = {stored_name(name): shape for name, shape in ours.items()}
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
        """The tensor of this name of ours, in its stored type, on the CPU."""
        if name == HEAD and self.description.tie_embeddings:
            name = EMBEDDING
        if stored_name(name) not in self._places:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        weights, stored = self._places[stored_name(name)]
        return weights.read(stored)

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


def _fetch(repository: str, download: Callable[..., str]) -> Path:
    """Safetensors first: some repositories hold the same weights in both forms."""
    small = ["config.json", "tokenizer.json", "*.index.json"]
    folder = Path(download(repository, allow_patterns=[*small, "model*.safetensors"]))
    if not any(folder.glob("model*.safetensors")):
        folder = Path(download(repository, allow_patterns=[*small, "pytorch_model*.bin"]))
    return folder


def fetch_tokenizer(repository: str) -> Path:
    """tokenizer.json of a hub model (`organisation/name`), for weights that come without one.

    Raises CheckpointError when it cannot be fetched.
    """
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, "tokenizer.json"))
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
