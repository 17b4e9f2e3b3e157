"""A bundle with its graph loaded: prefill in pieces, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from runtime.backends.choose import choose, open_backend
from runtime.backends.protocol import Backend, BackendOptions, States
from runtime.bundle import Bundle
from runtime.problems import BundleProblem
from runtime.states.fingerprint import Fingerprint, fingerprint
from runtime.states.prefix_cache import PrefixCache
from runtime.states.slot import Slot, Snapshot, resume, take
from runtime.states.state_file import Chat, Saved, load, save

# Tokens of a prompt between the states that a cache holds of it. With fewer the weights would be
# read too often, with more too much of a text would be read again.
HELD_EVERY = 512


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

    @property
    def fingerprint(self) -> Fingerprint:
        """Of all that the numbers in its states depend on."""
        return fingerprint(self.bundle, self.backend)

    def pieces(
        self, length: int, start: int = 0, marks: Collection[int] = ()
    ) -> list[tuple[int, int]]:
        """(start, end) of each call that reads a prompt from token `start` up to `length`."""
        model = self.bundle.model
        return prefill_pieces(length, self.bundle.max_tokens, model.prompt_multiple, start, marks)

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

    def advance(self, slot: Slot, ids: Sequence[int], keep: int = 1) -> np.ndarray:
        """Run `ids`, what was pending first, in one call after those of the slot.

        One that fails leaves the slot as it was.

        Returns:
            Logits (keep, vocab) float32 of the last positions; the next call may overwrite them.
        """
        states = self.backend.zero_states(1) if slot.states is None else slot.states
        tokens = np.array([ids], np.int32)
        logits, slot.states = self.backend.forward(tokens, states, keep, len(slot.ids))
        slot.ids += ids
        slot.pending = []
        return logits[0]

    def take(self, slot: Slot) -> Snapshot:
        """A copy of the slot on the host; see `runtime.states.slot`."""
        return take(slot, self.bundle.model)

    def resume(self, snapshot: Snapshot) -> Slot:
        """A slot that goes on from `snapshot`; with `take`, a fork."""
        return resume(snapshot, self.bundle.model, self.backend)

    def conversation(self, cache: PrefixCache | None = None) -> Conversation:
        """A sequence that starts with the next prompt; `cache`: see `Conversation`."""
        return Conversation(self, cache)

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


def prefill_pieces(
    length: int, max_tokens: int, multiple: int, start: int = 0, marks: Collection[int] = ()
) -> list[tuple[int, int]]:
    """(start, end) of each call that reads the tokens from `start` up to `length`.

    A piece ends at a mark and before `max_tokens` tokens; the longest are a `multiple`, so that
    chunks fall where they would in one go. Where a piece ends depends on where it begins alone: who
    goes on from the end of one cuts what follows as if it had been read in one go.
    """
    piece = max_tokens - max_tokens % multiple
    pieces = []
    while start < length:
        end = min([mark for mark in marks if start < mark < length], default=length)
        end = end if end - start <= max_tokens else start + piece
        pieces.append((start, end))
        start = end
    return pieces


def held_marks(length: int, multiple: int) -> set[int]:
    """Numbers of tokens behind which a prompt of `length` tokens has its state held: every
    `HELD_EVERY` or a few more, and the last one from which it can be gone on; multiples all."""
    stride = -(-HELD_EVERY // multiple) * multiple
    return {*range(stride, length, stride), (length - 1) // multiple * multiple}


class Conversation:
    """One sequence that grows: what was said so far is in the states, and not read again.

    With a cache, it holds the states of what is read and said, and `lead_to` looks there.
    """

    def __init__(self, session: Session, cache: PrefixCache | None = None) -> None:
        self._session = session
        self._cache = cache
        self._slot = Slot()

    @property
    def ids(self) -> list[int]:
        """All tokens so far, those that were read and those that were said."""
        return self._slot.text_ids

    @property
    def room(self) -> int | None:
        """Tokens that may follow until the context is full; None: any number."""
        context = self._session.bundle.model.context
        return None if context is None else context - len(self.ids)

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
        before, length = len(self.ids), prompt.shape[1]
        behind = f" behind the {before} of this conversation" if before else ""
        self._session.bundle.require_room(
            before + length, f"the prompt has {length} tokens{behind},", "give a shorter one"
        )

    def lead_to(self, ids: Sequence[int]) -> np.ndarray:
        """Make the tokens `ids` (l,) the conversation, and read again as little as can be.

        It goes on where they go on from what was said, else from the longest of their beginnings
        that the cache holds, else it starts anew.

        Returns:
            The prompt (1, r) int32 that is still to be read, r > 0.

        Raises:
            BundleProblem: the context has no room for them; nothing was changed.
        """
        ids, text, run = list(ids), self.ids, self._slot.ids
        if ids[: len(text)] == text:
            self.require_room(np.array([ids[len(text) :]]))
        else:
            self._session.bundle.require_room(
                len(ids), f"the conversation has {len(ids)} tokens", "start anew"
            )
        goes_on = len(run) < len(ids) and run == ids[: len(run)]
        held = self._cache.longest(ids) if self._cache is not None else None
        if held is not None and not (goes_on and len(run) >= held.ids.size):
            self._slot = self._session.resume(held)
        elif not goes_on:
            self._slot = Slot()
        self._slot.pending = []
        return np.array([ids[len(self._slot.ids) :]], np.int32)

    def take(self) -> Snapshot | None:
        """All that it is, on the host; None before the first prompt."""
        return None if self._slot.states is None else self._session.take(self._slot)

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        self._slot = self._session.resume(snapshot)

    def reset(self) -> None:
        """Start anew; the cache stays."""
        self._slot = Slot()

    def keep(self) -> None:
        """Have the cache hold what was said so far, if there is one; to be called after an answer.

        Raises:
            BundleProblem: a file of the cache cannot be written.
        """
        if self._cache is not None:
            self._hold(self._cache)
            self._cache.save()

    def _hold(self, cache: PrefixCache) -> None:
        if (snapshot := self.take()) is not None:
            cache.keep(snapshot)

    def read(self, prompt: np.ndarray, marks: Collection[int] = ()) -> Iterator[np.ndarray]:
        """Run `prompt` (1, l) int32 in pieces; yields the logits (vocab,) of each one's last token.

        Where there is a cache, it holds the state behind every piece but the last, and pieces are
        shorter, so that another prompt with the same beginning, and the same one again, find one.

        Args:
            marks: numbers of tokens of the conversation behind which a piece ends as well.

        Raises:
            BundleProblem: the context has no room for the prompt.
        """
        self.require_room(prompt)
        session, slot = self._session, self._slot
        ids, start = slot.text_ids + prompt[0].tolist(), len(slot.ids)
        if self._cache is not None:
            marks = {*marks, *held_marks(len(ids), session.bundle.model.prompt_multiple)}
        for begin, end in session.pieces(len(ids), start, marks):
            yield session.advance(slot, ids[begin:end])[-1]
            if end < len(ids) and self._cache is not None:
                self._hold(self._cache)

    def generate(
        self,
        prompt: np.ndarray,
        sample: Callable[[np.ndarray], int],
        max_new_tokens: int,
        end_ids: Collection[int],
        marks: Collection[int] = (),
    ) -> Iterator[Step]:
        """Go on after `prompt` (1, l) int32 to one of `end_ids`, yielded too, or `max_new_tokens`.

        It ends as well where the context is full, see `full`. The caller may stop at any token and
        come back with the next prompt. `marks`: see `read`.

        Raises:
            BundleProblem: the context has no room for the prompt.
        """
        started = time.perf_counter()
        *_, logits = self.read(prompt, marks)
        session, slot = self._session, self._slot
        for remaining in reversed(range(max_new_tokens)):
            token = sample(logits)
            slot.pending = [token]
            yield Step(token, time.perf_counter() - started)
            if token in end_ids or not remaining or self.full:
                return
            started = time.perf_counter()
            logits = session.advance(slot, [token])[-1]


def save_state(
    path: Path, conversation: Conversation, session: Session, chat: Chat | None = None
) -> None:
    """Write what a conversation is to a file; `chat`: what else it is, if it is one.

    Raises:
        BundleProblem: nothing was read yet, or the file cannot be written.
    """
    snapshot = conversation.take()
    if snapshot is None:
        raise BundleProblem("there is no state to save yet", "ask something first")
    save(path, Saved(snapshot, chat), session.bundle, session.fingerprint)


def load_state(path: Path, session: Session) -> Saved:
    """Read such a file; raises BundleProblem where it is torn, altered or foreign."""
    return load(path, session.bundle, session.fingerprint)
