"""The name of this machine: no number is shown without it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Where something ran."""

    platform: str
    cpu: str
    cores: int
    python: str

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {self.platform}"


def this_machine() -> Machine:
    """Board or processor model, cores, operating system and Python."""
    return Machine(
        platform=platform.platform(),
        cpu=_board_model() or _cpu_model() or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
    )


def _board_model() -> str:
    """The board's own name where the kernel has a device tree, as on a Jetson."""
    path = Path("/proc/device-tree/model")
    return path.read_text(encoding="utf-8").strip("\0\n ") if path.is_file() else ""


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""
