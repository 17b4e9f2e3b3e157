"""Numbers as a reader wants them: a few digits, the unit that fits, a dash for what is absent."""

from __future__ import annotations

import math

from ssdi8_edge.ground.decimals import fixed

ABSENT = "–"
MOST_DECIMALS = 6
HUGE = 1e9


def figures(value: float, digits: int = 3) -> str:
    """So many significant digits; with an exponent only where the number is huge."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= HUGE:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if decimals > MOST_DECIMALS and round(value, MOST_DECIMALS) == 0:
        return "0"
    return f"{value:,.{min(decimals, MOST_DECIMALS)}f}".replace(",", "\u2009")


def shown(value: float | None, unit: float = 1.0, digits: int = 3) -> str:
    """`value` in multiples of `unit`, or a dash."""
    return ABSENT if value is None else figures(value / unit, digits)


def between(low: float, high: float, unit: float = 1.0) -> str:
    """A range; one number where both ends read the same."""
    first, last = shown(low, unit), shown(high, unit)
    return first if first == last else f"{first} – {last}"


def percent(share: float | None) -> str:
    """A signed change."""
    return ABSENT if share is None else f"{fixed(share * 100, 2, sign=True)} %"
