"""The thread that owns the session: which sequence runs next.

A round gives the prompt of one sequence a piece, in turn, and then every sequence that generates
one token. So a long prompt delays the others by one piece at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from runtime.problems import BundleProblem
from runtime.serve.fields import RequestProblem
from runtime.serve.generation import Generation
from runtime.serve.named_states import NamedStates
from runtime.serve.steps import Seat, Steps
from runtime.session import Session, held_marks, prefill_pieces
from runtime.states.prefix_cache import PrefixCache

T = TypeVar("T")


class _Reading:
    """A generation whose prompt is being read, and the pieces that are left."""

    def __init__(self, generation: Generation, pieces: list[tuple[int, int]]) -> None:
        self.generation = generation
        self.pieces = deque(pieces)


class Scheduler:
    """Runs generations on one session, `parallel` of them together, the others in their order.

    Each has its own states, and is stepped as it would be alone: what it says does not depend on
    the others.
    """

    def __init__(
        self,
        session: Session,
        parallel: int,
        cache: PrefixCache,
        named: NamedStates,
        piece: int | None = None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """
        Args:
            cache: where prompts are looked up, and where what was read and said is kept.
            named: the states that a request may name.
            piece: the most tokens of a prompt that are read in one go; None: the bundle's own.
            note: is told what went wrong and concerns no request.
        """
        self._session, self._steps = session, Steps(session)
        self._parallel = parallel
        self.cache, self.named = cache, named
        most = session.bundle.max_tokens
        self._piece = most if piece is None else min(piece, most)
        self._note = note
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        # Of the thread alone.
        self._reading: deque[_Reading] = deque()
        self._writing: list[Generation] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Generations without a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Generations that have one."""
        return len(self._reading) + len(self._writing)

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End what still goes on and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, generation: Generation) -> None:
        """Let it run when a slot is free."""
        with self._changed:
            self._waiting.append(generation)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more: its slot is free after the step under way."""
        generation.cancelled = True
        with self._changed:
            self._changed.notify()

    def run_between_steps(self, errand: Callable[[], T]) -> Future[T]:
        """Call `errand` in the engine's thread, where no states change meanwhile."""
        future: Future[T] = Future()
        with self._changed:
            self._errands.append((errand, future))
            self._changed.notify()
        return future

    # ----------------------------------------------------------------------------------------------
    # in the thread

    def _work(self) -> None:
        while self._take_in():
            self._read_a_piece()
            self._write_a_token()
            if not self.active:
                self._save_cache()  # nobody waits for the disk
        self._save_cache()

    def _save_cache(self) -> None:
        try:
            self.cache.save()
        except BundleProblem as problem:
            self._note(str(problem))

    def _take_in(self) -> bool:
        """Wait for something to do, and give free slots away; False at the end."""
        with self._changed:
            while not (self._closing or self._errands or self._waiting or self.active):
                self._changed.wait()
            if self._closing:
                return False
            errands = list(self._errands)
            self._errands.clear()
            begun: list[Generation] = []
            self._waiting = deque(g for g in self._waiting if not g.cancelled)
            self._drop_cancelled()
            while self._waiting and self.active + len(begun) < self._parallel:
                begun.append(self._waiting.popleft())
        for errand, future in errands:
            _run(errand, future)
        for generation in begun:
            self._begin(generation)
        return True

    def _drop_cancelled(self) -> None:
        for generation in (*(r.generation for r in self._reading), *self._writing):
            if generation.cancelled:
                self._steps.leave(generation.seat)
        self._reading = deque(r for r in self._reading if not r.generation.cancelled)
        self._writing = [g for g in self._writing if not g.cancelled]

    def _begin(self, generation: Generation) -> None:
        if time.monotonic() > generation.deadline:
            generation.fail(_waited_too_long())
            return

        def step() -> None:
            seat, ids = self._seat(generation)
            self._session.bundle.require_room(
                len(ids) + generation.order.new_tokens,
                f"state, prompt and answer have {len(ids) + generation.order.new_tokens} tokens",
                "ask for fewer",
            )
            generation.begin(seat, ids)
            multiple, marks = self._session.bundle.model.prompt_multiple, generation.order.marks
            if self._holds(generation):
                marks |= held_marks(len(ids), multiple)
            pieces = prefill_pieces(len(ids), self._piece, multiple, generation.cached, marks)
            self._reading.append(_Reading(generation, pieces))

        self._guarded(generation, step)

    def _seat(self, generation: Generation) -> tuple[Seat, list[int]]:
        """Where it starts from, and all tokens that it is to have run before it writes."""
        order, prompt = generation.order, generation.prompt
        if order.state is not None:
            held = self.named.get(order.state)
            seat = Seat.on(held)
            if not order.whole_text:
                return seat, [*held.ids.tolist(), *held.pending, *prompt]
            if not held.is_prefix_of(prompt):
                raise RequestProblem(
                    f"the chat does not go on from the state {order.state}",
                    "send the messages that led to it, and then more",
                    param="state",
                )
            return seat, prompt
        found = self.cache.longest(prompt) if self._holds(generation) else None
        return (Seat() if found is None else Seat.on(found)), prompt

    def _read_a_piece(self) -> None:
        if not self._reading:
            return
        reading = self._reading.popleft()
        generation = reading.generation
        start, end = reading.pieces.popleft()
        scores = generation.scores_prompt

        def step() -> None:
            piece = generation.ids[start:end]
            logits = self._steps.read(generation.seat, piece, len(piece) if scores else 1)
            if scores:
                generation.prompt_logits(start, logits)
            if not reading.pieces:
                generation.next_token(logits[-1], self._keep)
            elif self._holds(generation):
                self.cache.keep(self._steps.take(generation.seat))

        self._guarded(generation, step)
        if generation.over:
            self._steps.leave(generation.seat)
        elif reading.pieces:
            self._reading.append(reading)
        else:
            self._writing.append(generation)

    def _write_a_token(self) -> None:
        if not self._writing:
            return
        try:
            found = self._steps.decode([g.seat for g in self._writing])
        except Exception as error:
            for generation in self._writing:
                self._steps.leave(generation.seat)
                generation.fail(error)
            self._writing = []
            return
        for generation, logits in zip(self._writing, found, strict=True):
            self._guarded(generation, partial(generation.next_token, logits, self._keep))
        for generation in self._writing:
            if generation.over:
                self._steps.leave(generation.seat)
        self._writing = [g for g in self._writing if not g.over]

    def _keep(self, generation: Generation) -> None:
        """Hold the state of an answer that is about to end.

        Raises:
            BundleProblem: it was to be saved, and cannot be.
        """
        name = generation.order.save_state
        if name is None and not self._holds(generation):
            return
        snapshot = self._steps.take(generation.seat)
        if self._holds(generation):
            self.cache.keep(snapshot)
        if name is not None:
            self.named.save(name, snapshot)

    @staticmethod
    def _holds(generation: Generation) -> bool:
        """Whether the cache is to have its states: not of a prompt that is only scored."""
        return generation.order.cache and not generation.scores_prompt

    def _guarded(self, generation: Generation, step: Callable[[], None]) -> None:
        """A problem of one sequence ends that one."""
        try:
            step()
        except Exception as error:
            generation.fail(error)


def _run(errand: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(errand())
    except Exception as error:
        future.set_exception(error)


def _waited_too_long() -> RequestProblem:
    problem = RequestProblem(
        "the request waited for a slot until its time was over", "come again later", status=503
    )
    problem.headers["Retry-After"] = "10"
    return problem
