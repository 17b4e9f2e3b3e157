"""Where a board is: `--host` as the user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssdi8_edge.ground.errors import UsageError

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_ADDRESS = re.compile(
    rf"(?:(?P<user>{_WORD})@)?"
    rf"(?:(?P<v6>[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%\w+)?)"
    rf"|(?:\[(?P<bracketed>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<plain>{_WORD}))"
    rf"(?::(?P<port>[0-9]{{1,5}}))?)",
    re.ASCII,
)


@dataclass(frozen=True)
class Address:
    """What was written, before ~/.ssh/config has its say.

    Attributes:
        host: name, number or alias.
    """

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" + (f":{self.port}" if self.port else "")


def parse_address(text: str) -> Address:
    """`[user@]host[:port]`; an IPv6 number with a port stands in brackets.

    Raises:
        UsageError: it is something else, such as an option or a command.
    """
    found = _ADDRESS.fullmatch(text)
    if found is not None and (found["port"] is None or 0 < int(found["port"]) < 1 << 16):
        host = found["bracketed"] or found["plain"] or found["v6"]
        return Address(host, found["user"], int(found["port"] or 0) or None)
    raise UsageError(
        f"{text!r} is no host;",
        "write user@board, user@board:port, [IPv6]:port or an alias of ~/.ssh/config.",
    )
