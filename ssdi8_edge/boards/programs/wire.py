"""The board's end of a call: arguments in, answers out. Sent before every other program."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

# The host sends a byte every few seconds; without any for so long, the link counts as lost.
SILENCE_S = 30


class Wire:
    """Standard input and output of a program, with the mark that ends whatever a login printed."""

    def __init__(self, arguments: dict[str, Any], mark: str) -> None:
        self.arguments = arguments
        assert isinstance(sys.stdin.buffer, io.BufferedReader)
        self.input = sys.stdin.buffer
        self._output = sys.stdout.buffer
        self._mark = mark.encode()
        self._gone = False

    def begin(self) -> None:
        """What follows on standard output is ours."""
        if self._mark:
            self._output.write(self._mark + b"\n")
            self._output.flush()
            self._mark = b""

    def answer(self, **fields: Any) -> None:
        """Send one JSON line."""
        self.begin()
        self._output.write(json.dumps(fields).encode() + b"\n")
        self._output.flush()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.begin()
        self._output.write(data)
        self._output.flush()

    def refuse(self, message: str, hint: str) -> NoReturn:
        """End with one sentence for the user."""
        self.answer(refused=[message, hint])
        self.exit(0)

    def exit(self, status: int) -> NoReturn:
        """End at once: a thread may still wait on standard input."""
        sys.stdout.flush()
        os._exit(status)

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, at least one; ends the program when the link is lost."""
        signal.alarm(SILENCE_S)
        data = self.input.read1(limit)
        signal.alarm(0)
        if not data:
            os._exit(1)
        return data

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` from a thread once the host closed its end or was not heard for a while."""
        heard = [time.monotonic()]

        def listen() -> None:
            while self.input.read1(4096):
                heard[0] = time.monotonic()
            heard[0] = -float("inf")

        def judge() -> None:
            while time.monotonic() - heard[0] < SILENCE_S:
                time.sleep(0.1)
            gone()

        for work in (listen, judge):
            threading.Thread(target=work, daemon=True).start()
