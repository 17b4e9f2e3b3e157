"""The page: sections of charts and tables, in one file that asks nothing of a network."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssdi8_edge import __version__
from ssdi8_edge.report.drawing import Drawing, Figure
from ssdi8_edge.report.sources import Measurements
from ssdi8_edge.report.tables import PAPER, SIMULATED, Table, Tables


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str
    figures: list[Figure] = field(default_factory=list)
    table: Table | None = None


def render(data: Measurements) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = sections(data)
    simulated = sorted({s.board for s in data.setups if s.simulated})
    return environment.get_template("page.html.j2").render(
        sections=found,
        simulated_boards=simulated,
        facts=_facts(data),
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        simulated=SIMULATED,
        paper=PAPER,
    )


def sections(data: Measurements) -> list[Section]:
    """All that there is something to say in."""
    draw, tables = Drawing(data), Tables(data)
    everything = [
        Section(
            "summary",
            "Speed, energy, memory and accuracy",
            "One row per method, at the longest prompt that all methods of its board have.",
            [],
            tables.summary(),
        ),
        Section(
            "latency",
            "Latency against prompt length",
            "Median over the repeats; whiskers reach from the fastest to the slowest.",
            draw.latency(),
            tables.latency(),
        ),
        Section(
            "speedup",
            "Speed-up over FP16",
            "Against FP16 on the same board, in the same mode and at the same length.",
            draw.speedup(),
            tables.speedups(),
        ),
        Section(
            "plan",
            "Plan and bounds",
            "What was planned before anything was built; shares say how near to its bound the "
            "fastest measured point of the same model, method, target and length comes.",
            [],
            tables.plan(),
        ),
        Section(
            "modules",
            "Where the time goes",
            "Per module of the network, summed over layers, for the whole prompt and for one "
            "further token. Layers are timed one by one, so that the sum is more than a run takes.",
            draw.modules(),
            tables.modules(),
        ),
        Section(
            "power",
            "Power and energy",
            "From a pass of its own, so that reading the sensors does not disturb the timing.",
            draw.power(),
            tables.power(),
        ),
        Section(
            "memory",
            "Memory",
            "Highest resident memory of the process, and what it holds on the GPU, in MB.",
            draw.memory(),
            tables.memory(),
        ),
        Section(
            "accuracy",
            "Accuracy beside speed",
            "Perplexity is of the first text; the columns say which windows of a text were read.",
            draw.accuracy(),
            tables.accuracy(),
        ),
        Section("machines", "Machines", "What the boards are.", [], tables.machines()),
        Section("points", "All points", "With the spread of the repeats.", [], tables.points()),
        Section("runs", "Runs", "What was run, how often and when.", [], tables.runs()),
        Section(
            "conditions",
            "Conditions",
            "How the board was while the engine ran.",
            [],
            tables.conditions(),
        ),
    ]
    return [s for s in everything if s.figures or (s.table and (s.table.rows or s.table.notes[1:]))]


def _facts(data: Measurements) -> list[str]:
    boards = sorted({s.board for s in data.setups})
    models = sorted({s.model for s in data.setups})
    facts = [
        f"{len(data.points)} points",
        f"{len(boards)} {'board' if len(boards) == 1 else 'boards'}: {', '.join(boards)}",
        f"{'model' if len(models) == 1 else 'models'}: {', '.join(models)}",
    ]
    if data.superseded:
        facts.append(f"{data.superseded} points that were measured again later are left out")
    return facts
