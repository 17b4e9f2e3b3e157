"""Commands that need a board: doctor, deploy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Column, Table

from ssdi8_edge.boards.link.connection import DEFAULT_STORE
from ssdi8_edge.boards.link.hosts import THIS_MACHINE, connect
from ssdi8_edge.cli.options import ForceOption, JsonOption
from ssdi8_edge.ground.console import human, results
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.json_text import to_json

if TYPE_CHECKING:
    from ssdi8_edge.boards.link.connection import Connection
    from ssdi8_edge.boards.store.deploy import Deployed
    from ssdi8_edge.boards.store.upload import OnBytes

HostOption = Annotated[
    str, typer.Option(help="user@board[:port], an alias of ~/.ssh/config, or this-machine.")
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept-new-host-key", help="Store the key of a host that has none stored."),
]
StoreOption = Annotated[str, typer.Option(help="Folder on the board for bundles and caches.")]
PythonOption = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="Interpreter on the board that runs portable bundles."),
]


def doctor(
    host: HostOption = THIS_MACHINE,
    print_profile: Annotated[
        bool, typer.Option("--print-profile", help="Print a target file that fits the board.")
    ] = False,
    accept_new_host_key: AcceptOption = False,
    store: StoreOption = DEFAULT_STORE,
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a board is, what it lacks and how to install that; changes nothing there."""
    from ssdi8_edge.boards.facts.board_facts import read_facts
    from ssdi8_edge.boards.facts.doctor import examine, profile_toml, report

    with connect(
        host, accept_new_host_key=accept_new_host_key, store=store, python=python
    ) as connection:
        facts = read_facts(connection)
        found = report(host, facts, examine(facts, connection))
    if print_profile:
        print(profile_toml(facts), end="")
    elif as_json:
        print(to_json(found))
    else:
        _show(found)


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
    host: Annotated[
        str, typer.Option(help="user@board[:port], an alias of ~/.ssh/config, or this-machine.")
    ],
    bundle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Bundle or run folder; none with --prune alone."),
    ] = None,
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
    result: dict[str, Any] = {}
    with connect(
        host, accept_new_host_key=accept_new_host_key, store=store, python=python
    ) as connection:
        if bundle is not None:
            # A board that was reached is waited for when it goes away; a wrong address is not.
            connection.run(["true"])
            result = _bring(connection, bundle, verify, force).to_dict()
        if prune:
            from ssdi8_edge.boards.store.upload import prune as remove

            kept = [Path(result["folder"]).name] if result else []
            removed, freed = remove(connection, kept)
            _say(f"removed {len(removed)} bundles from {host}, {freed / 1e6:.1f} MB")
            result |= {"removed": removed, "freed_bytes": freed}
    if as_json:
        print(to_json(result))


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
    with connect(host) as connection:
        return _bring(connection, bundle, True, force)


def _bring(connection: Connection, bundle: Path, verify: bool, force: bool) -> Deployed:
    from ssdi8_edge.boards.store.deploy import deploy as bring

    with _transfer_bar() as on_bytes:
        deployed = bring(
            connection,
            bundle,
            say=_say,
            on_line=lambda line: human.print(f"  {line}"),
            on_bytes=on_bytes,
            verify=verify,
            force=force,
        )
    _say(f"it lies in {deployed.folder} on {connection.name} and runs there by {deployed.python}")
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
