"""Passwords and passphrases: asked for on the terminal, remembered while the program runs."""

from __future__ import annotations

import getpass
import sys
import threading

# Boards are reached from several threads, and a terminal answers one question at a time.
_asking = threading.Lock()


class Prompts:
    """Answers by question."""

    def __init__(self) -> None:
        self._answers: dict[str, str] = {}

    def ask(self, question: str) -> str | None:
        """The answer, without showing it; None where no terminal is there to ask."""
        with _asking:
            if question not in self._answers:
                if not sys.stdin.isatty():
                    return None
                self._answers[question] = getpass.getpass(f"{question}: ")
            return self._answers[question]

    def forget(self, question: str) -> None:
        """The answer was wrong."""
        self._answers.pop(question, None)
