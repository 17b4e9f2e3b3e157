"""Any exception as a sentence; the sentences themselves are those of the board's runtime."""

from __future__ import annotations

import signal
from typing import Any

from ssdi8_edge.ground.board_runtime import runtime_module
from ssdi8_edge.ground.errors import Ssdi8Error

_shared: Any = runtime_module("failures")

during = _shared.during
quiet_libraries = _shared.quiet_libraries
show_traceback = _shared.show_traceback
take_debug = _shared.take_debug

# Exit codes of a program that the kernel killed, directly and under a shell.
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def killed_for_memory(exit_code: int, words: str) -> bool:
    """Whether a program ended so for lack of memory, most likely; `words` are what it said last."""
    return exit_code in KILLED or (exit_code < 0 and bool(_shared.RAN_OUT.search(words)))


def as_ours(error: BaseException, doing: str, lower: str = "end other programs") -> Ssdi8Error:
    """The error to report for any exception: itself where it speaks for itself.

    An error of ours that hides a lack of memory, such as a file that cannot be read for it, does
    not speak for itself.
    """
    if isinstance(error, Ssdi8Error) and _shared.out_of_memory(error, Ssdi8Error) is None:
        return error
    found = _shared.explain(error, doing, Ssdi8Error, lower=lower)
    failure = Ssdi8Error(f"{found.message};", f"{found.remedy}.")
    failure.exit_code = found.exit_code
    return failure
