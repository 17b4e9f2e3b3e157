"""The quantized checkpoint on disk: model.safetensors and config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runtime.files import WEIGHTS
from ssdi8_edge.ground.artifacts import QUANTIZED, read_json
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.recipes.recipe import QuantConfig

CONFIG = "config.json"


def is_quantized_checkpoint(folder: Path) -> bool:
    """Whether `folder` was written by the quantize stage (and not by a training framework)."""
    try:
        return "recipe" in read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json: {model, recipe, saturation, tokenizer, key, …}.

    Raises:
        CheckpointError: it is missing or not one of ours.
    """
    if not is_quantized_checkpoint(folder):
        raise CheckpointError(
            f"{folder} is not a quantized checkpoint;",
            f"expected a {QUANTIZED}/ folder of a build.",
        )
    config: dict[str, Any] = read_json(folder / CONFIG)
    return config


def load_quantized(folder: Path, device: str = "cpu", context: int = 0) -> QuantizedModel:
    """Read the whole quantized checkpoint into memory.

    Args:
        context: tokens that zero states have room for, where they grow; they get more as needed.
    """
    config = read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {folder / WEIGHTS}: {error};", "quantize again."
        ) from error
    description = Description.from_dict(config["model"]).with_context(context)
    return QuantizedModel(description, QuantConfig.from_dict(config["recipe"]), tensors)
