"""A bundle of a tiny pure Mamba-2 as it comes from export, at sizes that have kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from case_table import apply_recipe, random_ids, tiny_recipe, write_checkpoint
from conftest import make_config

from runtime.bundle import Bundle, open_bundle
from runtime.files import MANIFEST, MANIFEST_SCHEMA, PORTABLE_MODEL, PROGRAM, WEIGHTS
from ssdi8_edge.compile.export import record_model
from ssdi8_edge.compile.interface import interface
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import listing, write_json
from ssdi8_edge.models.network import QuantizedModel

SIZES = {"d_model": 128, "headdim": 64, "d_state": 64, "chunk_size": 64}
VOCABULARY = 256
MAX_TOKENS = 128


class PureBundle(NamedTuple):
    """The bundle, and the model that it was exported from."""

    bundle: Bundle
    model: QuantizedModel


def pure_bundle(folder: Path, method: str, **changes: Any) -> PureBundle:
    """Weights, portable graph, program and manifest; nothing of this machine's runtime."""
    folder.mkdir()
    checkpoint, _ = write_checkpoint(folder.parent / f"{folder.name}-source", make_config(**SIZES))
    made = apply_recipe(checkpoint, tiny_recipe(method, **changes), random_ids(4, 80))
    with SafetensorsWriter(folder / WEIGHTS) as writer:
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
    recorded = record_model(folder / WEIGHTS, made.config, made.recipe, "cpu")
    onnx.save(recorded.model(), folder / PORTABLE_MODEL)
    write_json(folder / PROGRAM, recorded.program.data())
    target = {
        "name": "host-gpu",
        "engines": ["kernels", "tensorrt"],
        "where": "here",
        "max_tokens": MAX_TOKENS,
    }
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": f"tiny--{method}",
        "model": made.config.to_dict(),
        "interface": interface(made.config, made.recipe),
        "recipe": {"name": method, "linear": made.recipe.linear},
        "target": target,
        "text": {"end_ids": []},
        "created": {},
        "files": listing(folder, MANIFEST),
        "steps": [],
        "not_run": [],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return PureBundle(open_bundle(folder), made.model)
