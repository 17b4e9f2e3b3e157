"""The name of this machine and the state of its board: no number is shown without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GPU_MAX_HZ = (  # JetPack 6 and 7; JetPack 5
    "sys/devices/platform/17000000.gpu/devfreq_dev/max_freq",
    "sys/class/devfreq/17000000.gpu/max_freq",
    "sys/devices/17000000.ga10b/devfreq/17000000.ga10b/max_freq",
)
EMC_CAP_HZ = ("sys/kernel/nvpmodel_clk_cap/emc", "sys/kernel/nvpmodel_emc_cap/emc_iso_cap")
NVPMODEL_SECONDS = 10  # it may stall while the power daemon starts


@dataclass(frozen=True)
class Board:
    """A Jetson's own facts; None where one cannot be read. Frequencies in Hz."""

    model: str | None
    l4t: str | None  # such as 36.4.3
    power_mode: str | None  # by name: ids mean different modes on different boards
    gpu_max_hz: int | None
    emc_cap_hz: int | None


@dataclass(frozen=True)
class Machine:
    """Where something ran."""

    kind: str  # "jetson"; "simulated": a Jetson's tools answer, but this is none; "other"
    platform: str
    cpu: str
    cores: int
    python: str
    board: Board | None  # of a machine of the first two kinds

    def __str__(self) -> str:
        simulated = "SIMULATED board on " if self.kind == "simulated" else ""
        mode = self.board.power_mode if self.board else None
        return f"{simulated}{self.cpu}, {self.cores} cores, {self.platform}" + (
            f", power mode {mode}" if mode else ""
        )


def this_machine(root: Path = Path("/")) -> Machine:
    """Board or processor model, cores, operating system, Python and power mode.

    `root`: where /proc, /sys and /etc lie.
    """
    # Only a kernel on the real thing has this entry; programs called nvpmodel can be anywhere.
    tegra = "nvidia,tegra" in _read(root, ["proc/device-tree/compatible"])
    kind = "jetson" if tegra else "simulated" if shutil.which("nvpmodel") else "other"
    model = _read(root, ["proc/device-tree/model"])
    return Machine(
        kind=kind,
        platform=platform.platform(),
        cpu=model or _cpu_model(root) or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        board=None if kind == "other" else _board(root, model),
    )


def available_memory(root: Path = Path("/")) -> int | None:
    """MemAvailable in bytes."""
    return _kilobytes(_read(root, ["proc/meminfo"]), "MemAvailable")


def swap_free(root: Path = Path("/")) -> int:
    """SwapFree in bytes."""
    return _kilobytes(_read(root, ["proc/meminfo"]), "SwapFree") or 0


def process_memory() -> tuple[int | None, int | None]:
    """Resident memory of this process, and the most it ever was, in bytes."""
    status = _read(Path("/"), ["proc/self/status"])
    return _kilobytes(status, "VmRSS"), _kilobytes(status, "VmHWM")


def _board(root: Path, model: str) -> Board:
    release = re.search(
        r"R(\d+)\s*\(release\).*?REVISION:\s*([\d.]+)", _read(root, ["etc/nv_tegra_release"])
    )
    return Board(
        model=model or None,
        l4t=".".join(release.groups()) if release else None,
        power_mode=_power_mode(),
        gpu_max_hz=_whole(_read(root, GPU_MAX_HZ)),
        emc_cap_hz=_whole(_read(root, EMC_CAP_HZ)),
    )


def _power_mode() -> str | None:
    """What `nvpmodel -q` says, whatever it warns of beside it; asking needs no root."""
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVPMODEL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(?im)^[ \t]*NV Power Mode:[ \t]*(\S[^\r\n]{0,63}?)\s*$", done.stdout)
    return found.group(1) if found else None


def _cpu_model(root: Path) -> str:
    for line in _read(root, ["proc/cpuinfo"]).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _read(root: Path, places: Iterable[str]) -> str:
    """The first of `places` that can be read; empty where none can."""
    for place in places:
        try:
            return (root / place).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            continue
    return ""


def _kilobytes(text: str, key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None
