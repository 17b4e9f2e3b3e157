"""The command line. Each command imports its stage when called, so that --help is quick.

Human text goes to stderr, data to stdout. Exit codes: 0 ok, 1 a stage failed, 2 the request does
not fit, 3 a board cannot be reached, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.table import Table

from ssdi8_edge.errors import Interrupted, Ssdi8Error, UsageError

if TYPE_CHECKING:
    from ssdi8_edge.pipeline import BuildResult

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize Mamba-2 with SSDi8 and run it on NVIDIA Jetson Orin.",
)
human = Console(stderr=True, highlight=False)

# A loop that has not run this long shows no bar.
QUIET_SECONDS = 2.0
# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3

Source = Annotated[str, typer.Argument(help="Bundle, run folder or checkpoint.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TokenizerOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="tokenizer.json of the model, if none lies beside the weights."),
]


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Show a bar with the time left once a loop turns out to take longer than two seconds."""
    if not human.is_terminal:
        yield from items
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=human, transient=True)
    task = bar.add_task(label, total=len(items))
    begin = time.monotonic()
    started = False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not started and time.monotonic() - begin > QUIET_SECONDS:
                bar.start()
                started = True
    finally:
        if started:
            bar.stop()


@app.command()
def build(
    target: Annotated[str, typer.Option(help="Target name, or a .toml file.")] = "host-cpu",
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or demo.")] = "demo",
    method: Annotated[str, typer.Option(help="Recipe; see `ssdi8-edge methods`.")] = "edge-w8a8",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="UTF-8 text to calibrate on; default: the text of the demo model."),
    ] = None,
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="tokenizer.json or hub id, if none lies beside the weights."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run folder; default: runs/MODEL--METHOD--TARGET."),
    ] = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "bundle",
    dry_run: Annotated[bool, typer.Option(help="Only say which stages would run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, quantize, export and package a model for a target."""
    from ssdi8_edge.methods import find_method
    from ssdi8_edge.profiles import load_target

    # Cheap checks first: torch takes seconds to import.
    chosen_target, recipe = load_target(target), find_method(method)
    from ssdi8_edge.pipeline import Build, BuildRequest

    name = f"{Path(model).name}--{method}--{chosen_target.name}"
    request = BuildRequest(
        model=model,
        recipe=recipe,
        target=chosen_target,
        out=out or Path("runs") / name,
        calibration=calibration,
        tokenizer=tokenizer,
        until=until,
        command=shlex.join(["ssdi8-edge", *sys.argv[1:]]),
    )
    _give_freed_memory_back()
    job = Build(request, progress, lambda line: human.print(line))
    if dry_run:
        plan = job.plan()
        _data({"out": str(request.out), "plan": plan}, as_json, lambda: _print_plan(plan))
        return
    result = job.run()
    _report(result, as_json)


def _give_freed_memory_back() -> None:
    """Let glibc take large blocks from the system one by one, and return each when it is freed.

    Otherwise it raises its threshold to the size of a layer's tensors, keeps them in its heap, and
    the peak grows with the calibration text, to more than twice as much on a 370m model.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library manages by itself
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)


def _print_plan(plan: dict[str, str]) -> None:
    for stage, action in plan.items():
        human.print(f"{stage}: would {action}")


def _report(result: BuildResult, as_json: bool) -> None:
    manifest = result.manifest
    summary: dict[str, Any] = {
        "out": str(result.out),
        "ran": result.ran,
        "reused": result.reused,
    }
    if manifest is not None:
        summary |= {
            "bundle": str(result.out / "bundle"),
            "bytes": sum(listed["bytes"] for listed in manifest["files"].values()),
            "not_run": manifest["not_run"],
        }

    def show() -> None:
        if manifest is None:
            human.print(f"stopped as asked; the artifacts lie in {result.out}")
            return
        size = summary["bytes"] / 1e6
        human.print(f"bundle: {summary['bundle']} ({size:.1f} MB), verified here by onnxruntime")
        for line in manifest["not_run"]:
            human.print(f"not done here: {line}")

    _data(summary, as_json, show)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[Optional[int], typer.Option(help="Sample among so many.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate text from a bundle on this machine's CPU, with the script that runs on boards."""
    from ssdi8_edge.board_runtime import become_engine

    arguments = ["--backend", "onnxruntime", f"--prompt={prompt}"]
    arguments += [f"--max-new-tokens={max_new_tokens}", f"--temperature={temperature}"]
    arguments += [f"--seed={seed}"]
    if top_k is not None:
        arguments.append(f"--top-k={top_k}")
    if as_json:
        arguments.append("--json")
    become_engine(bundle, arguments)


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")]) -> None:
    """Check a bundle's hashes and compare it with its golden vectors on this machine's CPU."""
    from ssdi8_edge.board_runtime import become_engine

    become_engine(bundle, ["--verify", "--backend", "onnxruntime"])


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Bundles, run folders or checkpoints.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to evaluate on.")],
    limit: Annotated[Optional[int], typer.Option(help="First so many windows.")] = None,  # noqa: UP045
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity in windows of 2048 tokens; the first model is the one compared with."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} evaluates nothing;", "give at least 1.")
    from ssdi8_edge.evaluate import open_subject, perplexity

    results = [
        perplexity(open_subject(model, tokenizer), text, limit, progress) for model in models
    ]

    def show() -> None:
        table = Table("model", "engine", "windows", "perplexity", "against the first")
        for result in results:
            change = result.perplexity / results[0].perplexity - 1
            table.add_row(
                result.model,
                result.engine,
                f"{result.windows} × {result.window_tokens}",
                f"{result.perplexity:.4f}",
                f"{change:+.3%}",
            )
        Console(highlight=False).print(table)

    _data([asdict(result) for result in results], as_json, show)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Sizes, scales, saturation counters and what ran where; checks every file."""
    from ssdi8_edge.inspection import inspect_bundle

    found = inspect_bundle(bundle)
    _data(found, as_json, lambda: _show_bundle(found))


def _show_bundle(found: dict[str, Any]) -> None:
    out = Console(highlight=False)
    recipe, target = found["recipe"], found["target"]
    out.print(f"{found['name']}  {found['bytes'] / 1e6:.1f} MB")
    out.print(f"recipe {recipe['name']}: {recipe['about']}")
    out.print(f"target {target['name']}: {target['about']} ({target['runtime']})")
    files = Table("file", "MB")
    for name, size in sorted(found["files"].items(), key=lambda item: -item[1])[:8]:
        files.add_row(name, f"{size / 1e6:.2f}")
    out.print(files)
    if any(layer["scales"] for layer in found["layers"]):
        names = [name.removesuffix("_scale") for name in found["layers"][0]["scales"]]
        scales = Table("scales", *names, "worst saturation", title="largest scale per layer")
        for i, layer in enumerate(found["layers"]):
            cells = [f"{high:.1g}" for _, high in layer["scales"].values()]
            site, fraction = max(layer["saturation"].items(), key=lambda item: item[1])
            scales.add_row(str(i), *cells, f"{site} {fraction:.4%}")
        out.print(scales)
    for step in found["steps"]:
        out.print(f"ran on {step['where']}: {step['step']} ({step['seconds']} s)")
    for line in found["not_run"]:
        out.print(f"not run: {line}")


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ssdi8_edge.profiles import load_target, target_names

    found = [load_target(name) for name in target_names()]

    def show() -> None:
        table = Table("target", "what", "runs by", "where", "memory")
        for target in found:
            memory = f"{target.board.memory_gb:g} GB" if target.board else ""
            table.add_row(target.name, target.about, target.runtime, target.where, memory)
        Console(highlight=False).print(table)

    _data([target.to_dict() for target in found], as_json, show)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the quantization methods."""
    from ssdi8_edge.methods import METHODS

    def show() -> None:
        table = Table("method", "what")
        for config in METHODS.values():
            table.add_row(config.name, config.about)
        Console(highlight=False).print(table)

    _data([config.to_dict() for config in METHODS.values()], as_json, show)


def _data(value: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(value, indent=2))
    else:
        show()


def main() -> None:
    """Entry point: errors of ours become one sentence and their exit code."""
    signal.signal(signal.SIGINT, _interrupted)
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(standalone_mode=False))
    except Ssdi8Error as error:
        human.print(f"ssdi8-edge: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except Exception as error:
        # typer's own usage errors, wherever the installed version keeps their class
        if not hasattr(error, "format_message"):
            raise
        reason = error.format_message().rstrip(".")
        human.print(f"ssdi8-edge: {reason}; see --help.", markup=False, soft_wrap=True)
        sys.exit(2)


def _interrupted(number: int, frame: object) -> NoReturn:
    # typer would turn KeyboardInterrupt into exit code 1.
    raise Interrupted("stopped;", "finished stages are kept.")
