"""A link over SSH while it is up: whether it lives, and the channels that commands run in.

Works on paramiko's transports and channels, which `ssh` makes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ssdi8_edge.boards.link.process import Channel, link_lost

LOST_S = 30.0  # without a sign of life
PULSE_S = 5.0
SETTLED_S = 0.5
PACKET = 1 << 15  # the most that OpenSSH takes at once


def quietly(action: Callable[[], object]) -> None:
    """In a thread, as paramiko waits for a dead line until that is given up."""

    def work() -> None:
        with contextlib.suppress(Exception):
            action()

    threading.Thread(target=work, daemon=True).start()


def hang_up(transport: Any) -> None:
    """Close a transport and its socket, without waiting.

    paramiko leaves the socket open where the transport was never started, or ended by itself.
    """

    def work() -> None:
        try:
            transport.close()
        finally:
            transport.sock.close()

    quietly(work)


class Ear:
    """A socket that remembers when it was last heard. What was sent may not have arrived."""

    def __init__(self, sock: Any) -> None:
        self.heard = time.monotonic()
        self._sock = sock

    def recv(self, size: int) -> bytes:
        data: bytes = self._sock.recv(size)
        self.heard = time.monotonic()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class Link:
    """An authenticated transport, those that it goes through, and a pulse that shows it alive."""

    def __init__(self, name: str, transports: Sequence[Any]) -> None:
        self._name = name
        self._transports = transports
        self.transport = transports[-1]
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises LinkLost when it broke, or nothing was heard for too long."""
        if not self.transport.is_active():
            raise link_lost(self._name, "the connection was closed")
        if time.monotonic() - self.transport.sock.heard > LOST_S:
            self.close()
            raise link_lost(self._name, f"nothing was heard for {LOST_S:g} s")

    def close(self) -> None:
        """Drop it, without waiting."""
        for transport in reversed(self._transports):
            hang_up(transport)

    def _beat(self) -> None:
        """Ask for an answer now and then: of a dead line or jump host nothing else tells."""
        try:
            while self.transport.is_active():
                # It is refused, and a refusal is an answer, too.
                self.transport.global_request("keepalive@openssh.com", wait=True)
                time.sleep(PULSE_S)
        except Exception:
            pass  # `check` tells


class SshChannel(Channel):
    """One exec channel of a link."""

    def __init__(self, link: Link, channel: Any) -> None:
        self._link = link
        self._channel = channel

    def read(self) -> bytes:
        return self._received(self._channel.recv, 1 << 20)

    def read_errors(self) -> bytes:
        return self._received(self._channel.recv_stderr, 1 << 16)

    @staticmethod
    def _received(receive: Callable[[int], bytes], most: int) -> bytes:
        try:
            return bytes(receive(most))
        except Exception:
            # Receiving also tells the other side that there is room again: not over a link that has
            # just died, which is the end of the stream too. `check` tells why.
            return b""

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), PACKET):
            piece = data[start : start + PACKET]
            while piece:
                try:
                    sent = self._channel.send(piece)
                except Exception as error:
                    raise BrokenPipeError from error
                if sent == 0:
                    raise BrokenPipeError
                piece = piece[sent:]

    def end_input(self) -> None:
        quietly(self._channel.shutdown_write)

    def exit_status(self, timeout: float) -> int | None:
        if not self._channel.status_event.wait(timeout):
            return None
        if self._channel.exit_status < 0:
            # A dead transport ends its channels before itself; a killed command leaves it alive.
            self._link.transport.join(SETTLED_S)
            self._link.check()
            return None
        return int(self._channel.exit_status)

    def check(self) -> None:
        self._link.check()

    def close(self) -> None:
        quietly(self._channel.close)
