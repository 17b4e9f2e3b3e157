"""Files of SSH keys, as far as they can be read without a passphrase."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

CERTIFICATE = "-cert-v01@openssh.com"
_MAGIC = b"openssh-key-v1\0"
_BEGIN, _END = "-----BEGIN OPENSSH PRIVATE KEY-----", "-----END OPENSSH PRIVATE KEY-----"
_MOST = 1 << 20


def public_blob(path: Path) -> bytes:
    """The public key of a private one: from inside, from the file beside it; else nothing.

    `path` may also name the public key itself.
    """
    for file, read in ((path, _inside), (path, public_key), (beside(path, ".pub"), public_key)):
        if blob := read(file):
            return blob
    return b""


def public_key(path: Path) -> bytes:
    """The key, or certificate, in a file of one line; else nothing."""
    try:
        kind, encoded, *_ = _text(path).split(maxsplit=2)
        blob = base64.b64decode(encoded, validate=True)
    except (OSError, ValueError):
        return b""
    return blob if kind_of(blob) == kind else b""


def kind_of(blob: bytes) -> str:
    """Such as ssh-ed25519, which a key begins with."""
    return _field(blob)[0].decode("ascii", "replace")


def certified_key(certificate: bytes) -> bytes:
    """The public key that a certificate is for; nothing where it is none.

    A certificate repeats the fields of the key after its own kind and a nonce (PROTOCOL.certkeys of
    OpenSSH).
    """
    kind = kind_of(certificate)
    plain = kind.removesuffix(CERTIFICATE)
    if plain == kind:
        return b""
    fields = 2 if plain == "ssh-rsa" or plain.startswith("ecdsa-") else 1
    start = _field(_field(certificate)[1])[1]
    rest = start
    for _ in range(fields):
        rest = _field(rest)[1]
    return len(plain).to_bytes(4, "big") + plain.encode() + start[: len(start) - len(rest)]


def beside(path: Path, suffix: str) -> Path:
    """The file of that name with `suffix`."""
    return path.with_name(path.name + suffix)


def _inside(path: Path) -> bytes:
    """The public half in a private key of OpenSSH's own format, which is never encrypted."""
    try:
        text = _text(path)
        encoded = text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)]
        data = base64.b64decode(encoded)
    except (OSError, ValueError, binascii.Error):
        return b""
    if not data.startswith(_MAGIC):
        return b""
    rest = data[len(_MAGIC) :]
    for _ in ("cipher", "derivation of its key", "options of that"):
        rest = _field(rest)[1]
    count, rest = rest[:4], rest[4:]
    return _field(rest)[0] if count == (1).to_bytes(4, "big") else b""


def _field(data: bytes) -> tuple[bytes, bytes]:
    """The first string of `data`, and what follows it."""
    end = 4 + int.from_bytes(data[:4], "big")
    return data[4:end], data[end:]


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MOST:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")
