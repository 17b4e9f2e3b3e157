"""Runs slots by a session: a piece of a prompt, or one token of several sequences.

The one place that knows that a library takes one sequence at a time; one that takes several in a
call replaces `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.session import Session, Slot


def read(session: Session, slot: Slot, ids: np.ndarray, keep: int) -> np.ndarray:
    """Run a piece of a prompt, (l,) int32, behind what the slot holds.

    Returns:
        Logits (keep, vocab) float32 of its last positions, until the next call.
    """
    states = session.backend.zero_states(1) if slot.states is None else slot.states
    logits, slot.states = session.backend.forward(ids[None], states, keep, slot.tokens)
    slot.tokens += len(ids)
    return logits[0]


def decode(session: Session, slots: Sequence[Slot]) -> list[np.ndarray]:
    """Run the pending token of each slot.

    Returns:
        Logits (vocab,) float32 of each.
    """
    found = []
    for slot in slots:
        [token], slot.pending = slot.pending, []
        found.append(read(session, slot, np.array([token], np.int32), 1)[0].copy())
    return found
