"""Options of several commands; run_engine.py and the host's `ssdi8-edge run` share the tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from runtime.arguments import number, text, text_to_find
from runtime.backends.protocol import BackendOptions
from runtime.bundle import Bundle
from runtime.memory import require_memory
from runtime.sampling import SAMPLING
from runtime.session import Session

# Each is a flag and what argparse's add_argument takes with it.
Options = Mapping[str, Mapping[str, Any]]

PROMPTS: Options = {
    "--prompt": {"type": text, "metavar": "TEXT", "help": "text to continue"},
    "--prompt-file": {
        "metavar": "FILE",
        "help": "read it from a UTF-8 file, - for stdin; one final newline is dropped",
    },
    "--interactive": {"action": "store_true", "help": "continue each line that you type"},
}
GENERATING: Options = {
    option.flag: {
        "type": number(option.kind, option.least, option.most),
        "default": option.default,
        "metavar": option.metavar,
        "help": f"{option.help} (default: {option.default:g})",
    }
    for option in SAMPLING
} | {
    "--stop": {
        "action": "append",
        "type": text_to_find,
        "default": [],
        "metavar": "TEXT",
        "help": "end before this text when the model writes it; may be given several times",
    }
}
RUNNING: Options = {
    "--threads": {
        "type": number(int, 1, 1024),
        "metavar": "N",
        "help": "of the CPU (default: one per core)",
    },
    "--force": {"action": "store_true", "help": "run though memory seems too small"},
    "--json": {"action": "store_true", "help": "JSON on stdout"},
}


def add(group: argparse._ActionsContainer, options: Options) -> None:
    """Give a parser, or a group of one, these options."""
    for flag, what in options.items():
        group.add_argument(flag, **what)


def open_session(
    bundle: Bundle, asked: argparse.Namespace, profiling: bool = False, hash_all: bool = False
) -> Session:
    """The bundle with the runtime, threads, engine and plugins that run_engine.py was asked for.

    Args:
        profiling, hash_all: see `BackendOptions`.

    Raises:
        BundleProblem: it cannot fit into memory, and --force was not given.
    """
    if not asked.force:
        require_memory(bundle)
    options = BackendOptions(
        threads=asked.threads,
        engines=asked.engine,
        plugins=asked.plugins,
        profiling=profiling,
        hash_all=hash_all,
    )
    return Session.open(bundle, options, asked.backend)
