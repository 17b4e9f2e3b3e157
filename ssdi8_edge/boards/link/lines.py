"""Bytes that come in pieces, as lines."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class LineReader:
    """Collects text; `on_line` gets every line once it is complete, without its end.

    Args:
        on_line: also None, for text alone.

    Attributes:
        bytes: how many were added.
    """

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._on_line = on_line
        self._parts: list[str] = []
        self._rest = ""
        self.bytes = 0

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)

    def add(self, data: bytes) -> None:
        """The next piece; it may end inside a line or a character."""
        self.bytes += len(data)
        self._take(self._decode(data))

    def end(self) -> None:
        """No more comes: an unfinished last line is one, too."""
        self._take(self._decode(b"", True))
        if self._rest and self._on_line:
            self._on_line(self._rest.removesuffix("\r"))
        self._rest = ""

    def _take(self, text: str) -> None:
        self._parts.append(text)
        if self._on_line is None:
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._on_line(line.removesuffix("\r"))
