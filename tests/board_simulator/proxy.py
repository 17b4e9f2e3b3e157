"""A wire that fails: after so many bytes it cuts, resets, garbles or falls silent."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cut", "reset", "flip", "silence"]


@dataclass(frozen=True)
class Fault:
    """What happens to one connection, once `after` bytes went through in both directions."""

    after: int
    kind: Kind


class Proxy:
    """Listens on loopback and forwards to `port`; each connection meets the next fault, if any.

    Attributes:
        met: faults that happened.
    """

    def __init__(self, port: int, faults: Iterable[Fault] = ()) -> None:
        self.met: list[Fault] = []
        self._target = port
        self._faults: Iterator[Fault] = iter(faults)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            fault = next(self._faults, None)
            threading.Thread(target=self._forward, args=(client, fault), daemon=True).start()

    def _forward(self, client: socket.socket, fault: Fault | None) -> None:
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            self._pump(client, server, fault)

    def _pump(self, client: socket.socket, server: socket.socket, fault: Fault | None) -> None:
        other = {client: server, server: client}
        left = fault.after if fault else -1
        while not self._closing.is_set():
            for ready in select.select(list(other), [], [], 0.1)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                if fault is not None and 0 <= left <= len(data):
                    self.met.append(fault)
                    if fault.kind == "silence":
                        self._closing.wait()
                        return
                    if fault.kind == "flip":
                        at = min(left, len(data) - 1)
                        data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
                        fault = None
                    else:
                        other[ready].sendall(data[:left])
                        if fault.kind == "reset":
                            for sock in other:
                                linger = struct.pack("ii", 1, 0)
                                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        return
                left -= len(data)
                other[ready].sendall(data)
