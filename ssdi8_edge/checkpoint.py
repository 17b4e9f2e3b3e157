"""Checkpoints on disk -> plain sizes and tensors under one set of names.

Three layouts are read; all key renaming happens here.

    state-spaces   config.json (d_model, n_layer, ssm_cfg, ...) with pytorch_model.bin or
                   model.safetensors: state-spaces/mamba2-*, NVIDIA's converted 8B, ours
    Hugging Face   config.json of Mamba2ForCausalLM (hidden_size, ...), single or sharded weights

Values that a config leaves out are the class defaults of state-spaces/mamba (`MambaConfig`,
`Mamba2`) and of transformers' `Mamba2Config`. Opening a checkpoint checks the name, shape and type
of every tensor; data is read only where a name is stored twice. A tensor that is read holds finite
FP32 numbers, or is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssdi8_edge.artifacts import read_json
from ssdi8_edge.errors import CheckpointError
from ssdi8_edge.fp16_range import all_finite
from ssdi8_edge.progress import Track, silent

DEMO_FOLDER = Path(__file__).parent / "demo"
HASH_BLOCK_BYTES = 4 << 20
FLOAT_TYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # safetensors name: bytes per value
TORCH_FLOAT_TYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
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
    "activation": "silu",
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


# One function under two names.
ACTIVATION_KEYS = ("activation", "hidden_act")
ACTIVATION_ALIASES = {"swish": "silu"}
# Where quantizers describe what they did to a checkpoint: transformers, compressed-tensors, MLX.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")

# What helps where config.json and weights do not fit together.
AGAIN = "fetch the checkpoint again, or correct its config.json."
ORIGINAL = "give the floating-point checkpoint that it was made from (BF16, FP16 or FP32)."


def typed(value: Any) -> Any:
    """What a config.json means by its value: some tools write every value as a string."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_config(path: Path) -> dict[str, Any]:
    """config.json, of a checkpoint that nobody has quantized yet."""
    config: dict[str, Any] = typed(read_object(path))
    for key in QUANTIZATION_KEYS:
        if isinstance(found := config.get(key), dict):
            method = found.get("quant_method") or key
            raise CheckpointError(
                f"{path.parent} is already quantized ({method}, says its config.json)", ORIGINAL
            )
    if "recipe" in config and "model" in config:
        raise CheckpointError(f"{path.parent} was written by `ssdi8-edge build`", ORIGINAL)
    return config


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
        if key in ACTIVATION_KEYS and isinstance(found, str):
            found = ACTIVATION_ALIASES.get(found.lower(), found.lower())
        if found is not None and found != expected:
            raise CheckpointError(
                f"config.json sets {prefix}{key} = {json.dumps(found)}; only "
                f"{json.dumps(expected)} is supported."
            )


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if value not in (True, False):
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected true or false.")
    return bool(value)


def _norm_eps(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    value = 1e-5 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected a positive number.")
    return float(value)


def _dt_limit(limits: Any, key: str) -> tuple[float, float]:
    """Two bounds of dt, which is positive; null is no bound. transformers writes infinity as
    {"__float__": "Infinity"}."""
    limits = (None, None) if limits is None else limits
    try:
        low, high = (
            default if v is None else float(v["__float__"] if isinstance(v, dict) else v)
            for v, default in zip(limits, (0.0, math.inf), strict=True)
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"config.json sets {key} = {limits!r}; expected two bounds."
        ) from None
    low = max(low, 0.0)  # NaN stays
    if not low <= high or low == math.inf:
        raise CheckpointError(
            f"config.json sets {key} = {limits!r}; expected a lower and an upper bound of dt, "
            "which is positive."
        )
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
        "dt_limit": _dt_limit(ssm.get("dt_limit"), "ssm_cfg.dt_limit"),
        "norm_eps": 1e-5,
        "tie_embeddings": _flag(config, "tie_embeddings", True),
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
        "dt_limit": _dt_limit(config.get("time_step_limit"), "time_step_limit"),
        "norm_eps": _norm_eps(config, "layer_norm_epsilon"),
        "tie_embeddings": _flag(config, "tie_word_embeddings", False),
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
# Names
# ---------------------------------------------------------------------------------------------

# Modules that training puts around a model or a layer; their names stay in what it saves.
WRAPPERS = {
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed
    "_forward_module",  # Fabric
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "model",  # LightningModule, by custom
}
# What a file of the model without its head, and so without `backbone.`, begins its names with.
BACKBONE_PARTS = ("embedding", "embeddings", "layers", "norm_f")
# Parts of names of adapters that lie beside the weights, and of quantized weights.
ADAPTER_MARKS = ("lora_", "base_layer.", "base_model.")
QUANTIZED_SUFFIXES = (
    *(".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".weight_scale", ".weight_packed"),
    *(".weight_scale_inv", ".quant_map"),
)


def _state_spaces_name(stored: str) -> str:
    """The name of a stored tensor in the layout of state-spaces."""
    parts = [part for part in stored.split(".") if part not in WRAPPERS]
    if parts and parts[0] in BACKBONE_PARTS:
        parts.insert(0, "backbone")
    name = ".".join(parts)
    # transformers writes "embeddings" where state-spaces writes "embedding".
    return EMBEDDING if name == "backbone.embeddings.weight" else name


# ---------------------------------------------------------------------------------------------
# Weight files
# ---------------------------------------------------------------------------------------------

# Keys under which training loops keep the weights, beside an optimizer and a step.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


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
        return self._tensors[name]


_WeightFile = _SafetensorsFile | _PickleFile


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises CheckpointError where there is none.
    """
    try:
        content = read_json(path)
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


def _open_weights(path: Path) -> _WeightFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


# ---------------------------------------------------------------------------------------------
# Checkpoint
# ---------------------------------------------------------------------------------------------

MERGE = "merge it into its base model (`merge_and_unload` of peft) and save that."
SAVE_HEAD = (
    "save the whole model, or set tie_embeddings in config.json if its head is the embedding."
)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored, and under which name."""

    path: Path
    weights: _WeightFile
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

    config           complete keyword arguments of `model.Mamba2Config`
    names            every tensor of the model, state-spaces names, `lm_head.weight` included
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
        raw = _read_config(self._config_path)
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
        self._places: dict[str, _Place] = {}
        self._finite: set[str] = set()
        self.notes: list[str] = []
        self.parameter_bytes = 0
        self._locate()
        self._settle_head()
        self._verify()
        tokenizer = folder / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None

    def _locate(self) -> None:
        """Where each tensor is stored."""
        for path in self._weight_paths:
            weights = _open_weights(path)
            for stored in weights.names:
                if any(mark in stored for mark in ADAPTER_MARKS):
                    raise CheckpointError(f"{path} holds the adapter tensor {stored}", MERGE)
                if stored.endswith(QUANTIZED_SUFFIXES):
                    raise CheckpointError(
                        f"{path} is already quantized: it holds the tensor {stored}", ORIGINAL
                    )
                name, place = _state_spaces_name(stored), _Place(path, weights, stored)
                other = self._places.setdefault(name, place)
                if other is not place and not _same_bits(other.read(), place.read()):
                    raise CheckpointError(
                        f"{self.folder} holds two different tensors {name}: {other.stored} in "
                        f"{other.path.name} and {stored} in {path.name}",
                        "remove the one that does not belong to it.",
                    )

    def _settle_head(self) -> None:
        """Whether the head is the embedding: the weights decide, config.json where they do not."""
        embedding, head = self._places.get(EMBEDDING), self._places.get(HEAD)
        tied = self.config["tie_embeddings"]
        if head is None and embedding is not None:
            # A base model is saved without prefix, and without a head whatever config.json says.
            if not tied and self._is_base():
                self.config["tie_embeddings"] = True
                self.notes.append(
                    f"{self.folder} holds a base model without {HEAD}: the embedding is used as "
                    "its head; if the model has a head of its own, save the whole model."
                )
        elif embedding is None and head is not None and tied:
            self._places[EMBEDDING] = self._places.pop(HEAD)
        elif embedding is not None and head is not None and tied:
            if _same_weights(embedding, head):
                del self._places[HEAD]
                return
            self.config["tie_embeddings"] = False
            self.notes.append(
                f"config.json ties {HEAD} to the embedding, but {self.folder} stores another one: "
                "the stored one is used."
            )

    def _is_base(self) -> bool:
        """Whether no stored name has the prefix that a whole model gives."""
        return not any(".backbone." in f".{place.stored}" for place in self._places.values())

    def _verify(self) -> None:
        shapes = expected_shapes(self.config)
        self.names = list(shapes)
        if self.config["tie_embeddings"]:
            del shapes[HEAD]
        for name, shape in shapes.items():
            if name not in self._places:
                hint = SAVE_HEAD if name == HEAD else AGAIN
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
        """The tensor of this state-spaces name, in its stored type (F64 as F32), on the CPU.

        Raises CheckpointError when a value is not a finite FP32 number.
        """
        if name == HEAD and self.config["tie_embeddings"]:
            name = EMBEDDING
        if name not in self._places:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        place = self._places[name]
        tensor = place.read()
        if name not in self._finite:
            self._require_finite(place.stored, tensor)
            if name.endswith(".A_log"):
                self._require_finite(f"exp({place.stored})", tensor.double().exp())
            self._finite.add(name)
        return _at_most_fp32(tensor)

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
