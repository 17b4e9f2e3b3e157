"""The command line in processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

COMMAND = [sys.executable, "-m", "ssdi8_edge"]

Result = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    """One thread: tiny tensors, and tests that share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **changes}


def ssdi8(*arguments: object, **options: Any) -> Result:
    command = [*COMMAND, *map(str, arguments)]
    options = {"env": environment(), **options}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


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
