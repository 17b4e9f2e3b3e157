"""Reading config.json: values as they are meant, a sentence about each that does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.foreign_json import read_object, typed

# One function under two names.
ACTIVATION_KEYS = ("activation", "hidden_act", "mamba_hidden_act")
ACTIVATION_ALIASES = {"swish": "silu"}
# Where quantizers describe what they did to a checkpoint: transformers, compressed-tensors, MLX.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
# Far beyond any model; a number above them would take all memory before a tensor is missed.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 1 << 12
ORIGINAL = "give the floating-point checkpoint that it was made from (BF16, FP16 or FP32)."


def read_config(path: Path) -> dict[str, Any]:
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


def size(
    config: Mapping[str, Any], key: str, default: int | None = None, most: int = LARGEST_SIZE
) -> int:
    """A positive whole number."""
    value = config.get(key, default)
    if value is None:
        raise CheckpointError(f"config.json lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected a positive integer.")
    if value > most:
        raise CheckpointError(f"config.json sets {key} = {value}; no model has more than {most}.")
    return value


def layers(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """How many layers there are."""
    return size(config, key, default, MOST_LAYERS)


def require(config: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str = "") -> None:
    """Keys that must hold one value where they are there, since the model computes nothing else."""
    for key, expected in fixed.items():
        found = config.get(key)
        if key in ACTIVATION_KEYS and isinstance(found, str):
            found = ACTIVATION_ALIASES.get(found.lower(), found.lower())
        if found is not None and found != expected:
            raise CheckpointError(
                f"config.json sets {prefix}{key} = {json.dumps(found)}; only "
                f"{json.dumps(expected)} is supported."
            )


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false."""
    value = config.get(key)
    if value is None:
        return default
    if value not in (True, False):
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected true or false.")
    return bool(value)


def norm_eps(config: Mapping[str, Any], key: str, default: float = 1e-5) -> float:
    """A positive number."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected a positive number.")
    return float(value)


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number."""
    return _number(key, default if config.get(key) is None else config[key])


def numbers(config: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    """So many finite numbers; ones where they are left out."""
    values = config.get(key)
    values = [1.0] * count if values is None else values
    if not isinstance(values, list) or len(values) != count:
        raise CheckpointError(f"config.json sets {key} = {values!r}; expected {count} numbers.")
    return tuple(_number(key, value) for value in values)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected a finite number.")
    return float(value)


def respelled(
    config: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """`config` with each key of `spellings` set to the first of its spellings that stands there."""
    found = {
        key: next((config[name] for name in names if config.get(name) is not None), None)
        for key, names in spellings.items()
    }
    return {**config, **found}


def dt_limit(limits: Any, key: str) -> tuple[float, float]:
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
