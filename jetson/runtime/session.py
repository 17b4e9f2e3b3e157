"""Prefill in pieces, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.backends.protocol import Backend, States
from runtime.bundle import Bundle


@dataclass(frozen=True)
class Step:
    """One sampled token and the seconds it took: the first one's include the prefill."""

    token: int
    seconds: float


@dataclass(frozen=True)
class Timings:
    """What a run took, without the time that printing takes."""

    prompt_tokens: int
    ttft_s: float | None  # time to first token; None when there was none
    tpot_s: float | None  # mean time per token after the first; None when there was one at most

    @classmethod
    def of(cls, prompt_tokens: int, seconds: list[float]) -> Timings:
        """From the seconds of each step, in their order."""
        first, rest = seconds[:1], seconds[1:]
        return cls(
            prompt_tokens=prompt_tokens,
            ttft_s=first[0] if first else None,
            tpot_s=sum(rest) / len(rest) if rest else None,
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate."""
        return 1 / self.tpot_s if self.tpot_s else None


def prefill_pieces(length: int, max_tokens: int, multiple: int) -> list[tuple[int, int]]:
    """(start, end) of each piece of a prompt.

    All but the last are a `multiple`, so that chunks fall where they would in one go.
    """
    if length <= max_tokens:
        return [(0, length)]
    piece = max_tokens - max_tokens % multiple
    return [(start, min(start + piece, length)) for start in range(0, length, piece)]


def prefill(
    backend: Backend, bundle: Bundle, ids: np.ndarray, keep: int = 1, states: States | None = None
) -> tuple[np.ndarray, States]:
    """Run tokens (b, l) int32 after `states` (None: from the start), in as many pieces as needed.

    Returns logits (b, keep, vocab) float32 of the last `keep` positions, and the states.
    """
    batch, length = ids.shape
    if states is None:
        states = backend.zero_states(batch)
    wanted = length - keep  # first position whose logits are returned
    kept = []
    for start, end in prefill_pieces(length, bundle.max_tokens, bundle.model.prompt_multiple):
        # The graph always gives at least one position; of early pieces nobody reads it.
        piece_keep = max(1, end - max(start, wanted))
        logits, states = backend.forward(ids[:, start:end], states, piece_keep)
        if end > wanted:
            kept.append(logits if keep == 1 else logits.copy())
    return kept[0] if len(kept) == 1 else np.concatenate(kept, axis=1), states


class Conversation:
    """One sequence that grows: what was said so far is in the states, and not read again."""

    def __init__(self, backend: Backend, bundle: Bundle) -> None:
        self._backend = backend
        self._bundle = bundle
        self._states: States | None = None
        # Sampled last and not run yet; it is run together with what comes next.
        self._pending: list[int] = []

    def generate(
        self,
        prompt: np.ndarray,
        sample: Callable[[np.ndarray], int],
        max_new_tokens: int,
        end_ids: Collection[int],
    ) -> Iterator[Step]:
        """Go on after `prompt` (1, l) int32 to one of `end_ids`, yielded too, or `max_new_tokens`.

        The caller may stop at any token and come back with the next prompt.
        """
        started = time.perf_counter()
        pending = np.array([self._pending], np.int32)
        ids = np.concatenate([pending, prompt], axis=1, dtype=np.int32)
        logits, self._states = prefill(self._backend, self._bundle, ids, 1, self._states)
        for remaining in reversed(range(max_new_tokens)):
            token = sample(logits[0, -1])
            self._pending = [token]
            yield Step(token, time.perf_counter() - started)
            if token in end_ids or not remaining:
                return
            started = time.perf_counter()
            step = np.array([[token]], np.int32)
            logits, self._states = self._backend.forward(step, self._states)


def generate(
    backend: Backend,
    bundle: Bundle,
    prompt: np.ndarray,
    sample: Callable[[np.ndarray], int],
    max_new_tokens: int,
    end_ids: Collection[int],
) -> Iterator[Step]:
    """Continue `prompt` (1, l) int32 until one of `end_ids`, yielded too, or `max_new_tokens`."""
    return Conversation(backend, bundle).generate(prompt, sample, max_new_tokens, end_ids)
