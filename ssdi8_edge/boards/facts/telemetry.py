"""Reads what a Jetson tells about itself: tegrastats, INA3221 rails, clocks, heat, throttling.

Pure functions on text. They never raise on rubbish: a value that is not there, or is no number, is
absent (None, or left out of the mapping) and never 0. Wording differs between JetPack releases;
unknown words of a line are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# Digits are bounded, so that no text becomes an infinite number; \d would match every script.
_NUMBER = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"
_COUNT = r"[0-9]{1,9}"

_RAM = re.compile(rf"\bRAM ({_COUNT})/({_COUNT})MB")
_LARGEST_BLOCK = re.compile(rf"\(lfb ({_COUNT})x({_COUNT})([kM])B\)")
_SWAP = re.compile(rf"\bSWAP ({_COUNT})/({_COUNT})MB")
_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(rf"({_COUNT})%(?:@({_COUNT}))?")
# NVIDIA's own description has blanks that its tool does not print: `12 %@[1300, 1290]`.
_LOAD = rf"(?: ({_COUNT}) ?%)?"
_GPU = re.compile(rf"\bGR3D2?_FREQ{_LOAD}(?: ?@ ?(?:({_COUNT})|\[([0-9, ]{{1,64}})\]))?")
_EMC = re.compile(rf"\bEMC_FREQ{_LOAD}(?: ?@ ?({_COUNT}))?")
_TEMPERATURE = re.compile(
    rf"(?<![\w@%-])([A-Za-z][\w-]{{0,31}})@({_NUMBER})(?:/{_NUMBER})?C(?!\w)", re.ASCII
)
# `5040mW/5040mW` or, before JetPack 5, `5290/5290`, in mW too; RAM and SWAP end in another unit.
_RAIL = re.compile(
    rf"(?<![\w-])([A-Z][A-Z0-9_]{{1,31}}) ({_NUMBER})(?: ?(m?)W(?!\w)|(?:/{_NUMBER}){{1,2}}(?!\S))"
)

# What tegrastats prints for a sensor that is powered down.
_SENSOR_OFF_C = -256.0
# Channels of the power monitor that measure nothing.
_UNCONNECTED = "NC"

# Rails that carry all that the module takes in.
MODULE_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
# On AGX Orin and AGX Xavier no rail does; these are their inputs. VDDQ_VDD2_1V8AO is fed by
# VIN_SYS_5V0 and would be counted twice.
INPUT_RAILS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)


@dataclass(frozen=True)
class Core:
    """One CPU core. `online` is None where the line does not say it readably."""

    online: bool | None
    load_percent: float | None = None
    mhz: float | None = None


@dataclass(frozen=True)
class Tegrastats:
    """One line of tegrastats. Each field is None, or empty, where the line does not have it.

    Attributes:
        largest_block_mb: largest free block of memory.
        cores: None if there is no list of cores.
        gpu_mhz: one clock per graphics cluster.
        emc_mhz: memory clock; only root sees it.
        temperatures_c: sensor -> °C.
        rails_w: rail -> W, the instantaneous value; may be slightly negative on an idle rail.
    """

    ram_used_mb: float | None = None
    ram_total_mb: float | None = None
    largest_block_mb: float | None = None
    swap_used_mb: float | None = None
    cores: tuple[Core, ...] | None = None
    gpu_load_percent: float | None = None
    gpu_mhz: tuple[float, ...] = ()
    emc_load_percent: float | None = None
    emc_mhz: float | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    rails_w: dict[str, float] = field(default_factory=dict)


def parse_tegrastats(line: str) -> Tegrastats | None:
    """One line of tegrastats of JetPack 5, 6 or 7; None if it has no field that is known."""
    ram, swap, emc = _RAM.search(line), _SWAP.search(line), _EMC.search(line)
    block, cores = _LARGEST_BLOCK.search(line), _CORES.search(line)
    gpus = list(_GPU.finditer(line))
    found = Tegrastats(
        ram_used_mb=_group(ram, 1),
        ram_total_mb=_group(ram, 2),
        largest_block_mb=_megabytes(block),
        swap_used_mb=_group(swap, 1),
        cores=tuple(_core(text.strip()) for text in cores[1].split(",")) if cores else None,
        gpu_load_percent=_group(gpus[0], 1) if gpus else None,
        gpu_mhz=tuple(mhz for gpu in gpus for mhz in _gpu_clocks(gpu)),
        emc_load_percent=_group(emc, 1),
        emc_mhz=_group(emc, 2),
        temperatures_c={
            name: float(value)
            for name, value in _TEMPERATURE.findall(line)
            if float(value) != _SENSOR_OFF_C
        },
        rails_w={
            rail[1]: float(rail[2]) / (1 if rail[3] == "" else 1000)
            for rail in _RAIL.finditer(line)
            if rail[1] != _UNCONNECTED
        },
    )
    return None if found == Tegrastats() else found


def _group(match: re.Match[str] | None, number: int) -> float | None:
    return float(match[number]) if match and match[number] is not None else None


def _megabytes(block: re.Match[str] | None) -> float | None:
    return float(block[2]) / (1000 if block[3] == "k" else 1) if block else None


def _core(text: str) -> Core:
    if text == "off":
        return Core(online=False)
    match = _CORE.fullmatch(text)
    if match is None:
        return Core(online=None)
    return Core(online=True, load_percent=_group(match, 1), mhz=_group(match, 2))


def _gpu_clocks(match: re.Match[str]) -> list[float]:
    if match[2]:
        return [float(match[2])]
    clocks = [clock.strip() for clock in (match[3] or "").split(",")]
    return [float(clock) for clock in clocks if re.fullmatch(_COUNT, clock)]


def total_rails(rails: Mapping[str, float]) -> tuple[tuple[str, ...], bool]:
    """The rails whose sum stands for the module, and whether it is the whole module.

    Without a rail for the whole module it is the sum of the inputs that are known, and not the
    board's total; no rail at all if none of them is there.
    """
    for name in MODULE_RAILS:
        if name in rails:
            return (name,), True
    known = (tuple(name for name in inputs if name in rails) for inputs in INPUT_RAILS)
    return max(known, key=len), False


# --------------------------------------------------------------------------------------------------
# files of /sys and /proc: each function takes {path: text}, as read


def ina3221_rails_w(files: Mapping[str, str]) -> dict[str, float]:
    """Rail -> W from in{n}_label, in{n}_input (mV) and curr{n}_input (mA) of one reading."""
    rails = {}
    for path, label in files.items():
        place = PurePosixPath(path)
        channel = re.fullmatch(r"in([0-9]{1,2})_label", place.name)
        name = label.strip()
        if not channel or not re.fullmatch(r"[\w.+-]{1,32}", name, re.ASCII):
            continue
        millivolt = number_of(files.get(str(place.with_name(f"in{channel[1]}_input"))))
        milliampere = number_of(files.get(str(place.with_name(f"curr{channel[1]}_input"))))
        if name != _UNCONNECTED and millivolt is not None and milliampere is not None:
            rails[name] = millivolt * milliampere / 1e6
    return rails


def thermal_zones_c(files: Mapping[str, str]) -> dict[str, float]:
    """Zone type -> °C from thermal_zone*/type and thermal_zone*/temp (thousandths of a degree)."""
    zones = {}
    for path, text in files.items():
        place = PurePosixPath(path)
        if place.name != "temp" or not place.parent.name.startswith("thermal_zone"):
            continue
        value = number_of(text)
        kind = files.get(str(place.with_name("type")), "").strip()
        if value is not None and value != _SENSOR_OFF_C * 1000 and kind:
            zones[kind.removesuffix("-thermal")] = value / 1000
    return zones


def throttle_alerts(files: Mapping[str, str]) -> tuple[str, ...]:
    """Types of the throttle-alert cooling devices (type, cur_state) that are active."""
    active = []
    for path, text in files.items():
        kind = text.strip()
        if PurePosixPath(path).name != "type" or not kind.endswith("throttle-alert"):
            continue
        state = number_of(files.get(str(PurePosixPath(path).with_name("cur_state"))))
        if state:
            active.append(kind)
    return tuple(sorted(active))


def over_current_counts(files: Mapping[str, str]) -> dict[str, int]:
    """oc1 (under-voltage), oc2 (average over-current), oc3 (instantaneous) -> events since boot."""
    counts = {}
    for path, text in files.items():
        match = re.fullmatch(r"(oc[0-9])_event_cnt", PurePosixPath(path).name)
        value = number_of(text)
        if match and value is not None and value >= 0:
            counts[match[1]] = int(value)
    return counts


def count_difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Events between two readings, without counters that went back (a reboot) or are missing."""
    return {
        name: after[name] - count
        for name, count in before.items()
        if name in after and after[name] >= count
    }


def mhz_of(text: str | None, unit_hz: float = 1.0) -> float | None:
    """A clock file in MHz: devfreq counts in Hz, cpufreq in kHz (`unit_hz` 1000)."""
    value = number_of(text)
    return value * unit_hz / 1e6 if value is not None and value > 0 else None


def memory_mb(text: str) -> dict[str, float]:
    """MemTotal, MemAvailable, … of /proc/meminfo -> MB of 1e6 bytes."""
    found = re.findall(r"(?m)^([A-Za-z]\w{0,31}): +([0-9]{1,15}) kB$", text, re.ASCII)
    return {name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in found}


PAGE_BYTES = 4096


def largest_block_mb(text: str) -> float | None:
    """The largest piece of memory that is free as one, of /proc/buddyinfo, MB of 1e6 bytes.

    A column counts the free blocks of twice as many pages as the one before it. Memory behind an
    IOMMU, as that of a GPU is, need not lie in one piece; what is pinned for DMA does.
    """
    columns = [
        [int(count) for count in counts.split()]
        for counts in re.findall(r"(?m)^Node +[0-9]+, +zone +\w+((?: +[0-9]{1,9})+) *$", text)
    ]
    orders = [order for zone in columns for order, count in enumerate(zone) if count]
    return (PAGE_BYTES << max(orders)) / 1e6 if orders else None


def memory_holders(text: str, most: int = 5) -> dict[str, float]:
    """Programs by the resident memory of their processes, MB of 1e6 bytes, the largest first.

    `text` is what `ps -eo rss=,comm=` prints.
    """
    held: dict[str, float] = {}
    for kilobytes, name in re.findall(r"(?m)^ *([0-9]{1,12}) +(\S.{0,63}?) *$", text, re.ASCII):
        held[name] = held.get(name, 0.0) + int(kilobytes) * 1024 / 1e6
    largest = sorted(held.items(), key=lambda item: -item[1])[:most]
    return {name: megabytes for name, megabytes in largest if megabytes >= 1}


def l4t_release(text: str) -> str | None:
    """`36.4.3` from the first line of /etc/nv_tegra_release."""
    match = re.search(
        r"R([0-9]{1,4})\s*\(release\).{0,200}?REVISION:\s*([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", text
    )
    return f"{match[1]}.{match[2]}" if match else None


def number_of(text: str | None) -> float | None:
    """The number that is all of `text`, or None."""
    match = re.fullmatch(r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,9})?)\s*", text or "", re.ASCII)
    return float(match[1]) if match else None
