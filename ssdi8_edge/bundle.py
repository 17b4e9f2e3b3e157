"""Pack a bundle: everything a board needs, nothing else, and a manifest that says so."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdi8_edge import __version__
from ssdi8_edge.artifacts import (
    BUNDLE_SCHEMA,
    GOLDEN,
    MANIFEST,
    ONNX,
    PORTABLE_MODEL,
    QUANTIZED,
    TENSORRT_MODEL,
    TOKENIZER,
    WEIGHTS,
    listing,
    shipped,
    write_json,
)
from ssdi8_edge.board_runtime import run_engine, runtime_module
from ssdi8_edge.errors import Ssdi8Error
from ssdi8_edge.failures import during, killed_for_memory
from ssdi8_edge.profiles import Target
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.quantize.modules import QuantizedMamba2, State, watched_model
from ssdi8_edge.quantize.saved import load_quantized, read_config

DECODE_STEPS = 4
GOLDEN_LOGITS = 4
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "safetensors")
_JUNK = {"__pycache__", "build"}


def golden_vectors(
    model: QuantizedMamba2, ids: Tensor, max_tokens: int, track: Track = silent
) -> dict[str, np.ndarray]:
    """What every runtime must reproduce, from the torch reference.

    A prefill over two chunks and three tokens more, the states behind it layer by layer, and a few
    decode steps.

    Args:
        ids: (tokens,) real text; used cyclically where it is short.
        max_tokens: the most that a call takes; a longer prefill goes in the runtime's pieces, since
            the states between them are rounded to their type.

    Raises:
        CheckpointError: a tensor leaves FP16.
    """
    chunk = model.config.chunk_size
    length = 2 * chunk + 3
    repeats = -(-(length + DECODE_STEPS) // len(ids))
    ids = ids.repeat(repeats)[: length + DECODE_STEPS].to(torch.int32)[None]
    prompt, following = ids[:, :length], ids[:, length:]
    pieces = runtime_module("generate").prefill_pieces(length, max_tokens, chunk)
    layers = iter(track(range(model.config.n_layer * len(pieces) + 1), "golden vectors"))

    def layer_begins(_: str) -> AbstractContextManager[None]:
        next(layers, None)
        return nullcontext()

    states: list[State] | None = None
    last_logits = []
    with watched_model(model):
        for start, end in pieces:
            keep = min(GOLDEN_LOGITS, end - start)
            logits, states = model.forward(prompt[:, start:end], states, keep, layer_begins)
            last_logits.append(logits)
    deque(layers, maxlen=0)  # ends the bar
    assert states is not None
    logits = torch.cat(last_logits, 1)[:, -GOLDEN_LOGITS:]
    golden = {"input_ids": prompt, "logits": logits, "decode_ids": following}
    for i, state in enumerate(states):
        golden |= {f"conv_state.{i}": state.conv, f"ssm_state.{i}": state.ssm}
    steps = []
    with watched_model(model):
        for step in range(DECODE_STEPS):
            logits, states = model.forward(following[:, step : step + 1], states)
            steps.append(logits[0, 0])
    golden["decode_logits"] = torch.stack(steps)
    return {name: tensor.numpy() for name, tensor in golden.items()}


def pack(
    run_folder: Path,
    folder: Path,
    target: Target,
    golden_ids: Tensor,
    key: str,
    command: str,
    steps: list[dict[str, Any]],
    track: Track = silent,
) -> dict[str, Any]:
    """Write the bundle of a finished run folder into `folder` and verify it here.

    Args:
        golden_ids: (tokens,) text for the golden vectors.
        key: of the bundle stage, kept in the manifest.
        steps: what was done so far: step, where, seconds.

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
    for name in (PORTABLE_MODEL, TENSORRT_MODEL):
        shutil.copyfile(run_folder / ONNX / name, folder / name)
    if (run_folder / QUANTIZED / TOKENIZER).is_file():
        shutil.copyfile(run_folder / QUANTIZED / TOKENIZER, folder / TOKENIZER)
    for source, inside in ((shipped("jetson"), folder), (shipped("plugins"), folder / "plugins")):
        _copy_sources(source, inside)
    with during("the golden vectors of the bundle were made", "end other programs"):
        model = load_quantized(run_folder / QUANTIZED)
        golden = golden_vectors(model, golden_ids, target.max_tokens, track)
    del model  # the process that verifies needs the memory
    np.savez(folder / GOLDEN, **golden)  # type: ignore[arg-type]

    manifest: dict[str, Any] = {
        "schema": BUNDLE_SCHEMA,
        "name": f"{config['name']}--{config['recipe']['name']}--{target.name}",
        "key": key,
        "model": config["model"],
        "recipe": config["recipe"],
        "target": target.to_dict(),
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
        "not_run": _not_run(target),
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


def _not_run(target: Target) -> list[str]:
    """What this host could not do, in the words that messages and reports use."""
    if target.runtime == "onnxruntime":
        return []
    place = "on the board" if target.where == "board" else "on this machine's GPU"
    return [
        f"plugins: to be compiled {place}",
        f"engine: to be built {place}, since a TensorRT engine runs only on the GPU and the "
        "TensorRT version that built it",
    ]


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
