"""Bundles of tiny models as they come from export, at sizes that have kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from case_table import Quantized, apply_recipe, random_ids, tiny_recipe, write_checkpoint
from conftest import make_config
from tiny_hybrids import hybrid, quantized

from runtime.bundle import Bundle, open_bundle
from runtime.files import MANIFEST, MANIFEST_SCHEMA, PORTABLE_MODEL, PROGRAM, WEIGHTS
from ssdi8_edge.compile.export import record_model
from ssdi8_edge.compile.interface import interface
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import listing, write_json
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.models.network import QuantizedModel

SIZES = {"d_model": 128, "headdim": 64, "d_state": 64, "chunk_size": 64}
VOCABULARY = 256
CONTEXT = 192
MAMBA = {"d_state": 64, "chunk_size": 64}
HYBRID = Description(
    d_model=128,
    vocab_size=VOCABULARY,
    blocks=(
        Mamba2(d_inner=320, headdim=80, ngroups=2, **MAMBA),
        Mlp(hidden=160, activation="relu2"),
        Attention(n_heads=4, n_kv_heads=2, head_dim=64),
        Mamba2(d_inner=128, headdim=32, **MAMBA),
        Mlp(hidden=192, activation="swiglu"),
    ),
    tie_embeddings=False,
)
MAX_TOKENS = 128


class TinyBundle(NamedTuple):
    """The bundle, and the model that it was exported from."""

    bundle: Bundle
    model: QuantizedModel


def pure_bundle(folder: Path, method: str, **changes: Any) -> TinyBundle:
    """Two blocks of Mamba-2."""
    checkpoint, _ = write_checkpoint(folder.parent / f"{folder.name}-source", make_config(**SIZES))
    made = apply_recipe(checkpoint, tiny_recipe(method, **changes), random_ids(4, 80))
    return _exported(folder, made, made.config)


def hybrid_bundle(folder: Path, method: str, **changes: Any) -> TinyBundle:
    """Blocks of Mamba-2, attention and both activations, as Nemotron-H and Granite have them."""
    made = quantized(hybrid(HYBRID), method, **changes)
    return _exported(folder, made, made.config.with_context(CONTEXT))


def _exported(folder: Path, made: Quantized, model: Description) -> TinyBundle:
    """Weights, portable graph, program and manifest; nothing of this machine's runtime."""
    folder.mkdir()
    with SafetensorsWriter(folder / WEIGHTS) as writer:
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
    recorded = record_model(folder / WEIGHTS, model, made.recipe, "cpu")
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
        "name": f"tiny--{made.recipe.name}",
        "model": model.to_dict(),
        "interface": interface(model, made.recipe),
        "recipe": {"name": made.recipe.name, "linear": made.recipe.linear},
        "target": target,
        "text": {"end_ids": []},
        "created": {},
        "files": listing(folder, MANIFEST),
        "steps": [],
        "not_run": [],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return TinyBundle(open_bundle(folder), made.model)
