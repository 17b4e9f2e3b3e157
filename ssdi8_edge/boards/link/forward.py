"""A port of this machine that leads to one of a board's own, over the connection to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from ssdi8_edge.boards.link.connection import Connection, Stream
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError

PIECE = 1 << 15  # bytes
LOOPBACK = "127.0.0.1"


class Forward:
    """Listens on loopback here until it is closed.

    A link that is lost ends the connections that go over it; the next one makes a new link.

    Attributes:
        port: that it listens on.
    """

    def __init__(self, connection: Connection, to_port: int, port: int) -> None:
        """
        Args:
            to_port: of the board's loopback.
            port: here; 0 takes any that is free.

        Raises:
            UsageError: the port is taken here.
        """
        self._connection = connection
        self._to_port = to_port
        try:
            self._listener = socket.create_server((LOOPBACK, port))
        except OSError as error:
            raise UsageError(
                f"port {port} of this machine is taken ({error.strerror});",
                "name another one by --forward.",
            ) from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more; connections that are open end by themselves."""
        # Closing alone does not wake the thread that waits for the next one.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Forward:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(caller,), daemon=True).start()

    def _join(self, caller: socket.socket) -> None:
        """Pass bytes both ways until both ends have said all."""
        with caller:
            try:
                stream = self._connection.open_stream(self._to_port)
            except Ssdi8Error:
                return  # the caller sees that nobody answers
            back = threading.Thread(target=_pump, args=(stream, caller), daemon=True)
            back.start()
            _pump(caller, stream)
            back.join()
            stream.close()


def _pump(source: Stream | socket.socket, target: Stream | socket.socket) -> None:
    """Until the source ends, or one of both breaks, which shuts the other one, too."""
    with contextlib.suppress(OSError, EOFError):
        while data := source.recv(PIECE):
            target.sendall(data)
    with contextlib.suppress(OSError, EOFError):
        target.shutdown(socket.SHUT_WR)
