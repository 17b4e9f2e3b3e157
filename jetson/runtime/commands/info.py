"""--info: what the bundle is, where it was made, and which engine it has."""

from __future__ import annotations

import argparse
from typing import Any

from runtime.bundle import Bundle
from runtime.console import pairs, print_json, size, visible
from runtime.engine.store import STORE, engines_in
from runtime.files import CHAT
from runtime.problems import BundleProblem


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Describe it; returns the exit code."""
    bundle.check_files()
    manifest = bundle.manifest
    sizes = {name: listed["bytes"] for name, listed in bundle.files.items()}
    state_bytes, context = bundle.model.state_bytes(), bundle.model.context
    report = {
        "bundle": bundle.name,
        "model": manifest["model"],
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "files": sizes,
        "bytes": sum(sizes.values()),
        "state_bytes_per_sequence": state_bytes,
        "context": context,
        "chat": CHAT in sizes,
        "created": manifest["created"],
        "steps": manifest["steps"],
        "not_run": manifest["not_run"],
        "engines": _engines(bundle, options),
    }
    if options.json:
        print_json(report)
        return 0
    largest = max(sizes, key=lambda name: sizes[name])
    _print(f"bundle   {bundle.name}")
    _print(f"model    {pairs(report['model'])}")
    _print(f"recipe   {pairs(report['recipe'])}")
    _print(f"target   {pairs(report['target'])}")
    _print(
        f"size     {size(report['bytes'])} in {len(sizes)} files, largest {largest}"
        f" ({size(sizes[largest])}); {size(state_bytes)} of state per sequence"
    )
    if context is not None:
        _print(f"context  {context} tokens")
    if report["chat"]:
        _print("chat     by the checkpoint's template")
    _print(f"created  {pairs(report['created'])}")
    for step in report["steps"]:
        _print(f"ran      {pairs(step)}")
    for step in report["not_run"]:
        _print(f"not run  {step}")
    for engine in report["engines"]:
        _print(f"engine   {pairs(engine)}")
    return 0


def _print(line: str) -> None:
    print(visible(line))  # a manifest may say anything


def _engines(bundle: Bundle, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those built so far, newest first; whether one fits here is for the runtime to say."""
    found = []
    for engine in engines_in(options.engine or bundle.root / STORE):
        try:
            engine.check()
            state = "whole"
        except BundleProblem as problem:
            state = problem.message
        built_for = {
            name: value
            for part in ("requirements", "conditions")
            for name, value in engine.log[part].items()
            if name in ("tensorrt", "cuda", "gpu", "board", "sms", "power_mode", "gpu_max_hz")
        }
        found.append(
            {
                "key": engine.key,
                "built": engine.log.get("built"),
                "bytes": engine.log["engine"]["bytes"],
                "state": state,
                "built_for": built_for,
            }
        )
    return found
