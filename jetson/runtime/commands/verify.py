"""--verify: hashes of all files, then the golden vectors, layer by layer."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from typing import Any

from runtime.bundle import Bundle
from runtime.console import print_json, show_notes, size
from runtime.machine import this_machine
from runtime.options import open_session
from runtime.problems import BundleProblem
from runtime.verify import Comparison, compare_with_golden, suspects


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Compare everything; returns 0 if all of it agrees, else 1."""
    report: dict[str, Any] = {
        "bundle": bundle.name,
        "verified": False,
        "problem": None,
        "backend": None,
        "notes": [],
        "machine": asdict(this_machine()),
        "comparisons": [],
        "suspects": [],
    }
    try:
        hashed = bundle.check_files(hash_up_to=None)
    except BundleProblem as problem:
        report["problem"] = str(problem)
        return _report(report, options)
    if not options.json:
        print(f"files: {len(bundle.files)} as packed ({size(hashed)} hashed)", flush=True)
    with open_session(bundle, options, hash_all=True) as session:
        compared = list(compare_with_golden(session))
    backend = session.backend
    report["backend"], report["notes"] = backend.description, list(backend.notes)
    report["comparisons"] = [
        {
            "name": c.name,
            "relative_error": c.relative_error if math.isfinite(c.relative_error) else None,
            "tolerance": c.tolerance,
            "agrees": c.agrees,
        }
        for c in compared
    ]
    differing = [c for c in compared if not c.agrees]
    report["verified"] = not differing
    if differing:
        report["suspects"] = list(suspects(differing[0].name, bundle))
        report["problem"] = _problem(differing, report["suspects"])
    elif not options.json:
        worst = max(compared, key=lambda c: c.relative_error)
        print(
            f"golden vectors: {len(compared)} tensors agree,"
            f" worst relative error {worst.relative_error:.1e} in {_place(worst.name)}"
        )
        print(f"verified with {backend.description} on {this_machine()}")
        show_notes(backend.notes)
    return _report(report, options)


def _problem(differing: list[Comparison], ops: list[str]) -> str:
    first = differing[0]
    return (
        f"{_place(first.name)} is the first of {len(differing)} tensors that differ from the"
        f" golden vectors (relative error {first.relative_error:.1e}, allowed"
        f" {first.tolerance:.0e}), so the first op to differ is one of {', '.join(ops)};"
        " do not use this bundle with this backend here."
    )


def _report(report: dict[str, Any], options: argparse.Namespace) -> int:
    if options.json:
        print_json(report)
    elif not report["verified"]:
        print(f"run_engine: {report['problem']}", file=sys.stderr)
    return 0 if report["verified"] else 1


def _place(name: str) -> str:
    """ssm_state.1 -> layer 1: ssm_state"""
    kind, _, layer = name.partition(".")
    return f"layer {layer}: {kind}" if layer else name
