"""The command lines of run_engine.py and build_engine.py: arguments, commands, exit codes.

What was asked for goes to stdout, timings and problems to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from runtime import options as shared
from runtime.arguments import Parser, number, numbers
from runtime.backends.choose import BACKENDS
from runtime.bundle import open_bundle
from runtime.console import visible
from runtime.failures import during, explain, out_of_memory, show_traceback
from runtime.problems import PIPE_CLOSED, BundleProblem, MemoryRanOut

# option -> file in runtime/commands
COMMANDS = {
    "info": "info",
    "verify": "verify",
    "bench": "bench",
    "profile": "profile",
    "interactive": "chat",
    "serve": "serve",
}
DOING = {
    "verify": "verifying the bundle",
    "bench": "measuring",
    "profile": "measuring layers",
    "serve": "serving",
}


def run(arguments: Sequence[str], default_bundle: Path) -> int:
    """run_engine.py; returns the exit code."""
    return _guarded("run_engine", lambda: _run(arguments, default_bundle))


def run_build(arguments: Sequence[str], default_bundle: Path) -> int:
    """build_engine.py; returns the exit code."""
    from runtime.commands import build

    return _guarded("build_engine", lambda: build.build(build.parse(arguments, default_bundle)))


def _guarded(program: str, command: Callable[[], int]) -> int:
    # None where the program was started with it closed, which input() does not take.
    sys.stdout = sys.stdout or _nobody()
    sys.stderr = sys.stderr or _nobody()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console without UTF-8 shall not end a run
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        show_traceback(error)
        if isinstance(error, MemoryRanOut) or (
            isinstance(error, BundleProblem) and out_of_memory(error, BundleProblem) is None
        ):
            print(f"{program}: {visible(str(error))}", file=sys.stderr)
            return error.exit_code
        failure = explain(error, "running", BundleProblem)
        print(f"{program}: {visible(failure.sentence)}", file=sys.stderr)
        return failure.exit_code


def _nobody() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _run(arguments: Sequence[str], default_bundle: Path) -> int:
    options = _parse(arguments, default_bundle)
    bundle = open_bundle(options.bundle)
    asked = [name for option, name in COMMANDS.items() if getattr(options, option)]
    if options.prompt is not None or options.prompt_file is not None:
        asked.append("generate")
    if not asked:
        raise BundleProblem(
            "there is nothing to do",
            "give --prompt TEXT, --prompt-file FILE, --interactive, --serve, --bench, --profile,"
            " --verify or --info",
        )
    # Imported here: one command does not need what another does.
    with during(DOING.get(asked[0], "running the model")):
        return importlib.import_module(f"runtime.commands.{asked[0]}").run(bundle, options)


def _parse(arguments: Sequence[str], default_bundle: Path) -> argparse.Namespace:
    parser = Parser(
        prog="run_engine.py",
        description="Run, measure, verify or describe a bundle: a quantized Mamba-2 model in one"
        " folder.",
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        default=default_bundle,
        metavar="BUNDLE",
        help="its folder (default: the folder of this script)",
    )
    _add_commands(parser)
    shared.add_prompting(parser)
    _add_serving(parser)
    _add_measuring(parser)
    where = parser.add_argument_group("where and how it runs")
    add = where.add_argument
    add(
        "--backend",
        choices=tuple(BACKENDS),
        help="(default: the first of the bundle's engines that is ready)",
    )
    add("--engine", type=Path, metavar="DIR", help="--out of build_engine.py")
    add(
        "--plugins",
        type=Path,
        metavar="LIB",
        help="plugin or kernel library (default: the one of the engine, else that of setup.sh)",
    )
    shared.add(where, shared.RUNNING)
    add("--debug", action="store_true", help="show where a failure happened")
    return parser.parse_args(arguments)


def _add_commands(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to do, one of").add_mutually_exclusive_group()
    shared.add(group, shared.PROMPTS)
    add = group.add_argument
    add("--serve", action="store_true", help="OpenAI's API over HTTP, and a page to chat")
    add("--bench", action="store_true", help="times and memory, one JSON line per length")
    add("--profile", action="store_true", help="time of each layer and module")
    add(
        "--verify",
        action="store_true",
        help="check all hashes, then compare with the golden vectors; exit code 0 or 1",
    )
    add("--info", action="store_true", help="describe the bundle")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --serve")
    for flag, what in shared.LISTENING.items():
        group.add_argument(flag, "--host", **what)
    shared.add(group, shared.SERVING)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("with --bench and --profile").add_argument
    add(
        "--seq-lens",
        type=numbers,
        default=[256, 512, 1024, 2048],
        metavar="L,…",
        help="prompt lengths; --profile takes the first (default: 256,512,1024,2048)",
    )
    add("--new-tokens", type=number(int, 1), default=64, metavar="N", help="(default: 64)")
    add("--repeat", type=number(int, 1), default=5, metavar="N", help="(default: 5)")
    add("--warmup", type=number(int, 0), default=1, metavar="N", help="not counted (default: 1)")
    add(
        "--seconds",
        type=number(float, 0),
        default=0.0,
        metavar="S",
        help="repeat a length for at least so long (default: 0)",
    )
