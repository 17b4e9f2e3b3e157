"""Which power mode is best by speed, and which by energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ssdi8_edge.boards.points.records import Point


class Best(NamedTuple):
    """Of the points of one bundle on one board at one length, measured in several modes."""

    fastest: Point
    thriftiest: Point | None  # None where none has energy

    def __str__(self) -> str:
        fast, thrifty = self.fastest, self.thriftiest
        said = (
            f"{fast.bundle.method} on {fast.board}, {fast.length} tokens: {fast.mode} is best by "
            f"speed ({fast.timing.tokens_per_s or 0:.1f} tokens/s)"
        )
        if thrifty is None or thrifty.power is None:
            return f"{said}; no mode has its energy measured"
        return f"{said}, {thrifty.mode} by energy ({thrifty.power.tokens_per_j or 0:.2f} tokens/J)"


def best_modes(points: Sequence[Point]) -> list[Best]:
    """One for each bundle, board and length that was measured in at least two modes."""
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        if point.mode is not None and point.timing.tokens_per_s is not None:
            key = (point.bundle.digest, point.board, point.length)
            groups.setdefault(key, []).append(point)
    return [_best(group) for group in groups.values() if len({p.mode for p in group}) > 1]


def _best(group: Sequence[Point]) -> Best:
    fastest = max(group, key=lambda point: point.timing.tokens_per_s or 0.0)
    costs = [(p.power.j_per_token, p) for p in group if p.power and p.power.j_per_token is not None]
    _, thriftiest = min(costs, key=lambda each: each[0], default=(0.0, None))
    return Best(fastest, thriftiest)
