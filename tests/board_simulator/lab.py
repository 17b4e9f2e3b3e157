"""What a test of SSH needs around it: a home with keys and configuration, and servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.link.hosts import connect

from .machine import make_board
from .server import SshServer, sshd_path

# The interpreter of the tests first: a python3 that is a shell script takes long to start.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# How many seeded runs each test with random faults makes; where it is not set, a few.
FAULT_SEEDS = int(os.environ.get("FAULT_SEEDS", "0"))

needs_sshd = pytest.mark.skipif(sshd_path() is None, reason="sshd is missing: openssh-server")


class Lab:
    """A user's home on this machine, and servers that it knows by alias.

    Attributes:
        home: with .ssh/config and .ssh/known_hosts.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.home = folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        self.config = self.home / ".ssh/config"
        self.known_hosts = self.home / ".ssh/known_hosts"
        self._servers: list[SshServer] = []
        self._connections: list[Connection] = []
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.delenv("SSDI8_BOARD_ROOT", raising=False)

    def serve(
        self,
        alias: str,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        known: bool = True,
        **config: str,
    ) -> SshServer:
        """Start a server that ~/.ssh/config calls `alias`."""
        place = self.folder / alias
        home = place / "board"
        home.mkdir(parents=True)
        variables = {"HOME": str(home), "PATH": PATH, **(environment or {})}
        server = SshServer(place / "sshd", options=options, environment=variables)
        self._servers.append(server)
        server.start()
        self.add(server.client_config(alias, **config), server.known_host() if known else "")
        return server

    def simulate(self, alias: str) -> SshServer:
        """Start a simulated Orin NX that ~/.ssh/config calls `alias`."""
        environment = make_board(self.folder / alias)
        server = self.serve(alias, environment=environment)
        server.restart_after(self.folder / alias / "root/reboot")
        return server

    def add(self, config: str, known_host: str = "") -> None:
        """Append to ~/.ssh/config and known_hosts."""
        for file, text in ((self.config, config), (self.known_hosts, known_host)):
            if text:
                with file.open("a") as stream:
                    stream.write(text)

    def connect(self, alias: str, *, accept_new_host_key: bool = False) -> Connection:
        """A connection whose store lies in this lab."""
        connection = connect(
            alias,
            accept_new_host_key=accept_new_host_key,
            store=str(self.store(alias)),
        )
        self._connections.append(connection)
        return connection

    def store(self, alias: str) -> Path:
        """Where the board keeps what is ours."""
        return self.folder / f"{alias}-store"

    def close(self) -> None:
        """End all of it."""
        for connection in self._connections:
            connection.close()
        for server in self._servers:
            server.stop()
