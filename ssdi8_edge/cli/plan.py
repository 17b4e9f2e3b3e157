"""The command `plan`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ssdi8_edge.cli.options import JsonOption
from ssdi8_edge.ground.console import results, table
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.json_text import to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ssdi8_edge.boards.points.records import Point
    from ssdi8_edge.plan.memory import Room
    from ssdi8_edge.plan.plan import Plan

DEFAULT_METHODS = ("edge-w8a8", "edge-w4a8")


def plan(
    model: Annotated[
        str,
        typer.Argument(help="Checkpoint folder, hub id, demo, or the name of a published model."),
    ],
    target: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
        typer.Option(help="Target name or .toml file, several times; default: all boards."),
    ] = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"Recipe, several times; default: {', '.join(DEFAULT_METHODS)}."),
    ] = None,
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tokens of a conversation; default: the target's."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tokens of the prompt to bound; default: 1024."),
    ] = None,
    host: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Take what this board has free: user@board[:port], or an ssh alias."),
    ] = None,
    measured: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Points of `sweep`, to show beside the bounds; several times."),
    ] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Say what a model will take and how fast it can be at most, from its config.json alone."""
    from ssdi8_edge.checkpoints.outline import outline
    from ssdi8_edge.plan.choices import with_context
    from ssdi8_edge.plan.plan import make_plan
    from ssdi8_edge.recipes.presets import find_method
    from ssdi8_edge.targets import load_target, target_names

    if as_json and markdown:
        raise UsageError("--json and --markdown are two forms of one answer;", "give one of them.")
    room = None if host is None else _room_on(host)
    chosen = [load_target(name) for name in target or target_names()]
    if not target:
        chosen = [each for each in chosen if each.board is not None]
    recipes = [find_method(name) for name in method or DEFAULT_METHODS]
    described = outline(model)
    makers = [
        partial(
            make_plan,
            *(model, described, recipe, with_context(each, context)),
            parallel=parallel,
            room=room,
        )
        for each in chosen
        for recipe in recipes
    ]
    plans = [make(prompt_tokens=prompt) for make in makers]
    if measured:
        points = _points(measured)
        plans = [_beside(each, points, make) for each, make in zip(plans, makers, strict=True)]
    if as_json:
        print(to_json([each.to_dict() for each in plans]))
    elif markdown:
        from ssdi8_edge.plan.markdown import to_markdown

        print(to_markdown(plans), end="")
    else:
        _show(plans)


def _points(files: Sequence[Path]) -> list[Point]:
    from ssdi8_edge.boards.points.points import read_points
    from ssdi8_edge.ground.inputs import expanded

    for file in files:
        if not expanded(file).is_file():
            raise UsageError(f"{file} is no file;", "name one that `ssdi8-edge sweep` wrote.")
    return [point for file in files for point in read_points(expanded(file))]


def _beside(plan: Plan, points: Sequence[Point], make: Callable[..., Plan]) -> Plan:
    """The plan with what was measured of the same model, method and target."""
    from ssdi8_edge.plan.measured import Beside

    wanted = (Path(plan.model).name, plan.method, plan.target)
    found = []
    for point in points:
        bundle, timing = point.bundle, point.timing
        if (bundle.model, bundle.method, bundle.target) != wanted:
            continue
        bounds = make(prompt_tokens=point.length).bounds
        found.append(
            Beside(
                board=point.board,
                mode=point.mode,
                simulated=point.simulated,
                length=point.length,
                ttft_s=timing.ttft_s,
                tpot_s=timing.tpot_s,
                prompt_s=bounds.prompt.seconds,
                token_s=bounds.token.seconds,
            )
        )
    return dataclasses.replace(plan, measured=tuple(found))


def _room_on(host: str) -> Room:
    from ssdi8_edge.boards.facts.board_facts import read_facts
    from ssdi8_edge.boards.link.hosts import connect
    from ssdi8_edge.plan.memory import room_on

    with connect(host) as connection:
        return room_on(read_facts(connection).memory_free_mb, host)


def _show(plans: list[Plan]) -> None:
    from ssdi8_edge.plan import cells

    first = plans[0]
    tables: list[tuple[str, tuple[str, ...], list[list[str]]]] = [
        (f"memory of {first.model}", cells.MEMORY, cells.memory_cells(plans)),
        (
            f"bounds; prompt of {first.bounds.prompt_tokens} tokens, {first.parallel} at once",
            cells.SPEED,
            cells.speed_cells(plans),
        ),
    ]
    if measured := cells.measured_cells(plans):
        tables.append(("measured, and the bound as a share of it", cells.MEASURED, measured))
    for title, headings, rows in tables:
        shown: Any = table(*headings, title=title)
        for row in rows:
            shown.add_row(*row)
        results.print(shown)
    for note in cells.notes(plans):
        results.print(note)
