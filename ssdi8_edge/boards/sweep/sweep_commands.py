"""What a sweep asks of a board: what to read there, and the plan for board/measure.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ssdi8_edge.boards.points.records import Settings

INTERVAL_S = 0.1
IDLE_S = 3.0
LIMIT_S = 3600.0

_THERMAL = (
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
)
# The GPU of an Orin is ga10b in JetPack 5 and gpu later.
GPU_CLOCKS = (
    "/sys/devices/platform/17000000.gpu/devfreq_dev/cur_freq",
    "/sys/devices/17000000.ga10b/devfreq/17000000.ga10b/cur_freq",
    "/sys/class/devfreq/17000000.gpu/cur_freq",
)
EMC_CLOCK = "/sys/kernel/debug/bpmp/debug/clk/emc/rate"  # root only
CPU_CLOCK = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
_CLOCKS = (*GPU_CLOCKS, EMC_CLOCK, CPU_CLOCK)
_POWER = (
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/in[1-3]_label",
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/in[1-3]_input",
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/curr[1-3]_input",
)
NVPMODEL_CONF = "/etc/nvpmodel.conf"
L4T_RELEASE = "/etc/nv_tegra_release"
MEMINFO = "/proc/meminfo"
BOOT_ID = "/proc/sys/kernel/random/boot_id"  # another one after every boot

QUERY, MODES, SHOW = "query", "modes", "show"

# `files` are read before and after a point, `clocks` each second of the timing pass, and with
# `power` ten times a second of the power pass. A command is (needs root, argv).
READING: dict[str, Any] = {
    "files": [
        *(NVPMODEL_CONF, L4T_RELEASE, MEMINFO, BOOT_ID),
        *_THERMAL,
        *_CLOCKS,
        "/sys/class/thermal/cooling_device*/type",
        "/sys/class/thermal/cooling_device*/cur_state",
        "/sys/devices/platform/soctherm-oc-event/hwmon/hwmon*/oc*_event_cnt",
    ],
    "clocks": [*_CLOCKS, *_THERMAL],
    "power": list(_POWER),
    "commands": {
        QUERY: (False, ["nvpmodel", "-q"]),
        MODES: (False, ["nvpmodel", "-p", "--verbose"]),
        SHOW: (True, ["jetson_clocks", "--show"]),
    },
}


class Installed(NamedTuple):
    """A bundle on a board: its folder, and the interpreter that runs it."""

    folder: str
    python: str


def _plan(
    tag: str, where: Installed, timing: Sequence[str], power: Sequence[str] = ()
) -> dict[str, Any]:
    engine = [where.python, f"{where.folder}/run_engine.py"]
    return {
        "tag": tag,
        "folder": where.folder,
        "timing": [*engine, *timing],
        "power": [*engine, *power] if power else None,
        "idle_s": IDLE_S,
        "interval_s": INTERVAL_S,
        "limit_s": LIMIT_S,
    }


def point_plan(tag: str, where: Installed, length: int, settings: Settings) -> dict[str, Any]:
    """A point as board/measure.py wants it: the timing pass, and the power pass apart from it.

    Args:
        tag: comes back with the answer.
    """
    common = ["--bench", "--seq-lens", str(length), "--new-tokens", str(settings.new_tokens)]
    timing = [*common, "--repeat", str(settings.repeat), "--warmup", str(settings.warmup)]
    power = [*common, "--repeat", "1", "--warmup", "1"]
    power += ["--seconds", f"{settings.power_seconds:g}"]
    return _plan(tag, where, timing, power if settings.power_seconds else ())


def profile_plan(where: Installed, length: int, repeat: int) -> dict[str, Any]:
    """A profile, as the timing pass of a point without a power pass."""
    arguments = ["--profile", "--json", "--seq-lens", str(length), "--repeat", str(repeat)]
    return _plan("profile", where, arguments)


def call_arguments(
    holder: str,
    modes: Sequence[Mapping[str, Any]] = (),
    *,
    wait_s: float = 0.0,
    keep_changes: bool = False,
    allow_reboot: bool = False,
    allow_unrestored: bool = False,
) -> dict[str, Any]:
    """Arguments of board/measure.py.

    Args:
        holder: what others are told who want the board meanwhile.
        modes: each {"name", "id", "pin_clocks", "points"}; none only looks, and puts back what a
            killed sweep left changed.
        wait_s: for the lock.
        keep_changes: leave what is to be put back for the end, after a reboot in the middle.
        allow_unrestored: change also what the board will not be able to put back.
    """
    return {
        "holder": holder,
        "wait_s": wait_s,
        "keep_changes": keep_changes,
        "allow_reboot": allow_reboot,
        "allow_unrestored": allow_unrestored,
        "reading": READING,
        "modes": list(modes),
    }
