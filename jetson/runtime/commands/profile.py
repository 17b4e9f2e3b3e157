"""--profile: the time of each layer and module, in prefill and in decode.

Layers are timed one by one and without a CUDA graph, so their sum is not what a run takes: --bench
measures that.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np

from runtime.bench import SEED
from runtime.bundle import Bundle, Interface
from runtime.console import print_json, show_notes, table
from runtime.layer_times import LayerTime, Modules, kind_times, median_times, module_times
from runtime.machine import this_machine
from runtime.options import open_session
from runtime.session import Session

SCHEMA = 1
LAYERS_SHOWN = 20


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Time prompts of the first of --seq-lens, and tokens after each; returns the exit code."""
    bundle.check_files()
    length = options.seq_lens[0]
    bundle.require_room(
        length + 1,
        f"a prompt of {length} tokens and a new one are asked for",
        "give smaller --seq-lens",
    )
    with open_session(bundle, options, profiling=True) as session:
        prefill, decode = _measure(session, length, options)
    backend = session.backend
    model = bundle.model
    phases = [_phase("prefill", length, prefill, model), _phase("decode", 1, decode, model)]
    if options.json:
        print_json(
            {
                "schema": SCHEMA,
                "kind": "profile",
                "bundle": bundle.name,
                "key": bundle.key,
                "recipe": bundle.recipe,
                "target": bundle.target,
                "runtime": backend.runtime,
                "backend": backend.description,
                "engine": backend.engine,
                "notes": list(backend.notes),
                "machine": asdict(this_machine()),
                "versions": dict(backend.versions),
                "threads": options.threads,
                "repeat": options.repeat,
                "phases": phases,
            }
        )
        return 0
    print(f"{backend.description} on {this_machine()}")
    show_notes(backend.notes)
    for phase in phases:
        _show(phase)
    return 0


def _measure(
    session: Session, length: int, options: argparse.Namespace
) -> tuple[list[LayerTime], list[LayerTime]]:
    """Layers of a prefill of `length` tokens (its pieces added up), and of one decode step."""
    backend, model = session.backend, session.bundle.model
    ids = np.random.default_rng(SEED).integers(0, model.vocab_size, (1, length + 1))
    ids = ids.astype(np.int32)
    pieces = session.pieces(length)
    rounds = options.warmup + options.repeat
    for _ in range(rounds):
        states = backend.zero_states(1)
        for start, end in pieces:
            _, states = backend.forward(ids[:, start:end], states, position=start)
        _, states = backend.forward(ids[:, length:], states, position=length)
    runs = backend.layer_times()
    each = len(pieces) + 1
    prefills, decodes = [], []
    for i in range(options.warmup, rounds):
        *parts, step = runs[i * each : (i + 1) * each]
        prefills.append([layer for part in parts for layer in part])
        decodes.append(step)
    modules = Modules(model.ops)
    return median_times(prefills, modules), median_times(decodes, modules)


def _phase(name: str, tokens: int, layers: list[LayerTime], model: Interface) -> dict[str, Any]:
    return {
        "phase": name,
        "tokens": tokens,
        "seconds": sum(layer.seconds for layer in layers),
        "modules": [asdict(module) for module in module_times(layers, model.ops)],
        "kinds": [asdict(kind) for kind in kind_times(layers, model.blocks)],
        "layers": [asdict(layer) for layer in layers],
    }


def _show(phase: dict[str, Any]) -> None:
    print(f"\n{phase['phase']}, {phase['tokens']} tokens: {phase['seconds'] * 1e3:.3f} ms")
    rows = [("module", "layers", "ms", "%")]
    rows += [
        (m["module"], str(m["layers"]), f"{m['seconds'] * 1e3:.3f}", f"{m['share'] * 100:.1f}")
        for m in phase["modules"]
    ]
    print(table(rows))
    if len(phase["kinds"]) > 1:
        kinds = [
            (k["kind"], str(k["layers"]), f"{k['seconds'] * 1e3:.3f}", f"{k['share'] * 100:.1f}")
            for k in phase["kinds"]
        ]
        print(table([("blocks", "layers", "ms", "%"), *kinds]))
    longest = sorted(phase["layers"], key=lambda layer: -layer["seconds"])[:LAYERS_SHOWN]
    names = [(layer["name"], f"{layer['seconds'] * 1e3:.3f}") for layer in longest]
    print(table([("longest layers", "ms"), *names]))
