"""The command `build`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ssdi8_edge.cli.boards import check_reachable, deploy_bundle
from ssdi8_edge.cli.options import ForceOption, JsonOption, TokenizerOption
from ssdi8_edge.cli.output import print_result, progress
from ssdi8_edge.ground.allocator import keep_freed_memory
from ssdi8_edge.ground.console import human
from ssdi8_edge.ground.inputs import expanded

if TYPE_CHECKING:
    from ssdi8_edge.compile.pipeline import BuildRequest, BuildResult
    from ssdi8_edge.models.description import Description


def build(
    target: Annotated[str, typer.Option(help="Target name, or a .toml file.")] = "host-cpu",
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or demo.")] = "demo",
    method: Annotated[str, typer.Option(help="Recipe; see `ssdi8-edge methods`.")] = "edge-w8a8",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
        typer.Option(help="UTF-8 text to calibrate on; default: the text of the demo model."),
    ] = None,
    tokenizer: TokenizerOption = None,
    lm_head: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The last linear layer: fp16, w8_row or w4; default: the method's."),
    ] = None,
    embedding: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Its rows: fp16 or int8_row; default: the method's."),
    ] = None,
    kv: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Keys and values of attention: int8 or fp16; default: the method's."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run folder; default: runs/MODEL--METHOD--TARGET."),
    ] = None,
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="Tokens that a conversation may have, for models with attention; default: the "
            "target's.",
        ),
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
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, quantize, export and package a model for a target; with --host, deploy it."""
    from ssdi8_edge.recipes.presets import find_method
    from ssdi8_edge.targets import load_target

    # Cheap checks first: torch takes seconds to import.
    chosen_target, recipe = load_target(target), find_method(method)
    recipe = recipe.choosing(lm_head=lm_head, embedding=embedding, kv=kv)
    if context is not None:
        chosen_target = chosen_target.model_copy(update={"context": context})
    if host is not None:
        check_reachable(host, until)
    from ssdi8_edge.compile.pipeline import Build, BuildRequest, run_name

    request = BuildRequest(
        model=model,
        recipe=recipe,
        target=chosen_target,
        out=expanded(out or Path("runs") / run_name(model, recipe.name, chosen_target.name)),
        calibration=calibration,
        tokenizer=tokenizer,
        until=until,
        device=device,
        command=shlex.join(["ssdi8-edge", *sys.argv[1:]]),
    )
    keep_freed_memory()
    job = Build(request, progress, lambda line: human.print(line))
    if not force:
        _require_fitting(request, job.checkpoint.description)
    if dry_run:
        plan = job.plan() | ({"deploy": f"bring it to {host}"} if host else {})
        print_result({"out": str(request.out), "plan": plan}, as_json, lambda: _print_plan(plan))
        return
    result = job.run()
    _report(result, as_json, host, force)


def _require_fitting(request: BuildRequest, model: Description) -> None:
    """Refuse what cannot run where it is built for, before hours are spent on it."""
    from ssdi8_edge.plan.choices import require_fitting
    from ssdi8_edge.plan.plan import make_plan

    target, recipe = request.target, request.recipe
    if request.until == "bundle" and target.board and target.board.free_mib:
        require_fitting(make_plan(request.model, model, recipe, target), model, recipe, target)


def _print_plan(plan: dict[str, str]) -> None:
    for stage, action in plan.items():
        human.print(f"{stage}: would {action}")


def _report(result: BuildResult, as_json: bool, host: str | None, force: bool) -> None:
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
        print_result(summary, as_json, show)
        return
    show()
    summary["deployed"] = deploy_bundle(host, result.out, force).to_dict()
    print_result(summary, as_json, lambda: None)
