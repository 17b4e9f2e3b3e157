"""Engines on disk: what one depends on, where it lies, and why one that lies there does not fit.

    engine/                     in the bundle, or the folder given with --out
        <key>/model.engine      the serialized engine
        <key>/build_log.json    requirements, conditions, versions, times, layers
        <key>/build.txt         all that TensorRT said
        timing.cache            measured kernels, to build faster the next time

The key is a hash of the requirements and the conditions. An engine whose requirements differ does
not load or computes something else; one whose conditions differ runs, but was tuned for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.engine.libcuda import Gpu
from runtime.engine.tensorrt_api import PLUGIN_LIBRARY
from runtime.files import BUILD_LOG, ENGINE, HASHED_AT_LOAD, TENSORRT_MODEL, WEIGHTS, sha256
from runtime.machine import Machine
from runtime.problems import BundleProblem

STORE = "engine"
SCHEMA = 1
KEY_LETTERS = 16
REBUILD = "python3 build_engine.py"

# requirement or condition -> how a message calls it
NAMES = {
    "onnx": "the graph",
    "weights": "the weights",
    "shapes": "the shapes",
    "plugins": "the plugin library",
    "tensorrt": "TensorRT",
    "cuda": "CUDA",
    "gpu": "the GPU",
    "compute_capability": "compute capability",
    "board": "the board",
    "sms": "SMs",
    "power_mode": "power mode",
    "gpu_max_hz": "GPU clock",
    "emc_cap_hz": "memory clock",
}
# What the runtime reads of a build log.
LOG_TYPES: Mapping[tuple[str, ...], Any] = {
    ("engine", "bytes"): int,
    ("engine", "sha256"): str,
    ("requirements",): dict,
    ("conditions",): dict,
    ("plugins",): str | None,
    ("layers",): list,
    ("built_unix",): int | float,
}
# Hashes: that they differ says all.
UNREADABLE = ("onnx", "weights", "plugins", "shapes")


@dataclass(frozen=True)
class Surroundings:
    """What an engine is built from and for."""

    requirements: Mapping[str, Any]
    conditions: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of the engine's folder."""
        parts = json.dumps([dict(self.requirements), dict(self.conditions)], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:KEY_LETTERS]


@dataclass(frozen=True)
class Engine:
    """One engine in the store."""

    folder: Path
    log: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / ENGINE

    @property
    def key(self) -> str:
        return self.folder.name

    def check(self, hash_up_to: int | None = HASHED_AT_LOAD) -> None:
        """Compare the file with the log; it is hashed if it has at most `hash_up_to` bytes.

        Raises:
            BundleProblem: it is missing, cut short or altered.
        """
        listed = self.log["engine"]
        if not self.path.is_file():
            raise BundleProblem(f"{self.path} is missing", f"build it again: {REBUILD}")
        found = self.path.stat().st_size
        if found != listed["bytes"]:
            raise BundleProblem(
                f"{self.path} has {found} bytes and {BUILD_LOG} lists {listed['bytes']}",
                f"build it again: {REBUILD}",
            )
        fits = hash_up_to is None or listed["bytes"] <= hash_up_to
        if fits and sha256(self.path) != listed["sha256"]:
            raise BundleProblem(
                f"{self.path} was altered after it was built (SHA-256 differs)",
                f"build it again: {REBUILD}",
            )


def surroundings(
    bundle: Bundle, plugins: Path | None, tensorrt: str, gpu: Gpu, machine: Machine
) -> Surroundings:
    """What an engine of `bundle` built here and now would depend on.

    Args:
        plugins: the plugin library, None for a graph that needs none.
        tensorrt: its version.
    """
    files = bundle.files
    shapes = bundle.manifest["target"].get("engine") or {}
    board = asdict(machine.board) if machine.board else {}
    return Surroundings(
        requirements={
            "onnx": files[TENSORRT_MODEL]["sha256"] if TENSORRT_MODEL in files else None,
            "weights": files[WEIGHTS]["sha256"] if WEIGHTS in files else None,
            "shapes": {name: shapes.get(name) for name in ("batch", "tokens")},
            "plugins": sha256(plugins) if plugins else None,
            "tensorrt": tensorrt,
            "cuda": gpu.cuda,
            "gpu": gpu.name,
            "compute_capability": gpu.compute_capability,
        },
        conditions={
            "board": board.get("model"),  # CUDA calls the GPU of every module "Orin"
            "sms": gpu.sms,
            "power_mode": board.get("power_mode"),
            "gpu_max_hz": board.get("gpu_max_hz"),
            "emc_cap_hz": board.get("emc_cap_hz"),
        },
    )


def find_plugins(bundle: Bundle, named: Path | None) -> Path | None:
    """The plugin library: the one named, else the one that setup.sh builds inside the bundle.

    Raises:
        BundleProblem: the one named is not there.
    """
    if named is not None and not named.is_file():
        raise BundleProblem(f"there is no plugin library {named}", "build it: setup.sh")
    built = bundle.root / "build" / PLUGIN_LIBRARY
    return named or (built if built.is_file() else None)


def engines_in(store: Path) -> list[Engine]:
    """Those with a readable log, newest first."""
    found = []
    for path in store.glob(f"*/{BUILD_LOG}"):
        try:
            log = json.loads(path.read_text(encoding="utf-8"))
            typed = all(isinstance(_entry(log, at), kind) for at, kind in LOG_TYPES.items())
            if log["schema"] != SCHEMA or not typed:
                continue
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(Engine(path.parent, log))
    return sorted(found, key=lambda engine: engine.log["built_unix"], reverse=True)


def _entry(log: Any, at: tuple[str, ...]) -> Any:
    for key in at:
        log = log[key]
    return log


def differences(built: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One text per entry that is not as it was: "TensorRT 10.3.0, here 10.16.2"."""
    return [
        f"another version of {NAMES[name]}"
        if name in UNREADABLE
        else f"{NAMES[name]} {built.get(name)}, here {value}"
        for name, value in here.items()
        if built.get(name) != value
    ]


def choose_engine(bundle: Bundle, store: Path, here: Surroundings) -> tuple[Engine, list[str]]:
    """The engine for `here`, and in which conditions it was not built.

    An engine built for exactly this is taken, else the newest whose requirements are met.

    Raises:
        BundleProblem: there is none; says what those there are for, and how to build.
    """
    engines = engines_in(store)
    fitting = [
        (differences(engine.log["conditions"], here.conditions), engine)
        for engine in engines
        if not differences(engine.log["requirements"], here.requirements)
    ]
    if fitting:
        differs, engine = min(fitting, key=lambda pair: bool(pair[0]))
        return engine, differs
    if not engines:
        raise no_engine(bundle, store)
    built_for = differences(engines[0].log["requirements"], here.requirements)
    raise BundleProblem(
        f"the engine in {engines[0].folder} does not fit: it was built for {'; '.join(built_for)}",
        f"build one here: {REBUILD}",
    )


def no_engine(bundle: Bundle, store: Path) -> BundleProblem:
    """There is nothing in `store`, or nothing with a readable log."""
    here = bundle.manifest["target"].get("where") == "here"
    state = f"it will be built on {'this GPU' if here else 'the board'}"
    if any(store.glob("*/*")):
        state = f"{store} holds none that is whole"
    return BundleProblem(
        f"bundle {bundle.name} has no TensorRT engine yet, {state}",
        f"build it there with {REBUILD}, or use --backend onnxruntime to run the portable graph"
        " on the CPU",
    )
