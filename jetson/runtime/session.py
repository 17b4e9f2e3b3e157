"""A bundle with its graph loaded: prefill in pieces, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np

from runtime.backends.choose import choose, open_backend
from runtime.backends.protocol import Backend, BackendOptions, States
from runtime.bundle import Bundle


@dataclass(frozen=True)
class Step:
    """One sampled token and the seconds it took: the first one's include the prefill."""

    token: int
    seconds: float


@dataclass(frozen=True)
class Session:
    """A bundle and the inference library that runs its graph; prompts, measurements and checks
    need nothing else of either. As a context manager it closes at the end."""

    bundle: Bundle
    backend: Backend
    load_s: float = 0.0  # seconds that opening the backend took

    @classmethod
    def open(cls, bundle: Bundle, options: BackendOptions, name: str | None = None) -> Session:
        """Load the graph with the runtime `name`, a key of `BACKENDS`, or what `choose` says."""
        started = time.perf_counter()
        if name is None:
            name, reason = choose(bundle, options)
            options = replace(options, reason=reason)
        backend = open_backend(bundle, name, options)
        return cls(bundle, backend, time.perf_counter() - started)

    def close(self) -> None:
        """Free everything; may be called again."""
        self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """(start, end) of each piece of a prompt of `length` tokens."""
        return prefill_pieces(length, self.bundle.max_tokens, self.bundle.model.prompt_multiple)

    def prefill(
        self, ids: np.ndarray, keep: int = 1, states: States | None = None, position: int = 0
    ) -> tuple[np.ndarray, States]:
        """Run tokens (b, l) int32 after `states` (None: from the start), in pieces if need be.

        Args:
            position: tokens that led to `states`.

        Returns:
            Logits (b, keep, vocab) float32 of the last `keep` positions, and the states.

        Raises:
            BundleProblem: the context has no room for them.
        """
        batch, length = ids.shape
        self.bundle.require_room(
            position + length, f"{length} tokens follow {position},", "give fewer"
        )
        if states is None:
            states = self.backend.zero_states(batch)
        wanted = length - keep  # first position whose logits are returned
        kept = []
        for start, end in self.pieces(length):
            # The graph always gives at least one position; of early pieces nobody reads it.
            piece_keep = max(1, end - max(start, wanted))
            piece = ids[:, start:end]
            logits, states = self.backend.forward(piece, states, piece_keep, position + start)
            if end > wanted:
                kept.append(logits if keep == 1 else logits.copy())
        return kept[0] if len(kept) == 1 else np.concatenate(kept, axis=1), states

    def conversation(self) -> Conversation:
        """A sequence that starts with the next prompt."""
        return Conversation(self)

    def generate(
        self,
        prompt: np.ndarray,
        sample: Callable[[np.ndarray], int],
        max_new_tokens: int,
        end_ids: Collection[int],
    ) -> Iterator[Step]:
        """Continue `prompt` (1, l) int32 until one of `end_ids`, yielded too, or
        `max_new_tokens`."""
        return self.conversation().generate(prompt, sample, max_new_tokens, end_ids)


def prefill_pieces(length: int, max_tokens: int, multiple: int) -> list[tuple[int, int]]:
    """(start, end) of each piece of a prompt.

    All but the last are a `multiple`, so that chunks fall where they would in one go.
    """
    if length <= max_tokens:
        return [(0, length)]
    piece = max_tokens - max_tokens % multiple
    return [(start, min(start + piece, length)) for start in range(0, length, piece)]


@dataclass
class Slot:
    """All that a sequence is between two calls: who copies it can go on from there again."""

    states: States | None = None  # None: nothing was run yet
    tokens: int = 0  # that were run, and led to the states
    # Sampled last and not run yet; it is run together with what comes next.
    pending: list[int] = field(default_factory=list)


class Conversation:
    """One sequence that grows: what was said so far is in the states, and not read again."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._slot = Slot()

    @property
    def room(self) -> int | None:
        """Tokens that may follow until the context is full; None: any number."""
        context, slot = self._session.bundle.model.context, self._slot
        return None if context is None else context - slot.tokens - len(slot.pending)

    @property
    def full(self) -> str | None:
        """A sentence if the context is full, so that no token can follow."""
        if self.room is None or self.room > 0:
            return None
        return (
            f"the context of {self._session.bundle.model.context} tokens is full;"
            " start anew, or build with a larger --context."
        )

    def require_room(self, prompt: np.ndarray) -> None:
        """Raises BundleProblem where `prompt` (1, l) does not fit behind what was said so far."""
        before, length = self._slot.tokens + len(self._slot.pending), prompt.shape[1]
        behind = f" behind the {before} of this conversation" if before else ""
        self._session.bundle.require_room(
            before + length, f"the prompt has {length} tokens{behind},", "give a shorter one"
        )

    def generate(
        self,
        prompt: np.ndarray,
        sample: Callable[[np.ndarray], int],
        max_new_tokens: int,
        end_ids: Collection[int],
    ) -> Iterator[Step]:
        """Go on after `prompt` (1, l) int32 to one of `end_ids`, yielded too, or `max_new_tokens`.

        It ends as well where the context is full, see `full`. The caller may stop at any token and
        come back with the next prompt.

        Raises:
            BundleProblem: the context has no room for the prompt.
        """
        self.require_room(prompt)
        started = time.perf_counter()
        session, slot = self._session, self._slot
        pending = np.array([slot.pending], np.int32)
        ids = np.concatenate([pending, prompt], axis=1, dtype=np.int32)
        logits, states = session.prefill(ids, 1, slot.states, slot.tokens)
        slot.states, slot.tokens = states, slot.tokens + ids.shape[1]
        for remaining in reversed(range(max_new_tokens)):
            token = sample(logits[0, -1])
            slot.pending = [token]
            yield Step(token, time.perf_counter() - started)
            if token in end_ids or not remaining or self.full:
                return
            started = time.perf_counter()
            step = np.array([[token]], np.int32)
            logits, states = session.backend.forward(step, slot.states, position=slot.tokens)
            slot.states, slot.tokens = states, slot.tokens + 1
