"""Evaluations as a table on a terminal, and as files: JSON and Markdown."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from ssdi8_edge.evaluate.decode import Decoding
from ssdi8_edge.evaluate.evaluation import Evaluation
from ssdi8_edge.evaluate.windows import Perplexity
from ssdi8_edge.ground.artifacts import whole_or_absent
from ssdi8_edge.ground.console import Console, table
from ssdi8_edge.ground.decimals import change, fixed, percent
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded
from ssdi8_edge.ground.json_text import to_json

ANY_WIDTH = 10_000


class Column(NamedTuple):
    """A heading, in lines, and a cell for each model."""

    heading: str
    cells: list[str]


def columns(rows: Sequence[Evaluation]) -> list[Column]:
    """The table, left to right; its first column names the models."""
    found = [Column("model", _names(rows)), Column("engine", [row.engine for row in rows])]
    for of_text in zip(*(row.perplexities for row in rows), strict=True):
        found += _text_columns(of_text, alone=len(rows[0].perplexities) == 1)
    for of_task in zip(*(row.accuracies for row in rows), strict=True):
        heading = f"{of_task[0].task}\n{of_task[0].metric}"
        cells = [_percent(each.accuracy, each.stderr) for each in of_task]
        found.append(Column(heading, cells))
    averages = [row.average for row in rows]
    if all(averages):
        cells = [_percent(each.accuracy, each.stderr) for each in averages if each]
        found.append(Column("average", cells))
    for of_length in zip(*(row.long_context for row in rows), strict=True):
        first = of_length[0]
        heading = f"{first.text}\nlast {first.scored_tokens} of {first.window_tokens}"
        found.append(Column(heading, [_with_change(each, first) for each in of_length]))
    for of_text in zip(*(row.decodings for row in rows), strict=True):
        found += _decoding_columns(of_text)
    return found


def _names(rows: Sequence[Evaluation]) -> list[str]:
    """Of the methods, with the source where two rows would look alike."""
    known = Counter((row.model, row.engine) for row in rows)
    return [
        row.model if known[row.model, row.engine] == 1 else f"{row.model} {row.source}"
        for row in rows
    ]


def _text_columns(of_text: Sequence[Perplexity], alone: bool) -> list[Column]:
    first = of_text[0]
    prefix = "" if alone else f"{first.text}\n"
    found = [Column(f"{first.text}\nperplexity", [_with_change(each, first) for each in of_text])]
    if any(each.kl is not None for each in of_text):
        distance = [_distance(each.kl) for each in of_text]
        agreement = [
            "" if each.top1_agreement is None else percent(each.top1_agreement, 2)
            for each in of_text
        ]
        found.append(Column(f"{prefix}KL", distance))
        found.append(Column(f"{prefix}top-1", agreement))
    if any(each.saturation for each in of_text):
        worst = [_worst(each.saturation) for each in of_text]
        found.append(Column(f"{prefix}saturation", worst))
    return found


def _decoding_columns(of_text: Sequence[Decoding]) -> list[Column]:
    first = of_text[0]
    prefix = f"{first.text}\n{first.tokens} tokens decoded\n"
    return [
        Column(f"{prefix}perplexity", [_with_change(each, first) for each in of_text]),
        Column(f"{prefix}KL", [_distance(each.kl) for each in of_text]),
        Column(f"{prefix}KL of prefill", [_distance(each.prefill_kl) for each in of_text]),
    ]


def _distance(kl: float | None) -> str:
    return "" if kl is None else f"{kl:.3g}"


def _with_change(result: Perplexity | Decoding, first: Perplexity | Decoding) -> str:
    if result is first:
        return fixed(result.perplexity, 4)
    relative = change(result.perplexity, first.perplexity)
    if relative is None:
        return fixed(result.perplexity, 4)
    stderr = result.change_stderr if isinstance(result, Perplexity) else None
    error = "" if stderr is None else f" ± {percent(stderr, 2)}"
    return f"{fixed(result.perplexity, 4)} ({percent(relative, 2, sign=True)}{error})"


def _worst(saturation: dict[str, float]) -> str:
    if not saturation:
        return ""
    site, fraction = max(saturation.items(), key=lambda item: item[1])
    return f"{percent(fraction, 3)} {site}"


def _percent(accuracy: float, stderr: float) -> str:
    return f"{fixed(accuracy * 100, 1)} ± {fixed(stderr * 100, 1)}"


def notes(rows: Sequence[Evaluation]) -> list[str]:
    """What the figures are, and on how much they were measured."""
    first = rows[0]
    found = [
        f"{each.text}: {each.windows} × {each.window_tokens} tokens" for each in first.perplexities
    ]
    reasons: list[str | None] = []
    for row in rows:
        reasons += [each.reason for each in (*row.perplexities, *row.long_context)]
        reasons += [each.reason for each in row.decodings]
    found += dict.fromkeys(reason for reason in reasons if reason)
    if len(rows) > 1:
        found.append(
            f"change of perplexity (± standard error over windows), KL (nats per token) and top-1 "
            f"agreement: to {first.model}"
        )
    if any(each.saturation for row in rows for each in row.perplexities):
        found.append("saturation: INT8 values at the end of their range, worst site of any layer")
    if first.accuracies:
        items = ", ".join(f"{each.task} {each.items}" for each in first.accuracies)
        found.append(f"accuracy in %, ± standard error; items: {items}")
    if first.long_context:
        longest = first.long_context[-1]
        found.append(
            f"long context: the last {longest.scored_tokens} tokens of {longest.windows} windows "
            "that end at the same places, after more or less of what precedes them"
        )
    if first.decodings:
        found.append(
            f"decoded: the text is given token by token, as when generating; KL to the prefill of "
            f"{first.model}, and the same of the model's own prefill"
        )
    found += [_along(each) for row in rows for each in row.decodings if len(each.kl_parts) > 1]
    return found


def _along(decoding: Decoding) -> str:
    """Whether the error of decoding grows along the text."""
    begin, end = decoding.kl_parts[0], decoding.kl_parts[-1]
    parts = len(decoding.kl_parts)
    return (
        f"{decoding.text}, decoded by {decoding.model} ({decoding.engine}): KL {_distance(begin)} "
        f"in the first of {parts} parts of the text, {_distance(end)} in the last"
    )


def require_writable(paths: Sequence[Path]) -> None:
    """Refuse, before anything is measured, files that `save_results` could not write.

    Raises:
        UsageError: an unknown kind of file, or no place for it.
    """
    for path in paths:
        path = expanded(path)
        if path.suffix not in FORMATS:
            raise UsageError(
                f"cannot save results as {path};", f"give a name in {' or '.join(FORMATS)}."
            )
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"cannot write {path};", "name a file in a folder that exists.")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror};",
                "name a file in another folder by --save.",
            ) from error


def save_results(rows: Sequence[Evaluation], paths: Sequence[Path]) -> None:
    """Write each file in the form that its suffix names."""
    for path in map(expanded, paths):
        with whole_or_absent(path) as scratch:
            scratch.write_text(FORMATS[path.suffix](rows), encoding="utf-8")


def records(rows: Sequence[Evaluation]) -> str:
    """Every figure with its name, as JSON."""
    return to_json([record for row in rows for record in row.records()]) + "\n"


def markdown(rows: Sequence[Evaluation]) -> str:
    """One table with every column, and the notes as a list."""
    found = columns(rows)
    lines = [
        [column.heading.replace("\n", " ") for column in found],
        ["---"] * len(found),
        *([column.cells[i] for column in found] for i in range(len(rows))),
    ]
    lined = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
    return f"{lined}\n\n" + "".join(f"- {_escape(note)}\n" for note in notes(rows))


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


FORMATS = {".json": records, ".md": markdown}


def show(rows: Sequence[Evaluation], console: Console) -> None:
    """Print the table, folded into several where the terminal is too narrow, and the notes."""
    names, *others = columns(rows)
    part = [names]
    for column in others:
        wider = [*part, column]
        if len(part) > 1 and _width(wider, console) > console.width:
            console.print(_rich(part))
            wider = [names, column]
        part = wider
    console.print(_rich(part))
    for note in notes(rows):
        console.print(note, soft_wrap=False)


def _width(part: Sequence[Column], console: Console) -> int:
    """Characters that the table takes where nothing is wrapped."""
    return console.measure(_rich(part), options=console.options.update(max_width=ANY_WIDTH)).maximum


def _rich(part: Sequence[Column]) -> Table:
    found = table(*(column.heading for column in part))
    for cells in zip(*(column.cells for column in part), strict=True):
        found.add_row(*cells)
    return found
