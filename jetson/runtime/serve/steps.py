"""Runs sequences by a session: a piece of a prompt, or one token of several sequences.

The one place that knows that a library takes one sequence at a time; one that takes several in a
call replaces `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.session import Session
from runtime.states.slot import Slot, Snapshot


@dataclass
class Seat:
    """A slot, or what it is while another one has its place in the library's memory."""

    slot: Slot = field(default_factory=Slot)
    parked: Snapshot | None = None  # its states, where they are not in `slot`

    @classmethod
    def on(cls, snapshot: Snapshot) -> Seat:
        """A seat that goes on from `snapshot`."""
        return cls(Slot(ids=snapshot.ids.tolist(), pending=list(snapshot.pending)), snapshot)


class Steps:
    """Seats on one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._resident: Seat | None = None  # whose states the library holds, if it holds one's

    def read(self, seat: Seat, ids: Sequence[int], keep: int = 1) -> np.ndarray:
        """Run `ids` in one call, behind what was run.

        Returns:
            Logits (keep, vocab) float32 of the last positions, until the next call.
        """
        self._bring(seat)
        return self._session.advance(seat.slot, ids, keep)

    def decode(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        """Run the pending token of each; returns logits (vocab,) float32 of each."""
        return [self.read(seat, list(seat.slot.pending))[0].copy() for seat in seats]

    def take(self, seat: Seat) -> Snapshot:
        """A copy that nothing overwrites."""
        return seat.parked or self._session.take(seat.slot)

    def leave(self, seat: Seat) -> None:
        """It does not go on; its states are freed now, whoever still knows of it."""
        seat.slot, seat.parked = Slot(), None
        if self._resident is seat:
            self._resident = None

    def _bring(self, seat: Seat) -> None:
        """Its states are in the library's memory; those of another one are not, if it takes one."""
        alone = self._session.backend.sequences is not None
        other = self._resident
        if alone and other is not None and other is not seat and other.slot.states is not None:
            other.parked = self._session.take(other.slot)
            other.slot.states = None
        if seat.parked is not None:
            seat.slot.states = self._session.resume(seat.parked).states
            seat.parked = None
        self._resident = seat
