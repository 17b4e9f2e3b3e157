"""Quantities that a report derives from points and profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ssdi8_edge.boards.points.records import Point, Profile, Timing

MS, MB = 1e-3, 1e6
SSD = "SSD"  # the part of a model that the paper's table is about
PREFILL = "prefill"
OTHER = "other"  # layers that a profile can give to no module
MOST_UNKNOWN = 0.1


class Gain(NamedTuple):
    """Times as fast as the baseline; None where one of the two did not decode."""

    prefill: float
    decode: float | None


def speedup(points: Sequence[Point], baseline: Sequence[Point]) -> dict[int, Gain]:
    """Length -> gain, where the baseline has the length too."""
    against = {point.length: point.timing for point in baseline}
    found = {}
    for point in points:
        mine, base = point.timing, against.get(point.length)
        if base:
            decode = base.tpot_s / mine.tpot_s if base.tpot_s and mine.tpot_s else None
            found[point.length] = Gain(base.ttft_s / mine.ttft_s, decode)
    return found


def ttft_range(timing: Timing) -> tuple[float, float]:
    """Fastest and slowest repeat, in s."""
    times = [repeat.ttft_s for repeat in timing.repeats]
    return min(times), max(times)


def process_bytes(timing: Timing) -> int | None:
    """Highest resident memory of the process."""
    return timing.memory.peak_rss_bytes if timing.memory else None


def gpu_bytes(timing: Timing) -> int | None:
    """Engine, contexts and buffers."""
    return timing.memory.gpu_bytes if timing.memory else None


def less_available(timing: Timing) -> int | None:
    """How much less memory the whole machine had while the engine was there."""
    memory = timing.memory
    if memory is None or memory.available_before_bytes is None or memory.available_bytes is None:
        return None
    return max(0, memory.available_before_bytes - memory.available_bytes)


def ssd_seconds(profile: Profile) -> float | None:
    """Time in the SSD alone during prefill, the quantity of the paper's table.

    None where a good part of the time belongs to no module, and perhaps to the SSD.
    """
    modules = [m for phase in profile.phases if phase.phase == PREFILL for m in phase.modules]
    times = [m.seconds for m in modules if m.part == SSD]
    unknown = sum(m.seconds for m in modules if m.module == OTHER)
    if not times or unknown > MOST_UNKNOWN * sum(m.seconds for m in modules):
        return None
    return sum(times)
