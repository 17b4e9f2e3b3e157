"""Bundles on this machine: opened, and run by the script that runs on boards.

Both are the package's own copy of the board runtime (`runtime`, in jetson/), and not the one in a
bundle, which may come from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from runtime import options as shared
from runtime.arguments import Parser, number
from runtime.bundle import Bundle, open_bundle
from runtime.files import HASHED_AT_LOAD, MANIFEST
from runtime.problems import BundleProblem
from ssdi8_edge.ground.errors import BundleError, UsageError
from ssdi8_edge.ground.shipped import shipped


def open_checked_bundle(folder: Path, *, hash_all: bool = False) -> Bundle:
    """The bundle in `folder`, or in its subfolder bundle/ if `folder` is a run folder.

    Raises:
        BundleError: it is not a bundle, of another schema, or a file is missing or altered.
    """
    try:
        bundle = open_bundle(bundle_folder(folder))
        bundle.check_files(None if hash_all else HASHED_AT_LOAD)
    except BundleProblem as problem:
        raise BundleError(f"{problem.message};", f"{problem.hint}.") from problem
    return bundle


def bundle_folder(folder: Path) -> Path:
    """A run folder stands for the bundle inside it."""
    inner = folder / "bundle"
    return inner if (inner / MANIFEST).is_file() else folder


@dataclass(frozen=True)
class RunRequest:
    """What `ssdi8-edge run` was asked for; `arguments` are run_engine.py's."""

    bundle: Path
    device: str
    arguments: list[str]


def parse_run(words: Sequence[str]) -> RunRequest:
    """The command line of `ssdi8-edge run`; --help prints and exits.

    Its options and their help are the board runtime's own (`runtime.options`).

    Raises:
        UsageError: an option is unknown, or its value out of range.
    """
    parser = Parser(
        prog="ssdi8-edge run",
        description="Generate text on this machine, with the script that runs on boards: on the"
        " CPU by onnxruntime from the bundle, on a GPU by the CUDA kernels from the run folder.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle or run folder")
    what = parser.add_argument_group("what to do, one of")
    shared.add(what.add_mutually_exclusive_group(required=True), shared.PROMPTS)
    shared.add_prompting(parser)
    where = parser.add_argument_group("where and how it runs")
    where.add_argument("--device", default="cpu", help="cpu, cuda or cuda:INDEX (default: cpu)")
    shared.add(where, shared.RUNNING)
    try:
        asked = parser.parse_args(words)
    except BundleProblem as problem:
        raise UsageError(f"{problem.message};", f"{problem.hint}.") from problem
    prompting = [flag for group in shared.PROMPTING.values() for flag in group]
    flags = (*shared.PROMPTS, *prompting, *shared.RUNNING)
    return RunRequest(asked.bundle, asked.device, _written(flags, asked))


@dataclass(frozen=True)
class ServeRequest:
    """What `ssdi8-edge serve` was asked for; `arguments` are run_engine.py's, but for the keys.

    Attributes:
        bundle: None to go on with what a board serves already.
        host: of a board; None: this process serves.
        forward: port here that leads to the board's; None: of the same number.
    """

    bundle: Path | None
    host: str | None
    device: str
    forward: int | None
    detach: bool
    stop: bool
    status: bool
    accept_new_host_key: bool
    store: str | None
    python: str | None
    key_file: Path | None
    arguments: list[str]


def parse_serve(words: Sequence[str]) -> ServeRequest:
    """The command line of `ssdi8-edge serve`; --help prints and exits.

    Raises:
        UsageError: an option is unknown, or its value out of range.
    """
    parser = Parser(
        prog="ssdi8-edge serve",
        description="Serve a bundle by OpenAI's API: on this machine until Ctrl-C, or on a board,"
        " where it goes on without this machine.",
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="bundle or run folder"
    )
    board = parser.add_argument_group("on a board")
    board.add_argument("--host", metavar="BOARD", help="user@board[:port], or an alias of SSH")
    add = board.add_argument
    add("--forward", type=number(int, 0, 65535), metavar="N", help="port here (default: the same)")
    add("--detach", action="store_true", help="return when it serves; do not show its log")
    add("--status", action="store_true", help="say what is served there")
    add("--stop", action="store_true", help="end it")
    add("--accept-new-host-key", action="store_true", help="store the key of an unknown host")
    add("--store", metavar="DIR", help="folder on the board for bundles and jobs")
    add("--python", metavar="FILE", help="interpreter on the board for portable bundles")
    passed_on = {**shared.LISTENING, **shared.SERVING, **shared.HOLDING, **shared.OPENING}
    shared.add(parser.add_argument_group("the server"), passed_on)
    where = parser.add_argument_group("on this machine")
    where.add_argument("--device", default="cpu", help="cpu, cuda or cuda:INDEX (default: cpu)")
    try:
        asked = parser.parse_args(words)
    except BundleProblem as problem:
        raise UsageError(f"{problem.message};", f"{problem.hint}.") from problem
    flags = [flag for flag in passed_on if flag != KEY_FILE]
    given = vars(asked) | {"key_file": asked.api_key_file, "arguments": _written(flags, asked)}
    return ServeRequest(**{name.name: given[name.name] for name in fields(ServeRequest)})


def _written(flags: Iterable[str], asked: argparse.Namespace) -> list[str]:
    """The words that say what was parsed."""
    words = []
    for flag in flags:
        value = getattr(asked, flag.removeprefix("--").replace("-", "_"))
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [f"{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    return words


KEY_FILE = "--api-key-file"


def _command(folder: Path, arguments: list[str]) -> list[str]:
    script = shipped("jetson") / "run_engine.py"
    return [sys.executable, str(script), str(bundle_folder(folder)), *arguments]


def run_engine(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run run_engine.py on a bundle with this interpreter, and wait for it."""
    return subprocess.run(_command(folder, arguments), capture_output=True, text=True, check=False)


def become_engine(folder: Path, arguments: list[str]) -> NoReturn:
    """Turn this process into run_engine.py: its output, signals and exit code are the command's."""
    command = [_as_bytes(word) for word in _command(folder, arguments)]
    os.execv(command[0], command)


def _as_bytes(word: str) -> bytes:
    try:
        return os.fsencode(word)
    except UnicodeEncodeError:  # text of which the locale's encoding has no letters
        return word.encode("utf-8")
