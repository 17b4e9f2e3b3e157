"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ssdi8_edge.ground.console import human
from ssdi8_edge.ground.inputs import expanded


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="What sweep, profile, plan --json and evaluate --json wrote, or folders of them."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The page, one file that needs no network.")
    ] = Path("report.html"),
    csv: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
        typer.Option(help="Also every point as a row, in SI units."),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also the tables."),
    ] = None,
) -> None:
    """Put measurements on one page: latency, speed-up, modules, power, memory, accuracy."""
    from ssdi8_edge.ground.artifacts import whole_or_absent
    from ssdi8_edge.report.exports import to_csv, to_markdown
    from ssdi8_edge.report.page import render
    from ssdi8_edge.report.sources import load

    data = load(map(expanded, runs))
    texts = {out: render(data)}
    if csv is not None:
        texts[csv] = to_csv(data)
    if markdown is not None:
        texts[markdown] = to_markdown(data)
    for path, text in texts.items():
        with whole_or_absent(expanded(path)) as scratch:
            scratch.write_text(text, encoding="utf-8")
        human.print(f"wrote {path}")
