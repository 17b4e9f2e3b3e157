"""The application: which commands there are, in the order of --help, and how each of them ends.

Each command imports its stage when called, so that --help is quick. Human text goes to stderr, data
to stdout. Exit codes: 0 ok, 1 a stage failed, 2 the request does not fit, 3 a board cannot be
reached, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from runtime.failures import show_traceback
from runtime.problems import PIPE_CLOSED
from ssdi8_edge.cli.boards import deploy, doctor
from ssdi8_edge.cli.build import build
from ssdi8_edge.cli.evaluate import evaluate
from ssdi8_edge.cli.listing import inspect, methods, targets
from ssdi8_edge.cli.measure import profile, sweep
from ssdi8_edge.cli.options import PASSED_ON
from ssdi8_edge.cli.plan import plan
from ssdi8_edge.cli.report import report
from ssdi8_edge.cli.run import run, verify
from ssdi8_edge.cli.serve import serve
from ssdi8_edge.ground.console import human
from ssdi8_edge.ground.errors import Interrupted, Ssdi8Error, UsageError
from ssdi8_edge.ground.failures import as_ours

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize Mamba-2 with SSDi8 and run it on NVIDIA Jetson Orin.",
)


@app.callback()
def _common(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where a failure happened; also after the command."),
    ] = False,
) -> None:
    """`__main__` takes --debug from wherever it stands; here it is told by --help."""


app.command()(plan)
app.command()(build)
app.command(add_help_option=False, context_settings=PASSED_ON)(run)
app.command(add_help_option=False, context_settings=PASSED_ON)(serve)
app.command()(verify)
app.command()(evaluate)
app.command()(inspect)
app.command()(targets)
app.command()(methods)
app.command()(doctor)
app.command()(deploy)
app.command()(sweep)
app.command()(profile)
app.command()(report)


def main() -> None:
    """Entry point: every exception becomes one sentence and its exit code."""
    stopped: list[Interrupted] = []

    def interrupted(number: int, frame: object) -> NoReturn:
        # typer would turn KeyboardInterrupt into exit code 1.
        stopped.append(Interrupted("stopped; what was finished is kept."))
        raise stopped[-1]

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        signal.signal(signal.SIGINT, interrupted)
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(code)
    except Interrupted as error:
        _end(error)
    except (KeyboardInterrupt, typer.Abort):
        _end(Interrupted("stopped; what was finished is kept."))
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except Exception as error:
        if stopped:  # while a library was loading, which made an error of its own of it
            _end(stopped[-1])
        # typer's own usage errors, wherever the installed version keeps their class
        if hasattr(error, "format_message"):
            _end(UsageError(error.format_message().rstrip("."), "see --help."))
        show_traceback(error)
        _end(as_ours(error, f"running {sys.argv[1]}"))


def _end(error: Ssdi8Error | Interrupted) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a second Ctrl-C, while this is said
    human.print(f"ssdi8-edge: {error}")
    sys.exit(error.exit_code)
