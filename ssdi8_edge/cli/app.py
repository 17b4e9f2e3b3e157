"""The command line. Each command imports its stage when called, so that --help is quick.

Human text goes to stderr, data to stdout. Exit codes: 0 ok, 1 a stage failed, 2 the request does
not fit, 3 a board cannot be reached, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from ssdi8_edge.cli import boards as board_commands
from ssdi8_edge.cli import measure as measure_commands
from ssdi8_edge.cli import report as report_command
from ssdi8_edge.ground.allocator import keep_freed_memory
from ssdi8_edge.ground.artifacts import TOKENIZER
from ssdi8_edge.ground.console import human, results, table, visible
from ssdi8_edge.ground.decimals import percent
from ssdi8_edge.ground.errors import Interrupted, Ssdi8Error, UsageError
from ssdi8_edge.ground.failures import as_ours, show_traceback
from ssdi8_edge.ground.inputs import expanded
from ssdi8_edge.ground.json_text import to_json

if TYPE_CHECKING:
    from ssdi8_edge.compile.pipeline import BuildResult

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize Mamba-2 with SSDi8 and run it on NVIDIA Jetson Orin.",
)

# A loop that has not run this long shows no bar.
QUIET_SECONDS = 2.0
PIPE_CLOSED = 141  # what a shell reports for a program whose reader went away

Source = Annotated[str, typer.Argument(help="Bundle, run folder or checkpoint.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TokenizerOption = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="tokenizer.json or hub id, if none lies beside the weights."),
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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=human, transient=True)
    task = bar.add_task(visible(label), total=len(items))
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


@app.callback()
def _common(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where a failure happened; also after the command."),
    ] = False,
) -> None:
    """`__main__` takes --debug from wherever it stands; here it is told by --help."""


@app.command()
def build(
    target: Annotated[str, typer.Option(help="Target name, or a .toml file.")] = "host-cpu",
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or demo.")] = "demo",
    method: Annotated[str, typer.Option(help="Recipe; see `ssdi8-edge methods`.")] = "edge-w8a8",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="UTF-8 text to calibrate on; default: the text of the demo model."),
    ] = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run folder; default: runs/MODEL--METHOD--TARGET."),
    ] = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "bundle",
    device: Annotated[
        str, typer.Option(help="Where to calibrate and quantize: cpu, cuda or cuda:INDEX.")
    ] = "cpu",
    host: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Then deploy to user@board[:port], an ssh alias, or this-machine."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say which stages would run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, quantize, export and package a model for a target; with --host, deploy it."""
    from ssdi8_edge.recipes.presets import find_method
    from ssdi8_edge.targets import load_target

    # Cheap checks first: torch takes seconds to import.
    chosen_target, recipe = load_target(target), find_method(method)
    if host is not None:
        board_commands.check_reachable(host, until)
    from ssdi8_edge.compile.pipeline import Build, BuildRequest, run_name

    request = BuildRequest(
        model=model,
        recipe=recipe,
        target=chosen_target,
        out=expanded(out or Path("runs") / run_name(model, method, chosen_target.name)),
        calibration=calibration,
        tokenizer=tokenizer,
        until=until,
        device=device,
        command=shlex.join(["ssdi8-edge", *sys.argv[1:]]),
    )
    keep_freed_memory()
    job = Build(request, progress, lambda line: human.print(line))
    if dry_run:
        plan = job.plan() | ({"deploy": f"bring it to {host}"} if host else {})
        _data({"out": str(request.out), "plan": plan}, as_json, lambda: _print_plan(plan))
        return
    result = job.run()
    _report(result, as_json, host)


def _print_plan(plan: dict[str, str]) -> None:
    for stage, action in plan.items():
        human.print(f"{stage}: would {action}")


def _report(result: BuildResult, as_json: bool, host: str | None) -> None:
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

    if host is None:
        _data(summary, as_json, show)
        return
    show()
    summary["deployed"] = board_commands.deploy_bundle(host, result.out).to_dict()
    _data(summary, as_json, lambda: None)


# The runtime's own parser reads what follows the name, so that both command lines take the same.
@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
    },
)
def run(context: typer.Context) -> None:
    """Generate text on this machine, with the script that runs on boards."""
    from ssdi8_edge.ground.board_runtime import parse_run

    asked = parse_run(context.args)
    _run_engine(asked.bundle, asked.arguments, asked.device)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    device: DeviceOption = "cpu",
) -> None:
    """Check a bundle's hashes and compare it with its golden vectors on this machine."""
    _run_engine(bundle, ["--verify"], device)


def _run_engine(bundle: Path, arguments: list[str], device: str) -> NoReturn:
    if device == "cpu":
        from ssdi8_edge.ground.board_runtime import become_engine

        become_engine(bundle, ["--backend", "onnxruntime", *arguments])
    from ssdi8_edge.local.gpu_backend import run_on_gpu

    raise typer.Exit(run_on_gpu(bundle, arguments, device))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Bundles, run folders or checkpoints.")],
    text: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="UTF-8 text for perplexity; may be given several times."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: wikitext2, lambada, hellaswag, piqa, arc_easy, arc_challenge, "
            "winogrande."
        ),
    ] = "",
    methods: Annotated[
        str, typer.Option(help="Quantize the one checkpoint by each of these, comma-separated.")
    ] = "",
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the tasks' data sets; default: they come from the hub."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="First so many windows of a text and items of a task."),
    ] = None,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Add windows of 512, 2048 and 8192 tokens.")
    ] = False,
    decode: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="TOKENS", help="Also decode so many tokens of each text one by one."),
    ] = None,
    device: DeviceOption = "cpu",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --methods: UTF-8 text to calibrate on."),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="With --methods: where the run folders lie or will lie.")
    ] = Path("runs"),
    tokenizer: TokenizerOption = None,
    save: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Write the results there too, a .json or .md file; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity, zero-shot accuracy, long context, decoding; compared with the first model.

    With --methods that is the checkpoint itself, in FP32.
    """
    from ssdi8_edge.evaluate import evaluate as measure
    from ssdi8_edge.evaluate import open_subject, plan, require_device
    from ssdi8_edge.evaluate.table import require_writable, save_results, show

    measures = plan(_names(tasks), text or [], data, limit, long_context, decode)
    require_device(device)
    require_writable(save or [])
    keep_freed_memory()
    if methods:
        if len(models) != 1:
            raise UsageError(f"--methods takes one checkpoint, not {len(models)};", "name one.")
        from ssdi8_edge.compile.comparison import quantize_by
        from ssdi8_edge.recipes.presets import find_method

        recipes, model = [find_method(name) for name in _names(methods)], models[0]
        if not recipes:
            raise UsageError("--methods names none;", "see `ssdi8-edge methods`.")
        folders = quantize_by(
            *(recipes, model, expanded(runs), calibration, tokenizer, device, progress, _say_of)
        )
        subjects = [open_subject(model, folders[0] / TOKENIZER, device)]
        subjects += [open_subject(str(folder), None, device) for folder in folders]
    else:
        if calibration is not None:
            raise UsageError("--calibration goes with --methods;", "leave it out.")
        from ssdi8_edge.compile.pipeline import named_tokenizer

        named = None if tokenizer is None else named_tokenizer(tokenizer)
        subjects = [open_subject(model, named, device) for model in models]
    # Where models were quantized here, their builds have said it.
    for note in [] if methods else dict.fromkeys(note for each in subjects for note in each.notes):
        human.print(f"note: {note}", markup=False)
    rows = measure(subjects, measures, progress)
    records = [record for row in rows for record in row.records()]
    # First, so that a disk that is full by now does not cost them.
    _data(records, as_json, lambda: show(rows, results))
    save_results(rows, save or [])


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _say_of(method: str, line: str) -> None:
    human.print(f"{method}: {line}")


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Sizes, scales, saturation counters and what ran where; checks every file."""
    from ssdi8_edge.compile.inspection import inspect_bundle

    found = inspect_bundle(expanded(bundle))
    _data(found, as_json, lambda: _show_bundle(found))


def _show_bundle(found: dict[str, Any]) -> None:
    recipe, target = found["recipe"], found["target"]
    results.print(f"{found['name']}  {found['bytes'] / 1e6:.1f} MB")
    results.print(f"recipe {recipe['name']}: {recipe['about']}")
    results.print(f"target {target['name']}: {target['about']} ({target['runtime']})")
    files = table("file", "MB")
    for name, size in sorted(found["files"].items(), key=lambda item: -item[1])[:8]:
        files.add_row(name, f"{size / 1e6:.2f}")
    results.print(files)
    if any(layer["scales"] for layer in found["layers"]):
        names = [name.removesuffix("_scale") for name in found["layers"][0]["scales"]]
        scales = table("scales", *names, "worst saturation", title="largest scale per layer")
        for i, layer in enumerate(found["layers"]):
            cells = [f"{high:.1g}" for _, high in layer["scales"].values()]
            site, fraction = max(layer["saturation"].items(), key=lambda item: item[1])
            scales.add_row(str(i), *cells, f"{site} {percent(fraction, 4)}")
        results.print(scales)
    for note in found["checkpoint"].get("notes", ()):
        results.print(f"note: {note}")
    for step in found["steps"]:
        results.print(f"ran on {step['where']}: {step['step']} ({step['seconds']} s)")
    for line in found["not_run"]:
        results.print(f"not run: {line}")


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ssdi8_edge.targets import load_target, target_names

    found = [load_target(name) for name in target_names()]

    def show() -> None:
        rows = table("target", "what", "runs by", "where", "memory")
        for target in found:
            memory = f"{target.board.memory_gb:g} GB" if target.board else ""
            rows.add_row(target.name, target.about, target.runtime, target.where, memory)
        results.print(rows)

    _data([target.to_dict() for target in found], as_json, show)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the quantization methods."""
    from ssdi8_edge.recipes.presets import METHODS

    def show() -> None:
        rows = table("method", "what")
        for config in METHODS.values():
            rows.add_row(config.name, config.about)
        results.print(rows)

    _data([config.to_dict() for config in METHODS.values()], as_json, show)


app.command()(board_commands.doctor)
app.command()(board_commands.deploy)
app.command()(measure_commands.sweep)
app.command()(measure_commands.profile)
app.command()(report_command.report)


def _data(value: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(to_json(value))
    else:
        show()


def main() -> None:
    """Entry point: every exception becomes one sentence and its exit code."""
    stopped: list[Interrupted] = []

    def interrupted(number: int, frame: object) -> NoReturn:
        # typer would turn KeyboardInterrupt into exit code 1.
        stopped.append(Interrupted("stopped; what was finished is kept."))
        raise stopped[-1]

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        signal.signal(signal.SIGINT, interrupted)
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(code)
    except Interrupted as error:
        _end(error)
    except (KeyboardInterrupt, typer.Abort):
        _end(Interrupted("stopped; what was finished is kept."))
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except Exception as error:
        if stopped:  # while a library was loading, which made an error of its own of it
            _end(stopped[-1])
        # typer's own usage errors, wherever the installed version keeps their class
        if hasattr(error, "format_message"):
            _end(UsageError(error.format_message().rstrip("."), "see --help."))
        show_traceback(error)
        _end(as_ours(error, f"running {sys.argv[1]}"))


def _end(error: Ssdi8Error | Interrupted) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a second Ctrl-C, while this is said
    human.print(f"ssdi8-edge: {error}")
    sys.exit(error.exit_code)
