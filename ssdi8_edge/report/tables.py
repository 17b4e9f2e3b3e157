"""The tables of a report, as text: page and Markdown show the same cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ssdi8_edge.boards.points.best import best_modes
from ssdi8_edge.boards.points.records import Point, Power, Range
from ssdi8_edge.report.figures import ABSENT, between, percent, shown
from ssdi8_edge.report.reference import PAPER_BOARD, PAPER_NOTE, SSD_LATENCY_MS
from ssdi8_edge.report.sources import BASELINE, Measurements, Setup
from ssdi8_edge.report.values import (
    MB,
    MS,
    gpu_bytes,
    less_available,
    process_bytes,
    speedup,
    ssd_seconds,
    ttft_range,
)

MEASURED, SIMULATED, PAPER = "measured", "simulated", "paper"
FIRST_TOKEN, PER_TOKEN, SSD = "first token", "per token", "SSD"
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        words: how many columns, from the left, hold words; the others hold numbers.
    """

    columns: Sequence[str]
    rows: list[list[str]]
    words: int
    notes: list[str] = field(default_factory=list)


def source_of(setup: Setup) -> str:
    return SIMULATED if setup.simulated else MEASURED


class Tables:
    """The tables of one report. The model has a column only where there are several."""

    def __init__(self, data: Measurements) -> None:
        self._data = data
        self._models = len({setup.model for setup in data.setups}) > 1

    # ----------------------------------------------------------------------------------------------
    # what rows begin with

    @property
    def _head(self) -> tuple[str, ...]:
        return (*(("model",) if self._models else ()), "board", "method", "source")

    def _begin(self, setup: Setup, method: str) -> list[str]:
        return self._cells(setup.model, setup.place, method, source_of(setup))

    def _cells(self, model: str, *others: str) -> list[str]:
        return [*([model] if self._models else []), *others]

    def _each(self) -> Iterator[tuple[Setup, str, list[Point]]]:
        for setup in self._data.setups:
            for method, points in self._data.of(setup).items():
                yield setup, method, points

    def _over_length(self, unit: str, rows: Sequence[tuple[list[str], Mapping[int, str]]]) -> Table:
        """Rows (head, length -> value as text), one column a length."""
        lengths = sorted({length for _, values in rows for length in values})
        cells = [
            [*head, *(values.get(length, ABSENT) for length in lengths)] for head, values in rows
        ]
        columns = (*self._head, unit, *(f"{length} tokens" for length in lengths))
        return Table(columns, cells, len(self._head) + 1)

    # ----------------------------------------------------------------------------------------------
    # tables

    def summary(self) -> Table:
        """One row per method: speed, energy, memory and accuracy side by side at one length."""
        rows = []
        for setup in self._data.setups:
            methods = self._data.of(setup)
            common = self._data.longest_common_length(setup)
            for method, points in methods.items():
                point = next((p for p in points if p.length == common), points[-1])
                rows.append([*self._begin(setup, method), *self._summary_row(setup, point)])
        columns = (
            *(*self._head, "prompt", "TTFT, ms", "× FP16", "tokens/s", "× FP16", "J/token"),
            *("memory, MB", "perplexity", "change"),
        )
        return Table(columns, rows, len(self._head))

    def _summary_row(self, setup: Setup, point: Point) -> list[str]:
        timing = point.timing
        gain = speedup([point], self._data.baseline(setup)).get(point.length)
        memory = (process_bytes(timing) or 0) + (gpu_bytes(timing) or 0)
        accuracy = self._data.evaluation(setup.model, point.bundle.method)
        return [
            str(point.length),
            shown(timing.ttft_s, MS),
            shown(gain.prefill if gain else None),
            shown(timing.tokens_per_s),
            shown(gain.decode if gain else None),
            shown(point.power.j_per_token if point.power else None),
            shown(memory or None, MB),
            shown(accuracy.perplexity if accuracy else None, digits=5),
            percent(accuracy.change if accuracy else None),
        ]

    def latency(self) -> Table:
        """Medians over prompt length, and the paper's rows below."""
        rows: list[tuple[list[str], Mapping[int, str]]] = []
        for setup, method in self._data.lines:
            points = self._data.of(setup).get(method, [])
            profiles = [p for p in self._data.profiles_of(setup) if p.bundle.method == method]
            steps = {p.length: p.timing.tpot_s for p in points}
            alone = {p.length: ssd_seconds(p) for p in profiles}
            for quantity, times in (
                (FIRST_TOKEN, {p.length: p.timing.ttft_s for p in points}),
                (PER_TOKEN, {length: s for length, s in steps.items() if s}),
                (SSD, {length: s for length, s in alone.items() if s}),
            ):
                if times:
                    cells = {length: shown(seconds, MS) for length, seconds in times.items()}
                    rows.append(([*self._begin(setup, method), quantity], cells))
        for method, paper in SSD_LATENCY_MS.items():
            head = self._cells(NOT_STATED, f"{PAPER_BOARD}, mode {NOT_STATED}", method, PAPER, SSD)
            rows.append((head, {length: f"{value:.2f}" for length, value in paper.items()}))
        table = self._over_length("ms", rows)
        note = (
            f"“{FIRST_TOKEN}” includes the whole prompt; “{PER_TOKEN}” is each further token,"
            f" sampling included; “{SSD}” is the SSD alone, known where a profile gives nine tenths"
            " of its time to modules."
        )
        return replace(table, notes=[note, PAPER_NOTE])

    def speedups(self) -> Table:
        """Against FP16 on the same board, in the same mode, for the same target and length."""
        rows: list[tuple[list[str], Mapping[int, str]]] = []
        for setup, method, points in self._each():
            gains = speedup(points, self._data.baseline(setup))
            if method == BASELINE or not gains:
                continue
            head = self._begin(setup, method)
            rows.append(([*head, "prefill"], {n: shown(g.prefill) for n, g in gains.items()}))
            decode = {n: shown(g.decode) for n, g in gains.items() if g.decode}
            if decode:
                rows.append(([*head, "decode"], decode))
        return self._over_length("times FP16", rows)

    def plan(self) -> Table:
        """Memory and bounds of each plan, and how near measured points come to them."""
        rows = []
        for plan in self._data.plans:
            timings = [
                point.timing
                for point in self._data.points
                if (point.bundle.model, point.bundle.method, point.bundle.target, point.length)
                == (plan.model, plan.method, plan.target, plan.prompt_tokens)
            ]
            first = [timing.ttft_s for timing in timings]
            later = [timing.tpot_s for timing in timings if timing.tpot_s]
            fits = {None: NOT_STATED, True: "yes", False: "no"}[plan.fits]
            rows.append(
                [
                    *(plan.model, plan.target, plan.method, fits),
                    *(shown(plan.memory.total, MB), shown(plan.room.free, MB)),
                    *(str(plan.prompt_tokens), shown(plan.prompt.seconds, MS)),
                    _share(plan.prompt.seconds, first),
                    *(shown(plan.token.seconds, MS), _share(plan.token.seconds, later)),
                ]
            )
        columns = (
            *("model", "target", "method", "fits", "memory, MB", "free, MB", "prompt"),
            *("bound, ms", "share", "token: bound, ms", "share"),
        )
        notes = dict.fromkeys(each for plan in self._data.plans for each in plan.assumptions)
        return Table(columns, rows, 4, [f"Bounds, no forecasts: {note}." for note in notes])

    def power(self) -> Table:
        """Energy per generated token, with what the board draws when idle."""
        rows, reasons = [], set()
        for setup, method, points in self._each():
            for point in points:
                if point.power is None:
                    reasons.add(f"{setup.place}: {point.power_missing}")
                else:
                    head = [*self._begin(setup, method), str(point.length)]
                    prompt = (point.j_per_prompt, point.above_idle_j_per_prompt)
                    rows.append([*head, *map(shown, prompt), *_power_row(point.power)])
        columns = (
            *(*self._head, "prompt", "J/prompt", "J/prompt above idle"),
            *("J/token", "above idle", "tokens/J", "mean, W", "idle, W"),
            *("which rails", "each rail, W", "window", "sampled"),
        )
        notes = [
            "J/token is all energy of a pass apart from the timed one, prompt included, over the"
            " tokens generated in it; “above idle” takes off what the board drew just before with"
            " nothing running. A sum of rails is not the whole board.",
            "J/prompt is that of a prompt with its answer of as many new tokens as were asked for.",
            *(f"{best}." for best in best_modes(self._data.points)),
            *(f"No power for {reason}." for reason in sorted(reasons)),
        ]
        return Table(columns, rows, len(self._head), notes)

    def memory(self) -> Table:
        """Highest over the lengths; on a Jetson CPU and GPU share it."""
        rows = []
        for setup, method, points in self._each():
            taken = [
                max((m for p in points if (m := of(p.timing)) is not None), default=None)
                for of in (process_bytes, gpu_bytes, less_available)
            ]
            cells = [shown(value, MB) for value in (*taken, points[-1].bundle.bytes)]
            rows.append([*self._begin(setup, method), *cells])
        columns = (*self._head, "process, MB", "GPU, MB", "less available, MB", "bundle, MB")
        return Table(columns, rows, len(self._head))

    def modules(self) -> Table:
        """Where the time goes: a row a phase of a profile, a column a module or a kind of block."""
        names, kinds = self._data.modules, self._data.kinds
        rows = []
        for setup in self._data.setups:
            for profile in self._data.profiles_of(setup):
                for phase in profile.phases:
                    times = {m.module: m.seconds for m in phase.modules}
                    head = [*self._begin(setup, profile.bundle.method), phase.phase]
                    cells = [shown(times.get(name), MS) for name in names]
                    of_kinds = {k.kind: k.seconds for k in phase.kinds}
                    cells += [shown(of_kinds.get(kind), MS) for kind in kinds]
                    all_ms = shown(sum(times.values()), MS)
                    rows.append([*head, str(phase.tokens), all_ms, *cells])
        headings = [f"{kind} blocks" for kind in kinds]
        columns = (*self._head, "phase", "tokens", "all, ms", *names, *headings)
        note = "Columns of blocks add up the same layers by the kind of block that they are in."
        return Table(columns, rows, len(self._head) + 1, [note] if kinds else [])

    def accuracy(self) -> Table:
        """As the evaluations give it."""
        evaluations = self._data.evaluations
        texts = list(dict.fromkeys(name for e in evaluations for name in e.perplexities))
        tasks = list(dict.fromkeys(name for e in evaluations for name in e.accuracies))
        rows = []
        for found in evaluations:
            cells = []
            for name in texts:
                value = found.perplexities.get(name)
                cells += [shown(value, digits=5), percent(found.changes.get(name))]
            cells += [shown(found.accuracies.get(name), 0.01) for name in tasks]
            rows.append([*([found.model or ABSENT] if self._models else []), found.method, *cells])
        head = [*(["model"] if self._models else []), "method"]
        columns = [part for name in texts for part in (f"{name}, perplexity", "change")]
        columns += [f"{name}, %" for name in tasks]
        notes = ["“change” is against the first row that has the text."] if texts else []
        return Table((*head, *columns), rows, len(head), notes)

    def machines(self) -> Table:
        """What each board is."""
        rows = {}
        for setup, _, points in self._each():
            last = points[-1]
            machine = last.machine
            versions = ", ".join(f"{name} {version}" for name, version in last.versions.items())
            rows[setup.place, setup.target] = [
                *(setup.place, source_of(setup), setup.target),
                (machine.board.model if machine.board else None) or machine.cpu,
                f"{machine.cores}, {shown(last.conditions.memory_mb, 1e3)} GB",
                last.conditions.l4t or ABSENT,
                machine.platform,
                last.backend,
                f"{versions}, Python {machine.python}",
            ]
        columns = (
            *("board", "source", "target", "machine", "cores, memory", "L4T", "system"),
            *("runtime", "versions"),
        )
        return Table(columns, list(rows.values()), len(columns))

    def points(self) -> Table:
        """Every point, with the spread of its repeats."""
        rows = []
        for setup, method, points in self._each():
            for point in points:
                timing = point.timing
                rows.append(
                    [
                        *self._begin(setup, method),
                        str(point.length),
                        shown(timing.ttft_s, MS),
                        between(*ttft_range(timing), MS),
                        shown(timing.tpot_s, MS),
                        shown(timing.token_p50_s, MS),
                        shown(timing.token_p95_s, MS),
                        shown(timing.tokens_per_s),
                        f"{len(timing.repeats)} × {timing.new_tokens}",
                        shown(timing.load_s),
                    ]
                )
        columns = (
            *(*self._head, "prompt", "TTFT, ms", "fastest – slowest", "per token, ms", "p50, ms"),
            *("p95, ms", "tokens/s", "runs × new tokens", "load, s"),
        )
        return Table(columns, rows, len(self._head))

    def runs(self) -> Table:
        """What was run, and when."""
        rows = [
            [*self._begin(setup, method), *_runs_row(points)]
            for setup, method, points in self._each()
        ]
        columns = (*self._head, "bundle", "engine", "runs", "date", "ssdi8-edge")
        return Table(columns, rows, len(columns))

    def conditions(self) -> Table:
        """The state of the board while each method was measured."""
        rows = [
            [*self._begin(setup, method), *_conditions_row(points)]
            for setup, method, points in self._each()
        ]
        columns = (
            *(*self._head, "SMs", "GPU, MHz", "EMC, MHz", "CPU, MHz", "pinned", "heat, °C"),
            *("over-current", "throttle alerts"),
        )
        notes = [
            "Clocks are read back while the engine ran: mean (lowest – highest) over the lengths."
            " Heat is that of the hottest sensor, at the start and at its highest. Over-current"
            " events are counted over timing and power pass."
        ]
        return Table(columns, rows, len(columns), notes)


def _power_row(used: Power) -> list[str]:
    names = " + ".join(used.total) or ABSENT
    return [
        shown(used.j_per_token),
        shown(used.above_idle_j_per_token),
        shown(used.tokens_per_j),
        shown(used.mean_w),
        shown(used.idle_w),
        f"{names} ({'module' if used.whole_module else 'sum of rails'})",
        ", ".join(f"{name} {shown(rail.mean_w)}" for name, rail in used.rails.items()),
        f"{shown(used.window_s)} s, {used.tokens} tokens",
        f"{used.source}, {shown(used.interval_s, MS)} ms",
    ]


def _runs_row(points: Sequence[Point]) -> list[str]:
    last = points[-1]
    used = last.settings
    dates = sorted(point.date for point in points)
    differs = sorted({d for p in points if p.engine for d in p.engine.differs})
    return [
        last.bundle.digest[:12],
        "; ".join([last.engine.key[:12], *differs]) if last.engine else ABSENT,
        f"{used.repeat} × {used.new_tokens} tokens, {used.warmup} warm-up",
        dates[0] if dates[0] == dates[-1] else f"{dates[0]} – {dates[-1]}",
        last.ssdi8_edge,
    ]


def _conditions_row(points: Sequence[Point]) -> list[str]:
    states = [point.conditions for point in points]
    counts = [sum(s.over_current_events.values()) for s in states if s.over_current_events]
    alerts = sorted({alert for state in states for alert in state.throttle_alerts})
    return [
        str(states[-1].sms or ABSENT),
        _clock([s.gpu_mhz for s in states]),
        _clock([s.emc_mhz for s in states]),
        _clock([s.cpu_mhz for s in states]),
        _pinned([state.clocks_pinned for state in states]),
        _heat(points),
        str(sum(counts)) if counts else ABSENT,
        ", ".join(alerts) or ABSENT,
    ]


def _pinned(states: Sequence[bool | None]) -> str:
    kinds = set(states)
    if len(kinds) > 1:
        return "partly"
    return {True: "yes", False: "no", None: ABSENT}[kinds.pop()]


def _clock(ranges: Sequence[Range | None]) -> str:
    known = [r for r in ranges if r is not None]
    if not known:
        return ABSENT
    mean = statistics.fmean(r.mean for r in known)
    low, high = min(r.low for r in known), max(r.high for r in known)
    spread = "" if low == high else f" ({low:.0f} – {high:.0f})"
    return f"{mean:.0f}{spread}"


def _heat(points: Sequence[Point]) -> str:
    starts = [max(c.values()) for p in points if (c := p.conditions.temperature_start_c)]
    tops = [max(c.values()) for p in points if (c := p.conditions.temperature_highest_c)]
    if not starts and not tops:
        return ABSENT
    return f"{shown(min(starts, default=None))} → {shown(max(tops, default=None))}"


def _share(bound: float | None, measured: Sequence[float]) -> str:
    """A bound over the shortest measured time."""
    return ABSENT if bound is None or not measured else f"{bound / min(measured):.0%}"
