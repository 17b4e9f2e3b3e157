"""A bundle on a board, ready and verified there: upload, engine, golden vectors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.memory import least_memory, misfit
from ssdi8_edge.boards.facts.board_facts import BoardFacts, read_facts
from ssdi8_edge.boards.facts.doctor import engine_for
from ssdi8_edge.boards.facts.interpreter import find_interpreter
from ssdi8_edge.boards.link.connection import Connection, Say
from ssdi8_edge.boards.store.engine import build_engine, build_kernels
from ssdi8_edge.boards.store.upload import Cargo, OnBytes, Placed, upload
from ssdi8_edge.ground.artifacts import whole_or_absent, write_json
from ssdi8_edge.ground.board_runtime import open_checked_bundle
from ssdi8_edge.ground.errors import BoardError, Ssdi8Error

BOARDS = "boards"  # beside the bundle: what boards made of it
VERIFICATION = "verification.json"
VERIFY_S = 3600.0


@dataclass(frozen=True)
class Deployed:
    """A bundle that is ready on a board.

    Attributes:
        bundle: its name.
        folder: absolute path over there.
        python: interpreter that runs it there.
        sent: files that travelled; their bytes in `sent_bytes`.
        engine: of TensorRT, as build_engine.py reports it; None for the portable graph.
        results: folder here with what came back.
        verification: what run_engine.py --verify reports; None where it was not asked.
    """

    host: str
    bundle: str
    folder: str
    python: str
    sent: int
    sent_bytes: int
    engine: Mapping[str, Any] | None
    results: str
    verification: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)


def deploy(
    connection: Connection,
    bundle_folder: Path,
    *,
    say: Say = lambda _: None,
    on_line: Callable[[str], None] = lambda _: None,
    on_bytes: OnBytes = lambda done, total: None,
    verify: bool = True,
    force: bool = False,
) -> Deployed:
    """Bring a bundle to a board, build its engine there and verify it.

    Every step is resumed after a lost link, and skipped where its result is there.

    Args:
        bundle_folder: of a bundle, or a run folder.
        say: gets a sentence about each step, and where it ran.
        on_line: gets what the engine's build prints.
        force: go on where the bundle cannot fit into the board's memory.

    Raises:
        BundleError: the bundle is not whole.
        BoardError: the board cannot be reached, or lacks something.
        Ssdi8Error: the bundle does not compute there what it should.
    """
    bundle = open_checked_bundle(bundle_folder)
    cargo = Cargo.of(bundle.root, bundle.manifest)
    results = bundle.root.parent / BOARDS / re.sub(r"[^A-Za-z0-9._@-]+", "_", connection.name)

    chosen = "onnxruntime"
    if bundle.engines[0] != chosen:
        facts = connection.patiently(lambda: read_facts(connection), say=say)
        chosen = engine_for(bundle.engines, facts, connection)
        if not force:
            require_memory(connection.name, bundle, facts)

    def bring(rehash: bool) -> Placed:
        return connection.patiently(
            lambda: upload(connection, cargo, rehash=rehash, on_bytes=on_bytes), say=say
        )

    placed = bring(rehash=False)
    if placed.sent:
        say(f"sent {placed.sent} files, {placed.sent_bytes / 1e6:.1f} MB, to {connection.name}")
    else:
        say(f"{connection.name} has all files of {bundle.name} already")
    engine = None
    if chosen == "kernels":
        python = build_kernels(connection, placed.folder, cargo.name, results, say, on_line)
    elif chosen == "tensorrt":
        python, engine = build_engine(
            connection, placed.folder, cargo.name, results, say, on_line, force
        )
    else:
        python = find_interpreter(connection)
    verification = None
    if verify:
        verification = _verify(connection, placed.folder, python)
        if not (verification["verified"] or verification["comparisons"]):
            # It did not come to computing: perhaps a file was altered over there.
            mended = bring(rehash=True)
            if mended.sent:
                say(f"sent {mended.sent} files anew, which had been altered on {connection.name}")
                verification = _verify(connection, placed.folder, python)
        _judge(connection, bundle.name, verification, results)
        say(f"verified on {connection.name} with {verification['backend']}")
    return Deployed(
        host=connection.name,
        bundle=bundle.name,
        folder=placed.folder,
        python=python,
        sent=placed.sent,
        sent_bytes=placed.sent_bytes,
        engine=engine,
        results=str(results),
        verification=verification,
    )


def require_memory(name: str, bundle: Bundle, facts: BoardFacts) -> None:
    """Before anything is sent; what building the engine takes, build_engine.py looks at."""
    if facts.memory_free_mb is None:
        return
    free = int((facts.memory_free_mb + (facts.swap_free_mb or 0.0)) * 1e6)
    said = misfit(least_memory(bundle), free)
    if said:
        raise BoardError(
            f"bundle {bundle.name} {said} on {name}, swap included;",
            "build it with a shorter --context, by --method edge-w4a8 or for a larger board "
            "(`ssdi8-edge plan` tells what fits), or go on with --force.",
        )


def _verify(connection: Connection, folder: str, python: str) -> dict[str, Any]:
    """What run_engine.py --verify reports on the board; its last words where it reports nothing."""
    argv = [python, "run_engine.py", "--verify", "--json"]
    done = connection.patiently(lambda: connection.run(argv, folder=folder, timeout=VERIFY_S))
    try:
        report = json.loads(done.stdout)
        if {"verified", "problem", "backend", "comparisons"} <= set(report):
            return dict(report)
    except (ValueError, TypeError):
        pass
    return {
        "verified": False,
        "problem": done.last_words(),
        "backend": None,
        "comparisons": [],
    }


def _judge(
    connection: Connection, name: str, verification: Mapping[str, Any], results: Path
) -> None:
    results.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(results / VERIFICATION) as scratch:
        write_json(scratch, verification)
    if verification["verified"] is not True:
        problem = str(verification["problem"]).removeprefix("run_engine: ").rstrip(".")
        raise Ssdi8Error(
            f"{name} does not pass --verify on {connection.name}: {problem};",
            f"the report is {results / VERIFICATION}.",
        )
