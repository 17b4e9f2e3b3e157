"""Numbers as a reader wants them: a few digits, also where they are huge or infinite."""

from __future__ import annotations

import math

# From here on a number is written with an exponent.
HUGE = 1e6


def fixed(value: float, decimals: int, sign: bool = False) -> str:
    """So many decimals; 1.2346e+09 where the number is huge, inf and nan as they are."""
    if not math.isfinite(value):
        return f"{value:+}" if sign else str(value)
    form = "e" if abs(value) >= HUGE else "f"
    text = f"{value:{'+' if sign else ''}.{decimals}{form}}"
    # Rounded to zero, a number has no sign; a change keeps one.
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def percent(share: float, decimals: int, sign: bool = False) -> str:
    """A share in percent, without a space."""
    return f"{fixed(share * 100, decimals, sign)}%"


def change(value: float, first: float) -> float | None:
    """value / first - 1; None where that says nothing, since one of them is zero or not finite."""
    if not first or not math.isfinite(value) or not math.isfinite(first):
        return None
    return value / first - 1
