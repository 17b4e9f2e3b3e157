"""Stop texts: where generated text ends before a text that was named."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes text on as it grows, up to the first of some stop texts, which itself is left out.

    What may be the beginning of a stop text is held back until it is decided, so that nothing is
    shown that a later token turns into one. The pieces in which the text comes make no difference:
    the stop text that is complete first counts, and of several that end at one place the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty; without any, all text passes at once."""
        self._stops = stops
        self._held = ""
        self.found = False  # nothing that comes after it belongs to the text

    def add(self, text: str) -> str:
        """What may be shown, now that `text` has come."""
        text = self._held + text
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back and is no stop text, since no more text comes."""
        text, self._held = self._held, ""
        return text

    def _undecided(self, text: str) -> int:
        """Characters at the end of `text` with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
