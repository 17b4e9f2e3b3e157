"""One piece of memory for all that calls make: who lives at the same time does not overlap.

The memory is taken in blocks, since a board may not give so much at once; no tensor lies across the
end of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.backends.device_states import aligned
from runtime.problems import BundleProblem

BLOCK = 256 * 2**20  # bytes; L4T 36.4.7 fails to give near 1 GB in one piece


@dataclass(frozen=True)
class Lifetime:
    """A tensor of `nbytes` from the call that makes it to the last that reads it."""

    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where each tensor begins, and how many bytes there are in all."""

    offsets: Mapping[str, int]
    nbytes: int

    @property
    def blocks(self) -> list[int]:
        """Bytes of each block."""
        return [min(BLOCK, self.nbytes - start) for start in range(0, self.nbytes, BLOCK)]


def plan(lifetimes: Mapping[str, Lifetime]) -> Plan:
    """Place each tensor in the first gap that is free while it lives, in the order they are made.

    Raises:
        BundleProblem: one is larger than a block.
    """
    offsets: dict[str, int] = {}
    living: list[tuple[int, int, int]] = []  # (offset, end, last call), by offset
    end = 0
    for name, life in sorted(lifetimes.items(), key=lambda item: item[1].first):
        size = aligned(life.nbytes)
        if size > BLOCK:
            raise BundleProblem(
                f"{name} takes {size / 2**20:.0f} MiB, and a tensor may take {BLOCK >> 20}",
                "ask for fewer tokens at once",
            )
        living = [each for each in living if each[2] >= life.first]
        offsets[name] = start = _first_gap(living, size)
        living.append((start, start + size, life.last))
        living.sort()
        end = max(end, start + size)
    return Plan(offsets, end)


def _first_gap(living: Sequence[tuple[int, int, int]], size: int) -> int:
    start = 0
    for offset, end, _ in living:
        start = _in_one_block(start, size)
        if start + size <= offset:
            return start
        start = max(start, end)
    return _in_one_block(start, size)


def _in_one_block(start: int, size: int) -> int:
    """`start`, or the next block's beginning if the tensor would lie across it."""
    block_end = (start // BLOCK + 1) * BLOCK
    return start if start + size <= block_end else block_end
