"""All that is measured of several models: what to measure, checked first, and the results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssdi8_edge.evaluate.decode import Decoding, decodings, require_length
from ssdi8_edge.evaluate.local_data import Row
from ssdi8_edge.evaluate.subject import Subject
from ssdi8_edge.evaluate.tasks import TASKS, Accuracy, Task, require_lm_eval
from ssdi8_edge.evaluate.texts import WIKITEXT2, Text, text_file, wikitext2
from ssdi8_edge.evaluate.windows import Perplexity, long_context, perplexities, require_contexts
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.progress import Track, silent


@dataclass(frozen=True)
class Measures:
    """What is measured.

    Attributes:
        texts: for perplexity.
        tasks: for zero-shot accuracy.
        rows: task -> its local data set; empty where the hub's are taken.
        limit: the first so many windows of a text and items of a task; None takes all.
        long_context: whether also the last tokens of windows of several lengths count.
        decode: so many tokens from the start of each text are also decoded one by one.
    """

    texts: tuple[Text, ...]
    tasks: tuple[Task, ...]
    rows: dict[str, list[Row]]
    limit: int | None = None
    long_context: bool = False
    decode: int | None = None


@dataclass(frozen=True)
class Average:
    """Mean accuracy over tasks; the standard error takes them as independent."""

    model: str
    engine: str
    tasks: tuple[str, ...]
    accuracy: float
    stderr: float


@dataclass
class Evaluation:
    """One model: a row of the table."""

    source: str
    model: str
    engine: str
    perplexities: list[Perplexity] = field(default_factory=list)
    long_context: list[Perplexity] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)

    @property
    def average(self) -> Average | None:
        """Over the tasks that were run; None for fewer than two."""
        found = self.accuracies
        if len(found) < 2:
            return None
        return Average(
            model=self.model,
            engine=self.engine,
            tasks=tuple(each.task for each in found),
            accuracy=sum(each.accuracy for each in found) / len(found),
            stderr=sum(each.stderr**2 for each in found) ** 0.5 / len(found),
        )

    def records(self) -> list[dict[str, Any]]:
        """Every figure with its name; a number may be infinite or NaN, see `json_text`."""
        average = self.average
        measured: list[tuple[str, Perplexity | Accuracy | Average | Decoding]] = [
            *(("perplexity", each) for each in self.perplexities),
            *(("accuracy", each) for each in self.accuracies),
            *((("average", average),) if average else ()),
            *(("long_context", each) for each in self.long_context),
            *(("decode", each) for each in self.decodings),
        ]
        return [
            {"measure": measure, "source": self.source, **asdict(each)}
            for measure, each in measured
        ]


def plan(
    names: Sequence[str],
    texts: Sequence[Path] = (),
    data: Path | None = None,
    limit: int | None = None,
    long_context: bool = False,
    decode: int | None = None,
) -> Measures:
    """What to measure, with everything in place that it needs.

    Args:
        names: of tasks, wikitext2 among them.
        texts: UTF-8 files for perplexity.
        data: the folder of the data sets; None takes the hub's.

    Raises:
        UsageError: an unknown task, a missing or unfit file, or nothing to measure.
    """
    known = [WIKITEXT2, *TASKS]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown task {name!r};", f"known: {', '.join(known)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} evaluates nothing;", "give at least 1.")
    if decode is not None and decode < 2:
        raise UsageError(f"--decode {decode} predicts no token;", "give at least 2.")
    if not names and not texts:
        raise UsageError("there is nothing to evaluate on;", "name --tasks or a --text.")
    # In the order of the paper's table, each once.
    tasks = tuple(task for task in TASKS.values() if task.name in names)
    if tasks:
        require_lm_eval()
    rows = {task.name: task.local_rows(data) for task in tasks} if data is not None else {}
    found = [wikitext2(data)] if WIKITEXT2 in names else []
    found += [text_file(path) for path in texts]
    asked = {"--long-context": long_context, "--decode": decode is not None}
    for option, given in asked.items():
        if given and not found:
            raise UsageError(
                f"{option} needs a text;", f"add {WIKITEXT2} to --tasks or name a --text."
            )
    return Measures(tuple(found), tasks, rows, limit, long_context, decode)


def evaluate(
    subjects: Sequence[Subject], measures: Measures, track: Track = silent
) -> list[Evaluation]:
    """Measure every model, the first being the one that the others are compared with."""
    for text in measures.texts if measures.long_context else ():
        require_contexts(subjects, text)
    if measures.decode is not None:
        for text in measures.texts:
            require_length(subjects, text, measures.decode)
    rows = [Evaluation(each.source, each.name, each.engine) for each in subjects]
    for text in measures.texts:
        found = perplexities(subjects, text, measures.limit, track)
        for row, result in zip(rows, found, strict=True):
            row.perplexities.append(result)
    for text in measures.texts if measures.long_context else ():
        for row, results in zip(
            rows, long_context(subjects, text, measures.limit, track), strict=True
        ):
            row.long_context += results
    if measures.decode is not None:
        for text in measures.texts:
            decoded = decodings(subjects, text, measures.decode, track)
            for row, decoding in zip(rows, decoded, strict=True):
                row.decodings.append(decoding)
    if measures.tasks:
        _zero_shot(subjects, rows, measures, track)
    return rows


def _zero_shot(
    subjects: Sequence[Subject], rows: Sequence[Evaluation], measures: Measures, track: Track
) -> None:
    if measures.rows:
        # Read by the package `datasets` when it is first imported.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    # Here, since it imports lm-eval.
    from ssdi8_edge.evaluate.harness import accuracies, open_tasks

    with open_tasks(measures.tasks, measures.rows) as tasks:
        for subject, row in zip(subjects, rows, strict=True):
            row.accuracies += accuracies(subject, tasks, measures.limit, track)
