"""What the charts are drawn with: elements with escaped text, scales, ticks, widths of words.

Colours are classes, so that the page decides them for light and dark.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

from ssdi8_edge.report.figures import figures

FONT = 12.0
# Mean advance of letters and digits in the widest of the page's fonts, in units of its size.
_ADVANCE, _BOLD_ADVANCE = 0.61, 0.69
LONGEST_LABEL = 26


def element(name: str, content: str | Markup = "", /, **attributes: object) -> Markup:
    """An SVG element; attribute names take `-` for `_`, and a final `_` is dropped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, escape(content))


def _plain(value: object) -> object:
    """Coordinates to a hundredth of a unit: more is noise in the file."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def text(x: float, y: float, words: str, /, anchor: str = "start", **attributes: object) -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def picture(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """The whole chart; `label` is what a screen reader says."""
    return element(
        "svg",
        element("title", label) + Markup("").join(parts),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        class_="chart",
    )


def width_of(words: str, *, bold: bool = False) -> float:
    """About how wide a text is set, rather more than less."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in words)
    return FONT * ((_BOLD_ADVANCE if bold else _ADVANCE) * (len(words) - wide) + wide)


def shorten(words: str, most: int = LONGEST_LABEL) -> str:
    """Both ends of a long name, since names often differ at the end."""
    if len(words) <= most:
        return words
    return words[: most - most // 3 - 1] + "…" + words[-(most // 3) :]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, near the wanted ones, from `low` to `high`, in the same order.

    Where there is no room for that, they are spaced evenly.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


class Scale:
    """Maps values onto a length of the picture, linear or logarithmic."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False
    ) -> None:
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self._start + share * (self._end - self._start)

    def words(self, tick: float) -> str:
        """A tick as text, with the digits that tell it from its neighbours."""
        if self.log:
            return figures(tick, 1)
        step = self._step()
        decimals = next((d for d in range(9) if math.isclose(round(step, d), step)), 9)
        return f"{tick:.{decimals}f}"

    def _step(self) -> float:
        return _round_step((self.high - self.low) / 4)

    def ticks(self) -> list[float]:
        """Round values inside, about five: 1, 2, 5 times powers of ten."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = self._step()
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [round((first + i) * step, 12) for i in range(count + 1)]


def scale_for(
    values: Sequence[float], start: float, end: float, include: float | None = 0.0
) -> Scale:
    """A scale that holds all `values`: logarithmic where they span more than a factor of four.

    Args:
        include: a value that a linear scale shows too; None for none.
    """
    low, high = min(values), max(values)
    if low > 0 and high > 4 * low and include == 0.0:
        return Scale(low / 1.15, high * 1.15, start, end, log=True)
    if include is not None:
        low, high = min(low, include), max(high, include)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    bottom = low if low == 0 else low - room
    return Scale(bottom, high + room, start, end)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]
