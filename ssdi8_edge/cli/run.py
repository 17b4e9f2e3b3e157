"""Commands that run a bundle on this machine: run, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ssdi8_edge.cli.options import DeviceOption
from ssdi8_edge.ground.inputs import expanded

# Of `run`: the runtime's own parser reads what follows the name, so that both command lines take
# the same.
PASSED_ON = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
}


def run(context: typer.Context) -> None:
    """Generate text on this machine, with the script that runs on boards."""
    from ssdi8_edge.ground.board_runtime import parse_run

    asked = parse_run(context.args)
    _run_engine(asked.bundle, asked.arguments, asked.device)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    device: DeviceOption = "cpu",
) -> None:
    """Check a bundle's hashes and compare it with its golden vectors on this machine."""
    _run_engine(bundle, ["--verify"], device)


def _run_engine(bundle: Path, arguments: list[str], device: str) -> NoReturn:
    bundle = expanded(bundle)
    if device == "cpu":
        from ssdi8_edge.ground.board_runtime import become_engine

        become_engine(bundle, ["--backend", "onnxruntime", *arguments])
    from ssdi8_edge.local.gpu_backend import run_on_gpu

    raise typer.Exit(run_on_gpu(bundle, arguments, device))
