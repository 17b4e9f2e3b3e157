"""Settings of a host where OpenSSH is not installed: from paramiko's reader.

It gets only lines that it reads as OpenSSH does; others are refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssdi8_edge.boards.link.address import Address
from ssdi8_edge.boards.link.ssh_lines import SYSTEM, Line, check_depth, included, read
from ssdi8_edge.ground.errors import UsageError

# (lines of a configuration, host) -> its options, names in lower case
Parse = Callable[[Iterable[str], str], Mapping[str, Any]]

_CONDITIONS = ("originalhost", "localuser")  # of Match, that depend on nothing else
_REPEATED = ("identityfile", "certificatefile")
# paramiko acts on names, tokens and quotes in its own way: it gets to see none of them.
_PREFIX = "x_"
_BETWEEN = "\x01"
_HIDDEN = {"%": "\x02", "~": "\x03", '"': "\x04"}
_HIDE = str.maketrans(_HIDDEN)
_SHOW = str.maketrans({hidden: shown for shown, hidden in _HIDDEN.items()})
_REMEDY = "install OpenSSH's ssh (openssh-client), which is asked then, or remove the line"


def effective(
    parse: Parse, address: Address, home: Path, known: Mapping[str, bool]
) -> dict[str, list[str]]:
    """Settings of a host that are configured.

    Args:
        home: whose .ssh/config is read.
        known: names of settings; true for those that must have one value.

    Returns:
        Values by name in lower case, as they were written.

    Raises:
        UsageError: there is a line that only OpenSSH can read.
    """
    lines = [
        *_flat(home / ".ssh/config", home / ".ssh", home, known),
        "Host *",
        *_flat(SYSTEM, SYSTEM.parent, home, known),
    ]
    try:
        found = parse(lines, address.host)
    except Exception as error:  # of the parser, which has no common base of its own
        raise UsageError(
            f"the SSH configuration for {address.host} cannot be read: {error};",
            "mend ~/.ssh/config.",
        ) from error
    settings: dict[str, list[str]] = {}
    for entry in found.get(_REPEATED[0], ()):
        name, _, value = entry.partition(_BETWEEN)
        settings.setdefault(name, []).append(value.translate(_SHOW))
    for name, value in found.items():
        if name.startswith(_PREFIX):
            words = value.translate(_SHOW).split(_BETWEEN)
            settings[name.removeprefix(_PREFIX)] = words
    return settings


def _flat(
    file: Path,
    folder: Path,
    home: Path,
    known: Mapping[str, bool],
    depth: int = 0,
    inside: bool = False,
) -> Iterator[str]:
    """Lines of a file and of those that it includes, as paramiko reads them right.

    Args:
        inside: the file is included in a Host or Match block, and counts where that does.
    """
    check_depth(file, depth)
    in_block = inside
    for line in read(file):
        if line.keyword in ("host", "match"):
            if inside:
                raise line.refusal("a block inside of a block", _REMEDY)
            in_block = True
            yield _host(line) if line.keyword == "host" else _match(line)
        elif line.keyword == "include":
            for name in included(line, folder, home):
                yield from _flat(name, folder, home, known, depth + 1, in_block)
            if not in_block:
                yield "Host *"
        elif line.keyword:
            yield _setting(line, known)


def _host(line: Line) -> str:
    return "Host " + shlex.join(_pattern(line, word) for word in line.words())


def _match(line: Line) -> str:
    words = line.words()
    if [word.lower() for word in words] == ["all"]:
        return "Match all"
    if "=" in line.rest or "'" in line.rest:
        raise line.refusal("Match with = or ' is not read here", _REMEDY)
    conditions = []
    for condition, pattern in zip(words[::2], [*words[1::2], ""], strict=False):
        if condition.lower().removeprefix("!") not in _CONDITIONS or not pattern:
            raise line.refusal(f"Match {condition} is not read here", _REMEDY)
        conditions += [condition.lower(), _pattern(line, pattern)]
    return "Match " + shlex.join(conditions)


def _pattern(line: Line, text: str) -> str:
    """Only `*`, `?` and a leading `!` are special to OpenSSH."""
    if "#" in text:
        raise line.refusal(f"the pattern {text!r} is not read here", _REMEDY)
    return text.replace("[", "[[]")


def _setting(line: Line, known: Mapping[str, bool]) -> str:
    name, words = line.keyword, line.words()
    if name not in known:
        raise line.refusal(f"{name} is no setting that is known here", _REMEDY)
    if any(ord(letter) < ord(" ") for word in words for letter in word):
        raise line.refusal(f"{line.text.strip()!r} cannot be read")
    if known[name] and len(words) > 1:
        raise line.refusal(f"there is more than one value of {name}")
    value = _BETWEEN.join(words).translate(_HIDE)
    if name in _REPEATED:
        return f"{_REPEATED[0]} {name}{_BETWEEN}{value}"
    return f"{_PREFIX}{name} {value}"
