"""What a user can put right, and the exit codes of a program that was stopped.

The host's command line uses both. Imports the standard library alone.
"""

from __future__ import annotations

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
PIPE_CLOSED = 141  # and for one whose reader went away


class BundleProblem(Exception):
    """Something the user can put right: one sentence, the thing first and then the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return " ".join(f"{self.message}; {self.hint}.".split())


class MemoryRanOut(BundleProblem):
    """There is not enough memory; the message says for what."""


class RunFailure(BundleProblem):
    """The bundle was loaded and then did not compute what it should."""

    exit_code = 1
