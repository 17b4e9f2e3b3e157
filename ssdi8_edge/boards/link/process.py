"""One command at the other end of a connection: bytes in, bytes out, and no endless wait."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from ssdi8_edge.ground.errors import BoardError, LinkLost

HEARTBEAT = b"\n"
HEARTBEAT_S = 4.0  # programs on the board give up after `board.wire.SILENCE_S` without one
_TICK_S = 0.5
_EXIT_S = 10.0
START_S = 30.0  # for login scripts and the start of python3 there
_ORPHANED_S = 2.0
_QUEUED = 32  # pieces, of at most a megabyte each

OUTPUT, ERRORS = "output", "errors"


class Channel(ABC):
    """What a connection has to provide for one command. Methods are called from several threads."""

    @abstractmethod
    def read(self) -> bytes:
        """Standard output; blocks; empty at its end, also when the link is lost."""

    @abstractmethod
    def read_errors(self) -> bytes:
        """The same for standard error."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Standard input; blocks while the other end is busy.

        Raises:
            OSError: nobody reads any more.
        """

    @abstractmethod
    def end_input(self) -> None:
        """No more comes on standard input."""

    @abstractmethod
    def exit_status(self, timeout: float) -> int | None:
        """Of the command, within `timeout` seconds; None if there is none.

        Raises:
            LinkLost: the link broke before the command ended.
        """

    @abstractmethod
    def check(self) -> None:
        """Look at the link.

        Raises:
            LinkLost: it broke, or the other end was not heard for too long.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up the command; reads and writes that wait return."""


class NotStarted(Exception):
    """The command did not begin in time."""


class Process:
    """Pumps a channel with threads, so that the caller never blocks without a deadline.

    Args:
        name: of the machine, for messages.
        what: the command, for messages.
        timeout: seconds in all; None for no limit.
        silence: seconds without a byte in either direction; None for no limit.
        beats: whether to send heartbeats when there is nothing else to send.
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        what: str,
        timeout: float | None,
        silence: float | None,
        beats: bool,
    ) -> None:
        self.what = what
        self._channel = channel
        self._name = name
        self._timeout, self._silence, self._beats = timeout, silence, beats
        self._begin = self._last = time.monotonic()
        self._received: queue.Queue[tuple[str, bytes]] = queue.Queue(_QUEUED)
        self._to_send: queue.Queue[Iterable[bytes]] = queue.Queue()
        self._open = {OUTPUT, ERRORS}
        self._closed = False
        self._started = False
        self._feed_error: Exception | None = None
        for stream, read in ((OUTPUT, channel.read), (ERRORS, channel.read_errors)):
            threading.Thread(target=self._pump, args=(stream, read), daemon=True).start()
        threading.Thread(target=self._feed, daemon=True).start()

    def close(self) -> None:
        """End the command, if it still runs."""
        self._closed = True
        self._to_send.put(())  # wakes the feeder
        self._channel.close()

    def send(self, pieces: Iterable[bytes]) -> None:
        """Send `pieces` from a thread, after what was given before.

        What `pieces` raises is raised by `receive`.
        """
        self._to_send.put(pieces)

    def started(self) -> None:
        """The command runs: from now on heartbeats are its own."""
        self._started = True
        self._last = time.monotonic()

    def receive(self) -> Iterator[tuple[str, bytes]]:
        """(stream, bytes) as they come, until both streams end.

        Raises:
            LinkLost: the link broke.
            BoardError: a deadline passed.
            NotStarted: `started` was not called within `START_S`.
        """
        while self._open:
            try:
                stream, data = self._received.get(timeout=_TICK_S)
            except queue.Empty:
                self._look()
                continue
            if data:
                self._last = time.monotonic()
                yield stream, data
                self._check_deadlines()
            else:
                self._open.discard(stream)
        self._raise_feed_error()

    def release(self) -> None:
        """Tell the command that it is not wanted any more, and wait for its end a while."""
        with contextlib.suppress(LinkLost):
            self._channel.end_input()
            self._channel.exit_status(_EXIT_S)

    def check(self) -> None:
        """Whether the command still runs, for one that says nothing more.

        Raises:
            LinkLost: it does not.
        """
        self._channel.check()
        while not self._received.empty():
            stream, data = self._received.get()
            if not data:
                self._open.discard(stream)
        if OUTPUT not in self._open:
            raise link_lost(self._name, f"{self.what} ended there")

    def exit_status(self) -> int:
        """Of the command, after its streams ended.

        Raises:
            LinkLost: the link broke before.
            BoardError: it was killed.
        """
        status = self._channel.exit_status(_EXIT_S)
        if status is None:
            raise BoardError(
                f"{self.what} was killed on {self._name};",
                "see whether memory ran out there (dmesg), then repeat.",
            )
        return status

    def _pump(self, stream: str, read: Callable[[], bytes]) -> None:
        data = b"not empty"
        while data:  # to the end also when closed: a pipe nobody reads stays open
            data = read()
            while not self._closed:
                try:
                    self._received.put((stream, data), timeout=_TICK_S)
                    break
                except queue.Full:
                    continue

    def _feed(self) -> None:
        while not self._closed:
            try:
                pieces = self._to_send.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                pieces = [HEARTBEAT] if self._beats and self._started else []
            try:
                for piece in pieces:
                    try:
                        self._channel.write(piece)
                    except OSError:
                        return  # nobody reads any more; whether that was right, its answer tells
                    if piece is not HEARTBEAT:
                        self._last = time.monotonic()
            except Exception as error:  # of `pieces`, such as a file that cannot be read
                self._feed_error = error
                return

    def _look(self) -> None:
        """While nothing comes: has anything gone wrong?"""
        self._raise_feed_error()
        self._channel.check()
        self._check_deadlines()
        silent = time.monotonic() - self._last
        if silent > _ORPHANED_S and self._channel.exit_status(0) is not None:
            self._open.clear()  # it ended, and what it left behind keeps its streams open

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if not self._started and now - self._begin > START_S:
            raise NotStarted
        remedy = "see what keeps it busy (ssh, top), then repeat."
        if self._timeout is not None and now - self._begin > self._timeout:
            raise BoardError(
                f"{self.what} did not end within {self._timeout:g} s on {self._name};", remedy
            )
        if self._silence is not None and now - self._last > self._silence:
            raise BoardError(
                f"{self.what} on {self._name} said nothing for {self._silence:g} s;", remedy
            )

    def _raise_feed_error(self) -> None:
        if self._feed_error is not None:
            raise self._feed_error


def link_lost(name: str, why: str) -> LinkLost:
    """The error for a link that broke."""
    return LinkLost(
        f"the link to {name} was lost ({why});",
        "see whether it is up and reachable, then repeat: what is done stays done.",
    )
