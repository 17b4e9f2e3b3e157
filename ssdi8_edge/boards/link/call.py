"""One program of `board/` while it runs: its answers, attachments and refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from ssdi8_edge.boards.link.process import ERRORS, OUTPUT, START_S, NotStarted, Process
from ssdi8_edge.ground.errors import BoardError

_NOISE = 1 << 20  # what a login may print before our mark
_ANSWER = 1 << 26
_KEPT_ERRORS = 1 << 16
_NOT_FOUND = 127  # what a shell exits with
_NO_PYTHON = re.compile(r"(?i)python3\W+(command )?not found|not found\W+python3")
_LOGIN_REMEDY = (
    "let the login scripts there (~/.bashrc, ~/.profile, ~/.zshenv, config.fish, ~/.cshrc) "
    "{do} in interactive shells alone: [ -t 0 ] before it."
)


class Call:
    """Reads what the program sends. Everything before its mark came from the login and is skipped.

    Args:
        name: of the machine.
        mark: the line that the program begins with.
    """

    def __init__(self, process: Process, name: str, mark: str) -> None:
        self._process = process
        self._name = name
        self._received = process.receive()
        self._errors = b""
        self._mark = mark.encode() + b"\n"
        self._started = self._marked = False
        self._buffer = b""

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.close()

    def start(self, ready: str, message: bytes) -> None:
        """Wait until the program says `ready`, whatever a login prints before, and send `message`.

        Raises:
            LinkLost: the link broke.
            BoardError: the login there never comes to the program.
        """
        try:
            self._skip_to(ready.encode() + b"\n")
        except NotStarted as error:
            said = self._login_said()
            raise BoardError(
                f"the login shell of {self._name} did not run our command within {START_S:g} s"
                f"{f' (it says: {said})' if said else ''}: a login script waits for input, or "
                "starts another program;",
                _LOGIN_REMEDY.format(do="read, ask and exec"),
            ) from error
        self._started = True
        self._process.started()
        self._process.send([message])

    # ----------------------------------------------------------------------------------------------
    # a command's own streams

    def pieces(self) -> Iterator[tuple[str, bytes]]:
        """(stream, bytes) of a supervised command."""
        if not self._marked:
            self._skip_login()
            if self._errors:
                yield ERRORS, self._errors
            if self._buffer:
                yield OUTPUT, self._buffer
        yield from self._received

    def exit_status(self) -> int:
        """Of the program, once `pieces` is exhausted."""
        return self._process.exit_status()

    # ----------------------------------------------------------------------------------------------
    # answers

    def answers(self) -> Iterator[dict[str, Any]]:
        """Until the program ends.

        Raises:
            LinkLost: the link broke.
            BoardError: a deadline passed, the program refused or broke, or this is no answer.
        """
        while (line := self._line()) is not None:
            yield self._parse(line)
        if self._process.exit_status() != 0:
            raise self._failure()

    def next_answer(self) -> dict[str, Any]:
        """The next one.

        Raises:
            LinkLost, BoardError: as for `answers`; also when there is none.
        """
        for answer in self.answers():
            return answer
        raise self.rubbish("no answer")

    def last_answer(self) -> dict[str, Any]:
        """The last one of a program that ends by itself."""
        answers = list(self.answers())
        if not answers:
            raise self.rubbish("no answer")
        return answers[-1]

    def send(self, pieces: Iterable[bytes]) -> None:
        """What follows on the program's standard input; sent from a thread."""
        self._process.send(pieces)

    def release(self) -> None:
        """Let a program go that stays as long as it is wanted, and wait until it is gone."""
        self._process.release()

    def check(self) -> None:
        """Raises LinkLost when the program, or the link to it, is gone."""
        self._process.check()

    # ----------------------------------------------------------------------------------------------
    # attachments: an answer with `bytes`, so many bytes, an answer with `sha256`

    def attachment_size(self) -> int | None:
        """Bytes of the attachment that follows; None where there is no such file."""
        answer = self.next_answer()
        size = answer.get("bytes")
        if size is None and "bytes" in answer:
            return None
        if not isinstance(size, int) or size < 0:
            raise self.rubbish(repr(answer)[:80])
        return size

    def attachment(self, size: int, write: Callable[[bytes], object]) -> None:
        """Hand an attachment to `write`, piece by piece.

        Raises:
            BoardError: what arrived is not what was sent.
        """
        digest = hashlib.sha256()

        def take(piece: bytes) -> None:
            digest.update(piece)
            write(piece)

        self.read(size, take)
        if self.next_answer().get("sha256") != digest.hexdigest():
            raise BoardError(
                f"{self._process.what} from {self._name} came out altered;",
                "repeat; if it happens again, check the network and the disk there.",
            )

    def read(self, count: int, write: Callable[[bytes], object]) -> None:
        """Hand the next `count` bytes to `write`, piece by piece; raises as `answers` does."""
        while count:
            if not self._buffer and not self._more():
                raise self._failure()
            piece, self._buffer = self._buffer[:count], self._buffer[count:]
            count -= len(piece)
            write(piece)

    # ----------------------------------------------------------------------------------------------

    def _more(self) -> bool:
        """Wait for more output; False at its end."""
        for stream, data in self._received:
            if stream == OUTPUT:
                self._buffer += data
                return True
            self._errors = (self._errors + data)[-_KEPT_ERRORS:]
        return False

    def _skip_login(self) -> None:
        self._skip_to(self._mark)
        self._marked = True

    def _skip_to(self, mark: bytes) -> None:
        while (at := self._buffer.find(mark)) < 0:
            if len(self._buffer) > _NOISE:
                raise self.rubbish(self._buffer)
            if not self._more():
                raise self._failure()
        self._buffer = self._buffer[at + len(mark) :]

    def _login_said(self) -> str:
        """The last line before our program, from either stream."""
        text = (self._errors.strip() or self._buffer.strip()).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(c if c.isprintable() else "?" for c in lines[-1])[:200] if lines else ""

    def _not_begun(self, status: int) -> BoardError:
        """The login ended and our program never began."""
        said = self._login_said()
        if _NO_PYTHON.search(said) or (status == _NOT_FOUND and (not said or "python3" in said)):
            return BoardError(
                f"{self._name} has no python3;", "install it there: sudo apt install python3."
            )
        what = self._process.what
        if self._errors.strip():
            words = f"{what} failed on {self._name}: {said}"
        else:
            said = repr(said) if said else f"exit status {status}"
            words = f"{self._name} answered {what} with {said}, which makes no sense"
        return BoardError(
            f"{words} (the login shell ended without running our command);",
            "give this user a shell there that runs commands (chsh -s /bin/bash), and "
            + _LOGIN_REMEDY.format(do="exit and exec"),
        )

    def _line(self) -> bytes | None:
        if not self._marked:
            self._skip_login()
        while b"\n" not in self._buffer:
            if len(self._buffer) > _ANSWER:
                raise self.rubbish(self._buffer)
            if not self._more():
                if self._buffer:
                    raise self._failure()
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.rubbish(line)
        if "refused" in answer:
            message, hint = map(str, answer["refused"])
            raise BoardError(f"{self._name}: {message};", hint)
        return answer

    def rubbish(self, what: bytes | str) -> BoardError:
        """The error for an answer that cannot be meant."""
        shown = what if isinstance(what, str) else repr(what[:60])[1:]
        return BoardError(
            f"{self._name} answered {self._process.what} with {shown}, which makes no sense;",
            "see whether it is the right machine and what its login scripts print.",
        )

    def _failure(self) -> BoardError:
        """Why there is no answer, from the exit status and the last line of standard error."""
        for stream, data in self._received:
            if stream != OUTPUT:
                self._errors = (self._errors + data)[-_KEPT_ERRORS:]
        status = self._process.exit_status()
        if not self._started:
            return self._not_begun(status)
        if not self._errors.strip():
            return self.rubbish(self._buffer or f"exit status {status}")
        words = self._errors.decode("utf-8", "replace").strip().splitlines()[-1]
        return BoardError(
            f"{self._process.what} failed on {self._name}: {words};",
            "mend that there and repeat.",
        )
