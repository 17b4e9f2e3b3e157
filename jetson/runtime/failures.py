"""What an exception means to a user: no memory left, a file, a package, or what nobody foresaw.

The host's command line shows the same sentences. Imports the standard library alone, so that also
a machine without numpy gets one.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import traceback
import warnings
from _thread import interrupt_main
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from runtime.console import size, visible

DEBUG_OPTION = "--debug"
# In the environment, since commands start other programs of ours.
DEBUG = "SSDI8_EDGE_DEBUG"

LOADING = "loading libraries"
FEWER_TOKENS = "end other programs, or ask for fewer tokens"

# What says so in words alone: torch, onnxruntime, CUDA and its libraries, C++, the loader of shared
# libraries, threads.
RAN_OUT = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|failed to allocate|bad_alloc"
    r"|bad allocation|unable to allocate|can.?t start new thread|alloc_failed|OUT_OF_MEMORY"
    r"|memoryallocation|failed to map segment|memory allocation of \d+ bytes failed",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?(bytes|[KMGTPE]i?B)\b|buffer of size:? ?(\d+)")


class Failure(NamedTuple):
    """One sentence: the thing, then the remedy; both without a full stop."""

    message: str
    remedy: str
    exit_code: int

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.remedy}."


@contextmanager
def during(doing: str, lower: str = "") -> Iterator[None]:
    """Notes on an exception that leaves the block what was being done; the innermost block counts.

    Of one that an import raised, that is `LOADING`.

    Args:
        doing: such as "measuring"; it follows the word "while".
        lower: what takes less memory, as a remedy.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "doing"):
            error.doing = LOADING if _while_importing(error) else doing  # type: ignore[attr-defined]
            error.lower = lower  # type: ignore[attr-defined]
        raise


def _while_importing(error: BaseException) -> bool:
    """Whether a module was being loaded when it was raised, as far up as it came."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ImportError) or any(
        frame.f_code.co_filename.startswith("<frozen importlib")
        or (frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__")
        for frame in frames
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def out_of_memory(error: BaseException, *own: type[BaseException]) -> BaseException | None:
    """The exception in the chain of `error` that says that memory ran out.

    Args:
        own: exceptions whose words are about what the user gave, and may name anything.
    """
    for each in chain(error):
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return each
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno == errno.ENOMEM:
                return each
        elif not isinstance(each, (*own, UnicodeError)) and RAN_OUT.search(str(each)):
            return each
    return None


def memory_failure(error: BaseException, doing: str, lower: str) -> Failure:
    """Of an exception from `out_of_memory`: the stage, what was needed, what can be set lower."""
    text = str(error)
    found = _AMOUNT.search(text)
    needed = ""
    if found:
        number, unit, bare = found.groups()
        plain = bare or (number if unit == "bytes" else None)
        needed = f", where {size(float(plain)) if plain else f'{number} {unit}'} more were needed"
    gpu = "GPU memory" if re.search(r"\bCUDA|CUBLAS|CUDNN", text) else "memory"
    return Failure(f"{gpu} ran out while {doing}{needed}", lower, 2)


def explain(
    error: BaseException, doing: str, *own: type[BaseException], lower: str = FEWER_TOKENS
) -> Failure:
    """What to tell a user who is not to see a traceback.

    Args:
        doing: what the program was doing, where neither a `during` nor an import says it better.
        lower: likewise, what takes less memory.
        own: see `out_of_memory`.
    """
    noted = next((each for each in chain(error) if hasattr(each, "doing")), None)
    if noted is not None:
        doing, lower = noted.doing, noted.lower or lower  # type: ignore[attr-defined]
    elif any(map(_while_importing, chain(error))):
        doing = LOADING
    memory = out_of_memory(error, *own)
    if memory is not None:
        return memory_failure(memory, doing, lower)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return Failure(
            f"{package or 'a package'} cannot be imported ({one_line(error)})",
            f"install it again with: {sys.executable} -m pip install --force-reinstall"
            f" {package or 'PACKAGE'}",
            2,
        )
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check that this user may read and write there"
        return Failure(f"{one_line(error)} while {doing}", remedy, 2)
    return Failure(
        f"unexpected {type(error).__name__} while {doing}: {one_line(error)}",
        f"repeat the command with {DEBUG_OPTION} to see where, and report it",
        1,
    )


def one_line(error: BaseException) -> str:
    """The text of an exception on one line, without a full stop at its end."""
    return " ".join(str(error).split()).rstrip(".;") or "no text"


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return bool(os.environ.get(DEBUG))


def take_debug(arguments: MutableSequence[str]) -> None:
    """Remove --debug from a command line, wherever it stands before `--`, and remember it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if DEBUG_OPTION in arguments[:end]:
        os.environ[DEBUG] = "1"
        arguments[:] = [a for i, a in enumerate(arguments) if i >= end or a != DEBUG_OPTION]


def show_traceback(error: BaseException) -> None:
    """On stderr, if it was asked for."""
    if debugging():
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)


def quiet_libraries(program: str) -> None:
    """Neither warnings nor tracebacks of other threads and of objects that go, without --debug."""
    if debugging():
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

    def thread_failed(given: Any) -> None:
        if given.exc_value is not None and not issubclass(given.exc_type, SystemExit):
            failure = explain(given.exc_value, "working in the background")
            print(f"{program}: {visible(failure.sentence)}", file=sys.stderr)

    def nobody_hears(given: Any) -> None:
        # Ctrl-C while a library called back is said once more, where it is heard.
        if not issubclass(given.exc_type, (Exception, GeneratorExit, SystemExit)):
            interrupt_main()

    threading.excepthook = thread_failed
    sys.unraisablehook = nobody_hears
