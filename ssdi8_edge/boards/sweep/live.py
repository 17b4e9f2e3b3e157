"""A sweep while it runs: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from ssdi8_edge.boards.points.records import Point, plain
from ssdi8_edge.ground.console import Console


@dataclass
class _Row:
    now: str = ""
    done: int = 0
    total: int | None = None
    last: Point | None = None


class Display:
    """Watches a sweep. Use it as a context manager around the sweep."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.RLock()
        self._rows: dict[str, _Row] = {}
        self._begin = time.monotonic()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4)
        self._screen: AbstractContextManager[Any] = (
            self._live if console.is_terminal else nullcontext()
        )

    def __enter__(self) -> Display:
        self._screen.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._screen.__exit__(*exception)

    # ----------------------------------------------------------------------------------------------
    # what happens

    def planned(self, board: str, total: int, done: int) -> None:
        with self._lock:
            row = self._row(board)
            row.total, row.done = total, done
        kept = f", {done} of them measured before" if done else ""
        self.say(board, f"{total} points{kept}")

    def say(self, board: str, sentence: str) -> None:
        with self._lock:
            self._console.print(f"{plain(board)}: {sentence}")

    def running(self, board: str, what: str) -> None:
        with self._lock:
            self._row(board).now = what

    def measured(self, board: str, point: Point) -> None:
        with self._lock:
            row = self._row(board)
            row.done, row.last = row.done + 1, point
            progress = f"{row.done}/{row.total}"
        if not self._console.is_terminal:
            self.say(board, f"{progress} {_label(point)}: {', '.join(_cells(point))}")

    def ended(self, board: str, how: str) -> None:
        with self._lock:
            self._row(board).now = how

    # ----------------------------------------------------------------------------------------------

    def _row(self, board: str) -> _Row:
        return self._rows.setdefault(board, _Row())

    def _table(self) -> Table:
        with self._lock:
            seconds = int(time.monotonic() - self._begin)
            table = Table(title=f"sweep, {seconds // 60}:{seconds % 60:02d}", title_justify="left")
            for title in ("board", "points", "now", "last", "TTFT", "decode", "energy"):
                table.add_column(title)
            for board, row in self._rows.items():
                points = f"{row.done}/{'?' if row.total is None else row.total}"
                last = [_label(row.last), *_cells(row.last)] if row.last else []
                cells = [plain(board), points, row.now, *last]
                table.add_row(*(Text(cell, overflow="ellipsis") for cell in cells))
            return table


def _label(point: Point) -> str:
    simulated = " (simulated)" if point.simulated else ""
    mode = f", {point.mode}" if point.mode else ""
    return f"{point.bundle.method}{mode}, {point.length} tokens{simulated}"


def _cells(point: Point) -> list[str]:
    timing, power = point.timing, point.power
    cells = [f"{timing.ttft_s * 1e3:.1f} ms"]
    cells.append(f"{timing.tokens_per_s:.1f} tokens/s" if timing.tokens_per_s else "–")
    if power and power.j_per_token is not None:
        cells.append(f"{power.j_per_token:.3f} J/token")
    return cells
