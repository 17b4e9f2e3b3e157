"""What a board is and has, read without changing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ssdi8_edge.boards.facts.gather import gather
from ssdi8_edge.boards.facts.interpreter import (
    Interpreter,
    chosen,
    interpreter_of,
    question,
    questions,
)
from ssdi8_edge.boards.facts.power_modes import current_mode, offered_modes
from ssdi8_edge.boards.facts.telemetry import (
    ina3221_rails_w,
    l4t_release,
    largest_block_mb,
    memory_holders,
    memory_mb,
    mhz_of,
    over_current_counts,
    thermal_zones_c,
    throttle_alerts,
)
from ssdi8_edge.boards.link.connection import Connection

# Part number -> SMs with all of them powered. All are Tegra234, of compute capability 8.7.
MODULE_SMS = {
    "p3767-0000": 8,
    "p3767-0001": 8,
    "p3767-0003": 8,
    "p3767-0004": 4,
    "p3767-0005": 8,
    "p3701-0000": 16,
    "p3701-0004": 14,
    "p3701-0005": 16,
}
JETPACKS = {
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.2": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
# Of one chip: 2 SMs are gated by a set bit of the mask.
TPCS = 8
SMS_PER_TPC = 2

_GPU = "/sys/devices/platform/17000000.gpu/devfreq_dev"
_GPU_5 = "/sys/devices/17000000.ga10b/devfreq/17000000.ga10b"
_CPU = "/sys/devices/system/cpu/cpu0/cpufreq"
_FILES = (
    "/proc/device-tree/model",
    "/proc/device-tree/compatible",
    "/proc/meminfo",
    "/proc/buddyinfo",
    "/proc/cpuinfo",
    "/etc/nv_tegra_release",
    "/etc/nvpmodel.conf",
    "/usr/local/cuda/version.json",
    f"{_GPU}/*_freq",
    f"{_GPU_5}/*_freq",
    f"{_CPU}/scaling_*_freq",
    "/sys/kernel/nvpmodel_clk_cap/emc",
    "/sys/devices/platform/gpu.0/tpc_pg_mask",
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/in*_label",
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/in*_input",
    "/sys/bus/i2c/devices/*/hwmon/hwmon*/curr*_input",
    "/sys/devices/platform/soctherm-oc-event/hwmon/hwmon*/oc*_event_cnt",
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/thermal/cooling_device*/type",
    "/sys/class/thermal/cooling_device*/cur_state",
)
_NAMES = (
    "/usr/lib/*/libnvinfer.so.*",
    "/usr/lib/libnvinfer.so.*",
    "/usr/local/cuda/bin/nvcc",
    "/usr/include/*/NvInfer.h",
    "/usr/include/NvInfer.h",
)
MODULES = ("numpy", "onnxruntime", "tokenizers", "tensorrt", "pycuda")
TOOLS = ("cmake", "g++", "nvpmodel", "tegrastats", "jetson_clocks")


@dataclass(frozen=True)
class BoardFacts:
    """A board as it is now; None and empty where it does not say.

    Attributes:
        simulated: the numbers are those of fakes.
        part: number of the module, such as p3767-0000.
        sms: that are powered in the current mode.
        root: whether `sudo` works without a password.
        python: that runs portable bundles.
        system_python: python3, whose tensorrt module builds and runs engines.
        largest_block_mb: of free memory that lies in one piece.
        memory_holders_mb: resident memory of the programs that hold most.
    """

    simulated: bool
    model: str | None
    part: str | None
    cpu: str | None
    machine: str | None
    kernel: str | None
    l4t: str | None
    jetpack: str | None
    cuda: str | None
    nvcc: bool
    tensorrt: str | None
    tensorrt_headers: bool
    python: Interpreter
    system_python: Interpreter
    tools: Sequence[str]
    root: bool
    power_mode: str | None
    power_modes: Sequence[str]
    sms: int | None
    gpu_mhz: float | None
    gpu_max_mhz: float | None
    cpu_mhz: float | None
    cpu_max_mhz: float | None
    emc_max_mhz: float | None
    memory_mb: float | None
    memory_free_mb: float | None
    swap_mb: float | None
    disk_free_mb: float
    swap_free_mb: float | None = None
    largest_block_mb: float | None = None
    memory_holders_mb: Mapping[str, float] = field(default_factory=dict)
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    rails_w: Mapping[str, float] = field(default_factory=dict)
    over_current_events: Mapping[str, int] = field(default_factory=dict)
    throttle_alerts: Sequence[str] = ()

    @property
    def is_jetson(self) -> bool:
        """Whether it says that it is one."""
        return self.l4t is not None


def read_facts(connection: Connection) -> BoardFacts:
    """Ask a board what it is.

    Raises:
        BoardError: it cannot be reached, or answers rubbish.
    """
    tools = {
        **questions(connection, MODULES),
        "python3": question("python3", MODULES),
        "mode": ["nvpmodel", "-q"],
        "modes": ["nvpmodel", "-p", "--verbose"],
        "root": ["sudo", "-n", "true"],
        "uname": ["uname", "-mr"],
        "processes": ["ps", "-eo", "rss=,comm="],
        **{tool: ["sh", "-c", f"command -v {tool}"] for tool in TOOLS},
    }
    found = gather(connection, _FILES, _NAMES, tools)
    files = found.files
    l4t = l4t_release(files.get("/etc/nv_tegra_release", ""))
    kernel, _, machine = found.tools.get("uname", "").strip().partition(" ")
    modes = offered_modes(files.get("/etc/nvpmodel.conf", ""), found.tools.get("modes", ""))
    mode = current_mode(found.tools.get("mode", ""), modes)
    clocks = _clocks(files)
    memory = memory_mb(files.get("/proc/meminfo", ""))
    return BoardFacts(
        simulated=found.simulated,
        model=files.get("/proc/device-tree/model", "").strip("\0\n ") or None,
        part=_first(r"p\d{4}-\d{4}(?!.*p\d{4}-\d{4})", _compatible(files)),
        cpu=_first(r"(?m)^model name\s*:\s*(.+)$", files.get("/proc/cpuinfo", "")),
        machine=machine or None,
        kernel=kernel or None,
        l4t=l4t,
        jetpack=JETPACKS.get(l4t or ""),
        cuda=_first(
            r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"',
            files.get("/usr/local/cuda/version.json", ""),
        ),
        nvcc=any(name.endswith("/nvcc") for name in found.names),
        tensorrt=_tensorrt(found.names),
        tensorrt_headers=any(name.endswith("/NvInfer.h") for name in found.names),
        python=chosen(connection, found.tools),
        system_python=interpreter_of("python3", found.tools),
        tools=[tool for tool in TOOLS if tool in found.tools and tool not in found.failed],
        root="root" in found.tools and "root" not in found.failed,
        power_mode=mode.name if mode else None,
        power_modes=[mode.name for mode in modes.modes],
        sms=_powered_sms(files.get("/sys/devices/platform/gpu.0/tpc_pg_mask")),
        gpu_mhz=clocks.get("cur_freq"),
        gpu_max_mhz=clocks.get("max_freq"),
        cpu_mhz=mhz_of(files.get(f"{_CPU}/scaling_cur_freq"), 1e3),
        cpu_max_mhz=mhz_of(files.get(f"{_CPU}/scaling_max_freq"), 1e3),
        emc_max_mhz=mhz_of(files.get("/sys/kernel/nvpmodel_clk_cap/emc")),
        memory_mb=memory.get("MemTotal"),
        memory_free_mb=memory.get("MemAvailable"),
        swap_mb=memory.get("SwapTotal"),
        disk_free_mb=found.disk["free"] / 1e6,
        swap_free_mb=memory.get("SwapFree"),
        largest_block_mb=largest_block_mb(files.get("/proc/buddyinfo", "")),
        memory_holders_mb=memory_holders(found.tools.get("processes", "")),
        temperatures_c=thermal_zones_c(files),
        rails_w=ina3221_rails_w(files),
        over_current_events=over_current_counts(files),
        throttle_alerts=throttle_alerts(files),
    )


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[found.re.groups].strip() if found else None


def _compatible(files: Mapping[str, str]) -> str:
    return files.get("/proc/device-tree/compatible", "").replace("\0", "\n")


def _clocks(files: Mapping[str, str]) -> dict[str, float]:
    clocks = {}
    for folder in (_GPU_5, _GPU):
        for name in ("cur_freq", "max_freq"):
            mhz = mhz_of(files.get(f"{folder}/{name}"))
            if mhz is not None:
                clocks[name] = mhz
    return clocks


def _tensorrt(names: Sequence[str]) -> str | None:
    """The most exact version that a library's name carries: libnvinfer.so.10.3.0."""
    found = [re.search(r"libnvinfer\.so\.(\d+(?:\.\d+)*)$", name) for name in names]
    versions = [match[1] for match in found if match]
    return max(versions, key=lambda v: (v.count("."), _numbers(v)), default=None)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _powered_sms(mask: str | None) -> int | None:
    try:
        gated = bin(int(mask or "", 0) & ((1 << TPCS) - 1)).count("1")
    except ValueError:
        return None
    return (TPCS - gated) * SMS_PER_TPC
