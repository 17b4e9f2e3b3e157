"""Reads nvpmodel and jetson_clocks. Pure functions; what is not there is None, and nothing raises.

Ids mean different things on different boards and releases, so modes go by name everywhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# `< POWER_MODEL ID=0 NAME=15W >` in nvpmodel.conf; `POWER_MODEL: ID=0 NAME=15W` as listed.
_MODE = re.compile(
    r"(?i)POWER_MODEL\s{0,8}:?\s{1,8}ID\s{0,8}=\s{0,8}([0-9]{1,4})\s{1,8}"
    r"NAME\s{0,8}=\s{0,8}([^\s<>=](?:[^<>=]{0,62}[^\s<>=])?)\s{0,8}(?:>|$)"
)
_DEFAULT = re.compile(
    r"(?i)<\s{0,8}PM_CONFIG\s{1,8}DEFAULT\s{0,8}=\s{0,8}([^\s<>](?:[^<>]{0,62}[^\s<>])?)\s{0,8}>"
)
_CURRENT = re.compile(r"(?im)^[ \t]{0,8}NV Power Mode:[ \t]{0,8}([^\r\n]{0,64}?)\s{0,8}$")
_GPU_LIMITS = re.compile(
    r"(?m)^GPU MinFreq=([0-9]{1,12}) MaxFreq=([0-9]{1,12}) CurrentFreq=([0-9]{1,12})"
)
_LIMITS = re.compile(
    r"(?m)^[ \t]{0,8}([A-Za-z]\w{0,31})\b[^\n]{0,200}?\bMinFreq=([0-9]{1,12}) MaxFreq=([0-9]{1,12})"
)
_TPCS = re.compile(r"(?m)^Active GPU TPCs:\s{0,8}([0-9]{1,3})\s{0,8}$")
SMS_PER_TPC = 2


@dataclass(frozen=True)
class Mode:
    """One power mode of one board."""

    id: int
    name: str


@dataclass(frozen=True)
class Modes:
    """What nvpmodel.conf offers; `default` is None if it names none that exists."""

    modes: tuple[Mode, ...]
    default: Mode | None

    def named(self, name: str) -> Mode | None:
        """The mode of that name, in any case of letters."""
        return next((m for m in self.modes if m.name.casefold() == name.casefold()), None)


def parse_nvpmodel_conf(text: str) -> Modes:
    """The modes of an nvpmodel.conf, or as `nvpmodel -p --verbose` lists them, in their order.

    Behind a # is a comment, and a mode in it is none. Of two with one id or name the first counts.
    """
    modes: list[Mode] = []
    default = None
    for line in text.splitlines():
        statement = line.partition("#")[0]
        if match := _MODE.search(statement):
            number, name = int(match[1]), match[2]
            if all(number != m.id and name.casefold() != m.name.casefold() for m in modes):
                modes.append(Mode(number, name))
        elif match := _DEFAULT.search(statement):
            default = default or match[1]
    wanted = (default or "").casefold()
    return Modes(
        tuple(modes), next((m for m in modes if wanted in (str(m.id), m.name.casefold())), None)
    )


def offered_modes(conf: str, listing: str) -> Modes:
    """The modes of nvpmodel.conf or, where it has none, of `nvpmodel -p --verbose`."""
    modes = parse_nvpmodel_conf(conf)
    return modes if modes.modes else parse_nvpmodel_conf(listing)


def current_mode(query: str, modes: Modes) -> Mode | None:
    """The mode that `nvpmodel -q` tells; by the name in `modes` where the tool prints none."""
    mode = parse_nvpmodel_query(query)
    if mode is None or mode.name:
        return mode
    return next((known for known in modes.modes if known.id == mode.id), None)


def parse_nvpmodel_query(text: str) -> Mode | None:
    """The current mode from `nvpmodel -q`: its name on one line, its id alone on a later one.

    Warnings and errors may stand before, between and behind them. The name is empty where the tool
    prints none.
    """
    match = _CURRENT.search(text)
    if not match:
        return None
    number = re.search(r"(?m)^\s{0,8}([0-9]{1,4})\s{0,8}$", text[match.end() :])
    return Mode(int(number[1]), match[1]) if number else None


def needs_reboot(text: str) -> bool:
    """Whether nvpmodel refused to change the mode of a GPU that was used since boot.

    The wording varies, so two of its words are enough.
    """
    return re.search(r"(?i)reboot\s{1,8}required|want\s{1,8}to\s{1,8}reboot", text) is not None


def clock_limits(text: str) -> tuple[str, ...] | None:
    """What jetson_clocks changes and `--show` tells of it, one string a clock; None if nothing.

    Without what changes by itself: current clocks and loads.
    """
    found = _LIMITS.findall(text)
    return tuple(f"{name} {low} {high}" for name, low, high in found) or None


@dataclass(frozen=True)
class Clocks:
    """What `jetson_clocks --show` says of the GPU; each None where it does not."""

    gpu_min_mhz: float | None
    gpu_max_mhz: float | None
    sms: int | None

    @property
    def pinned(self) -> bool | None:
        """Whether the GPU's clock is held at its highest."""
        if self.gpu_min_mhz is None or self.gpu_max_mhz is None:
            return None
        return self.gpu_min_mhz == self.gpu_max_mhz


def parse_jetson_clocks(text: str) -> Clocks:
    """GPU limits and powered SMs from `jetson_clocks --show`."""
    limits, tpcs = _GPU_LIMITS.search(text), _TPCS.search(text)
    return Clocks(
        gpu_min_mhz=int(limits[1]) / 1e6 if limits else None,
        gpu_max_mhz=int(limits[2]) / 1e6 if limits else None,
        sms=int(tpcs[1]) * SMS_PER_TPC if tpcs else None,
    )
