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

from runtime.failures import during
from runtime.files import (
    MANIFEST,
    PORTABLE_MODEL,
    PROGRAM,
    TENSORRT_MODEL,
    TOKENIZER,
    WEIGHTS,
    sha256,
)
from ssdi8_edge import __version__
from ssdi8_edge.checkpoints.checkpoint import (
    DEMO_FOLDER,
    Checkpoint,
    open_checkpoint,
)
from ssdi8_edge.checkpoints.hub import fetch_tokenizer
from ssdi8_edge.checkpoints.quantized import CONFIG, read_config
from ssdi8_edge.compile.bundle import pack
from ssdi8_edge.compile.calibrate import STATISTICS, calibrate
from ssdi8_edge.compile.export import export_model, record_model
from ssdi8_edge.compile.golden import golden_tokens
from ssdi8_edge.compile.lowering import lower
from ssdi8_edge.compile.quantize import quantize, quantized_description
from ssdi8_edge.compile.quantize.gptq import require_groups
from ssdi8_edge.compile.safetensors_writer import SafetensorsWriter
from ssdi8_edge.ground.artifacts import (
    BUNDLE,
    CALIBRATION,
    DISK_ERRORS,
    ONNX,
    QUANTIZED,
    disk_error,
    is_intact,
    key_of,
    listing,
    read_json,
    remove_leftovers,
    whole_or_absent,
    write_json,
)
from ssdi8_edge.ground.chat_templates import chat_templates
from ssdi8_edge.ground.device import require_device
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded, text_input
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.shipped import shipped
from ssdi8_edge.ground.tokens import (
    converted,
    end_ids,
    open_tokenizer,
    require_fitting,
    tokenizer_in,
)
from ssdi8_edge.ground.windows import read_tokens
from ssdi8_edge.models.description import Description
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.ops.kernel_header import abi_version
from ssdi8_edge.ops.kernel_library import references_only
from ssdi8_edge.ops.kernel_limits import require_kernels
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import Target

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
        out_option: that `out` came from, for messages.
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
    out_option: str = "--out"


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
        with during(f"opening {request.model}", self._lower()):
            self.checkpoint = open_checkpoint(request.model)
            self.model = self.checkpoint.description.adapted(request.recipe)
            self.tokenizer = _find_tokenizer(request, self.checkpoint)
            require_fitting(self.tokenizer, request.model, self.model.vocab_size)
            self._chat = chat_templates(self.tokenizer.parent)
            self._end_ids = end_ids(self.checkpoint.folder, self.tokenizer, self.model.vocab_size)
        self.text = text_input(request.calibration or DEMO_CALIBRATION, "calibration text")
        if request.until not in STAGES:
            raise UsageError(f"unknown stage {request.until!r};", f"known: {', '.join(STAGES)}.")
        if request.until in ("export", "bundle"):
            request.recipe.require_exportable()
        if request.target.max_tokens < self.model.prompt_multiple:
            raise UsageError(
                f"target {request.target.name} takes at most {request.target.max_tokens} tokens a "
                f"call, less than the model's chunk of {self.model.prompt_multiple};",
                "raise engine.tokens in its profile.",
            )
        _require_sizes(request, self.model)
        self._require_context()
        self._steps = self._noted_steps()
        for note in self.checkpoint.notes:
            say(f"note: {note}")

    def _require_context(self) -> None:
        """Refuse a context that the golden vectors do not fit into."""
        needed = sum(golden_tokens(self.model))
        if self.context is not None and self.context < needed:
            raise UsageError(
                f"a context of {self.context} tokens is less than the {needed} that verifying the "
                "bundle takes;",
                f"give --context {needed} or more.",
            )

    @property
    def context(self) -> int | None:
        """Tokens that a sequence may have; None: any number, since no state grows."""
        return self.request.target.context if self.model.grows(self.request.recipe) else None

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
                "text": sha256(self.text),
                "tokenizer": sha256(self.tokenizer),
                "chunk_size": self.model.prompt_multiple,
                "windows": [recipe.calibration_tokens, recipe.calibration_samples],
                "quantized": recipe.quantized,
                **({} if self.request.device == "cpu" else {"device": "cuda"}),
            }
        )
        keys["quantize"] = key_of(
            {
                "calibrate": keys["calibrate"],
                "recipe": recipe.to_dict(),
                "tied": self.model.tie_embeddings,
                "end_ids": self._end_ids,
            }
        )
        context = {} if self.context is None else {"context": self.context}
        keys["export"] = key_of({"quantize": keys["quantize"], "abi": abi_version(), **context})
        sources = {
            path.relative_to(shipped(name)).as_posix(): sha256(path)
            for name in ("jetson", "plugins")
            for path in sorted(shipped(name).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and "build" not in path.parts
        }
        target = self.request.target.to_dict()
        if self.context is None:
            del target["context"]  # it changes nothing
        keys["bundle"] = key_of(
            {
                "export": keys["export"],
                "target": target,
                "sources": sources,
                **({} if self._chat is None else {"chat": self._chat}),
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
        with _exclusive(self.request):
            for name in (CALIBRATION, QUANTIZED, ONNX, BUNDLE, STEPS):
                remove_leftovers(self.request.out / name)
            with during("checking the weights", self._lower()):
                keys, plan = self.keys, self.plan()
                if "run" in (plan["calibrate"], plan.get("quantize")):
                    self.checkpoint.require_finite(self._track)
            for stage, action in plan.items():
                if action == "reuse":
                    result.reused.append(stage)
                    self._say(f"{stage}: up to date")
                    continue
                begin = time.perf_counter()
                try:
                    with during(f"the stage {stage} ran", self._lower()):
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

    def _lower(self) -> str:
        """What takes less memory."""
        cpu = "" if self.request.device == "cpu" else ", give --device cpu"
        return f"end other programs{cpu}, or take a smaller model"

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
        return read_tokens(
            self.text, self.tokenizer, recipe.calibration_tokens, recipe.calibration_samples
        )

    def adopt_calibration(self, other: Build) -> None:
        """Take the statistics of a build that made them from the same, unless ours are there."""
        if self.plan()["calibrate"] == "run" and self.keys["calibrate"] == other.keys["calibrate"]:
            with _exclusive(self.request):
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
                    "model": quantized_description(self.checkpoint, recipe, statistics).to_dict(),
                    "recipe": recipe.to_dict(),
                    "text": {"end_ids": self._end_ids},
                    "checkpoint": {
                        "source": self.checkpoint.folder.name,
                        "sha256": self.fingerprint,
                        "bytes": self.checkpoint.parameter_bytes,
                        "notes": self.checkpoint.notes,
                    },
                    "saturation": saturation,
                    "files": listing(folder, CONFIG),
                },
            )

    def _export(self, key: str) -> None:
        folder = self.request.out / QUANTIZED
        weights, recipe = folder / WEIGHTS, self.request.recipe
        model = Description.from_dict(read_config(folder)["model"])
        model = model.with_context(self.request.target.context)
        with whole_or_absent(self.request.out / ONNX) as folder:
            # The graphs refer to the weights by name; the bundle puts them side by side.
            folder.mkdir()
            recorded = record_model(weights, model, recipe, "cpu")
            onnx.save(recorded.model(), folder / PORTABLE_MODEL)
            write_json(folder / PROGRAM, recorded.program.data())
            tensorrt = lower(export_model(weights, model, recipe, "tensorrt"))
            onnx.save(tensorrt, folder / TENSORRT_MODEL)
            write_json(folder / EXPORT, {"key": key, "files": listing(folder, EXPORT)})

    def _bundle(self, key: str) -> None:
        ids = self._windows().flatten()
        request = self.request
        with whole_or_absent(request.out / BUNDLE) as folder:
            steps = self._done_before()
            command, track = request.command, self._track
            pack(request.out, folder, request.target, ids, key, command, steps, self._chat, track)

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

    A sentencepiece model, named or in the folder, stands for what it is converted to.

    Raises:
        UsageError: there is none.
    """
    path = expanded(name)
    if not path.exists() and HUB_NAME.fullmatch(name):
        path = fetch_tokenizer(name)
    if path.is_dir():
        path = tokenizer_in(path) or path / TOKENIZER
    elif path.suffix == ".model" and path.is_file():
        path = converted(path)
    open_tokenizer(path)
    return path


def _find_tokenizer(request: BuildRequest, checkpoint: Checkpoint) -> Path:
    """The tokenizer.json to use.

    Raises:
        UsageError: none lies beside the weights and none was named.
    """
    if request.tokenizer is not None:
        return named_tokenizer(request.tokenizer)
    found = tokenizer_in(checkpoint.folder)
    if found is not None:
        return found
    raise UsageError(
        f"{checkpoint.folder} has no tokenizer.json;",
        f"name one (the published models use --tokenizer {PUBLISHED_TOKENIZER}).",
    )


def _require_sizes(request: BuildRequest, model: Description) -> None:
    """Refuse at once what the last layer would refuse after an hour, or the board after that.

    Raises:
        UsageError: no rotation, no 4-bit groups or no kernel for the model's sizes.
    """
    recipe, target = request.recipe, request.target
    if not recipe.quantized:
        return

    def check(name: str, width: int) -> None:
        hadamard.require_width(name, width, "use --method fp16.")
        if recipe.linear == "w4":
            require_groups(width, recipe.for_columns(width).group_size)

    check("d_model", model.d_model)
    for block in model.blocks:
        block.check_widths(check)
        block.require_rotations(recipe)
    if target.on_gpu:
        require_kernels(model.misfit(), target.name, "give --method fp16, or --target host-cpu.")


@contextmanager
def _exclusive(request: BuildRequest) -> Iterator[None]:
    """One build at a time per run folder; the lock dies with its holder."""
    out, option = request.out, request.out_option
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"cannot write to {out}: {error.strerror};", f"choose another {option} folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another build is writing to {out};", f"wait for it or choose another {option}."
            ) from error
        yield
