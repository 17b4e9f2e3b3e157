"""Options of several commands; run_engine.py and the host's `run` and `serve` share the tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.arguments import number, text, text_to_find
from runtime.backends.protocol import BackendOptions
from runtime.bundle import Bundle
from runtime.console import size
from runtime.memory import require_memory
from runtime.problems import BundleProblem
from runtime.sampling import SAMPLING
from runtime.session import Session
from runtime.states.prefix_cache import MIB, PrefixCache, StateFolder

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
CHATTING: Options = {
    "--system": {"type": text, "metavar": "TEXT", "help": "system prompt"},
    "--think": {"action": "store_true", "help": "thoughts before an answer"},
    "--no-think": {"action": "store_true", "help": "no thoughts before an answer"},
}
HOLDING: Options = {
    "--state-dir": {
        "metavar": "DIR",
        "help": "keep states of what was read and said here, for later runs as well",
    },
    "--state-memory": {
        "type": number(int, 1, 1 << 20),
        "default": 256,
        "metavar": "MIB",
        "help": "that states held may take (default: 256)",
    },
}
REMEMBERING: Options = {
    "--save-state": {
        "metavar": "FILE",
        "help": "at the end write the state that prompt and answer led to",
    },
    "--load-state": {"metavar": "FILE", "help": "go on from such a state"},
    **HOLDING,
}
# Of prompts and chats: title -> what stands under it in --help.
PROMPTING: Mapping[str, Options] = {
    "with --prompt and --interactive": GENERATING,
    "with --interactive, where the bundle has a chat template": CHATTING,
    "what is remembered, with --prompt and --interactive": REMEMBERING,
}
OPENING: Options = {
    "--threads": {
        "type": number(int, 1, 1024),
        "metavar": "N",
        "help": "of the CPU (default: one per core)",
    },
    "--force": {"action": "store_true", "help": "run though memory seems too small"},
}
RUNNING: Options = {
    **OPENING,
    "--json": {"action": "store_true", "help": "JSON on stdout"},
}
LISTENING: Options = {
    "--listen": {
        "default": "127.0.0.1",
        "metavar": "ADDRESS",
        "help": "(default: 127.0.0.1, which only that machine reaches)",
    }
}
# Of the server; what they mean in detail says docs/server.md.
SERVING: Options = {
    "--port": {
        "type": number(int, 0, 65535),
        "default": 8000,
        "metavar": "N",
        "help": "(default: 8000; 0: any that is free)",
    },
    "--api-key-file": {
        "type": Path,
        "metavar": "FILE",
        "help": "keys, one a line, of which a request has to show one; needed beyond loopback",
    },
    "--allow-host": {
        "action": "append",
        "type": text_to_find,
        "default": [],
        "metavar": "NAME",
        "help": "a name by which the server may be called; may be given several times",
    },
    "--parallel": {
        "type": number(int, 1, 256),
        "default": 4,
        "metavar": "N",
        "help": "answers that go on together (default: 4)",
    },
    "--queue": {
        "type": number(int, 0, 4096),
        "default": 64,
        "metavar": "N",
        "help": "requests that may wait; one more gets status 429 (default: 64)",
    },
    "--prefill-tokens": {
        "type": number(int, 1),
        "metavar": "N",
        "help": "read prompts in pieces of at most so many tokens, so that others wait less for a"
        " long one (default: as the bundle says, like --prompt)",
    },
    "--max-prompt-tokens": {
        "type": number(int, 1),
        "default": 32768,
        "metavar": "N",
        "help": "(default: 32768)",
    },
    "--max-answer-tokens": {
        "type": number(int, 1),
        "default": 4096,
        "metavar": "N",
        "help": "(default: 4096)",
    },
    "--max-seconds": {
        "type": number(float, 0.1, 86400),
        "default": 600.0,
        "metavar": "S",
        "help": "of one request, the wait included; then its answer ends (default: 600)",
    },
    "--max-body-bytes": {
        "type": number(int, 1024),
        "default": 1 << 22,
        "metavar": "N",
        "help": "(default: 4194304)",
    },
    "--print-unit": {
        "action": "store_true",
        "help": "print a unit file for systemd that serves with these options, and do nothing else",
    },
}


def add(group: argparse._ActionsContainer, options: Options) -> None:
    """Give a parser, or a group of one, these options."""
    for flag, what in options.items():
        group.add_argument(flag, **what)


def add_prompting(parser: argparse.ArgumentParser) -> None:
    """Give a parser all options of `PROMPTING`."""
    for title, options in PROMPTING.items():
        add(parser.add_argument_group(title), options)


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


def open_cache(session: Session, asked: argparse.Namespace) -> PrefixCache:
    """The states that are held while a command runs, and beyond it where a folder was named.

    Raises:
        BundleProblem: the folder cannot be made, or none of its files could be used.
    """
    folder, budget = None, asked.state_memory * MIB
    if asked.state_dir is not None:
        model = session.bundle.model
        least = model.state_bytes() - model.cache_bytes()
        if least > budget:
            raise BundleProblem(
                f"a state of {session.bundle.name} takes {size(least)}, more than --state-memory"
                f" {asked.state_memory}",
                f"give it {-(-least // MIB)} or more",
            )
        folder = StateFolder(Path(asked.state_dir), session.bundle, session.backend)
    return PrefixCache(budget, folder)
