"""From `--host` to a connection."""

from __future__ import annotations

import sys

from ssdi8_edge.boards.link.address import parse_address
from ssdi8_edge.boards.link.connection import DEFAULT_STORE, Connection
from ssdi8_edge.boards.link.local import LocalConnection

THIS_MACHINE = "this-machine"


def connect(
    host: str,
    *,
    accept_new_host_key: bool = False,
    store: str = DEFAULT_STORE,
    python: str | None = None,
) -> Connection:
    """A connection that dials when it is first used.

    Args:
        host: `[user@]board[:port]`, an alias of ~/.ssh/config, or `this-machine`.
        python: interpreter over there for bundles; None to look for one, and here our own.

    Raises:
        UsageError: `host` is none of these.
    """
    if host == THIS_MACHINE:
        return LocalConnection(store, python or sys.executable)
    address = parse_address(host)
    from ssdi8_edge.boards.link.ssh import SshConnection  # paramiko takes a while to import

    return SshConnection(
        address, accept_new_host_key=accept_new_host_key, store=store, python=python
    )
