"""A sequence between two calls: where the backend computes, and at rest on the host.

A backend may overwrite the states that it was given, and some hold those of one sequence alone. So
what is to stay, to be copied or to be written to disk is a `Snapshot`: plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.backends.protocol import Backend, States
from runtime.bundle import Interface

ROWS = 2  # axis of a state that grows, batch included, on which a token has its row


@dataclass
class Slot:
    """All that a sequence is between two calls."""

    states: States | None = None  # None: nothing was run yet
    ids: list[int] = field(default_factory=list)  # that were run, and led to the states
    # Sampled last and not run yet; it is run together with what comes next.
    pending: list[int] = field(default_factory=list)

    @property
    def text_ids(self) -> list[int]:
        """All tokens of the sequence."""
        return self.ids + self.pending


@dataclass(frozen=True)
class Snapshot:
    """A slot at rest, on the host, where no call overwrites it."""

    ids: np.ndarray  # (n,) int32, n > 0, that led to the states
    states: States  # name -> array (1, ...); of one that grows only the n rows that are filled
    pending: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory, and nearly that on disk."""
        return self.ids.nbytes + sum(state.nbytes for state in self.states.values())

    def is_prefix_of(self, ids: Sequence[int] | np.ndarray) -> bool:
        """Whether `ids` begin with those that led here, and go on: a run needs a token."""
        held = self.ids.size
        return held < len(ids) and np.array_equal(self.ids, ids[:held])


def take(slot: Slot, model: Interface) -> Snapshot:
    """Copy a slot to the host; the slot can go on.

    Raises:
        ValueError: nothing was run in it.
    """
    if slot.states is None:
        raise ValueError("nothing was run in this slot")
    states = {}
    for name, state in model.states.items():
        held = np.asarray(slot.states[name])
        states[name] = np.array(held[:, :, : len(slot.ids)] if state.grows else held)
    return Snapshot(np.array(slot.ids, np.int32), states, tuple(slot.pending))


def resume(snapshot: Snapshot, model: Interface, backend: Backend) -> Slot:
    """A slot that goes on from `snapshot`, as often as one likes.

    Rows behind the filled ones are zeros, which nothing reads before a call has written them.
    """
    states = {}
    for name, state in model.states.items():
        states[name] = held = snapshot.states[name]
        if state.grows:
            states[name] = whole = np.zeros((1, *state.shape), state.dtype)
            whole[:, :, : held.shape[ROWS]] = held
    return Slot(backend.load_states(states), snapshot.ids.tolist(), list(snapshot.pending))
