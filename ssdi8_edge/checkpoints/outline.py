"""What a model is by its config.json alone: no weights are read or fetched.

A name stands for a folder, the shipped model, a hub model, or one of the published models whose
sizes ship in published.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdi8_edge.checkpoints.config import read_config
from ssdi8_edge.checkpoints.hub import fetch_config
from ssdi8_edge.checkpoints.layout import Layout
from ssdi8_edge.checkpoints.layouts import layouts
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.description import Description

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
PUBLISHED = Path(__file__).with_name("published.json")


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Name -> config.json of published models: the keys that say what the model computes."""
    configs: dict[str, dict[str, Any]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return configs


def layout_of(config: Mapping[str, Any], path: Path) -> Layout:
    """The layout of the checkpoint with this config.json.

    Raises:
        CheckpointError: it is not that of a Mamba-2 model.
    """
    for layout in layouts():
        if layout.recognises(config):
            return layout
    raise CheckpointError(
        f"{path} has neither d_model (state-spaces) nor hidden_size (Hugging Face): not a Mamba-2 "
        "model."
    )


def outline(source: str) -> Description:
    """The model that `source` names: see the module.

    A checkpoint's weights may tell another head than its config.json; nothing else.

    Raises:
        CheckpointError: there is no such model, or it cannot be supported.
    """
    config, path = _config(source)
    return layout_of(config, path).describe(config)


def _config(source: str) -> tuple[dict[str, Any], Path]:
    folder = DEMO_FOLDER if source == "demo" else Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json.", "name a folder that holds one.")
    if folder.is_dir():
        return read_config(folder / "config.json"), folder / "config.json"
    if source in published():
        return published()[source], PUBLISHED
    parts = source.split("/")
    if folder.exists() or len(parts) != 2 or not all(parts):
        raise CheckpointError(
            f"{source} is neither a folder nor a published model that is known here.",
            "give a checkpoint folder, a hub model as organisation/name, demo, or one of "
            f"{', '.join(published())}.",
        )
    path = fetch_config(source)
    return read_config(path), path
