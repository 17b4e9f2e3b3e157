"""Host keys that the user has accepted: the files that OpenSSH keeps, read and added to."""

from __future__ import annotations

import base64
import binascii
import fcntl
import fnmatch
import hashlib
import hmac
import os
import secrets
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssdi8_edge.ground.errors import BoardError

SSH_PORT = 22
_REVOKED = "@revoked"


@dataclass(frozen=True)
class HostKey:
    """A key that a host shows.

    Attributes:
        kind: such as ssh-ed25519.
        blob: the key itself, as on the wire.
    """

    kind: str
    blob: bytes

    @property
    def algorithm(self) -> str:
        """As sshd names its files: ed25519, rsa or ecdsa."""
        return self.kind.removeprefix("ssh-").partition("-")[0]

    def __str__(self) -> str:
        """Its kind, and its fingerprint as ssh-keygen -l prints it."""
        digest = hashlib.sha256(self.blob).digest()
        return f"{self.kind} SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


@dataclass(frozen=True)
class Known:
    """One line that applies to a host, and where it stands."""

    key: HostKey
    revoked: bool
    file: Path
    number: int


def host_name(host: str, port: int) -> str:
    """The name that known_hosts files use."""
    host = host.lower()
    return host if port == SSH_PORT else f"[{host}]:{port}"


def known_keys(name: str, files: Sequence[Path]) -> list[Known]:
    """All lines about `name`; authorities are left out, as certificates are not checked."""
    return [known for file in files for known in _read(name, file)]


def _read(name: str, file: Path) -> Iterator[Known]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#") or marker not in ("", _REVOKED):
            continue
        patterns, kind, encoded = words[:3]
        if not _applies(patterns, name):
            continue
        try:
            blob = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            continue
        yield Known(HostKey(kind, blob), marker == _REVOKED, file, number)


def _applies(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        _, _, salt, digest = [*patterns.split("|"), "", ""][:4]
        return hmac.compare_digest(_hashed(name, salt), f"|1|{salt}|{digest}")
    applies = False
    for pattern in patterns.lower().split(","):
        negated = pattern.startswith("!")
        # Only * and ? are special here, and brackets mean a port.
        plain = pattern.lstrip("!").replace("[", "[[]")
        if fnmatch.fnmatchcase(name.lower(), plain):
            if negated:
                return False
            applies = True
    return applies


def _hashed(name: str, salt: str) -> str:
    try:
        key = base64.b64decode(salt, validate=True)
    except binascii.Error:
        return ""
    digest = hmac.new(key, name.encode(), hashlib.sha1).digest()
    return f"|1|{salt}|{base64.b64encode(digest).decode()}"


def judge(label: str, name: str, shown: HostKey, known: Sequence[Known]) -> bool:
    """Whether `shown` is stored already; False where nothing is stored about the host.

    Args:
        label: the host, for messages.
        name: what its key is filed under.

    Raises:
        BoardError: another key is stored, or this one is revoked.
    """
    revoked = [line for line in known if line.revoked and line.key == shown]
    stored = [line for line in known if not line.revoked]
    if not revoked and (not stored or any(line.key == shown for line in stored)):
        return bool(stored)
    why = "which was revoked in" if revoked else "which is not the one in"
    line = (revoked or stored)[0]
    remove = shlex.join(["ssh-keygen", "-f", str(line.file), "-R", name])
    raise BoardError(
        f"{label} shows the host key {shown}, {why} {line.file}:{line.number}: someone may stand "
        "between;",
        f"only if its keys were renewed, remove the old one: {remove}",
    )


def add_key(name: str, key: HostKey, file: Path, *, hashed: bool) -> None:
    """Append a line, in one write; the file and its folder are made where they are missing."""
    if hashed:
        name = _hashed(name, base64.b64encode(secrets.token_bytes(20)).decode())
    line = f"{name} {key.kind} {base64.b64encode(key.blob).decode()}\n"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "r+b", buffering=0) as stream:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if stream.seekable() and (end := stream.seek(0, os.SEEK_END)):
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                line = "\n" + line
        stream.write(line.encode())
