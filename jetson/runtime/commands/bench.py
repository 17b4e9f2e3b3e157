"""--bench: one JSON line per prompt length; runtime/bench.py says what is in it."""

from __future__ import annotations

import argparse

from runtime.bench import BenchOptions, measure
from runtime.bundle import Bundle
from runtime.console import print_json, show_notes
from runtime.machine import available_memory, this_machine
from runtime.options import open_session


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Measure every length; returns the exit code."""
    bundle.check_files()
    longest, new = max(options.seq_lens), options.new_tokens
    bundle.require_room(
        longest + new,
        f"a prompt of {longest} tokens and {new} new ones are asked for",
        "give smaller --seq-lens or --new-tokens",
    )
    machine = this_machine()
    available = available_memory()
    with open_session(bundle, options) as session:
        wanted = BenchOptions(
            seq_lens=options.seq_lens,
            new_tokens=options.new_tokens,
            repeat=options.repeat,
            warmup=options.warmup,
            seconds=options.seconds,
            threads=options.threads,
        )
        for record in measure(session, machine, available, wanted):
            print_json(record, indent=None)
        show_notes(session.backend.notes)
    return 0
