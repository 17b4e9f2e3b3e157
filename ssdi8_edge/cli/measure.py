"""Commands that measure on boards: sweep and profile."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ssdi8_edge.boards.fleet.boards_file import FleetBoard
from ssdi8_edge.boards.link.connection import DEFAULT_STORE
from ssdi8_edge.boards.link.hosts import THIS_MACHINE, connect
from ssdi8_edge.cli.boards import AcceptOption, PythonOption, StoreOption
from ssdi8_edge.cli.fleet import (
    AT_ONCE,
    AtOnceOption,
    FleetOption,
    TagOption,
    fleet_of,
)
from ssdi8_edge.cli.options import JsonOption
from ssdi8_edge.ground.console import human, results, table
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError
from ssdi8_edge.ground.failures import as_ours
from ssdi8_edge.ground.json_text import to_json

if TYPE_CHECKING:
    from ssdi8_edge.boards.link.connection import Connection, Say
    from ssdi8_edge.boards.points.records import Profile
    from ssdi8_edge.boards.sweep.sweep import Outcome
    from ssdi8_edge.boards.sweep.sweep_commands import Installed

LENGTHS = "256,512,1024,2048"
WARMUP = 1


def sweep(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles or run folders.")],
    host: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
        typer.Option(
            help="user@board[:port] or an alias of ~/.ssh/config; may be given several times. "
            "Default: this machine."
        ),
    ] = None,
    fleet: FleetOption = None,
    tag: TagOption = None,
    at_once: AtOnceOption = AT_ONCE,
    seq_lens: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = LENGTHS,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each point.")] = 5,
    power_modes: Annotated[
        str, typer.Option(help="current, all, or names of nvpmodel's, comma-separated.")
    ] = "current",
    pin_clocks: Annotated[
        bool, typer.Option("--pin-clocks", help="Hold clocks by jetson_clocks meanwhile.")
    ] = False,
    power_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long the power pass generates; 0 leaves it out.")
    ] = 10.0,
    allow_reboot: Annotated[
        bool, typer.Option("--allow-reboot", help="Reboot boards where a power mode needs it.")
    ] = False,
    allow_unrestored: Annotated[
        bool,
        typer.Option(
            "--allow-unrestored",
            help="Change power mode and clocks also where the board cannot put them back.",
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before all power modes are set.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File of points; what it has is not repeated.")
    ] = Path("runs/sweep.jsonl"),
    accept_new_host_key: AcceptOption = False,
    store: StoreOption = DEFAULT_STORE,
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure bundles on boards, at every prompt length and power mode; repeat it to go on.

    Speed and memory come from one pass, power from another. Bundles are deployed where they are
    missing. Power modes and clocks are put back at the end, also after Ctrl-C, and read again; what
    cannot be put back is not changed without --allow-unrestored.
    """
    lengths = _lengths(seq_lens)
    modes = [name.strip() for name in power_modes.split(",") if name.strip()]
    if not modes:
        raise UsageError("--power-modes names none;", "write current, or names of modes.")
    boards = fleet_of(fleet, tag, host)
    if boards is None:
        boards = [FleetBoard(host=name) for name in dict.fromkeys(host or [THIS_MACHINE])]
    if "all" in map(str.casefold, modes) and not yes:
        _ask_for_all_modes([board.host for board in boards])
    from ssdi8_edge.boards.points.best import best_modes
    from ssdi8_edge.boards.points.points import open_points
    from ssdi8_edge.boards.points.records import Settings
    from ssdi8_edge.boards.sweep.board_sweep import SweepRequest
    from ssdi8_edge.boards.sweep.live import Display
    from ssdi8_edge.boards.sweep.measuring import open_source
    from ssdi8_edge.boards.sweep.sweep import sweep as measure

    sources = [open_source(bundle, lengths[-1], new_tokens) for bundle in bundles]
    found = {source.bundle.digest: source for source in sources}
    settings = Settings(
        new_tokens=new_tokens,
        repeat=repeat,
        warmup=WARMUP,
        pin_clocks=pin_clocks,
        power_seconds=power_seconds,
    )
    asked, unfit = [], {}
    for board in boards:
        fitting = [s for s in found.values() if board.target in (None, s.bundle.target)]
        if not fitting:
            unfit[board.host] = board.misfit(next(iter(found.values())).bundle.target)
            continue
        connection = connect(
            board.host, accept_new_host_key=accept_new_host_key, store=store, python=python
        )
        asked.append(
            (
                connection,
                SweepRequest(fitting, lengths, modes, settings, allow_reboot, allow_unrestored),
            )
        )
    with open_points(out, settings) as file, Display(human) as display:
        outcome = measure(asked, file, _install, display, at_once if fleet else None)
        bests = best_modes([*file.points.values()])
    outcome.errors |= unfit
    for best in bests:
        _say(str(best))
    _summarize(outcome, out, as_json)


def _ask_for_all_modes(hosts: Sequence[str]) -> None:
    """Once, for all boards.

    Raises:
        UsageError: nobody is there to answer, or the answer is no.
    """
    remedy = "repeat it with --yes, or name the modes."
    if not sys.stdin.isatty():
        raise UsageError("--power-modes all sets every mode, and nobody can be asked here;", remedy)
    question = f"Set every power mode of {', '.join(hosts)} in turn, and put it back at the end?"
    if not typer.confirm(question, err=True):
        raise UsageError("no power mode was changed;", remedy)


def _summarize(outcome: Outcome, out: Path, as_json: bool) -> None:
    errors = {board: as_ours(error, "measuring") for board, error in outcome.errors.items()}
    for board, point, why in outcome.failed:
        _say(f"{board}: {point} is not measured: {why}")
    _say(f"measured {outcome.measured} points, {outcome.kept} were there before; they lie in {out}")
    if as_json:
        print(
            to_json(
                {
                    "out": str(out),
                    "measured": outcome.measured,
                    "kept": outcome.kept,
                    "failed": outcome.failed,
                    "boards": {board: str(error) for board, error in errors.items()},
                }
            )
        )
    if not errors and not outcome.failed:
        return
    for error in list(errors.values())[1:]:
        _say(f"ssdi8-edge: {error}")
    if errors:
        raise next(iter(errors.values()))
    raise Ssdi8Error(
        f"{len(outcome.failed)} points are not measured;", "repeat the command to try them again."
    )


def profile(
    bundle: Annotated[Path, typer.Argument(help="Bundle or run folder.")],
    host: Annotated[
        str, typer.Option(help="user@board[:port], an alias of ~/.ssh/config, or this-machine.")
    ] = THIS_MACHINE,
    seq_len: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 1024,
    repeat: Annotated[int, typer.Option(min=1, help="Runs to take the mean of.")] = 5,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Default: profile-BUNDLE-HOST-LENGTH.json in runs/."),
    ] = None,
    accept_new_host_key: AcceptOption = False,
    store: StoreOption = DEFAULT_STORE,
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time each module of the network on a board; the result is a file for `report`."""
    import re

    from ssdi8_edge.boards.sweep.measuring import open_source
    from ssdi8_edge.boards.sweep.profile import profile as measure
    from ssdi8_edge.ground.artifacts import whole_or_absent, write_json

    source = open_source(bundle, seq_len, 1)
    with connect(
        host, accept_new_host_key=accept_new_host_key, store=store, python=python
    ) as connection:
        found = connection.patiently(
            lambda: measure(connection, source, seq_len, repeat, _install, _say), say=_say
        )
    name = re.sub(r"[^A-Za-z0-9._@-]+", "_", f"profile-{source.bundle.name}-{host}-{seq_len}")
    path = out or Path("runs") / f"{name}.json"
    with whole_or_absent(path) as scratch:
        write_json(scratch, found.to_json())
    if as_json:
        print(to_json(found.to_json()))
    else:
        _show(found)
    _say(f"the profile lies in {path}")


def _show(found: Profile) -> None:
    mode = f", {found.mode}" if found.mode else ""
    mark = "SIMULATED BOARD, " if found.simulated else ""
    for phase in found.phases:
        whole = sum(module.seconds for module in phase.modules) or 1.0
        title = f"{mark}{phase.phase}, {phase.tokens} tokens, {found.board}{mode}"
        shown = table("module", "layers", "ms", "share", title=title)
        for module in phase.modules:
            share = f"{module.seconds / whole:.1%}"
            shown.add_row(module.module, str(module.layers), f"{module.seconds * 1e3:.3f}", share)
        results.print(shown)


def _lengths(listed: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in listed.split(",")})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise UsageError(
            f"--seq-lens {listed!r} are no prompt lengths;", "write numbers such as 256,512."
        )
    return lengths


def _install(connection: Connection, folder: Path, say: Say) -> Installed:
    from ssdi8_edge.boards.store.deploy import deploy
    from ssdi8_edge.boards.sweep.sweep_commands import Installed

    deployed = deploy(connection, folder, say=say)
    return Installed(deployed.folder, deployed.python)


def _say(sentence: str) -> None:
    human.print(sentence)
