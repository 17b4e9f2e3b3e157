"""The command serve: a bundle by OpenAI's API, on this machine or on a board."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ssdi8_edge.boards.link.connection import DEFAULT_STORE
from ssdi8_edge.boards.link.hosts import THIS_MACHINE, connect
from ssdi8_edge.cli.boards import deploy_for_use
from ssdi8_edge.cli.this_machine import run_engine_here
from ssdi8_edge.ground.console import human
from ssdi8_edge.ground.errors import BoardError, UsageError

if TYPE_CHECKING:
    from ssdi8_edge.boards.link.connection import Connection
    from ssdi8_edge.boards.serving.serving import Serving
    from ssdi8_edge.boards.store.jobs import Job
    from ssdi8_edge.ground.board_runtime import ServeRequest


def serve(context: typer.Context) -> None:
    """Serve a bundle by OpenAI's API, on this machine or on a board."""
    from ssdi8_edge.ground.board_runtime import KEY_FILE, parse_serve

    asked = parse_serve(context.args)
    if asked.host is None:
        if asked.bundle is None or asked.stop or asked.status:
            raise UsageError("there is nothing to serve;", "name a bundle, or a board by --host.")
        keys = [f"{KEY_FILE}={asked.key_file}"] if asked.key_file else []
        run_engine_here(asked.bundle, ["--serve", *keys, *asked.arguments], asked.device)
    with connect(
        asked.host,
        accept_new_host_key=asked.accept_new_host_key,
        store=asked.store or DEFAULT_STORE,
        python=asked.python,
    ) as connection:
        if asked.stop:
            _stop(connection)
        elif asked.status:
            _show_status(connection)
        else:
            _serve_there(connection, asked)


def _stop(connection: Connection) -> None:
    from ssdi8_edge.boards.serving.serving import stop

    ended = stop(connection)
    human.print(
        f"the server on {connection.name} has ended"
        if ended
        else f"nothing is served on {connection.name}"
    )


def _show_status(connection: Connection) -> None:
    from ssdi8_edge.boards.serving.serving import running

    found = running(connection)
    if found is None:
        human.print(f"nothing is served on {connection.name}")
        raise typer.Exit(1)
    _, serving = found
    human.print(
        f"{connection.name} serves {serving.model} on {serving.host} port {serving.port}"
        if serving
        else f"a server is starting on {connection.name}"
    )


def _serve_there(connection: Connection, asked: ServeRequest) -> None:
    from ssdi8_edge.boards.serving.serving import follow

    job = _job(connection, asked)
    with ExitStack() as open_forwards:

        def announce(serving: Serving) -> None:
            port = serving.port
            if asked.host != THIS_MACHINE and not asked.detach:
                port = _forward(open_forwards, connection, serving.port, asked.forward)
            _say_where(connection, serving, port, asked.detach)
            if asked.detach:
                raise _Detached

        with suppress(_Detached):
            follow(
                connection,
                job,
                on_line=lambda line: human.print(f"  {line}"),
                on_serving=announce,
                say=human.print,
            )


class _Detached(Exception):
    """It serves, and nobody stays to look."""


def _job(connection: Connection, asked: ServeRequest) -> Job:
    """The server that runs there, or a new one of the bundle that was named."""
    from ssdi8_edge.boards.serving.serving import running, send_keys, start
    from ssdi8_edge.ground.board_runtime import KEY_FILE, open_checked_bundle

    connection.run(["true"])  # a board that was reached is waited for, a wrong address is not
    found = running(connection)
    if found is not None:
        job, serving = found
        name = open_checked_bundle(asked.bundle).name if asked.bundle else None
        if serving and name not in (None, serving.model):
            raise BoardError(
                f"{connection.name} serves {serving.model} already;",
                f"end it first: ssdi8-edge serve --host {asked.host} --stop",
            )
        human.print(f"{connection.name} serves already; its options stay as they are")
        return job
    if asked.bundle is None:
        raise UsageError(f"nothing is served on {connection.name};", "name a bundle.")
    deployed = deploy_for_use(connection, asked.bundle)
    arguments = list(asked.arguments)
    if asked.key_file is not None:
        path = send_keys(connection, _read(asked.key_file))
        arguments.append(f"{KEY_FILE}={path}")
    return start(connection, deployed.folder, deployed.python, arguments)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the key file {path} cannot be read ({error.strerror});", "check --api-key-file."
        ) from error


def _forward(stack: ExitStack, connection: Connection, to_port: int, port: int | None) -> int:
    from ssdi8_edge.boards.link.forward import Forward

    wanted = to_port if port is None else port
    return stack.enter_context(Forward(connection, to_port, wanted)).port


def _say_where(connection: Connection, serving: Serving, port: int, detached: bool) -> None:
    if detached:
        human.print(f"{serving.model} answers on port {serving.port} of {connection.name}")
    else:
        human.print(f"{serving.model} answers on http://127.0.0.1:{port}/ while this command runs")
    human.print(f"the server goes on until: ssdi8-edge serve --host {connection.name} --stop")
