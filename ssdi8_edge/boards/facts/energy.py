"""Energy from samples of power: the trapezoid rule over timestamps of our own.

The timestamps are CLOCK_MONOTONIC of the machine that was sampled, the clock that also stamps the
generation; the one-second wall clock that tegrastats prints takes no part.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

# (s on the monotonic clock, W)
Sample = tuple[float, float]

# A gap longer than so many sampling intervals makes a window worthless.
MOST_INTERVALS = 3.0


class NoEnergy(Exception):
    """A window whose energy cannot be told; the message says why."""


def energy_j(samples: Sequence[Sample], start_s: float, end_s: float, interval_s: float) -> float:
    """Energy in J from `start_s` to `end_s`, the power at both ends interpolated.

    Args:
        samples: in order of time, from before the window to after it.
        interval_s: how often samples were asked for.

    Raises:
        NoEnergy: the window is empty, or the samples do not cover it, go back in time, or leave a
            gap of more than three intervals in it.
    """
    if not end_s > start_s:
        raise NoEnergy("the window is empty")
    times = [t for t, _ in samples]
    if any(not b > a for a, b in pairwise(times)):
        raise NoEnergy("the timestamps of the samples do not rise")
    # With the last sample at or before the start, and the first at or after the end.
    first, last = bisect_right(times, start_s) - 1, bisect_left(times, end_s)
    if first < 0 or last >= len(times):
        raise NoEnergy("the samples do not cover the window")
    gap = max(b - a for a, b in pairwise(times[first : last + 1]))
    if gap > MOST_INTERVALS * interval_s:
        raise NoEnergy(
            f"there is a gap of {gap:.2f} s between samples that were asked for every"
            f" {interval_s:g} s"
        )
    inside = [
        (start_s, _at(samples[first], samples[first + 1], start_s)),
        *samples[first + 1 : last],
        (end_s, _at(samples[last - 1], samples[last], end_s)),
    ]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(inside))


def _at(left: Sample, right: Sample, t: float) -> float:
    """Power at `t` on the line between two samples."""
    share = (t - left[0]) / (right[0] - left[0])
    return left[1] + share * (right[1] - left[1])
