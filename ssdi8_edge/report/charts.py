"""The four kinds of chart: lines over prompt length, bars, stacked bars, and a scatter of methods.

Every line, bar and point carries its name beside it, in the order in which the eye meets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ssdi8_edge.report import svg
from ssdi8_edge.report.figures import figures
from ssdi8_edge.report.svg import Scale, element, line, shorten, text, width_of

WIDTH = 460.0
COLOURS = 9  # classes c0 (the baseline, grey) to c8 of the page
_TOP, _BOTTOM, _LEFT = 14.0, 40.0, 52.0
_GAP = 15.0  # between labels
_SIMULATED = "simulated board"


@dataclass(frozen=True)
class Spot:
    """A value at a prompt length, with the lowest and the highest of its repeats if it has any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line: `colour` is a class of the page, 0 the grey of the baseline."""

    label: str
    colour: int
    spots: Sequence[Spot]
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of one or more segments, in order: (name, colour, value)."""

    label: str
    segments: Sequence[tuple[str, int, float]]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(value for _, _, value in self.segments)


def line_chart(
    title: str,
    y_label: str,
    series: Sequence[Series],
    *,
    baseline: tuple[float, str] | None = None,
    simulated: bool = False,
) -> Markup:
    """Lines over prompt length, log2; whiskers span the repeats.

    Args:
        y_label: quantity and unit, above the axis.
        baseline: a value that all compare with, drawn across and named.
    """
    names = [shorten(s.label) for s in series] + ([baseline[1]] if baseline else [])
    right = WIDTH - 12 - max(width_of(name, bold=True) for name in names)
    height = max(270.0, _TOP + _BOTTOM + 20 + _GAP * len(series))
    bottom, top = height - _BOTTOM, _TOP + 22
    spots = [spot for s in series for spot in s.spots]
    values = [v for p in spots for v in (p.y, p.low, p.high) if v is not None]
    y = svg.scale_for(values, bottom, top, baseline[0] if baseline else 0.0)
    lengths = sorted({spot.x for spot in spots})
    inset = 14.0 if len(lengths) > 1 else 0.0
    x = Scale(lengths[0], lengths[-1], _LEFT + inset, right - inset, log=True)

    parts = [text(0, 14, y_label + (", log scale" if y.log else ""), class_="axis")]
    parts += _y_axis(y, right)
    parts += _x_axis(x, lengths, bottom, right)
    if baseline:
        parts.append(line(_LEFT, y(baseline[0]), right, y(baseline[0]), "baseline"))
    ends = [y(s.spots[-1].y) for s in series] + ([y(baseline[0])] if baseline else [])
    places = svg.spread(ends, _GAP, top + 4, bottom - 2)
    if baseline:
        parts.append(text(right + 8, places[-1] + 4, baseline[1], class_="name c0"))
    for i, s in enumerate(series):
        parts += _draw(s, i, x, y)
        end_x, end_y = x(s.spots[-1].x), y(s.spots[-1].y)
        if abs(places[i] - end_y) > 3:
            parts.append(line(end_x + 6, end_y, right + 4, places[i], f"leader c{s.colour}"))
        parts.append(text(right + 8, places[i] + 4, names[i], class_=f"name c{s.colour}"))
    if simulated:
        parts.append(_stamp())
    return svg.picture(WIDTH, height, title, parts)


def _y_axis(y: Scale, right: float) -> list[Markup]:
    parts = []
    for tick in y.ticks():
        parts.append(line(_LEFT, y(tick), right, y(tick), "grid"))
        parts.append(text(_LEFT - 6, y(tick) + 4, y.words(tick), "end", class_="tick"))
    return parts


def _x_axis(x: Scale, lengths: Sequence[float], bottom: float, right: float) -> list[Markup]:
    parts = [line(_LEFT, bottom, right, bottom, "axisline")]
    free_from = -math.inf
    for length in lengths:
        words = f"{length:.0f}"
        parts.append(line(x(length), bottom, x(length), bottom + 4, "axisline"))
        if x(length) - width_of(words) / 2 > free_from:
            parts.append(text(x(length), bottom + 17, words, "middle", class_="tick"))
            free_from = x(length) + width_of(words) / 2 + 4
    middle = (_LEFT + right) / 2
    return [*parts, text(middle, bottom + 34, "prompt length, tokens", "middle", class_="axis")]


def _draw(s: Series, number: int, x: Scale, y: Scale) -> list[Markup]:
    places = [(x(spot.x), y(spot.y)) for spot in s.spots]
    path = "M" + " L".join(f"{px:.2f},{py:.2f}" for px, py in places)
    kind = "line dashed" if s.dashed else "line"
    parts = [element("path", d=path, class_=f"{kind} c{s.colour}")]
    for spot, (px, py) in zip(s.spots, places, strict=True):
        if spot.low is not None and spot.high is not None and spot.high > spot.low:
            parts.append(line(px, y(spot.low), px, y(spot.high), f"whisker c{s.colour}"))
        tip = element("title", f"{s.label}, {spot.x:.0f} tokens: {figures(spot.y)}")
        parts.append(_marker(number, px, py, f"mark c{s.colour}", tip))
    return parts


def _marker(number: int, x: float, y: float, class_: str, tip: Markup) -> Markup:
    """Circle, square, diamond, triangle in turn: lines stay apart without their colours."""
    shapes = (
        "M-4,0 A4,4 0 1 1 4,0 A4,4 0 1 1 -4,0 Z",
        "M-3.6,-3.6 H3.6 V3.6 H-3.6 Z",
        "M0,-5 L5,0 L0,5 L-5,0 Z",
        "M0,-4.8 L4.6,3.4 L-4.6,3.4 Z",
    )
    place = f"translate({x:.2f} {y:.2f})"
    return element("path", tip, d=shapes[number % 4], transform=place, class_=class_)


def _stamp() -> Markup:
    return text(WIDTH - 2, 14, _SIMULATED, "end", class_="stamp")


def bar_chart(
    title: str, unit: str, bars: Sequence[Bar], *, simulated: bool = False, inner: bool = False
) -> Markup:
    """Horizontal bars from zero with the total at the end of each.

    Args:
        inner: write values into the segments that are wide enough.
    """
    names = [shorten(bar.label) for bar in bars]
    ends = [f"{figures(bar.total)} {unit}{bar.note}" for bar in bars]
    left = 8 + max(width_of(name) for name in names)
    right = WIDTH - 10 - max(width_of(end) for end in ends)
    x = Scale(0, max(bar.total for bar in bars) or 1.0, left, max(right, left + 60))
    top = 26.0 if simulated else 8.0
    parts = [_stamp()] if simulated else []
    for i, bar in enumerate(bars):
        middle = top + 26 * i + 11
        parts.append(text(left - 6, middle + 4, names[i], "end", class_="label"))
        start = 0.0
        for name, colour, value in bar.segments:
            tip = element("title", f"{bar.label}, {name}: {figures(value)} {unit}")
            a, b = x(start), x(start + value)
            box = {"x": a, "y": middle - 9, "width": b - a, "height": 18}
            parts.append(element("rect", tip, **box, class_=f"bar c{colour}"))
            words = figures(value)
            if inner and b - a > width_of(words) + 8:
                parts.append(text((a + b) / 2, middle + 4, words, "middle", class_="inside"))
            start += value
        parts.append(text(x(bar.total) + 6, middle + 4, ends[i], class_="value"))
    parts.append(line(left, top - 4, left, top + 26 * len(bars), "axisline"))
    return svg.picture(WIDTH, top + 26 * len(bars) + 6, title, parts)


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    spots: Sequence[tuple[str, int, float, float]],
    *,
    simulated: bool = False,
) -> Markup:
    """Methods as points (name, colour, x, y), each named where there is room."""
    height, top, right = 290.0, _TOP + 22, WIDTH - 14
    bottom = height - _BOTTOM
    x = svg.scale_for([spot[2] for spot in spots], _LEFT, right, None)
    y = svg.scale_for([spot[3] for spot in spots], bottom, top, None)
    parts = [text(0, 14, y_label, class_="axis"), *_y_axis(y, right)]
    parts.append(line(_LEFT, bottom, right, bottom, "axisline"))
    for tick in x.ticks():
        parts.append(text(x(tick), bottom + 17, x.words(tick), "middle", class_="tick"))
        parts.append(line(x(tick), bottom, x(tick), bottom + 4, "axisline"))
    middle = (_LEFT + right) / 2
    parts.append(text(middle, bottom + 34, x_label, "middle", class_="axis"))
    taken = [(x(a) - 6, y(b) - 6, x(a) + 6, y(b) + 6) for _, _, a, b in spots]
    for i, (name, colour, a, b) in enumerate(spots):
        tip = element("title", f"{name}: {figures(a)}, {figures(b)}")
        parts.append(_marker(i, x(a), y(b), f"mark c{colour}", tip))
        words = shorten(name)
        place = _free_place(
            x(a), y(b), width_of(words, bold=True), taken, (_LEFT, top - 8, right, bottom)
        )
        taken.append(place)
        parts.append(text(place[0], place[3] - 3, words, class_=f"name c{colour}"))
    if simulated:
        parts.append(_stamp())
    return svg.picture(WIDTH, height, title, parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_place(x: float, y: float, width: float, taken: Sequence[Box], frame: Box) -> Box:
    """A box for a label near a point: the nearest that is free, else the first that fits."""
    fitting = []
    for distance in range(0, 90, 13):
        for side in (1, -1):
            for left in (x + 9, x - 9 - width, x - width / 2):
                shift = side * (distance if left != x - width / 2 else distance + 16)
                box = (left, y - 7 + shift, left + width, y + 8 + shift)
                inside = box[0] >= frame[0] and box[2] <= frame[2]
                if inside and box[1] >= frame[1] and box[3] <= frame[3]:
                    fitting.append(box)
    for box in fitting:
        if not any(_overlap(box, other) for other in taken):
            return box
    return fitting[0] if fitting else (x + 9, y - 7, x + 9 + width, y + 8)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
