"""The stages of a build, in order: calibrate, quantize, export, bundle.

Each stage reads the artifacts before it and leaves its own, with the key of what it was made from.
A stage whose artifact carries the key it would get again is skipped; deleting an artifact redoes
the work from there.
"""

from __future__ import annotations

import fcntl
import functools
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ssdi8_edge import __version__, hadamard
from ssdi8_edge.artifacts import (
    BUNDLE,
    CALIBRATION,
    DISK_ERRORS,
    MANIFEST,
    ONNX,
    PORTABLE_MODEL,
    QUANTIZED,
    TENSORRT_MODEL,
    TOKENIZER,
    WEIGHTS,
    disk_error,
    is_intact,
    key_of,
    listing,
    read_json,
    remove_leftovers,
    sha256_file,
    shipped,
    whole_or_absent,
    write_json,
)
from ssdi8_edge.bundle import pack
from ssdi8_edge.calibrate import STATISTICS, calibrate, layer_config
from ssdi8_edge.checkpoint import DEMO_FOLDER, Checkpoint, fetch_tokenizer, open_checkpoint
from ssdi8_edge.device import require_device
from ssdi8_edge.errors import UsageError
from ssdi8_edge.export import export_model
from ssdi8_edge.lowering import lower
from ssdi8_edge.methods import QuantConfig
from ssdi8_edge.model import Mamba2Config
from ssdi8_edge.ops.kernel_library import references_only
from ssdi8_edge.ops.kernel_limits import require_kernels
from ssdi8_edge.profiles import Target
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.quantize import quantize
from ssdi8_edge.quantize.gptq import require_groups
from ssdi8_edge.quantize.saved import CONFIG
from ssdi8_edge.safetensors_writer import SafetensorsWriter
from ssdi8_edge.stream import open_tokenizer, read_tokens, require_vocabulary

STAGES = ("calibrate", "quantize", "export", "bundle")
EXPORT = "export.json"
STEPS = "steps.json"
DEMO_CALIBRATION = DEMO_FOLDER / "calibration.txt"
# The tokenizer of the published state-spaces checkpoints, which do not carry one.
PUBLISHED_TOKENIZER = "EleutherAI/gpt-neox-20b"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)")

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildRequest:
    """What `ssdi8-edge build` was asked for.

    Attributes:
        model: a folder, a hub id, or "demo".
        calibration: UTF-8 text; None takes the text that ships with the demo model.
        tokenizer: a tokenizer.json, a folder or hub id with one; None takes the one beside the
            weights.
        out: the run folder.
        device: where calibrate and quantize compute. Sums in another order round differently, so
            what a GPU made is not taken for what a CPU would make.
        command: as recorded in the manifest.
    """

    model: str
    recipe: QuantConfig
    target: Target
    out: Path
    calibration: Path | None = None
    tokenizer: str | None = None
    until: str = "bundle"
    device: str = "cpu"
    command: str = "build"


@dataclass
class BuildResult:
    """Where the artifacts lie and which stages ran."""

    out: Path
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None


class Build:
    """One build of one run folder."""

    def __init__(self, request: BuildRequest, track: Track = silent, say: Say = lambda _: None):
        require_device(request.device)
        self.request = request
        self._track, self._say = track, say
        self.checkpoint = open_checkpoint(request.model)
        self.config = layer_config(self.checkpoint, request.recipe)
        self.tokenizer = _find_tokenizer(request, self.checkpoint)
        self.text = request.calibration or DEMO_CALIBRATION
        if request.until not in STAGES:
            raise UsageError(f"unknown stage {request.until!r};", f"known: {', '.join(STAGES)}.")
        if request.until in ("export", "bundle"):
            request.recipe.require_exportable()
        if request.target.max_tokens < self.config.chunk_size:
            raise UsageError(
                f"target {request.target.name} takes at most {request.target.max_tokens} tokens a "
                f"call, less than the model's chunk of {self.config.chunk_size};",
                "raise engine.tokens in its profile.",
            )
        _require_sizes(request, self.config)
        if not self.text.is_file():
            raise UsageError(f"calibration text {self.text} does not exist;", "name a text file.")
        self._steps = self._noted_steps()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint."""
        return self.checkpoint.fingerprint(self._track)

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Stage -> key; each holds the key before it."""
        recipe = self.request.recipe
        keys: dict[str, str] = {}
        keys["calibrate"] = key_of(
            {
                "version": __version__,
                "statistics": STATISTICS,
                "checkpoint": self.fingerprint,
                "text": sha256_file(self.text),
                "tokenizer": sha256_file(self.tokenizer),
                "chunk_size": self.config.chunk_size,
                "windows": [recipe.calibration_tokens, recipe.calibration_samples],
                "quantized": recipe.quantized,
                **({} if self.request.device == "cpu" else {"device": "cuda"}),
            }
        )
        keys["quantize"] = key_of({"calibrate": keys["calibrate"], "recipe": recipe.to_dict()})
        keys["export"] = key_of({"quantize": keys["quantize"]})
        sources = {
            path.relative_to(shipped(name)).as_posix(): sha256_file(path)
            for name in ("jetson", "plugins")
            for path in sorted(shipped(name).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and "build" not in path.parts
        }
        keys["bundle"] = key_of(
            {
                "export": keys["export"],
                "target": self.request.target.to_dict(),
                "sources": sources,
            }
        )
        return keys

    def plan(self) -> dict[str, str]:
        """Stage -> "reuse" or "run", up to the stage asked for."""
        keys = self.keys
        wanted = STAGES[: STAGES.index(self.request.until) + 1]
        plan, fresh = {}, True
        for stage in wanted:
            fresh = fresh and self._record(stage).get("key") == keys[stage]
            plan[stage] = "reuse" if fresh else "run"
        return plan

    def _record(self, stage: str) -> dict[str, Any]:
        """What a stage wrote about its artifact, its key above all; empty if it is not whole."""
        out = self.request.out
        try:
            if stage == "calibrate":
                with safe_open(out / CALIBRATION, framework="pt") as file:
                    return {"key": file.metadata()["key"]}
            folder, name = {
                "quantize": (out / QUANTIZED, CONFIG),
                "export": (out / ONNX, EXPORT),
                "bundle": (out / BUNDLE, MANIFEST),
            }[stage]
            record: dict[str, Any] = read_json(folder / name)
            return record if is_intact(folder, record["files"]) else {}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return {}

    def run(self) -> BuildResult:
        """Bring every stage up to the one asked for up to date."""
        result = BuildResult(self.request.out)
        stages = {
            "calibrate": self._calibrate,
            "quantize": self._quantize,
            "export": self._export,
            "bundle": self._bundle,
        }
        with _exclusive(self.request.out):
            for name in (CALIBRATION, QUANTIZED, ONNX, BUNDLE, STEPS):
                remove_leftovers(self.request.out / name)
            keys = self.keys
            for stage, action in self.plan().items():
                if action == "reuse":
                    result.reused.append(stage)
                    self._say(f"{stage}: up to date")
                    continue
                begin = time.perf_counter()
                try:
                    stages[stage](keys[stage])
                    self._note_step(stage, keys[stage], begin)
                except OSError as error:
                    if error.errno in DISK_ERRORS:
                        raise disk_error(self.request.out, error) from error
                    raise
                result.ran.append(stage)
                self._say(f"{stage}: done in {self._steps[stage]['seconds']:.1f} s")
        manifest = self.request.out / BUNDLE / MANIFEST
        if self.request.until == "bundle":
            result.manifest = read_json(manifest)
        return result

    def _noted_steps(self) -> dict[str, dict[str, Any]]:
        try:
            noted: dict[str, dict[str, Any]] = read_json(self.request.out / STEPS)
            return noted
        except (OSError, ValueError):
            return {}

    def _note_step(self, stage: str, key: str, begin: float) -> None:
        """Remember when and where a stage ran, apart from its artifact: that is the same bytes
        however long it took."""
        seconds = round(time.perf_counter() - begin, 2)
        on_gpu = self.request.device != "cpu" and stage in ("calibrate", "quantize")
        where = f"host, {torch.cuda.get_device_name(self.request.device)}" if on_gpu else "host"
        self._write_steps(self._steps | {stage: {"key": key, "where": where, "seconds": seconds}})

    def _write_steps(self, steps: dict[str, dict[str, Any]]) -> None:
        self._steps = steps
        with whole_or_absent(self.request.out / STEPS) as path:
            write_json(path, steps)

    def _windows(self) -> Tensor:
        recipe = self.request.recipe
        tokens = read_tokens(
            self.text, self.tokenizer, recipe.calibration_tokens, recipe.calibration_samples
        )
        require_vocabulary(tokens, self.tokenizer, self.request.model, self.config.vocab_size)
        return tokens

    def adopt_calibration(self, other: Build) -> None:
        """Take the statistics of a build that made them from the same, unless ours are there."""
        if self.plan()["calibrate"] == "run" and self.keys["calibrate"] == other.keys["calibrate"]:
            with _exclusive(self.request.out):
                with whole_or_absent(self.request.out / CALIBRATION) as path:
                    shutil.copyfile(other.request.out / CALIBRATION, path)
                shared = {
                    stage: step for stage, step in other._steps.items() if stage == "calibrate"
                }
                self._write_steps(self._steps | shared)

    def _calibrate(self, key: str) -> None:
        statistics: dict[str, Tensor] = {}
        if self.request.recipe.quantized:
            ids = self._windows()
            request = self.request
            statistics = calibrate(
                *(self.checkpoint, request.recipe, ids, self._track, request.device),
                scratch=request.out,
            )
        with whole_or_absent(self.request.out / CALIBRATION) as path:
            # Not save_file: it reports a full disk as an error of its own kind.
            path.write_bytes(save(statistics or {"none": torch.zeros(1)}, {"key": key}))

    def _quantize(self, key: str) -> None:
        recipe = self.request.recipe
        with safe_open(self.request.out / CALIBRATION, framework="pt") as file:
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids = self._windows()
        with whole_or_absent(self.request.out / QUANTIZED) as folder:
            folder.mkdir()
            with SafetensorsWriter(folder / WEIGHTS) as writer, references_only():
                saturation = quantize(
                    self.checkpoint,
                    recipe,
                    statistics,
                    ids,
                    writer,
                    self._track,
                    self.request.device,
                    scratch=self.request.out,
                )
            shutil.copyfile(self.tokenizer, folder / TOKENIZER)
            write_json(
                folder / CONFIG,
                {
                    "key": key,
                    "name": _model_name(self.request.model),
                    "model": self.config.to_dict(),
                    "recipe": recipe.to_dict(),
                    "checkpoint": {
                        "source": self.checkpoint.folder.name,
                        "sha256": self.fingerprint,
                        "bytes": self.checkpoint.parameter_bytes,
                    },
                    "saturation": saturation,
                    "files": listing(folder, CONFIG),
                },
            )

    def _export(self, key: str) -> None:
        weights = self.request.out / QUANTIZED / WEIGHTS
        recipe = self.request.recipe
        with whole_or_absent(self.request.out / ONNX) as folder:
            # The graphs refer to the weights by name; the bundle puts them side by side.
            folder.mkdir()
            portable = export_model(weights, self.config, recipe, "cpu")
            onnx.save(portable, folder / PORTABLE_MODEL)
            tensorrt = lower(export_model(weights, self.config, recipe, "tensorrt"))
            onnx.save(tensorrt, folder / TENSORRT_MODEL)
            write_json(folder / EXPORT, {"key": key, "files": listing(folder, EXPORT)})

    def _bundle(self, key: str) -> None:
        ids = self._windows().flatten()
        request = self.request
        with whole_or_absent(request.out / BUNDLE) as folder:
            steps = self._done_before()
            command, track = request.command, self._track
            pack(request.out, folder, request.target, ids, key, command, steps, track)

    def _done_before(self) -> list[dict[str, Any]]:
        """The steps whose artifacts go into the bundle, also where an earlier build did them."""
        return [
            {"step": stage, "where": noted["where"], "seconds": noted["seconds"]}
            for stage, key in self.keys.items()
            if (noted := self._steps.get(stage, {})).get("key") == key and stage != "bundle"
        ]


def _model_name(source: str) -> str:
    return Path(source).name or "model"


def run_name(model: str, method: str, target: str) -> str:
    """Of the run folder, where the user names none."""
    return f"{Path(model).name}--{method}--{target}"


def named_tokenizer(name: str) -> Path:
    """The tokenizer.json that `name` stands for: a file, a folder or a hub id.

    Raises:
        UsageError: there is none.
    """
    path = Path(name).expanduser()
    path = path / TOKENIZER if path.is_dir() else path
    if not path.exists() and HUB_NAME.fullmatch(name):
        path = fetch_tokenizer(name)
    open_tokenizer(path)
    return path


def _find_tokenizer(request: BuildRequest, checkpoint: Checkpoint) -> Path:
    """The tokenizer.json to use.

    Raises:
        UsageError: none lies beside the weights and none was named.
    """
    if request.tokenizer is not None:
        return named_tokenizer(request.tokenizer)
    if checkpoint.tokenizer_path is not None:
        open_tokenizer(checkpoint.tokenizer_path)
        return checkpoint.tokenizer_path
    raise UsageError(
        f"{checkpoint.folder} has no tokenizer.json;",
        f"name one (the published models use --tokenizer {PUBLISHED_TOKENIZER}).",
    )


def _require_sizes(request: BuildRequest, config: Mamba2Config) -> None:
    """Refuse at once what the last layer would refuse after an hour, or the board after that.

    Raises:
        UsageError: no rotation, no 4-bit groups or no kernel for the model's sizes.
    """
    recipe, target = request.recipe, request.target
    if not recipe.quantized:
        return
    for width in (config.d_model, config.d_inner):
        hadamard.factors(width)
        if recipe.linear == "w4":
            require_groups(width, recipe.group_size)
    if target.runtime == "tensorrt":
        require_kernels(
            config.kernel_sizes, target.name, "give --method fp16, or --target host-cpu."
        )


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """One build at a time per run folder; the lock dies with its holder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"cannot write to {out}: {error.strerror};", "choose another --out folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another build is writing to {out};", "wait for it or choose another --out."
            ) from error
        yield
