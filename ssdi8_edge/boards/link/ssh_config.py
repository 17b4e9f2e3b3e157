"""How to reach one host: what the user wrote, completed from ~/.ssh/config."""

from __future__ import annotations

import base64
import getpass
import glob
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdi8_edge.boards.link.address import Address, parse_address
from ssdi8_edge.boards.link.known_hosts import SSH_PORT, host_name
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError

# (lines of a configuration, host) -> its options, names in lower case
Parse = Callable[[Iterable[str], str], Mapping[str, Any]]

_SYSTEM = Path("/etc/ssh/ssh_config")
_USER_KEYS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_SYSTEM_KEYS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
_DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_MAX_INCLUDES = 16


@dataclass(frozen=True)
class Settings:
    """Attributes:
    address: the host as the user wrote it.
    jumps: hosts to go through, the first one first.
    identities: key files, configured or the usual ones; they need not exist.
    only_identities: whether the agent may offer no other keys.
    key_name: what its host key is filed under.
    key_files: where host keys are filed; new ones go into the first.
    accept_new: whether the configuration lets unknown host keys in.
    hash_names: whether names of hosts are hashed there.
    """

    address: Address
    host: str
    port: int
    user: str
    jumps: tuple[Address, ...]
    identities: tuple[Path, ...]
    only_identities: bool
    key_name: str
    key_files: tuple[Path, ...]
    accept_new: bool
    hash_names: bool

    def __str__(self) -> str:
        return f"{self.address} ({self.host}:{self.port})"


def look_up(address: Address, parse: Parse) -> Settings:
    """Settings for `address`; what it says itself goes before the configuration.

    Raises:
        UsageError: the configuration cannot be read, or asks for a ProxyCommand.
    """
    user_file = Path.home() / ".ssh/config"
    try:
        found = parse([*_lines(user_file), "Match all", *_lines(_SYSTEM)], address.host)
        port = address.port or int(found.get("port", SSH_PORT))
    except Ssdi8Error:
        raise
    except Exception as error:  # of the parser, which has no common base of its own
        raise UsageError(
            f"the SSH configuration for {address.host} cannot be read: {error};",
            f"mend {user_file}.",
        ) from error
    if found.get("proxycommand"):
        raise UsageError(
            f"{user_file} reaches {address.host} by a ProxyCommand, which is not run here;",
            "use ProxyJump.",
        )
    host = found.get("hostname", address.host)
    jump = found.get("proxyjump", "none")
    key_files = found.get("userknownhostsfile", _USER_KEYS).split()
    key_files += found.get("globalknownhostsfile", _SYSTEM_KEYS).split()
    return Settings(
        address=address,
        host=host,
        port=port,
        user=address.user or found.get("user") or getpass.getuser(),
        jumps=()
        if jump.lower() == "none"
        else tuple(parse_address(one.strip()) for one in jump.split(",")),
        identities=tuple(
            Path(name).expanduser() for name in found.get("identityfile", _DEFAULT_IDENTITIES)
        ),
        only_identities=found.get("identitiesonly", "no") == "yes",
        key_name=found.get("hostkeyalias") or host_name(host, port),
        key_files=tuple(Path(name).expanduser() for name in key_files if name != "none"),
        accept_new=found.get("stricthostkeychecking", "ask") in ("accept-new", "no", "off"),
        hash_names=found.get("hashknownhosts", "no") == "yes",
    )


def public_blob(path: Path) -> bytes:
    """The public key beside a private one, or the one that `path` itself names; else nothing."""
    public = path if path.suffix == ".pub" else path.with_name(path.name + ".pub")
    try:
        return base64.b64decode(public.read_text(encoding="utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return b""


def _lines(file: Path, depth: int = 0) -> Iterator[str]:
    """Lines of a configuration, with those that it includes in place."""
    if not file.is_file() or depth > _MAX_INCLUDES:
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.replace("=", " ", 1).split()
        if not words or words[0].lower() != "include":
            yield line
            continue
        for pattern in shlex.split(" ".join(words[1:])):
            folder = Path.home() / ".ssh" if file != _SYSTEM else _SYSTEM.parent
            for name in sorted(glob.glob(str(folder / Path(pattern).expanduser()))):
                yield from _lines(Path(name), depth + 1)
