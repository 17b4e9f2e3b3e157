"""What a command shows: a result on stdout, how far it is on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from runtime.console import visible
from ssdi8_edge.ground.console import human
from ssdi8_edge.ground.json_text import to_json

# A loop that has not run this long shows no bar.
QUIET_SECONDS = 2.0


def print_result(value: Any, as_json: bool, show: Callable[[], object]) -> None:
    """The result as JSON, or as people read it."""
    if as_json:
        print(to_json(value))
    else:
        show()


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Show a bar with the time left once a loop turns out to take longer than two seconds."""
    if not human.is_terminal:
        yield from items
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=human, transient=True)
    task = bar.add_task(visible(label), total=len(items))
    begin = time.monotonic()
    started = False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not started and time.monotonic() - begin > QUIET_SECONDS:
                bar.start()
                started = True
    finally:
        if started:
            bar.stop()
