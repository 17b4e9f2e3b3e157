"""This machine, as if it were a board."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import IO

from ssdi8_edge.boards.link.connection import DEFAULT_STORE, Connection
from ssdi8_edge.boards.link.process import Channel
from ssdi8_edge.ground.errors import BoardError

_END_S = 10.0


class LocalConnection(Connection):
    """Runs commands here, with the guarantees of every connection; the link cannot be lost."""

    def __init__(self, store: str = DEFAULT_STORE, python: str = sys.executable) -> None:
        super().__init__("this machine", store, python)

    def open_channel(self, program: str) -> Channel:
        """Run this interpreter with the one-line `program`."""
        return _LocalChannel(program)

    def open_stream(self, port: int) -> socket.socket:
        """Connect to a port of this machine."""
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError as error:
            raise BoardError(
                f"nobody listens on port {port} of {self.name} ({error.strerror});",
                "see whether the server runs.",
            ) from error

    def close(self) -> None:
        """There is no link."""


class _LocalChannel(Channel):
    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            cwd=os.path.expanduser("~"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours; the command is told by its input's end
        )
        self._writing = threading.Lock()

    def read(self) -> bytes:
        return _read(self._process.stdout)

    def read_errors(self) -> bytes:
        return _read(self._process.stderr)

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with self._writing:
            if self._process.stdin.closed:
                raise BrokenPipeError
            view = memoryview(data)
            while view:
                view = view[self._process.stdin.write(view) :]

    def end_input(self) -> None:
        with self._writing:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def exit_status(self, timeout: float) -> int | None:
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return status if status >= 0 else None

    def check(self) -> None:
        pass

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.end_input()


def _read(stream: IO[bytes] | None) -> bytes:
    """Up to a megabyte; closes the stream at its end."""
    assert stream is not None
    data = os.read(stream.fileno(), 1 << 20)
    if not data:
        stream.close()
    return data
