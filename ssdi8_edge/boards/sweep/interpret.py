"""From what board/measure.py answers to a point: times, power, and the state of the board."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssdi8_edge import __version__
from ssdi8_edge.boards.facts import telemetry
from ssdi8_edge.boards.facts.energy import NoEnergy, energy_j
from ssdi8_edge.boards.facts.power_modes import (
    Mode,
    Modes,
    clock_limits,
    current_mode,
    offered_modes,
    parse_jetson_clocks,
)
from ssdi8_edge.boards.points.records import (
    Bench,
    Bundle,
    Conditions,
    LayerProfile,
    Point,
    Power,
    Profile,
    Rail,
    Range,
    Repeat,
    Settings,
    Timing,
    plain,
)
from ssdi8_edge.boards.sweep.sweep_commands import (
    CPU_CLOCK,
    EMC_CLOCK,
    GPU_CLOCKS,
    L4T_RELEASE,
    MEMINFO,
    MODES,
    NVPMODEL_CONF,
    QUERY,
    SHOW,
)

FEWEST_IDLE_SAMPLES = 3

Files = Mapping[str, str]


class PointFailed(Exception):
    """A point was not measured; the message is a clause that says why."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class State(_Answer):
    """What the board tells at the start, and in each mode."""

    files: dict[str, str]
    commands: dict[str, str]
    simulated: bool

    @property
    def mode(self) -> Mode | None:
        """The current power mode; None on a machine that has none, or does not tell it."""
        return current_mode(self.commands.get(QUERY, ""), self.modes)

    @property
    def modes(self) -> Modes:
        """What there is to choose from."""
        return offered_modes(self.files.get(NVPMODEL_CONF, ""), self.commands.get(MODES, ""))

    @property
    def clocks(self) -> tuple[str, ...] | None:
        """Limits of all clocks; None where they cannot be read."""
        return clock_limits(self.commands.get(SHOW, ""))


class Samples(_Answer):
    """Texts of files, in the order of `paths`, and lines of tegrastats, each with its time in s."""

    paths: list[str]
    values: list[tuple[float, list[str | None]]]
    lines: list[tuple[float, str]]
    interval_s: float = Field(gt=0)

    def readings(self) -> Iterable[tuple[float, Files]]:
        """(time, path -> text), without files that could not be read just then."""
        for at, texts in self.values:
            pairs = zip(self.paths, texts, strict=False)
            yield at, {path: text for path, text in pairs if text is not None}


class Run(_Answer):
    """One run of the engine."""

    exit: int
    stdout: str
    stderr: str
    samples: Samples | None


class Measurement(_Answer):
    """What a point answers."""

    idle: Samples | None
    timing: Run
    power: Run | None
    before: dict[str, str]
    after: dict[str, str]


def to_point(
    answer: object,
    bundle: Bundle,
    key: str,
    board: str,
    state: State,
    length: int,
    settings: Settings,
) -> Point:
    """A point from the answer of the board.

    Args:
        key: of the bundle, from its manifest; what ran has to be it.
        board: as given to --host.
        state: as read in the mode of the point.

    Raises:
        PointFailed: the engine failed, or what came is not what was asked for.
    """
    try:
        found = Measurement.model_validate(answer)
    except ValidationError as error:
        raise PointFailed(f"the board's answer makes no sense ({_first(error)})") from error
    bench = _bench(found.timing, key, length, settings)
    power, missing = _power(found, key, length, settings)
    simulated = {"kind": "simulated"} if state.simulated else {}
    return Point(
        bundle=bundle,
        board=plain(board),
        mode=state.mode.name if state.mode else None,
        length=length,
        machine=bench.machine.model_copy(update=simulated),
        backend=bench.backend,
        versions=bench.versions,
        engine=bench.engine,
        conditions=_conditions(found, state),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        ssdi8_edge=__version__,
        settings=settings,
        timing=Timing.model_validate(bench.model_dump()),
        power=power,
        power_missing=missing,
    )


def to_profile(
    run: Run, bundle: Bundle, key: str, board: str, state: State, length: int
) -> Profile:
    """A profile from one run of `run_engine.py --profile --json`.

    Raises:
        PointFailed: as for a point.
    """
    found = _parse(LayerProfile, _output(run))
    if found.key != key:
        raise PointFailed("the board profiled another bundle")
    simulated = {"kind": "simulated"} if state.simulated else {}
    return Profile(
        bundle=bundle,
        board=plain(board),
        mode=state.mode.name if state.mode else None,
        length=length,
        machine=found.machine.model_copy(update=simulated),
        backend=found.backend,
        versions=found.versions,
        engine=found.engine,
        conditions=_static_conditions(state),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        ssdi8_edge=__version__,
        phases=found.phases,
    )


# --------------------------------------------------------------------------------------------------
# times


def _output(run: Run) -> str:
    """Standard output of a run that ended well."""
    if run.exit == 0 and run.stdout.strip():
        return run.stdout
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("run_engine: ") if lines else f"exit status {run.exit}"
    raise PointFailed(plain(reason).rstrip("."))


def _bench(run: Run, key: str, length: int, settings: Settings) -> Bench:
    bench = _parse(Bench, _output(run).splitlines()[-1])
    if bench.key != key:
        raise PointFailed("the board ran another bundle")
    if (bench.prompt_tokens, bench.new_tokens) != (length, settings.new_tokens):
        raise PointFailed("the board measured another length than it was asked for")
    return bench


T = TypeVar("T", Bench, LayerProfile)


def _parse(model: type[T], text: str) -> T:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        reason = f"run_engine.py printed what makes no sense ({_first(error)})"
        raise PointFailed(plain(reason)) from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])


# --------------------------------------------------------------------------------------------------
# power


def _power(
    found: Measurement, key: str, length: int, settings: Settings
) -> tuple[Power | None, str | None]:
    """Power of the pass apart from the timed one, or why there is none."""
    if not settings.power_seconds:
        return None, "not asked for"
    if found.idle is None or found.power is None or found.power.samples is None:
        return None, "no power sensor can be read there (neither INA3221 nor tegrastats)"
    try:
        bench = _bench(found.power, key, length, settings)
        return _energy(bench.repeats, bench.new_tokens, found.power.samples, found.idle), None
    except (PointFailed, NoEnergy) as error:
        return None, plain(f"the power pass gave none: {error}")


def _energy(repeats: Sequence[Repeat], new_tokens: int, samples: Samples, idle: Samples) -> Power:
    source, series = _rails(samples)
    windows = [(repeat.start_s, repeat.end_s) for repeat in repeats]
    seconds = sum(end - start for start, end in windows)
    joules = {
        rail: sum(energy_j(values, start, end, samples.interval_s) for start, end in windows)
        for rail, values in series.items()
    }
    if not joules:
        raise NoEnergy("no rail was read")
    total, whole = telemetry.total_rails(joules)
    tokens = new_tokens * len(repeats)
    energy = sum(joules[rail] for rail in total) if total else None
    idle_w = _idle_w(idle, total)
    return Power(
        source=source,
        interval_s=samples.interval_s,
        window_s=seconds,
        tokens=tokens,
        rails={rail: Rail(mean_w=j / seconds, energy_j=j) for rail, j in joules.items()},
        total=list(total),
        whole_module=whole,
        mean_w=None if energy is None else energy / seconds,
        idle_w=idle_w,
        j_per_token=None if energy is None else energy / tokens,
        above_idle_j_per_token=None
        if energy is None or idle_w is None
        else (energy - idle_w * seconds) / tokens,
    )


def _rails(
    samples: Samples,
) -> tuple[Literal["ina3221", "tegrastats"], dict[str, list[tuple[float, float]]]]:
    """Source, and rail -> (time, W): from the monitor's own files where there are any."""
    series: dict[str, list[tuple[float, float]]] = {}
    for at, files in samples.readings():
        for rail, watts in telemetry.ina3221_rails_w(files).items():
            series.setdefault(rail, []).append((at, watts))
    if series:
        return "ina3221", series
    for at, line in samples.lines:
        parsed = telemetry.parse_tegrastats(line)
        for rail, watts in (parsed.rails_w if parsed else {}).items():
            series.setdefault(rail, []).append((at, watts))
    return "tegrastats", series


def _idle_w(idle: Samples, total: Sequence[str]) -> float | None:
    """Mean of the same sum with nothing running."""
    _, series = _rails(idle)
    if not total or any(len(series.get(rail, [])) < FEWEST_IDLE_SAMPLES for rail in total):
        return None
    return sum(statistics.fmean(watts for _, watts in series[rail]) for rail in total)


# --------------------------------------------------------------------------------------------------
# conditions


def _static_conditions(state: State) -> Conditions:
    clocks = parse_jetson_clocks(state.commands.get(SHOW, ""))
    memory = telemetry.memory_mb(state.files.get(MEMINFO, ""))
    return Conditions(
        mode_id=state.mode.id if state.mode else None,
        sms=clocks.sms,
        clocks_pinned=clocks.pinned,
        temperature_start_c=telemetry.thermal_zones_c(state.files),
        l4t=telemetry.l4t_release(state.files.get(L4T_RELEASE, "")),
        memory_mb=memory.get("MemTotal"),
    )


def _conditions(found: Measurement, state: State) -> Conditions:
    """With what was read while the engine ran: in the timing pass, else in the power pass."""
    timed = found.timing.samples
    powered = found.power.samples if found.power else None
    readings = [files for _, files in timed.readings()] if timed else []
    lines = [telemetry.parse_tegrastats(line) for _, line in powered.lines] if powered else []
    parsed = [line for line in lines if line]
    hot = [*readings, found.after]
    if powered:
        hot += [files for _, files in powered.readings()]
    zones = [telemetry.thermal_zones_c(files) for files in hot]
    counts = [telemetry.over_current_counts(files) for files in (found.before, found.after)]
    alerts = {a for files in (found.before, found.after) for a in telemetry.throttle_alerts(files)}
    gpu = [_first_clock(files, GPU_CLOCKS) for files in readings]
    emc = [_first_clock(files, (EMC_CLOCK,)) for files in readings]
    changes = {
        "gpu_mhz": _range(gpu) or _range([max(line.gpu_mhz, default=None) for line in parsed]),
        "emc_mhz": _range(emc) or _range([line.emc_mhz for line in parsed]),
        "cpu_mhz": _range([telemetry.mhz_of(files.get(CPU_CLOCK), 1e3) for files in readings]),
        "temperature_start_c": telemetry.thermal_zones_c(found.before),
        "temperature_highest_c": {
            zone: max(each[zone] for each in zones if zone in each)
            for zone in {zone for each in zones for zone in each}
        },
        "over_current_events": telemetry.count_difference(*counts),
        "throttle_alerts": sorted(alerts),
    }
    return _static_conditions(state).model_copy(update=changes)


def _first_clock(files: Files, paths: Sequence[str]) -> float | None:
    clocks = (telemetry.mhz_of(files.get(path)) for path in paths)
    return next((mhz for mhz in clocks if mhz is not None), None)


def _range(values: Iterable[float | None]) -> Range | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Range(mean=statistics.fmean(known), low=min(known), high=max(known))
