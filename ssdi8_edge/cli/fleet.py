"""What the commands for many boards share: options, a line per board, how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer
from rich.live import Live
from rich.table import Table

from ssdi8_edge.boards.fleet.boards_file import FleetBoard, read_fleet
from ssdi8_edge.boards.fleet.side_by_side import Outcome, side_by_side
from ssdi8_edge.ground.console import human, table
from ssdi8_edge.ground.errors import BoardError, Ssdi8Error, UsageError
from ssdi8_edge.ground.failures import as_ours

FleetOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="TOML file of boards (host, target, tags), instead of --host."),
]
TagOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Of the fleet, boards with this tag; may be given several times."),
]
AtOnceOption = Annotated[int, typer.Option(min=1, help="Boards of a fleet at the same time.")]
AT_ONCE = 8

T = TypeVar("T")


def fleet_of(
    fleet: Path | None, tag: Sequence[str] | None, host: object
) -> list[FleetBoard] | None:
    """The boards that were asked for by --fleet; None without it.

    Raises:
        UsageError: --host is given as well, or --tag without a fleet; what `read_fleet` raises.
    """
    if fleet is None:
        if tag:
            raise UsageError("--tag chooses boards of a fleet;", "add --fleet FILE.")
        return None
    if host:
        raise UsageError("--host and --fleet both name boards;", "leave out one of them.")
    return read_fleet(fleet, tag or ())


class Lines:
    """A line per board, which changes, on a terminal; elsewhere a line for each sentence."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._now = dict.fromkeys(hosts, "waits")
        self._lock = threading.Lock()
        self._live = Live(get_renderable=self._table, console=human, refresh_per_second=4)
        self._screen: AbstractContextManager[Any] = (
            self._live if human.is_terminal else nullcontext()
        )

    def __enter__(self) -> Lines:
        self._screen.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._screen.__exit__(*exception)

    def say(self, host: str, sentence: str) -> None:
        """What there is to know of a board."""
        with self._lock:
            self._now[host] = sentence
            if not human.is_terminal:
                human.print(f"{host}: {sentence}")

    def running(self, host: str, what: str) -> None:
        """How far it is; shown on a terminal alone."""
        with self._lock:
            self._now[host] = what

    def _table(self) -> Table:
        with self._lock:
            shown = table("board", "now")
            for host, now in self._now.items():
                shown.add_row(host, now)
            return shown


def on_each(
    boards: Sequence[FleetBoard], work: Callable[[FleetBoard, Lines], T], at_once: int, doing: str
) -> Outcome[T]:
    """`work` on each board; errors come as ours, of what `doing` says."""
    by_host = {board.host: board for board in boards}

    def one(host: str) -> T:
        try:
            return work(by_host[host], lines)
        except Exception as error:
            failure = as_ours(error, doing)
            lines.say(host, f"failed: {failure}")
            raise failure from error

    with Lines([*by_host]) as lines:
        return side_by_side([*by_host], one, at_once)


def require_all(errors: Mapping[str, Exception], boards: int) -> None:
    """After results are printed: which boards failed.

    Raises:
        BoardError, UsageError, Ssdi8Error: of the kind of the first error, if there is one.
    """
    if not errors:
        return
    first = next(iter(errors.values()))
    kind = next(k for k in (BoardError, UsageError, Ssdi8Error) if isinstance(first, k))
    raise kind(
        f"{len(errors)} of {boards} boards failed ({', '.join(errors)});",
        "what each said stands above, and the others are done.",
    )
