"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from runtime.files import TOKENIZER
from ssdi8_edge.cli.options import DeviceOption, JsonOption, TokenizerOption
from ssdi8_edge.cli.output import print_result, progress
from ssdi8_edge.ground.allocator import keep_freed_memory
from ssdi8_edge.ground.console import human, results
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Bundles, run folders or checkpoints.")],
    text: Annotated[
        Optional[list[Path]],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
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
    print_result(records, as_json, lambda: show(rows, results))
    save_results(rows, save or [])


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _say_of(method: str, line: str) -> None:
    human.print(f"{method}: {line}")
