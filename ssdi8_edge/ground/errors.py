"""What can go wrong, as the user sees it: one sentence naming the thing, one naming the remedy.

Ssdi8Error                 exit code 1   a stage failed
├── UsageError             exit code 2   an option, target, method or file that does not fit
│   ├── CheckpointError    exit code 2   a checkpoint that cannot be read, or lacks a tensor
│   └── BundleError        exit code 2   a bundle that is incomplete, altered or of another schema
└── BoardError             exit code 3   a board that cannot be reached, or cannot do what was asked
    ├── LinkLost           exit code 3   the network to it failed; the same again may work
    └── BoardBusy          exit code 3   someone else holds the lock that was asked for

Interrupted                exit code 130 Ctrl-C; no Exception, which a library could catch
"""

from __future__ import annotations

from runtime.problems import INTERRUPTED


class Ssdi8Error(Exception):
    """Base of every error that the command line reports without a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """One sentence: the thing, then the remedy."""
        if not self.hint:
            return self.message
        return f"{self.message.rstrip('.;')}; {self.hint}"


class UsageError(Ssdi8Error):
    """The request does not fit: unknown name, missing file, impossible combination."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint is missing, partial or of an unknown layout; the message names the tensor."""


class BundleError(UsageError):
    """A bundle is incomplete, altered on the way, or written by another schema version."""


class BoardError(Ssdi8Error):
    """A board cannot be reached, or cannot do what was asked (disk full, tool missing)."""

    exit_code = 3


class LinkLost(BoardError):
    """The network to a board failed, at once or in the middle: the same again may work later."""


class BoardBusy(BoardError):
    """Someone else holds a lock on the board."""


class Interrupted(BaseException):
    """Ctrl-C; finished stages stay as they are.

    Like KeyboardInterrupt it passes every `except Exception`: the signal may come while a library
    is loading or calling back, and must not be lost there.
    """

    exit_code = INTERRUPTED
