"""The same work on many boards, some at a time; one that fails does not stop the others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
_TICK_S = 0.2


@dataclass
class Outcome(Generic[T]):
    """What came of each board, by its name: a result or an error."""

    results: dict[str, T] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


def side_by_side(names: Sequence[str], work: Callable[[str], T], at_once: int) -> Outcome[T]:
    """Call `work` with each name, in at most `at_once` threads; in the order of `names`.

    Ctrl-C leaves at once what is under way: a board goes on alone, or ends with its link.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    done: dict[str, T | Exception] = {}
    ended = threading.Event()

    def go_on() -> None:
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done[name] = work(name)
            except Exception as error:
                done[name] = error
            if len(done) == len(names):
                ended.set()

    for _ in range(min(at_once, len(names))):
        threading.Thread(target=go_on, daemon=True).start()
    while not ended.wait(_TICK_S):
        pass  # a wait without end would not hear Ctrl-C
    outcome: Outcome[T] = Outcome()
    for name in names:
        found = done[name]
        if isinstance(found, Exception):
            outcome.errors[name] = found
        else:
            outcome.results[name] = found
    return outcome
