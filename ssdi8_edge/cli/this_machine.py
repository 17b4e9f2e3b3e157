"""Running the script that runs on boards, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer

from ssdi8_edge.ground.inputs import expanded


def run_engine_here(bundle: Path, arguments: list[str], device: str) -> NoReturn:
    """End as run_engine.py ends: on the CPU this process becomes it."""
    bundle = expanded(bundle)
    if device == "cpu":
        from ssdi8_edge.ground.board_runtime import become_engine

        become_engine(bundle, ["--backend", "onnxruntime", *arguments])
    from ssdi8_edge.local.gpu_backend import run_on_gpu

    raise typer.Exit(run_on_gpu(bundle, arguments, device))
