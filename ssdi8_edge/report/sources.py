"""Reads what a report is made from: files of points, profiles, evaluations, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from runtime.files import MANIFEST
from ssdi8_edge.boards.points.points import PointId, read_points
from ssdi8_edge.boards.points.records import Measured, Point, Profile, model_name, plain
from ssdi8_edge.ground.artifacts import BUNDLE
from ssdi8_edge.ground.decimals import change
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.json_text import number_of
from ssdi8_edge.report.planned import Planned
from ssdi8_edge.report.values import OTHER

BASELINE = "fp16"
# What a record of an evaluation has one of.
FIGURES = ("perplexity", "accuracy")


class Setup(NamedTuple):
    """Where methods can be compared: one model on one board in one mode, for one target."""

    model: str
    board: str
    mode: str
    target: str
    simulated: bool

    @classmethod
    def of(cls, record: Measured) -> Setup:
        bundle = record.bundle
        return cls(bundle.model, record.board, record.mode or "", bundle.target, record.simulated)

    @property
    def place(self) -> str:
        """Board and mode."""
        return f"{self.board}, {self.mode}" if self.mode else self.board

    def __str__(self) -> str:
        return f"{self.model} on {self.place}"


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one method.

    Attributes:
        model: None where the file does not tell; then it holds for the only model of the report.
        perplexities: text -> perplexity, in the order of the file.
        changes: text -> relative change against the first model of the same file.
        accuracies: task -> fraction of its items.
    """

    model: str | None
    method: str
    perplexities: Mapping[str, float]
    changes: Mapping[str, float]
    accuracies: Mapping[str, float]

    @property
    def perplexity(self) -> float | None:
        """On the first text."""
        return next(iter(self.perplexities.values()), None)

    @property
    def change(self) -> float | None:
        """On the first text."""
        return self.changes.get(next(iter(self.perplexities), ""))


@dataclass(frozen=True)
class Measurements:
    """Everything that was given, and how many points an other file measured again, later."""

    points: Sequence[Point]
    profiles: Sequence[Profile]
    evaluations: Sequence[Evaluation]
    superseded: int
    plans: Sequence[Planned] = ()

    @property
    def _records(self) -> list[Measured]:
        return [*self.points, *self.profiles]

    @property
    def setups(self) -> list[Setup]:
        """Sorted; real boards before simulated ones."""
        found = {Setup.of(record) for record in self._records}
        return sorted(found, key=lambda s: (s.simulated, s))

    @property
    def methods(self) -> list[str]:
        """The baseline first."""
        found = {record.bundle.method for record in self._records}
        return sorted(found, key=lambda name: (name != BASELINE, name))

    @property
    def lines(self) -> list[tuple[Setup, str]]:
        """Every setup with each of its methods, in order."""
        found = {(Setup.of(r), r.bundle.method) for r in self._records}
        return [(s, m) for s in self.setups for m in self.methods if (s, m) in found]

    @property
    def modules(self) -> list[str]:
        """Of all profiles, the most costly first, and last what belongs to none."""
        totals: dict[str, float] = {}
        for profile in self.profiles:
            for module in (m for phase in profile.phases for m in phase.modules):
                totals[module.module] = totals.get(module.module, 0.0) + module.seconds
        return sorted(totals, key=lambda name: (name == OTHER, -totals[name]))

    @property
    def kinds(self) -> list[str]:
        """Of the blocks in all profiles, where there are several; the most costly first."""
        totals: dict[str, float] = {}
        for profile in self.profiles:
            for kind in (k for phase in profile.phases for k in phase.kinds):
                totals[kind.kind] = totals.get(kind.kind, 0.0) + kind.seconds
        known = sorted(totals.keys() - {OTHER}, key=lambda name: -totals[name])
        return known if len(known) > 1 else []

    def of(self, setup: Setup) -> dict[str, list[Point]]:
        """Method -> its points by length."""
        rows: dict[str, list[Point]] = {method: [] for method in self.methods}
        for point in sorted(self.points, key=lambda p: p.length):
            if Setup.of(point) == setup:
                rows[point.bundle.method].append(point)
        return {method: points for method, points in rows.items() if points}

    def baseline(self, setup: Setup) -> list[Point]:
        """The FP16 points that the others of a setup are compared with."""
        return self.of(setup).get(BASELINE, [])

    def longest_common_length(self, setup: Setup) -> int | None:
        """The longest prompt that all methods of a setup have."""
        lengths = [{point.length for point in points} for points in self.of(setup).values()]
        return max(set.intersection(*lengths), default=None) if lengths else None

    def profiles_of(self, setup: Setup) -> list[Profile]:
        """By length, then method."""
        order = self.methods.index
        found = [p for p in self.profiles if Setup.of(p) == setup]
        return sorted(found, key=lambda p: (p.length, order(p.bundle.method)))

    def evaluation(self, model: str, method: str) -> Evaluation | None:
        """The last one given for a method of a model."""
        models = {record.bundle.model for record in self._records}
        for found in reversed(self.evaluations):
            right = found.model == model or (found.model is None and len(models) == 1)
            if right and found.method == method:
                return found
        return None


Record = Point | Profile | Planned | Evaluation


def load(paths: Iterable[Path]) -> Measurements:
    """Read files and folders.

    Raises:
        UsageError: one is missing, or holds neither points, a profile, a plan nor an evaluation; or
            none of them holds a point or a profile.
    """
    points: list[Point] = []
    profiles: list[Profile] = []
    evaluations: list[Evaluation] = []
    plans: list[Planned] = []
    for path in paths:
        for file, model in _files(path):
            found = _read(file, model, named=file == path)
            if found is None and path.is_file():
                raise UsageError(
                    f"{path} holds neither points, a profile, a plan nor an evaluation;",
                    "name what sweep, profile, plan --json or evaluate --json wrote.",
                )
            for record in found or []:
                if isinstance(record, Point):
                    points.append(record)
                elif isinstance(record, Profile):
                    profiles.append(record)
                elif isinstance(record, Planned):
                    plans.append(record)
                else:
                    evaluations.append(record)
    if not points and not profiles:
        raise UsageError(
            "there is no measured point in what was named;", "run `ssdi8-edge sweep` first."
        )
    kept = _latest(points, PointId.of)
    kept_profiles = _latest(profiles, lambda p: (p.bundle.digest, p.board, p.mode, p.length))
    records: list[Measured] = [*kept, *kept_profiles]
    names = _distinct_names(records)
    return Measurements(
        [_renamed(point, names) for point in kept],
        [_renamed(profile, names) for profile in kept_profiles],
        evaluations,
        len(points) - len(kept),
        plans,
    )


T = TypeVar("T", Point, Profile)
R = TypeVar("R", bound=BaseModel)


def _latest(records: Sequence[T], key: Any) -> list[T]:
    return list({key(record): record for record in sorted(records, key=lambda r: r.date)}.values())


def _distinct_names(records: Sequence[Measured]) -> dict[str, tuple[str, str]]:
    """Digest -> (model, method) to show: what is not the latest of its name shows its digest too.

    Two checkpoints of one name, or two builds by one method, must not become one line.
    """
    names: dict[str, tuple[str, str]] = {}
    checkpoints: dict[str, str] = {}
    builds: dict[tuple[str, str, str], str] = {}
    for record in sorted(records, key=lambda r: r.date, reverse=True):
        bundle = record.bundle
        model, method = bundle.model, bundle.method
        if checkpoints.setdefault(model, bundle.checkpoint) != bundle.checkpoint:
            model = f"{model} ({bundle.checkpoint[:8]})"
        if builds.setdefault((model, method, bundle.target), bundle.digest) != bundle.digest:
            method = f"{method} ({bundle.digest[:8]})"
        names.setdefault(bundle.digest, (model, method))
    return names


def _renamed(record: T, names: Mapping[str, tuple[str, str]]) -> T:
    model, method = names[record.bundle.digest]
    bundle = record.bundle.model_copy(update={"model": model, "method": method})
    return record.model_copy(update={"bundle": bundle})


def _files(path: Path) -> list[tuple[Path, str | None]]:
    """The files of an argument, each with the model of the run folder that it lies in."""
    if path.is_file():
        return [(path, _model_of(path.parent))]
    if not path.is_dir():
        raise UsageError(f"{path} does not exist;", "name what sweep wrote, or its folder.")
    found = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl") and p.is_file())
    return [(file, _model_of(path)) for file in found]


def _model_of(folder: Path) -> str | None:
    for manifest in (folder / BUNDLE / MANIFEST, folder / MANIFEST):
        try:
            fields = json.loads(manifest.read_text(encoding="utf-8"))
            return plain(model_name(fields))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _read(file: Path, model: str | None, named: bool) -> list[Record] | None:
    """What a file holds, whatever its name; None if it is something else."""
    if _begins_with_point(file):
        return list(read_points(file))
    found = _read_whole(file, model)
    if found is None and named and file.suffix == ".jsonl":
        return list(read_points(file))  # which says what is wrong
    return found


def _read_whole(file: Path, model: str | None) -> list[Record] | None:
    """A profile or an evaluation."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and content.get("kind") == "profile":
        return [_valid(Profile, content, file, "profile", "profile")]
    rows = content if isinstance(content, list) else [content]
    if rows and all(isinstance(row, dict) and row.get("kind") == "plan" for row in rows):
        return [_valid(Planned, row, file, "plan", "plan --json") for row in rows]
    if rows and all(isinstance(row, dict) and row.keys() & set(FIGURES) for row in rows):
        return list(_evaluations(rows, model))
    return None


def _begins_with_point(file: Path) -> bool:
    with file.open("rb") as content:
        try:
            first = json.loads(content.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and first.get("kind") == "point"


def _valid(kind: type[R], content: Mapping[str, Any], file: Path, what: str, command: str) -> R:
    """A record of a file, which `command` writes; raises UsageError where it is none."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{file} is not a {what} ({key}: {first['msg']});",
            f"write it with `ssdi8-edge {command}`.",
        ) from error


def _evaluations(rows: Sequence[Mapping[str, Any]], model: str | None) -> Iterable[Evaluation]:
    """Of `evaluate --json`: one record a figure; the records of a model become one evaluation."""
    first: dict[str, float] = {}
    for method in dict.fromkeys(str(row.get("model")) for row in rows):
        perplexities, changes, accuracies = {}, {}, {}
        for row in rows:
            if str(row.get("model")) != method:
                continue
            perplexity, accuracy = (_number(number_of(row, figure)) for figure in FIGURES)
            if perplexity is not None:
                text = _text_name(row)
                perplexities[text] = perplexity
                relative = change(perplexity, first.get(text, 0.0))
                if relative is not None:
                    changes[text] = relative
                first.setdefault(text, perplexity)
            elif accuracy is not None:
                tasks = row.get("task", "average")
                accuracies[plain(str(tasks))] = accuracy
        yield Evaluation(model, plain(method), perplexities, changes, accuracies)


def _text_name(row: Mapping[str, Any]) -> str:
    """Of a text and its windows, and of their part that counts where that is not all of them; or of
    the tokens that were decoded."""
    keys = ("text", "windows", "scored_tokens", "window_tokens")
    name, windows, scored, window = (row.get(key) for key in keys)
    if isinstance(tokens := row.get("tokens"), int):
        name = f"{name}, {tokens} tokens one by one"
    if isinstance(windows, int) and isinstance(window, int):
        name = f"{name}, {windows} × {window} tokens"
        if isinstance(scored, int) and scored < window - 1:
            name = f"{name}, last {scored} of each"
    return plain(str(name))


def _number(value: object) -> float | None:
    """A figure, infinite and NaN included, which a model's may be."""
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
