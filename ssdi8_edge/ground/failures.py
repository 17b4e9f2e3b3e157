"""Any exception as a sentence; the sentences themselves are those of the board's runtime."""

from __future__ import annotations

import signal

from runtime.failures import RAN_OUT, explain, out_of_memory
from ssdi8_edge.ground.errors import Ssdi8Error

# Exit codes of a program that the kernel killed, directly and under a shell.
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def killed_for_memory(exit_code: int, words: str) -> bool:
    """Whether a program ended so for lack of memory, most likely; `words` are what it said last."""
    return exit_code in KILLED or (exit_code < 0 and bool(RAN_OUT.search(words)))


def as_ours(error: BaseException, doing: str, lower: str = "end other programs") -> Ssdi8Error:
    """The error to report for any exception: itself where it speaks for itself.

    An error of ours that hides a lack of memory, such as a file that cannot be read for it, does
    not speak for itself.
    """
    if isinstance(error, Ssdi8Error) and out_of_memory(error, Ssdi8Error) is None:
        return error
    found = explain(error, doing, Ssdi8Error, lower=lower)
    failure = Ssdi8Error(f"{found.message};", f"{found.remedy}.")
    failure.exit_code = found.exit_code
    return failure
