"""Pack a bundle: everything a board needs, nothing else, and a manifest that says so."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from runtime.failures import during
from runtime.files import (
    CHAT,
    GOLDEN,
    MANIFEST,
    MANIFEST_SCHEMA,
    PORTABLE_MODEL,
    PROGRAM,
    TENSORRT_MODEL,
    TOKENIZER,
    WEIGHTS,
)
from ssdi8_edge import __version__
from ssdi8_edge.checkpoints.quantized import load_quantized, read_config
from ssdi8_edge.compile.golden import golden_vectors
from ssdi8_edge.compile.interface import interface
from ssdi8_edge.ground.artifacts import ONNX, QUANTIZED, listing, read_json, write_json
from ssdi8_edge.ground.board_runtime import run_engine
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError
from ssdi8_edge.ground.failures import killed_for_memory
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.shipped import shipped
from ssdi8_edge.targets import Target

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "safetensors")
_JUNK = {"__pycache__", "build"}


def pack(
    run_folder: Path,
    folder: Path,
    target: Target,
    golden_ids: Tensor,
    key: str,
    command: str,
    steps: list[dict[str, Any]],
    chat: dict[str, Any] | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """Write the bundle of a finished run folder into `folder` and verify it here.

    Args:
        golden_ids: (tokens,) text for the golden vectors.
        key: of the bundle stage, kept in the manifest.
        steps: what was done so far: step, where, seconds.
        chat: the checkpoint's chat templates, see `ground.chat_templates`.

    Returns:
        The manifest.

    Raises:
        Ssdi8Error: onnxruntime does not reproduce the golden vectors.
    """
    folder.mkdir()
    config = read_config(run_folder / QUANTIZED)
    start = time.perf_counter()
    # Copies, not links: a bundle can be edited or moved without touching the run folder, and ONNX
    # tools refuse weights that have a second name.
    shutil.copyfile(run_folder / QUANTIZED / WEIGHTS, folder / WEIGHTS)
    for name in (PORTABLE_MODEL, TENSORRT_MODEL, PROGRAM):
        shutil.copyfile(run_folder / ONNX / name, folder / name)
    if (run_folder / QUANTIZED / TOKENIZER).is_file():
        shutil.copyfile(run_folder / QUANTIZED / TOKENIZER, folder / TOKENIZER)
    engines = _engines(target, folder)
    if chat is not None:
        write_json(folder / CHAT, chat)
    for source, inside in ((shipped("jetson"), folder), (shipped("plugins"), folder / "plugins")):
        _copy_sources(source, inside)
    with during("the golden vectors of the bundle were made", "end other programs"):
        model = load_quantized(run_folder / QUANTIZED)
        golden = golden_vectors(model, golden_ids, target.max_tokens, track)
    description, recipe = model.description.with_context(target.context), model.recipe
    del model  # the process that verifies needs the memory
    np.savez(folder / GOLDEN, **golden)  # type: ignore[arg-type]

    manifest: dict[str, Any] = {
        "schema": MANIFEST_SCHEMA,
        "name": f"{config['name']}--{config['recipe']['name']}--{target.name}",
        "key": key,
        "model": description.to_dict(),
        "interface": interface(description, recipe),
        "recipe": config["recipe"],
        "target": target.to_dict() | {"engines": engines},
        "text": config["text"],
        "created": {
            "ssdi8_edge": __version__,
            "command": command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "checkpoint": config["checkpoint"],
        "saturation": config["saturation"],
        "files": listing(folder, MANIFEST),
        "steps": [*steps, _step("bundle", start)],
        "not_run": _not_run(target, engines),
    }
    write_json(folder / MANIFEST, manifest)
    start = time.perf_counter()
    _verify(folder)
    manifest["steps"].append(_step("verify portable graph", start))
    write_json(folder / MANIFEST, manifest)
    return manifest


def _copy_sources(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and not _JUNK & set(relative.parts):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _step(name: str, start: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 2)
    return {"step": name, "where": "host", "seconds": seconds}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _engines(target: Target, folder: Path) -> list[str]:
    """Those of the target that can run this bundle: not the kernels where an op has none.

    Raises:
        UsageError: that leaves none.
    """
    calls = read_json(folder / PROGRAM)["calls"]
    without = next((call["op"] for call in calls if call["launch"] is None), None)
    engines: list[str] = [e for e in target.engines if e != "kernels" or without is None]
    if not engines:
        raise UsageError(
            f"{target.name} runs bundles by our kernels alone, and there is none for the op"
            f" {without} of this model;",
            "add tensorrt or onnxruntime to the engines of the target.",
        )
    return engines


def _not_run(target: Target, engines: list[str]) -> list[str]:
    """What this host could not do, in the words that messages and reports use."""
    place = "on the board" if target.where == "board" else "on this machine's GPU"
    left = {
        "kernels": f"kernels: to be compiled {place}",
        "tensorrt": f"engine: to be built {place} with the plugins, since a TensorRT engine runs "
        "only on the GPU and the TensorRT version that built it",
    }
    return [left[engine] for engine in engines if engine in left]


def _verify(folder: Path) -> None:
    """The new bundle in a process of its own, as it will run elsewhere.

    Raises:
        Ssdi8Error: what happened there; only other numbers are worth a report.
    """
    done = run_engine(folder, ["--verify", "--json", "--backend", "onnxruntime"])
    if done.returncode == 0:
        return
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = {}
    if report.get("comparisons"):
        raise Ssdi8Error(
            f"the new bundle does not reproduce its golden vectors: {report['problem']}",
            "the old bundle was kept; please report this.",
        )
    said = report.get("problem") or done.stderr.strip().rpartition("\n")[2]
    reason = said.removeprefix("run_engine: ").rstrip(".")
    memory = killed_for_memory(done.returncode, done.stderr)
    if memory:
        reason = "it was killed, most likely because memory ran out"
    elif done.returncode < 0:
        reason = f"it was ended by {signal.Signals(-done.returncode).name}"
    failure = Ssdi8Error(
        f"verifying the new bundle failed: {reason};",
        f"{'end other programs; ' if memory else ''}the stages before it are kept.",
    )
    failure.exit_code = 2 if memory or done.returncode == 2 else 1
    raise failure
