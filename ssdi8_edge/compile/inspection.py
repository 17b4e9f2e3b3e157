"""What is in a bundle: sizes, scales, saturation, and what ran where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from runtime.files import WEIGHTS
from ssdi8_edge.ground.board_runtime import open_checked_bundle
from ssdi8_edge.models.description import Description


def inspect_bundle(folder: Path) -> dict[str, Any]:
    """A JSON-safe description; every file is checked against the manifest first.

    Per layer: each scale as [smallest, largest], and the saturation fractions on the calibration
    text.

    Raises:
        BundleError: a file is missing or altered, or the schema is another one.
    """
    bundle = open_checked_bundle(folder, hash_all=True)
    manifest = bundle.manifest
    layers = []
    with safe_open(bundle.path(WEIGHTS), framework="pt") as file:
        names = list(file.keys())
        for i in range(Description.from_dict(manifest["model"]).n_layer):
            prefix = f"layers.{i}."
            scales = {}
            for name in names:
                local = name.removeprefix(prefix)
                # Scales of activations; those of linear layers have a dot in their names.
                if local != name and local.endswith("_scale") and "." not in local:
                    values = file.get_tensor(name)
                    scales[local] = [values.min().item(), values.max().item()]
            saturation = {
                key[len(prefix) :]: fraction
                for key, fraction in manifest["saturation"].items()
                if key.startswith(prefix)
            }
            layers.append({"scales": scales, "saturation": saturation})
    files = {name: listed["bytes"] for name, listed in bundle.files.items()}
    return {
        "name": bundle.name,
        "bytes": sum(files.values()),
        "files": files,
        "checkpoint": manifest["checkpoint"],
        "model": manifest["model"],
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "context": bundle.model.context,
        "cache_bytes": bundle.model.cache_bytes(),
        "blocks": list(bundle.model.blocks),
        "created": manifest["created"],
        "steps": manifest["steps"],
        "not_run": manifest["not_run"],
        "layers": layers,
    }
