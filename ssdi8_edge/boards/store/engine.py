"""What a bundle needs on its board, built there by a job: kernels, or a TensorRT engine, which is
fetched for safe keeping."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.files import BUILD_LOG, BUILD_MESSAGES, ENGINE, TIMING_CACHE, sha256
from ssdi8_edge.boards.link.connection import Connection, Say
from ssdi8_edge.boards.store.jobs import start_job
from ssdi8_edge.ground.artifacts import whole_or_absent
from ssdi8_edge.ground.errors import BoardError

PYTHON = ".venv/bin/python"  # made by setup.sh inside the bundle
MISSING = "missing  "  # begins a line of setup.sh

# Both tools do nothing where nothing is to be done, so that a second deploy runs them again.
_BUILD = f'bash setup.sh && exec {PYTHON} build_engine.py --json --timing-cache "$@"'
FORCED = "--no-memory-check"
_SETUP = "exec bash setup.sh"


def build_engine(
    connection: Connection,
    folder: str,
    name: str,
    results: Path,
    say: Say,
    on_line: Callable[[str], None],
    force: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Build plugins and engine where they are missing or stale, and bring back what is new.

    The job goes on when the link is lost, and when this process ends; asked again, its log is
    followed from its beginning. No measurement runs meanwhile, by the lock `board`.

    Args:
        folder: of the bundle on the board.
        name: of the bundle's folder, for the job.
        results: folder here for the engine, its logs and the timing cache.
        force: build also where memory seems too small.

    Returns:
        The interpreter for this bundle, and what build_engine.py reports.

    Raises:
        BoardBusy: someone measures there.
        BoardError: the build failed; says where its log is.
    """
    cache = f"{PurePosixPath(folder).parent.parent}/{TIMING_CACHE}"
    command = [_BUILD, "build", cache, *([FORCED] if force else [])]
    lines = _run(connection, folder, name, command, results, say, on_line)
    report = _report(lines)
    if report is None:
        raise BoardError(
            f"build_engine.py said nothing readable on {connection.name}: {_last_words(lines)}",
            f"all it printed is in {results / 'build.log'}.",
        )
    _fetch(connection, report, cache, results)
    say(
        f"engine {'built' if report['built'] else 'found up to date'} on {connection.name} and "
        f"kept in {results}"
    )
    return f"{folder}/{PYTHON}", report


def build_kernels(
    connection: Connection,
    folder: str,
    name: str,
    results: Path,
    say: Say,
    on_line: Callable[[str], None],
) -> str:
    """The same for a bundle that our kernels run: setup.sh alone.

    Returns:
        The interpreter for this bundle.

    Raises:
        BoardBusy, BoardError: as `build_engine`.
    """
    _run(connection, folder, name, [_SETUP], results, say, on_line)
    return f"{folder}/{PYTHON}"


def _run(
    connection: Connection,
    folder: str,
    name: str,
    command: list[str],
    results: Path,
    say: Say,
    on_line: Callable[[str], None],
) -> list[str]:
    """What the job of `command`, a script for bash and its arguments, prints to its end."""
    job = connection.patiently(
        lambda: start_job(
            connection,
            f"build-{name}",
            ["bash", "-c", *command],
            folder=folder,
            lock="board",
        ),
        say=say,
    )
    doing = "is still building" if job.picked_up else "checks or builds"
    log = f"{connection.store}/jobs/{job.name}/log"
    say(f"{connection.name} {doing} what the bundle needs there; the log is {log}")
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        on_line(line)

    status = job.follow(take, say=say)
    with whole_or_absent(results / "build.log") as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if status != 0:
        raise BoardError(
            f"what the bundle needs could not be built on {connection.name}: {_last_words(lines)}",
            f"all it printed is in {results / 'build.log'}.",
        )
    return lines


def _last_words(lines: list[str]) -> str:
    """What setup.sh finds missing, else the last line that says something."""
    missing = [line.removeprefix(MISSING).strip() for line in lines if line.startswith(MISSING)]
    if missing:
        return f"missing {missing[0]}"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _report(lines: list[str]) -> dict[str, Any] | None:
    """The JSON object that ends the log."""
    for start in reversed(range(len(lines))):
        if lines[start] == "{":
            try:
                report = json.loads("\n".join(lines[start:]))
                digest, path = report["engine"]["sha256"], report["path"]
                return report if isinstance(digest, str) and isinstance(path, str) else None
            except (ValueError, KeyError, TypeError):
                return None
    return None


def _fetch(connection: Connection, report: Mapping[str, Any], cache: str, results: Path) -> None:
    """What is new; the engine only where another one, or none, is here."""
    engine = PurePosixPath(str(report["path"]))
    if (results / ENGINE).is_file() and sha256(results / ENGINE) == report["engine"]["sha256"]:
        return
    # The engine last: it is there only with its log.
    for there, here in (
        (str(engine.parent.parent / BUILD_MESSAGES), BUILD_MESSAGES),
        (cache, TIMING_CACHE),
        (str(engine.parent / BUILD_LOG), BUILD_LOG),
        (str(engine), ENGINE),
    ):
        # Not all of it need be there: an engine may have been built by hand.
        bring = partial(connection.fetch, there, results / here, missing_ok=True)
        connection.patiently(bring)
