"""Reads nvpmodel and jetson_clocks. Pure functions; what is not there is None, and nothing raises.

Ids mean different things on different boards and releases, so modes go by name everywhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MODE = re.compile(
    r"POWER_MODEL:?\s{1,8}ID\s{0,8}=\s{0,8}([0-9]{1,4})\s{1,8}NAME\s{0,8}=\s{0,8}([^\s<>]{1,64})"
)
_DEFAULT = re.compile(r"<\s{0,8}PM_CONFIG\s{1,8}DEFAULT\s{0,8}=\s{0,8}([0-9]{1,4})")
_CURRENT = re.compile(r"(?m)^\s{0,8}NV Power Mode:\s{0,8}(\S{1,64})\s{0,8}$")
_GPU_LIMITS = re.compile(
    r"(?m)^GPU MinFreq=([0-9]{1,12}) MaxFreq=([0-9]{1,12}) CurrentFreq=([0-9]{1,12})"
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

    Of two with one id or name the first counts.
    """
    modes: list[Mode] = []
    for number, name in _MODE.findall(text):
        if all(int(number) != m.id and name.casefold() != m.name.casefold() for m in modes):
            modes.append(Mode(int(number), name))
    match = _DEFAULT.search(text)
    wanted = int(match[1]) if match else None
    return Modes(tuple(modes), next((m for m in modes if m.id == wanted), None))


def parse_nvpmodel_query(text: str) -> Mode | None:
    """The current mode from `nvpmodel -q`: its name on one line, its id alone on a later one."""
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
