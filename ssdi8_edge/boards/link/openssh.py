"""The settings of a host as OpenSSH itself finds them: `ssh -G`."""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ssdi8_edge.boards.link.address import Address
from ssdi8_edge.boards.link.ssh_lines import SYSTEM, copy_for_home
from ssdi8_edge.ground.errors import UsageError

# What is asked of the name service, and by commands of `Match exec`, takes its time.
DEADLINE_S = 30.0

_VERSION = re.compile(r"OpenSSH_(?:for_Windows_)?(\d+)\.(\d+)")
_FIRST_WITH_JUMPS = (7, 3)
_LISTS_OF_FILES = ("userknownhostsfile", "globalknownhostsfile")
_OF_THE_HOST = ("host", "hostname", "user", "port")
_NOISE = "Pseudo-terminal will not be allocated"

Found = dict[str, list[str]]


def program() -> str | None:
    """OpenSSH's ssh; None where there is none, or another one, such as dropbear's."""
    path = shutil.which("ssh")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # it serves nobody without a name, as the user of a container may be
        return None
    return path if path is not None and _is_openssh(path) else None


def effective(ssh: str, address: Address, home: Path) -> Found:
    """Settings of a host that are not the defaults, and its name, port and user.

    Args:
        ssh: the program.
        home: whose .ssh/config is read.

    Returns:
        Values by name in lower case. Tokens and `~` are expanded in some and not in others, as
        `ssh -G` prints them.

    Raises:
        UsageError: OpenSSH refuses the configuration, in its words, or takes too long.
    """
    arguments = [*(["-l", address.user] if address.user else [])]
    arguments += ["-p", str(address.port)] if address.port else []
    arguments += ["--", address.host]
    if os.path.realpath(home) == os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir):
        said = _ask(ssh, arguments, address, {})
    else:
        with tempfile.TemporaryDirectory(prefix="ssh-config-") as folder:
            originals: dict[str, str] = {}
            user = copy_for_home(home / ".ssh/config", home / ".ssh", home, Path(folder), originals)
            system = copy_for_home(SYSTEM, SYSTEM.parent, home, Path(folder), originals)
            both = Path(folder) / "both"
            both.write_text(f"Include {user}\nInclude {system}\n")
            said = _ask(ssh, ["-F", str(both), *arguments], address, originals)
    usual = _defaults(ssh)
    return {
        name: values
        for name, values in _parsed(said).items()
        if name in _OF_THE_HOST or usual.get(name) != tuple(values)
    }


@functools.cache
def _is_openssh(path: str) -> bool:
    try:
        said = subprocess.run(
            [path, "-V"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_S,
            encoding="utf-8",
            errors="replace",
        ).stderr
    except (OSError, subprocess.TimeoutExpired):
        return False
    found = _VERSION.match(said)
    return found is not None and (int(found[1]), int(found[2])) >= _FIRST_WITH_JUMPS


@functools.cache
def _defaults(ssh: str) -> dict[str, tuple[str, ...]]:
    """What `ssh -G` prints where nothing is configured."""
    said = _ask(ssh, ["-F", os.devnull, "--", "localhost"], Address("localhost"), {})
    return {name: tuple(values) for name, values in _parsed(said).items()}


def _ask(ssh: str, arguments: Sequence[str], address: Address, originals: dict[str, str]) -> str:
    """What `ssh -G` prints."""
    remedy = f"mend ~/.ssh/config until `ssh -G {address.host}` is content."
    try:
        done = subprocess.run(
            [ssh, "-G", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_S,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"the SSH configuration for {address.host} is not read within {DEADLINE_S:g} s;", remedy
        ) from error
    except OSError as error:
        raise UsageError(f"{ssh} cannot be run ({error.strerror});", "mend it.") from error
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines() if not line.startswith(_NOISE)]
    words = next((line for line in lines if line), f"exit status {done.returncode}")
    for copy, original in originals.items():
        words = words.replace(f"{copy}:", f"{original}:").replace(f"{copy} ", f"{original} ")
    raise UsageError(
        f"the SSH configuration for {address.host} cannot be read: {words.rstrip('.')};", remedy
    )


def _parsed(said: str) -> Found:
    found: Found = {}
    for line in said.split("\n"):
        name, _, value = line.strip("\r").partition(" ")
        if name:
            split = _files(value) if name.lower() in _LISTS_OF_FILES else [value]
            found.setdefault(name.lower(), []).extend(split)
    return found


def _files(value: str) -> list[str]:
    """File names of a list that is printed without quotes: a name starts with `/` or `~`.

    What does not is the rest of a name with a space in it. Names that depend on the folder of the
    call are taken for that, too: `look_up` trusts no name with a space that is not there.
    """
    names: list[str] = []
    for word in value.split(" "):
        if names and not word.startswith(("/", "~")):
            names[-1] += f" {word}"
        else:
            names.append(word)
    return names
