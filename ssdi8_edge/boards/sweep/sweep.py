"""Measures every (bundle, board, mode, length) once: boards side by side, points one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.points.points import PointFile
from ssdi8_edge.boards.sweep.board_sweep import BoardSweep, SweepRequest, Watcher
from ssdi8_edge.boards.sweep.measuring import Deploy
from ssdi8_edge.ground.errors import Interrupted

# How long Ctrl-C waits for boards to be put back.
STOP_S = 90.0
_TICK_S = 0.2


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        failed: (board, point, why) of what was tried and is not measured.
        errors: board -> why it was given up.
    """

    measured: int = 0
    kept: int = 0
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)


def sweep(
    asked: Sequence[tuple[Connection, SweepRequest]],
    file: PointFile,
    deploy: Deploy,
    watcher: Watcher,
    at_once: int | None = None,
) -> Outcome:
    """Measure what the file does not have yet.

    Args:
        asked: what to measure on each board; their names are distinct.
        deploy: brings a bundle to a board.
        at_once: the most boards that measure at the same time; None: all.

    Raises:
        Interrupted: Ctrl-C; every board that answers was put back first.
    """
    stop = threading.Event()
    boards = [BoardSweep(*each, file, deploy, watcher, stop) for each in asked]
    places = threading.Semaphore(at_once or len(boards))

    def run(board: BoardSweep) -> None:
        with places:
            if not stop.is_set():
                board.run()

    for board in boards:
        threading.Thread(target=run, args=(board,), daemon=True).start()
    try:
        _wait(boards)
    except (Interrupted, KeyboardInterrupt):
        stop.set()
        # Where nothing is being measured there is nothing to put back.
        try:
            _wait([board for board in boards if board.measuring], STOP_S)
        finally:  # also when Ctrl-C comes again
            for board in boards:
                if board.measuring and not board.ended.is_set():
                    board.say_unknown()
        raise
    outcome = Outcome()
    for board in boards:
        outcome.measured += board.measured
        outcome.kept += board.kept
        outcome.failed += [(board.name, str(point), why) for point, why in board.failed.items()]
        if board.error is not None:
            outcome.errors[board.name] = board.error
    return outcome


def _wait(boards: Sequence[BoardSweep], timeout: float = float("inf")) -> None:
    """Until all have ended. Ctrl-C is heard meanwhile.

    Threads are not joined: a `join` that Ctrl-C interrupts takes the thread for ended (CPython
    3.11).
    """
    end = time.monotonic() + timeout
    for board in boards:
        while not board.ended.wait(_TICK_S) and time.monotonic() < end:
            pass
