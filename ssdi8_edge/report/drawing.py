"""Which charts a report has, from its measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ssdi8_edge.boards.points.records import Point
from ssdi8_edge.report.charts import COLOURS, Bar, Series, Spot, bar_chart, line_chart, scatter
from ssdi8_edge.report.reference import PAPER_BOARD, SSD_LATENCY_MS
from ssdi8_edge.report.sources import BASELINE, Measurements, Setup
from ssdi8_edge.report.values import (
    MB,
    MS,
    OTHER,
    gpu_bytes,
    process_bytes,
    speedup,
    ssd_seconds,
    ttft_range,
)

MOST_MODULES = 7


@dataclass(frozen=True)
class Figure:
    """A chart under its caption; `legend` (name, colour) in drawing order if it has no names."""

    caption: str
    picture: Markup
    simulated: bool = False
    legend: Sequence[tuple[str, int]] = ()


class Drawing:
    """Charts of a report; a method has the same colour in all of them."""

    def __init__(self, data: Measurements) -> None:
        self._data = data
        others = [name for name in (*data.methods, *SSD_LATENCY_MS) if name != BASELINE]
        self._colours = {
            name: 1 + i % (COLOURS - 1) for i, name in enumerate(dict.fromkeys(others))
        }
        self._colours[BASELINE] = 0

    def _lines(self, setup: Setup, spot: Callable[[Point], Spot | None]) -> list[Series]:
        found = []
        for method, points in self._data.of(setup).items():
            spots = [s for point in points if (s := spot(point))]
            if spots:
                found.append(Series(method, self._colours[method], spots))
        return found

    def _line_figure(
        self,
        setup: Setup,
        what: str,
        unit: str,
        series: Sequence[Series],
        baseline: tuple[float, str] | None = None,
    ) -> Iterable[Figure]:
        if series:
            caption = f"{what}: {setup}"
            picture = line_chart(
                caption, unit, series, baseline=baseline, simulated=setup.simulated
            )
            yield Figure(caption, picture, setup.simulated)

    def latency(self) -> list[Figure]:
        """First token and further tokens per setup, then the SSD alone beside the paper's."""

        def ttft(point: Point) -> Spot:
            low, high = ttft_range(point.timing)
            return Spot(point.length, point.timing.ttft_s / MS, low / MS, high / MS)

        def per_token(point: Point) -> Spot | None:
            time_s = point.timing.tpot_s
            return Spot(point.length, time_s / MS) if time_s else None

        found: list[Figure] = []
        for setup in self._data.setups:
            first, further = self._lines(setup, ttft), self._lines(setup, per_token)
            found += self._line_figure(setup, "Time to first token", "ms", first)
            found += self._line_figure(setup, "Time per further token", "ms", further)
        return [*found, self._ssd()]

    def _ssd(self) -> Figure:
        """The paper's lines, dashed, with the SSD times of this report's profiles."""
        mine: dict[tuple[Setup, str], list[Spot]] = {}
        for setup in self._data.setups:
            for profile in self._data.profiles_of(setup):
                seconds = ssd_seconds(profile)
                if seconds and not setup.simulated:
                    spots = mine.setdefault((setup, profile.bundle.method), [])
                    spots.append(Spot(profile.length, seconds / MS))
        series = [
            Series(f"{method}, {setup.board}", self._colours[method], spots)
            for (setup, method), spots in mine.items()
        ]
        for method, times in SSD_LATENCY_MS.items():
            spots = [Spot(length, value) for length, value in times.items()]
            series.append(Series(f"{method} (paper)", self._colours[method], spots, dashed=True))
        caption = f"SSD alone; dashed: {PAPER_BOARD}, as the paper gives it"
        return Figure(caption, line_chart(caption, "ms (the paper states no unit)", series))

    def speedup(self) -> list[Figure]:
        """Prefill and decode per setup."""
        found: list[Figure] = []
        for setup in self._data.setups:
            prefill, decode = [], []
            for method, points in self._data.of(setup).items():
                if method == BASELINE:
                    continue
                gains = speedup(points, self._data.baseline(setup))
                faster = [Spot(n, gain.prefill) for n, gain in gains.items()]
                if faster:
                    prefill.append(Series(method, self._colours[method], faster))
                faster = [Spot(n, gain.decode) for n, gain in gains.items() if gain.decode]
                if faster:
                    decode.append(Series(method, self._colours[method], faster))
            for what, series in (("Prefill", prefill), ("Decode", decode)):
                unit = "times as fast as FP16"
                found += self._line_figure(setup, what, unit, series, (1.0, "FP16"))
        return found

    def modules(self) -> list[Figure]:
        """Prefill and decode, a bar per profile; what costs little is one segment."""
        ranked = [name for name in self._data.modules if name != OTHER]
        names, rest = ranked[:MOST_MODULES], {OTHER, *ranked[MOST_MODULES:]}
        legend = [(name, 1 + i) for i, name in enumerate(names)]
        found = []
        for setup in self._data.setups:
            bars: dict[str, list[Bar]] = {}
            for profile in self._data.profiles_of(setup):
                for phase in profile.phases:
                    times = {m.module: m.seconds / MS for m in phase.modules}
                    parts = [(name, colour, times.get(name, 0.0)) for name, colour in legend]
                    parts.append((OTHER, 0, sum(times.get(name, 0.0) for name in rest)))
                    label = f"{profile.bundle.method}, {profile.length}"
                    bar = Bar(label, [part for part in parts if part[2]])
                    bars.setdefault(phase.phase, []).append(bar)
            for phase_name, phase_bars in bars.items():
                caption = f"{phase_name.capitalize()}, ms per module: {setup}"
                picture = bar_chart(
                    caption, "ms", phase_bars, simulated=setup.simulated, inner=True
                )
                drawn = {name for bar in phase_bars for name, _, _ in bar.segments}
                named = [entry for entry in [*legend, (OTHER, 0)] if entry[0] in drawn]
                found.append(Figure(caption, picture, setup.simulated, named))
        return found

    def power(self) -> list[Figure]:
        """Energy per token and mean power per setup."""

        def energy(point: Point) -> Spot | None:
            value = point.power.j_per_token if point.power else None
            return Spot(point.length, value) if value else None

        def watts(point: Point) -> Spot | None:
            value = point.power.mean_w if point.power else None
            return Spot(point.length, value) if value else None

        found: list[Figure] = []
        for setup in self._data.setups:
            joules, mean = self._lines(setup, energy), self._lines(setup, watts)
            found += self._line_figure(setup, "Energy per new token", "J", joules)
            found += self._line_figure(setup, "Mean power", "W", mean)
        return found

    def memory(self) -> list[Figure]:
        """A bar per method, highest over the lengths."""
        found = []
        for setup in self._data.setups:
            bars = []
            for method, points in self._data.of(setup).items():
                process = max(process_bytes(p.timing) or 0 for p in points) / MB
                gpu = max(gpu_bytes(p.timing) or 0 for p in points) / MB
                segments = [s for s in (("process", 1, process), ("GPU", 2, gpu)) if s[2]]
                if segments:
                    bars.append(Bar(method, segments))
            if bars:
                caption = f"Memory, MB: {setup}"
                on_gpu = any(len(bar.segments) > 1 for bar in bars)
                legend = [("process", 1), ("GPU", 2)] if on_gpu else []
                picture = bar_chart(caption, "MB", bars, simulated=setup.simulated)
                found.append(Figure(caption, picture, setup.simulated, legend))
        return found

    def accuracy(self) -> list[Figure]:
        """Decode speed against perplexity, where methods have both."""
        found = []
        for setup in self._data.setups:
            spots = []
            length = self._data.longest_common_length(setup)
            for method, points in self._data.of(setup).items():
                evaluation = self._data.evaluation(setup.model, method)
                speed = {p.length: p.timing.tokens_per_s for p in points}.get(length or 0)
                perplexity = evaluation.perplexity if evaluation else None
                if perplexity and math.isfinite(perplexity) and speed:
                    spots.append((method, self._colours[method], speed, perplexity))
            if len(spots) > 1:
                caption = f"Accuracy beside speed: {setup}"
                picture = scatter(
                    caption,
                    f"decode, tokens/s, after a prompt of {length} tokens",
                    "perplexity, lower is better",
                    spots,
                    simulated=setup.simulated,
                )
                found.append(Figure(caption, picture, setup.simulated))
        return found
