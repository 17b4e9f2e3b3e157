"""The paper's six zero-shot tasks: lm-eval's own definitions, and the local files they may read."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ssdi8_edge.evaluate.local_data import AGAIN, Row, find_file, read_rows
from ssdi8_edge.ground.errors import UsageError

# The first whose TaskManager loads tasks by name.
LM_EVAL = (0, 4, 12)
PIQA_LABELS = "piqa_valid-labels.lst"


@dataclass(frozen=True)
class Accuracy:
    """Fraction of the items of a task that a model answers rightly, and its standard error."""

    model: str
    engine: str
    task: str
    metric: str
    items: int
    accuracy: float
    stderr: float


def _as_published(rows: list[Row], folder: Path) -> list[Row]:
    return rows


def _with_answers(rows: list[Row], folder: Path) -> list[Row]:
    """piqa's answers lie in a file of their own, one a line."""
    path = find_file(folder, PIQA_LABELS)
    labels = path.read_text(encoding="utf-8", errors="replace").split()
    if len(labels) != len(rows) or not set(labels) <= {"0", "1"}:
        raise UsageError(f"{path} does not hold {len(rows)} answers, each 0 or 1;", AGAIN)
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _with_lettered_choices(rows: list[Row], folder: Path) -> list[Row]:
    """arc's choices as columns of texts and letters, the answer as a letter."""
    letters = string.ascii_uppercase
    return [
        {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list(letters[: len(row["choices"])])},
            "answerKey": letters[row["gold"]],
        }
        for row in rows
    ]


@dataclass(frozen=True)
class Task:
    """A task and where its data lies.

    Attributes:
        name: on our command line.
        harness: lm-eval's name of it.
        definition: its file below lm_eval/tasks.
        metric: the paper's, docs/method.md §11.2.
        split: of the data set that is evaluated.
        file: the local rows, JSON lines.
        form: of a local row, in words.
        valid: whether a local row has it.
        publish: local rows -> rows as the published data set has them.
    """

    name: str
    harness: str
    definition: str
    metric: Literal["acc", "acc_norm"]
    split: Literal["test", "validation"]
    file: str
    form: str
    valid: Callable[[Row], bool]
    publish: Callable[[list[Row], Path], list[Row]] = _as_published

    def local_rows(self, data: Path) -> list[Row]:
        """The data set from the folder `data`, or below it.

        Raises:
            UsageError: a file is missing, or a line of it has another form.
        """
        return self.publish(read_rows(find_file(data, self.file), self.valid, self.form), data)


def _arc(name: str, metric: Literal["acc", "acc_norm"]) -> Task:
    return Task(
        name=name,
        harness=name,
        definition=f"arc/{name}.yaml",
        metric=metric,
        split="test",
        file=f"{name}_test.jsonl",
        form="question, choices (a list), gold (its index)",
        valid=lambda row: bool(row["question"]) and 0 <= row["gold"] < len(row["choices"]) <= 26,
        publish=_with_lettered_choices,
    )


# In the order of the paper's table.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="lambada",
            harness="lambada_openai",
            definition="lambada/lambada_openai.yaml",
            metric="acc",
            split="test",
            file="lambada_test.jsonl",
            form="text (of two words or more)",
            valid=lambda row: " " in row["text"].strip(),
        ),
        Task(
            name="hellaswag",
            harness="hellaswag",
            definition="hellaswag/hellaswag.yaml",
            metric="acc_norm",
            split="validation",
            file="hellaswag_val.jsonl",
            form="activity_label, ctx_a, ctx_b, endings (a list), label (its index)",
            valid=lambda row: (
                bool(row["activity_label"] + row["ctx_a"] + row["ctx_b"])
                and 0 <= int(row["label"]) < len(row["endings"])
            ),
        ),
        Task(
            name="piqa",
            harness="piqa",
            definition="piqa/piqa.yaml",
            metric="acc",
            split="validation",
            file="piqa_valid.jsonl",
            form="goal, sol1, sol2",
            valid=lambda row: bool(row["goal"] and row["sol1"] and row["sol2"]),
            publish=_with_answers,
        ),
        _arc("arc_easy", "acc"),
        _arc("arc_challenge", "acc_norm"),
        Task(
            name="winogrande",
            harness="winogrande",
            definition="winogrande/default.yaml",
            metric="acc",
            split="validation",
            file="winogrande_dev.jsonl",
            form="sentence (with a _), option1, option2, answer (1 or 2)",
            valid=lambda row: (
                "_" in row["sentence"]
                and bool(row["option1"] and row["option2"])
                and row["answer"] in ("1", "2")
            ),
        ),
    )
}


def require_lm_eval() -> None:
    """Refuse zero-shot tasks where lm-eval is not installed.

    Raises:
        UsageError: it is not, or is too old.
    """
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        found = ""
    if not found or tuple(map(int, found.split(".")[:3])) < LM_EVAL:
        raise UsageError(
            f"the zero-shot tasks need lm-eval {'.'.join(map(str, LM_EVAL))} or newer, "
            f"{f'not {found}' if found else 'which is not installed'};",
            "pip install 'ssdi8-edge[eval]'.",
        )
