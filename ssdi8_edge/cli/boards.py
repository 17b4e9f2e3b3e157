"""Commands that need a board: doctor, deploy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Column, Table

from ssdi8_edge.boards.link.connection import DEFAULT_STORE
from ssdi8_edge.boards.link.hosts import THIS_MACHINE, connect
from ssdi8_edge.cli.fleet import (
    AT_ONCE,
    AtOnceOption,
    FleetOption,
    Lines,
    TagOption,
    fleet_of,
    on_each,
    require_all,
)
from ssdi8_edge.cli.options import ForceOption, JsonOption
from ssdi8_edge.ground.console import human, results, table
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.json_text import to_json

if TYPE_CHECKING:
    from ssdi8_edge.boards.facts.board_facts import BoardFacts
    from ssdi8_edge.boards.fleet.boards_file import FleetBoard
    from ssdi8_edge.boards.fleet.side_by_side import Outcome
    from ssdi8_edge.boards.link.connection import Connection, Say
    from ssdi8_edge.boards.store.deploy import Deployed
    from ssdi8_edge.boards.store.upload import OnBytes

HostOption = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="user@board[:port], an alias of ~/.ssh/config, or this-machine."),
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept-new-host-key", help="Store the key of a host that has none stored."),
]
StoreOption = Annotated[str, typer.Option(help="Folder on the board for bundles and caches.")]
PythonOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Interpreter on the board that runs portable bundles."),
]


def doctor(
    host: HostOption = None,
    fleet: FleetOption = None,
    tag: TagOption = None,
    at_once: AtOnceOption = AT_ONCE,
    print_profile: Annotated[
        bool, typer.Option("--print-profile", help="Print a target file that fits the board.")
    ] = False,
    accept_new_host_key: AcceptOption = False,
    store: StoreOption = DEFAULT_STORE,
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a board is, what it lacks and how to install that; changes nothing there.

    Without --host and --fleet, of this machine.
    """
    from ssdi8_edge.boards.facts.board_facts import read_facts
    from ssdi8_edge.boards.facts.doctor import examine, profile_toml, report

    def examined(name: str) -> tuple[BoardFacts, dict[str, Any]]:
        with connect(
            name, accept_new_host_key=accept_new_host_key, store=store, python=python
        ) as connection:
            facts = read_facts(connection)
            return facts, report(name, facts, examine(facts, connection))

    boards = fleet_of(fleet, tag, host)
    if boards is not None:
        if print_profile:
            raise UsageError("--print-profile is of one board;", "name it by --host.")
        _doctor_fleet(boards, lambda name: examined(name)[1], at_once, as_json)
        return
    facts, found = examined(host or THIS_MACHINE)
    if print_profile:
        print(profile_toml(facts), end="")
    elif as_json:
        print(to_json(found))
    else:
        _show(found)


def _doctor_fleet(
    boards: Sequence[FleetBoard],
    examined: Callable[[str], dict[str, Any]],
    at_once: int,
    as_json: bool,
) -> None:
    def work(board: FleetBoard, lines: Lines) -> dict[str, Any]:
        lines.running(board.host, "is examined")
        found = examined(board.host)
        runs = [name for name, can in found["runs"].items() if can]
        lines.say(board.host, f"runs {', '.join(runs) or 'nothing yet'}")
        return found

    outcome = on_each(boards, work, at_once, "examining")
    if as_json:
        print(to_json(_fleet_result(outcome)))
    else:
        shown = table("board", "is", "power mode", "memory free, MB", "cannot run yet", "to do")
        for host, found in outcome.results.items():
            lacks = [name for name, can in found["runs"].items() if not can]
            free, mode = found["memory_free_mb"], found["power_mode"]
            shown.add_row(
                host + (" (simulated)" if found["simulated"] else ""),
                found["model"] or found["cpu"] or "unknown machine",
                mode or "unknown",
                "unknown" if free is None else f"{free:.0f}",
                ", ".join(lacks) or "–",
                "; ".join(finding["remedy"] for finding in found["findings"]) or "–",
            )
        results.print(shown)
    require_all(outcome.errors, len(boards))


def _fleet_result(outcome: Outcome[dict[str, Any]]) -> dict[str, Any]:
    errors = {host: str(error) for host, error in outcome.errors.items()}
    return {"boards": outcome.results, "errors": errors}


def _show(found: dict[str, Any]) -> None:
    if found["simulated"]:
        results.print("SIMULATED BOARD: nothing below was measured")
    rows = Table(Column(), Column(overflow="fold"), show_header=False)
    for name, value in _rows(found):
        rows.add_row(name, value)
    results.print(rows)
    for runtime, runs in found["runs"].items():
        results.print(f"{runtime} bundles {'can run' if runs else 'cannot run yet'}")
    for finding in found["findings"]:
        results.print(f"for {finding['needed_for']}: {finding['what']}")
        results.print(f"    {finding['remedy']}")


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def known(value: Any) -> str:
        return "unknown" if value is None else str(value)

    python = found["python"]
    yield "board", found["model"] or found["cpu"] or "unknown machine"
    yield "system", f"{known(found['machine'])}, Linux {known(found['kernel'])}"
    if found["l4t"]:
        yield "L4T", f"{found['l4t']} (JetPack {known(found['jetpack'])})"
        yield "CUDA, TensorRT", f"{known(found['cuda'])}, {known(found['tensorrt'])}"
        modes = ", ".join(found["power_modes"])
        yield "power mode", f"{known(found['power_mode'])} of {modes or 'unknown ones'}"
        clock, most = known(found["gpu_mhz"]), known(found["gpu_max_mhz"])
        yield "GPU", f"{known(found['sms'])} SMs at {clock} of {most} MHz"
        yield "CPU", f"{known(found['cpu_mhz'])} of {known(found['cpu_max_mhz'])} MHz"
        yield "EMC", f"at most {known(found['emc_max_mhz'])} MHz"
        for rail, watts in found["rails_w"].items():
            yield rail, f"{watts:.2f} W"
        counts = found["over_current_events"].items()
        yield "over-current events", ", ".join(f"{k} {v}" for k, v in counts) or "unknown"
        yield "throttled now", ", ".join(found["throttle_alerts"]) or "by nothing that says so"
    yield "Python", f"{python['path']} {known(python['version'])}"
    yield "modules", ", ".join(f"{k} {v}" for k, v in python["modules"].items()) or "none"
    if found["memory_mb"] is not None:
        free = f"{found['memory_free_mb']:.0f} of {found['memory_mb']:.0f} MB available"
        block = found["largest_block_mb"]
        yield "memory", free + (f", at most {block:.1f} MB in one piece" if block else "")
    if found["swap_mb"]:
        yield "swap", f"{known(found['swap_free_mb'])} of {found['swap_mb']:.0f} MB free"
    if found["memory_holders_mb"]:
        holders = found["memory_holders_mb"].items()
        yield "memory is held by", ", ".join(f"{name} {mb:.0f} MB" for name, mb in holders)
    yield "disk", f"{found['disk_free_mb']:.0f} MB free"
    hottest = max(found["temperatures_c"].items(), key=lambda item: item[1], default=None)
    if hottest:
        yield "hottest", f"{hottest[0]} {hottest[1]:.1f} °C"


def deploy(
    bundle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Bundle or run folder; none with --prune alone."),
    ] = None,
    host: HostOption = None,
    fleet: FleetOption = None,
    tag: TagOption = None,
    at_once: AtOnceOption = AT_ONCE,
    prune: Annotated[
        bool, typer.Option("--prune", help="Then remove every other bundle from the board.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare with the golden vectors there.")] = True,
    force: ForceOption = False,
    accept_new_host_key: AcceptOption = False,
    store: StoreOption = DEFAULT_STORE,
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a bundle to a board, build its engine there if it needs one, and verify it there."""
    if bundle is None and not prune:
        raise UsageError("there is nothing to deploy;", "name a bundle or run folder.")
    boards = fleet_of(fleet, tag, host)
    if boards is None and host is None:
        raise UsageError(
            "there is no board to deploy to;", "name one by --host, or many by --fleet."
        )

    def brought(name: str, say: Say, on_bytes: OnBytes) -> dict[str, Any]:
        with connect(
            name, accept_new_host_key=accept_new_host_key, store=store, python=python
        ) as connection:
            result: dict[str, Any] = {}
            if bundle is not None:
                # A board that was reached is waited for when it goes away; a wrong address is not.
                connection.run(["true"])
                result = _bring(connection, bundle, verify, force, say, on_bytes).to_dict()
            if prune:
                result |= _prune(connection, result.get("folder"), say)
            return result

    if boards is not None:
        _deploy_fleet(boards, bundle, brought, at_once, as_json)
        return
    assert host is not None
    with _transfer_bar() as on_bytes:
        result = brought(host, _say, on_bytes)
    if as_json:
        print(to_json(result))


def _prune(connection: Connection, kept: str | None, say: Say) -> dict[str, Any]:
    """Remove every bundle from a board but the one in the folder `kept`."""
    from ssdi8_edge.boards.store.upload import prune

    removed, freed = prune(connection, [Path(kept).name] if kept else [])
    say(f"removed {len(removed)} bundles from {connection.name}, {freed / 1e6:.1f} MB")
    return {"removed": removed, "freed_bytes": freed}


def _deploy_fleet(
    boards: Sequence[FleetBoard],
    bundle: Path | None,
    brought: Callable[[str, Say, OnBytes], dict[str, Any]],
    at_once: int,
    as_json: bool,
) -> None:
    target = None
    if bundle is not None:
        from ssdi8_edge.ground.board_runtime import bundle_folder, open_checked_bundle

        target = open_checked_bundle(bundle_folder(bundle)).manifest["target"]["name"]

    def work(board: FleetBoard, lines: Lines) -> dict[str, Any]:
        def sent(done: int, total: int) -> None:
            lines.running(board.host, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB sent")

        if target is not None and board.target not in (None, target):
            raise board.misfit(target)
        return brought(board.host, lambda sentence: lines.say(board.host, sentence), sent)

    outcome = on_each(boards, work, at_once, "deploying")
    if as_json:
        print(to_json(_fleet_result(outcome)))
    require_all(outcome.errors, len(boards))


def check_reachable(host: str, until: str) -> None:
    """Before a long build that is to be deployed.

    Raises:
        UsageError: the build stops before there is a bundle.
        BoardError: the board cannot be reached.
    """
    if until != "bundle":
        raise UsageError(
            f"--host {host} deploys a bundle, and the build stops after {until};",
            "leave out one of --host and --until.",
        )
    with connect(host) as connection:
        connection.run(["true"])


def deploy_bundle(host: str, bundle: Path, force: bool = False) -> Deployed:
    """Deploy a bundle that was just built, with all that is said on the way."""
    with connect(host) as connection, _transfer_bar() as on_bytes:
        return _bring(connection, bundle, True, force, _say, on_bytes)


def deploy_for_use(connection: Connection, bundle: Path) -> Deployed:
    """Bring a bundle that is to run at once, if the board does not have it; not verified anew."""
    with _transfer_bar() as on_bytes:
        return _bring(connection, bundle, False, False, _say, on_bytes)


def _bring(
    connection: Connection, bundle: Path, verify: bool, force: bool, say: Say, on_bytes: OnBytes
) -> Deployed:
    from ssdi8_edge.boards.store.deploy import deploy as bring

    deployed = bring(
        connection,
        bundle,
        say=say,
        on_line=lambda line: say(f"  {line}"),
        on_bytes=on_bytes,
        verify=verify,
        force=force,
    )
    say(f"it lies in {deployed.folder} on {connection.name} and runs there by {deployed.python}")
    return deployed


def _say(sentence: str) -> None:
    human.print(sentence)


@contextmanager
def _transfer_bar() -> Iterator[OnBytes]:
    """A bar that shows itself with the first bytes, on a terminal only."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("sending", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=human, transient=True)
    task = bar.add_task("", total=None)

    def show(done: int, total: int) -> None:
        if human.is_terminal:
            bar.update(task, completed=done, total=total)
            bar.stop() if done == total else bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
