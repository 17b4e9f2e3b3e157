"""Plans as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ssdi8_edge.plan.cells import (
    MEASURED,
    MEMORY,
    SPEED,
    measured_cells,
    memory_cells,
    notes,
    speed_cells,
)
from ssdi8_edge.plan.plan import Plan


def to_markdown(plans: Sequence[Plan]) -> str:
    """Both tables and what is to be said of them."""
    first = plans[0].bounds
    lines = [f"## Plan of {plans[0].model}", "", *_table(MEMORY, memory_cells(plans)), ""]
    lines += [f"A prompt of {first.prompt_tokens} tokens, {first.parallel} at once:", ""]
    lines += [*_table(SPEED, speed_cells(plans)), ""]
    if measured := measured_cells(plans):
        lines += ["What was measured, and the bound as a share of it:", ""]
        lines += [*_table(MEASURED, measured), ""]
    lines += [f"* {note}" for note in notes(plans)]
    return "\n".join(lines) + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruled = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in ruled]
