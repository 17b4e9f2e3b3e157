"""build_engine.py: checks first, then the engine, its log and the timing cache."""

from __future__ import annotations

import argparse
import fcntl
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.arguments import Parser, number
from runtime.bundle import Bundle, open_bundle
from runtime.console import print_json, size
from runtime.engine.builder import MIB, EngineBuilder, estimate_disk, estimate_memory
from runtime.engine.libcuda import Gpu, this_gpu
from runtime.engine.store import (
    SCHEMA,
    STORE,
    Engine,
    Surroundings,
    engines_in,
    find_plugins,
    surroundings,
)
from runtime.engine.tensorrt_api import (
    LogLines,
    deserialize,
    import_tensorrt,
    layer_information,
    load_plugins,
    logger,
)
from runtime.files import (
    BUILD_LOG,
    BUILD_MESSAGES,
    ENGINE,
    PARTIAL,
    TENSORRT_MODEL,
    TIMING_CACHE,
    WEIGHTS,
    sha256,
    sync,
    write_whole,
)
from runtime.machine import Machine, available_memory, process_memory, swap_free, this_machine
from runtime.problems import BundleProblem

LOCK = ".lock"


def parse(arguments: Sequence[str], default_bundle: Path) -> argparse.Namespace:
    """Options of build_engine.py."""
    parser = Parser(
        prog="build_engine.py",
        description="Build the TensorRT engine of a bundle for this machine's GPU. An engine that"
        " fits is kept.",
    )
    add = parser.add_argument
    add(
        "bundle",
        nargs="?",
        type=Path,
        default=default_bundle,
        metavar="BUNDLE",
        help="its folder (default: the folder of this script)",
    )
    add("--plugins", type=Path, metavar="LIB", help="(default: what setup.sh built in the bundle)")
    add("--timing-cache", type=Path, metavar="FILE", help="(default: timing.cache in --out)")
    add(
        "--workspace-mb",
        type=number(int, 0),
        metavar="N",
        help="scratch memory of a kernel (default: the target's)",
    )
    add("--out", type=Path, metavar="DIR", help="where engines lie (default: engine/ in BUNDLE)")
    add("--force", action="store_true", help="build also where an engine fits")
    add("--no-memory-check", action="store_true", help="build though memory seems too small")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show where a failure happened")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class _Job:
    """All that one build needs to know."""

    bundle: Bundle
    trt: ModuleType
    plugins: Path | None
    gpu: Gpu
    machine: Machine
    here: Surroundings
    store: Path
    cache: Path
    workspace: int  # bytes


def build(options: argparse.Namespace) -> int:
    """Build, or find that nothing is to be done; returns the exit code."""
    bundle = open_bundle(options.bundle)
    if "tensorrt" not in bundle.engines:
        raise BundleProblem(
            f"bundle {bundle.name} is for a CPU and has no TensorRT engine to build",
            "run it as it is with run_engine.py, or pack one for a Jetson: ssdi8-edge build"
            " --target orin-nx",
        )
    shapes = _target_shapes(bundle)
    bundle.check_files(hash_up_to=None)
    trt = import_tensorrt()
    store = (options.out or bundle.root / STORE).absolute()
    workspace = shapes["workspace_mb"] if options.workspace_mb is None else options.workspace_mb
    plugins, gpu, machine = _plugins(bundle, options.plugins), this_gpu(), this_machine()
    job = _Job(
        bundle=bundle,
        trt=trt,
        plugins=plugins,
        gpu=gpu,
        machine=machine,
        here=surroundings(bundle, plugins, trt.__version__, gpu, machine),
        store=store,
        cache=(options.timing_cache or store / TIMING_CACHE).absolute(),
        workspace=workspace * MIB,
    )
    with _locked(store):
        if not options.force and (engine := _fitting(job)):
            return _report(engine, options, built=False)
        weights = bundle.files[WEIGHTS]["bytes"] if WEIGHTS in bundle.files else 0
        _check_disk(store, weights)
        if not options.no_memory_check:
            caches = shapes["batch"][2] * bundle.model.cache_bytes()
            _check_memory(weights, job.workspace, caches)
        if not options.json:
            print(
                f"building for {job.gpu.name}, {job.gpu.sms} SMs; TensorRT's messages go to"
                f" {store / BUILD_MESSAGES}",
                file=sys.stderr,
                flush=True,
            )
        return _report(_build(job), options, built=True)


def _build(job: _Job) -> Engine:
    lines = LogLines()
    with (job.store / BUILD_MESSAGES).open("w", encoding="utf-8") as messages:

        def write(severity: str, message: str) -> None:
            messages.write(f"{severity}: {message}\n")
            lines(severity, message)

        log = logger(job.trt, write)
        if job.plugins:
            load_plugins(job.trt, job.plugins)
        builder = EngineBuilder(job.trt, log, lines)
        with _ctrl_c_kills():
            plan, timings = builder.build(
                job.bundle.path(TENSORRT_MODEL), job.bundle, job.workspace, _read_bytes(job.cache)
            )
        write_whole(job.cache, [timings])
        with _scratch(job.store, job.here.key) as folder:
            (folder / ENGINE).write_bytes(plan)
            del plan  # so that memory holds the engine once while it is loaded
            started = time.perf_counter()
            information = _inspect(job.trt, log, lines, folder / ENGINE)
            builder.seconds["load"] = time.perf_counter() - started
            record = _record(job, builder.seconds, folder / ENGINE) | information
            (folder / BUILD_LOG).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Engine(job.store / job.here.key, record)


def _inspect(trt: ModuleType, log: Any, lines: LogLines, path: Path) -> dict[str, Any]:
    """What the engine says of its layers: loading it shows, too, that it does load."""
    with path.open("rb") as file:
        plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        engine = deserialize(trt, log, plan, "the engine that it just built", lines)
        return layer_information(trt, engine)


def _record(job: _Job, seconds: dict[str, float], engine: Path) -> dict[str, Any]:
    """build_log.json, without the layers."""
    return {
        "schema": SCHEMA,
        "key": job.here.key,
        "bundle": job.bundle.name,
        "bundle_key": job.bundle.key,
        "requirements": dict(job.here.requirements),
        "conditions": dict(job.here.conditions),
        "engine": {"bytes": engine.stat().st_size, "sha256": sha256(engine)},
        "plugins": str(job.plugins.absolute()) if job.plugins else None,
        "workspace_bytes": job.workspace,
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "built_unix": time.time(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_bytes": process_memory()[1],
        "machine": asdict(job.machine),
        "gpu": asdict(job.gpu),
    }


def _target_shapes(bundle: Bundle) -> Mapping[str, Any]:
    shapes = bundle.manifest["target"].get("engine")
    try:
        for name in ("batch", "tokens"):
            low, best, high = shapes[name]
            if not 1 <= low <= best <= high:
                raise ValueError(f"{name} is not min <= opt <= max")
        if shapes["workspace_mb"] < 0:
            raise ValueError("workspace_mb is negative")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleProblem(
            f"bundle {bundle.name} names no engine shapes in its target ({error!r})",
            "pack it again for the board's target: ssdi8-edge build --target",
        ) from error
    return shapes


def _plugins(bundle: Bundle, named: Path | None) -> Path | None:
    if not bundle.quantized:
        return None
    library = find_plugins(bundle, named)
    if library is None:
        raise BundleProblem(
            f"bundle {bundle.name} needs the plugin library and {bundle.root / 'build'} has none",
            "build it with setup.sh, or name it with --plugins",
        )
    return library


def _fitting(job: _Job) -> Engine | None:
    """The whole engine with this key and built with this workspace, if there is one."""
    for engine in engines_in(job.store):
        if engine.key == job.here.key and engine.log.get("workspace_bytes") == job.workspace:
            try:
                engine.check()
            except BundleProblem:
                return None
            return engine
    return None


def _check_disk(store: Path, weights: int) -> None:
    free, needed = shutil.disk_usage(store).free, estimate_disk(weights)
    if free < needed:
        raise BundleProblem(
            f"{store} has {size(free)} free and the engine may need {size(needed)}",
            "free some space, or name a folder on another disk with --out",
        )


def _check_memory(weights: int, workspace: int, caches: int = 0) -> None:
    available = available_memory()
    if available is None:
        return
    free, needed = available + swap_free(), estimate_memory(weights, workspace, caches)
    if free < needed:
        raise BundleProblem(
            f"memory and swap have {size(free)} free and building may need {size(needed)}",
            "end other programs or the desktop (sudo systemctl isolate multi-user), add swap, give"
            " a smaller --workspace-mb, or try all the same with --no-memory-check",
        )


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """One build at a time in a store."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleProblem(
                f"another build is under way in {store}", "wait for it, or end it"
            ) from None
        yield


@contextmanager
def _ctrl_c_kills() -> Iterator[None]:
    """TensorRT builds for minutes in one call, in which Python would not see a Ctrl-C.

    Nothing is on disk yet, so that there is nothing to clean up.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _scratch(store: Path, key: str) -> Iterator[Path]:
    """A folder that takes its place in the store when the block ends well."""
    for left in store.glob(f".*{PARTIAL}"):  # of a killed build
        shutil.rmtree(left, ignore_errors=True)
    folder = store / f".{key}{PARTIAL}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            sync(path)
        if (store / key).exists():
            shutil.rmtree(store / key)
        os.rename(folder, store / key)
        sync(store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _report(engine: Engine, options: argparse.Namespace, built: bool) -> int:
    log = engine.log
    if options.json:
        report: dict[str, Any] = {"built": built, "path": str(engine.path)}
        keys = ("key", "bundle", "requirements", "conditions", "engine", "seconds", "built_unix")
        print_json(report | {key: log[key] for key in keys})
        return 0
    state = f"built in {sum(log['seconds'].values()):.0f} s" if built else "up to date, kept"
    print(f"{engine.path}: {size(log['engine']['bytes'])}, {state}")
    return 0
