"""Commands that run a bundle on this machine: run, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssdi8_edge.cli.options import DeviceOption
from ssdi8_edge.cli.this_machine import run_engine_here


def run(context: typer.Context) -> None:
    """Generate text on this machine, with the script that runs on boards."""
    from ssdi8_edge.ground.board_runtime import parse_run

    asked = parse_run(context.args)
    run_engine_here(asked.bundle, asked.arguments, asked.device)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    device: DeviceOption = "cpu",
) -> None:
    """Check a bundle's hashes and compare it with its golden vectors on this machine."""
    run_engine_here(bundle, ["--verify"], device)
