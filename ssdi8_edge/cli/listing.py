"""Commands that only tell: inspect, targets, methods."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ssdi8_edge.cli.options import JsonOption
from ssdi8_edge.cli.output import print_result
from ssdi8_edge.ground.console import results, table
from ssdi8_edge.ground.decimals import percent
from ssdi8_edge.ground.inputs import expanded


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Sizes, scales, saturation counters and what ran where; checks every file."""
    from ssdi8_edge.compile.inspection import inspect_bundle

    found = inspect_bundle(expanded(bundle))
    print_result(found, as_json, lambda: _show_bundle(found))


def _show_bundle(found: dict[str, Any]) -> None:
    recipe, target = found["recipe"], found["target"]
    results.print(f"{found['name']}  {found['bytes'] / 1e6:.1f} MB")
    results.print(f"recipe {recipe['name']}: {recipe['about']}")
    results.print(f"embedding {recipe['embedding']}, lm_head {recipe['lm_head']}")
    engines = ", ".join(target["engines"])
    results.print(f"target {target['name']}: {target['about']} ({engines})")
    if found["context"] is not None:
        cache = f"{found['cache_bytes'] / 1e6:.1f} MB"
        kept = f"keys and values in {recipe['kv']}"
        results.print(f"context {found['context']} tokens, which take {cache} a sequence, {kept}")
    kinds = Counter(found["blocks"])
    if len(kinds) > 1:
        results.print(f"blocks {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    files = table("file", "MB")
    for name, size in sorted(found["files"].items(), key=lambda item: -item[1])[:8]:
        files.add_row(name, f"{size / 1e6:.2f}")
    results.print(files)
    if any(layer["scales"] for layer in found["layers"]):
        # Blocks of other kinds have other scales.
        names = list(dict.fromkeys(name for layer in found["layers"] for name in layer["scales"]))
        headings = [name.removesuffix("_scale") for name in names]
        scales = table("scales", *headings, "worst saturation", title="largest scale per layer")
        for i, layer in enumerate(found["layers"]):
            largest = [layer["scales"].get(name) for name in names]
            cells = [f"{ends[1]:.1g}" if ends else "" for ends in largest]
            worst = sorted(layer["saturation"].items(), key=lambda item: -item[1])[:1]
            cells += [f"{site} {percent(fraction, 4)}" for site, fraction in worst] or [""]
            scales.add_row(str(i), *cells)
        results.print(scales)
    for note in found["checkpoint"].get("notes", ()):
        results.print(f"note: {note}")
    for step in found["steps"]:
        results.print(f"ran on {step['where']}: {step['step']} ({step['seconds']} s)")
    for line in found["not_run"]:
        results.print(f"not run: {line}")


def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ssdi8_edge.targets import load_target, target_names

    found = [load_target(name) for name in target_names()]

    def show() -> None:
        rows = table("target", "what", "runs by", "where", "memory", "context")
        for target in found:
            memory = f"{target.board.memory_gb:g} GB" if target.board else ""
            cells = (target.name, target.about, ", ".join(target.engines), target.where, memory)
            rows.add_row(*cells, str(target.context))
        results.print(rows)

    print_result([target.to_dict() for target in found], as_json, show)


def methods(as_json: JsonOption = False) -> None:
    """List the quantization methods."""
    from ssdi8_edge.recipes.presets import METHODS

    def show() -> None:
        rows = table("method", "what", "embedding, lm_head", "keys and values")
        for config in METHODS.values():
            tables = f"{config.embedding}, {config.lm_head}"
            rows.add_row(config.name, config.about, tables, config.kv)
        results.print(rows)

    print_result([config.to_dict() for config in METHODS.values()], as_json, show)
