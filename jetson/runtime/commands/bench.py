"""--bench: one JSON line per prompt length; runtime/bench.py says what is in it."""

from __future__ import annotations

import argparse

from runtime.bench import BenchOptions, Opened, measure
from runtime.bundle import Bundle
from runtime.commands.generate import open_timed, show_notes
from runtime.console import print_json
from runtime.machine import available_memory, this_machine


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Measure every length; returns the exit code."""
    bundle.check_files()
    machine = this_machine()
    available = available_memory()
    backend, load_s = open_timed(bundle, options)
    try:
        wanted = BenchOptions(
            seq_lens=options.seq_lens,
            new_tokens=options.new_tokens,
            repeat=options.repeat,
            warmup=options.warmup,
            seconds=options.seconds,
            threads=options.threads,
        )
        for record in measure(Opened(backend, load_s, available), bundle, machine, wanted):
            print_json(record, indent=None)
        show_notes(backend)
    finally:
        backend.close()
    return 0
