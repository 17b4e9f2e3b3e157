"""A machine that runs commands: what every connection offers and guarantees.

`hosts.connect(host)` makes one: `ssh.SshConnection` for a board, `local.LocalConnection` for this
machine. Everything else in this package works through this class and cannot tell them apart.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ssdi8_edge.boards.link.call import Call
from ssdi8_edge.boards.link.lines import LineReader
from ssdi8_edge.boards.link.process import OUTPUT, Channel, Process
from ssdi8_edge.ground.artifacts import whole_or_absent
from ssdi8_edge.ground.errors import BoardBusy, LinkLost

T = TypeVar("T")
OnLine = Callable[[str], None]
Say = Callable[[str], None]

DEFAULT_STORE = "~/.local/share/ssdi8-edge"
SILENCE_S = 60.0

_PROGRAMS = Path(__file__).parents[1] / "programs"
# All that is ever put on a command line: says that it runs, then reads programs and arguments from
# standard input. Nothing is sent before, so that no login script or other shell reads it.
_START = (
    'import json,sys;print("READY",flush=True);m=json.loads(sys.stdin.buffer.readline());'
    '[exec(p,globals()) for p in m["programs"]];main(Wire(m["arguments"],m["mark"]))'
)
_RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0)


@dataclass(frozen=True)
class Result:
    """What a command left behind; output that is not UTF-8 has replacement characters."""

    exit: int
    stdout: str
    stderr: str

    def last_words(self) -> str:
        """The last line that says something, for messages."""
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines()]
        return next((line for line in reversed(lines) if line), f"exit status {self.exit}")


class Stream(Protocol):
    """What is used of a socket, and of what stands for one at the other end of a link."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> None: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class Connection(ABC):
    """One machine that runs commands.

    Guaranteed, whichever machine it is:

    * **Nothing hangs.** Every call ends by its deadline or, where it has none, when the link is
      lost; a peer that is not heard for 30 s counts as lost, however quiet the network is about it.
    * **Errors.** `LinkLost`: the network failed, the same call may work later. `BoardBusy`: a lock
      is held. `BoardError`, their base: everything else that is wrong over there. Each is one
      sentence that names the machine and the remedy, exit code 3.
    * **Reconnecting.** A call without a link makes one. A call that loses it raises `LinkLost` and
      is not repeated by itself, as it may have had its effect; `patiently` repeats it. Between
      calls nothing depends on the link, except locks.
    * **Nothing is left running.** When a call does not see its command end (deadline, lost link,
      Ctrl-C, this process killed), the command is ended on the machine, with its process group,
      within 40 s. Only jobs (`jobs.start_job`) live on, and what runs as another user.
    * **Nothing is interpreted.** Arguments, paths and contents reach the machine as they are; no
      shell sees them. `~` at the start of a path is the home over there. What a login script prints
      is skipped.
    * **Threads.** Calls may overlap, from any threads.

    The machine needs a login shell that knows `exec` (a POSIX shell, fish, csh), login scripts that
    do not wait for input, and python3 of at least 3.8.

    Attributes:
        name: of the machine, as the user gave it; for messages.
        store: folder over there that holds bundles, jobs and locks.
        python: interpreter for bundles that was named; None to look for one (`interpreter`).
    """

    def __init__(self, name: str, store: str = DEFAULT_STORE, python: str | None = None) -> None:
        self.name = name
        self.store = store
        self.python = python

    # ----------------------------------------------------------------------------------------------
    # what the two kinds of connection differ in

    @abstractmethod
    def open_channel(self, program: str) -> Channel:
        """Run python3 with the one-line `program`."""

    @abstractmethod
    def open_stream(self, port: int) -> Stream:
        """Connect to a port of the machine's own loopback.

        Raises:
            LinkLost: the network failed.
            BoardError: nobody listens there, or the machine does not let ports be forwarded.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop the link; the next call makes a new one."""

    # ----------------------------------------------------------------------------------------------
    # commands

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        folder: str = "~",
        environment: Mapping[str, str] | None = None,
        timeout: float | None = 60.0,
        silence: float | None = None,
        on_line: OnLine | None = None,
        on_error_line: OnLine | None = None,
    ) -> Result:
        """Run a command to its end; a failing one is a `Result` like any other.

        Args:
            argv: program, looked up in PATH, and its arguments; `~` is expanded in the first.
            input: its standard input.
            folder: to run in.
            environment: variables to set besides those of the login.
            timeout: seconds in all; None for no limit.
            silence: seconds without output; None for no limit.
            on_line: gets each line of standard output when it is complete, without its end.
            on_error_line: the same for standard error.

        Raises:
            LinkLost: the network failed; the command is being ended.
            BoardError: a deadline passed, or the machine lacks what any call needs.
        """
        arguments = {
            "argv": list(argv),
            "folder": folder,
            "environment": dict(environment or {}),
            "input_bytes": len(input),
        }
        output, errors = LineReader(on_line), LineReader(on_error_line)
        with self.open_program(
            "supervise", arguments, what=argv[0], timeout=timeout, silence=silence
        ) as call:
            call.send([input])
            for stream, data in call.pieces():
                (output if stream == OUTPUT else errors).add(data)
            output.end()
            errors.end()
            return Result(call.exit_status(), output.text, errors.text)

    def call(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        what: str,
        timeout: float | None = 60.0,
        silence: float | None = SILENCE_S,
    ) -> dict[str, Any]:
        """Run a program of `board/` and return its last answer.

        Raises:
            LinkLost, BoardError: as for `run`; also what the program refuses, in its words.
        """
        with self.open_program(
            program, arguments, what=what, timeout=timeout, silence=silence
        ) as call:
            return call.last_answer()

    def open_program(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        what: str,
        timeout: float | None = None,
        silence: float | None = SILENCE_S,
        beats: bool = True,
    ) -> Call:
        """Start a program of `board/` and talk with it; close it by `with`.

        Args:
            program: file name in `board/` without its suffix.
            arguments: JSON values, for `wire.arguments`; `store` is added.
            what: it does, for messages.
            beats: send heartbeats while there is nothing else to send; not for a program that
                reads its data by count.
        """
        mark = f"ssdi8-edge-{secrets.token_hex(8)}"
        message = {
            "programs": [_program_text(name) for name in ("wire", "store", program)],
            "arguments": {"store": self.store, **arguments},
            "mark": mark,
        }
        ready = f"ssdi8-edge-{secrets.token_hex(8)}"
        channel = self.open_channel(_START.replace("READY", ready))
        process = Process(channel, self.name, what, timeout, silence, beats)
        call = Call(process, self.name, mark)
        try:
            call.start(ready, json.dumps(message).encode() + b"\n")
        except BaseException:
            process.close()
            raise
        return call

    # ----------------------------------------------------------------------------------------------
    # files

    def read_bytes(self, path: str, limit: int = 1 << 24) -> bytes:
        """Content of a small file.

        Raises:
            BoardError: it cannot be read, or holds more than `limit` bytes.
        """
        content = bytearray()
        arguments = {"path": path, "limit": limit, "missing_ok": False}
        with self.open_program("read_file", arguments, what=f"reading {path}") as call:
            call.attachment(call.attachment_size() or 0, content.extend)
        return bytes(content)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a small file, whole or not at all; folders on the way are made.

        Raises:
            BoardError: it cannot be written.
        """
        arguments = {"path": path, "bytes": len(data)}
        with self.open_program(
            "write_file", arguments, what=f"writing {path}", beats=False
        ) as call:
            call.send([data])
            call.last_answer()

    def fetch(self, path: str, local: Path, *, missing_ok: bool = False) -> bool:
        """Copy a file to this machine, whole or not at all, compared by SHA-256.

        Returns:
            Whether it was there; False only with `missing_ok`.

        Raises:
            BoardError: it cannot be read there.
            Ssdi8Error: it cannot be written here.
        """
        arguments = {"path": path, "limit": None, "missing_ok": missing_ok}
        with self.open_program("read_file", arguments, what=f"fetching {path}") as call:
            size = call.attachment_size()
            if size is None:
                return False
            with whole_or_absent(local) as scratch, scratch.open("wb") as file:
                call.attachment(size, file.write)
        return True

    # ----------------------------------------------------------------------------------------------
    # locks

    @contextmanager
    def lock(
        self, name: str, *, holder: str, wait_s: float = 0.0, shared: bool = False
    ) -> Iterator[Lock]:
        """Hold a lock on the machine; it is free within 40 s of the death of its holder or link.

        Args:
            name: of the lock: letters, digits, `.`, `_`, `-`. `board` is held while measuring.
            holder: what others are told.
            wait_s: how long to wait for it.
            shared: others may hold it shared at the same time.

        Raises:
            BoardBusy: someone else holds it, and who.
        """
        arguments = {"name": name, "holder": holder, "wait_s": wait_s, "shared": shared}
        with self.open_program("lock", arguments, what=f"lock {name}", silence=None) as call:
            answer = call.next_answer()
            if "busy" in answer:
                raise BoardBusy(
                    f"{self.name} is in use by {answer['busy'] or 'someone else'};",
                    "wait until it is done, then repeat.",
                )
            try:
                yield Lock(call)
            finally:
                call.release()

    # ----------------------------------------------------------------------------------------------
    # patience

    def patiently(
        self, action: Callable[[], T], *, patience_s: float = 300.0, say: Say = lambda _: None
    ) -> T:
        """Repeat `action` while the network fails, reconnecting, for at most `patience_s` seconds.

        Args:
            action: may be run again after any part of it had its effect.
            say: gets a sentence each time the link is lost.

        Raises:
            LinkLost: the patience is over. Anything else that `action` raises comes through.
        """
        waits = iter(_RETRY_S)
        wait = next(waits)
        end = time.monotonic() + patience_s
        while True:
            try:
                return action()
            except LinkLost as error:
                if time.monotonic() + wait > end:
                    raise
                say(f"{error.message} trying again in {wait:g} s")
                self.close()
                time.sleep(wait)
                wait = next(waits, wait)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Lock:
    """A lock while it is held."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def check(self) -> None:
        """Whether it is still held.

        Raises:
            LinkLost: it is not, the link broke; others may hold it by now.
        """
        self._call.check()


def _program_text(name: str) -> str:
    """Source of a program of `board/`."""
    return (_PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
