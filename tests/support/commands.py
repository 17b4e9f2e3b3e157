"""The command line in processes of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "ssdi8_edge"]

Result = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    """One thread: tiny tensors, and tests that share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **changes}


def ssdi8(
    *arguments: object,
    env: dict[str, str] | None = None,
    folder: Path | None = None,
    **options: Any,
) -> Result:
    """The command's result; with `env`, or other options of subprocess, of a new interpreter.

    `folder`: where it runs; None: here.
    """
    words = [*map(str, arguments)]
    if env is None and not options:
        return _forked(words, folder)
    options = {"env": env or environment(), "cwd": folder, **options}
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=240, **options
    )


def start_forked(
    arguments: list[str], stdout: Path, stderr: Path, folder: Path | None = None
) -> BaseProcess:
    """The command in a process of its own that has torch loaded already, which saves seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ssdi8_edge.cli", "ssdi8_edge.compile.pipeline", "ssdi8_edge.evaluate"]
    )
    place = (str(folder or os.getcwd()), environment())
    process = context.Process(target=_command, args=(arguments, *place, stdout, stderr))
    process.start()
    return process


def _forked(arguments: list[str], folder: Path | None) -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        stdout, stderr = (Path(scratch) / name for name in ("stdout", "stderr"))
        process = start_forked(arguments, stdout, stderr, folder)
        process.join(240)
        assert process.exitcode is not None, f"{arguments} does not end"
        said = (path.read_text(encoding="utf-8") for path in (stdout, stderr))
        return Result([*COMMAND, *arguments], process.exitcode, *said)


def _command(
    arguments: list[str], folder: str, variables: dict[str, str], stdout: Path, stderr: Path
) -> None:
    from ssdi8_edge.__main__ import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        # Unbuffered files: what is killed has said what it said.
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [COMMAND[0], *arguments]
    main()


def data(*arguments: object) -> Any:
    """What a command prints as JSON on stdout."""
    result = ssdi8(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_one_sentence(result: Result, words: list[str], exit_code: int = 2) -> None:
    """One sentence on stderr after the stages that were finished, and nothing on stdout."""
    text = re.sub(r"(?m)^(\w+: (done in .*|up to date))?\n", "", result.stderr)
    assert result.returncode == exit_code, text
    assert result.stdout == ""
    assert "Traceback" not in text
    assert re.match(r"(ssdi8-edge|run_engine): \S", text) and text.endswith(".\n"), text
    for word in words:
        assert word in text, text
    assert text.count("\n") == 1, text
    assert not re.search(r"[.!?] [A-Z]", text), f"more than one sentence: {text}"
