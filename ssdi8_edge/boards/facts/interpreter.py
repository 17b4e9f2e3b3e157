"""Which Python on a board runs bundles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssdi8_edge.boards.facts.gather import gather
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.ground.errors import BoardError

PORTABLE_NEEDS = ("numpy", "onnxruntime", "tokenizers")
_ASK = """
import importlib.metadata, importlib.util, json, platform, sys
found = {}
for name in sys.argv[1:]:
    if importlib.util.find_spec(name):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
print(json.dumps([platform.python_version(), found]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python on a board.

    Attributes:
        path: how it is called there.
        version: None where it does not run.
        modules: name -> version, of those asked for that it has.
    """

    path: str
    version: str | None
    modules: Mapping[str, str]

    @property
    def missing(self) -> list[str]:
        """What the portable graph needs and it lacks."""
        return [name for name in PORTABLE_NEEDS if name not in self.modules]


def question(python: str, modules: Sequence[str]) -> list[str]:
    """A command whose text `interpreter_of` reads."""
    return [python, "-c", _ASK, *modules]


def questions(connection: Connection, modules: Sequence[str]) -> dict[str, list[str]]:
    """Commands whose texts `chosen` reads: of the one named, or of the store's venv and python3."""
    named = connection.python
    candidates = [named] if named else [f"{connection.store}/venv/bin/python", "python3"]
    return {python: question(python, modules) for python in candidates}


def chosen(connection: Connection, texts: Mapping[str, str]) -> Interpreter:
    """The first that has what is needed, else the last, whatever it lacks."""
    found = [interpreter_of(path, texts) for path in questions(connection, ())]
    return next((python for python in found if not python.missing), found[-1])


def find_interpreter(connection: Connection) -> str:
    """The Python for the portable graph.

    Raises:
        BoardError: it does not run, or lacks a module; says how to install it.
    """
    found = gather(connection, [], tools=questions(connection, PORTABLE_NEEDS))
    python = chosen(connection, found.tools)
    if python.version is None or python.missing:
        lacks = f"has no {', '.join(python.missing)}" if python.version else "does not run"
        raise BoardError(
            f"{python.path} on {connection.name} {lacks};",
            f"make an environment there: {venv_remedy(connection.store)}",
        )
    return python.path


def venv_remedy(store: str) -> str:
    """How to make the environment that is looked for in the store."""
    return (
        f"python3 -m venv {store}/venv && {store}/venv/bin/pip install {' '.join(PORTABLE_NEEDS)}"
    )


def interpreter_of(path: str, texts: Mapping[str, str]) -> Interpreter:
    """What the texts say about one interpreter."""
    try:
        version, modules = json.loads(texts[path].strip().splitlines()[-1])
        named = {str(name): str(found) for name, found in modules.items()}
        return Interpreter(path, str(version), named)
    except (ValueError, LookupError, AttributeError, TypeError):
        return Interpreter(path, None, {})
