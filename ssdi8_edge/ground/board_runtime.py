"""The one bridge to the runtime that lives on boards: the package `runtime` in jetson/.

The host does not share modules with a board; it runs the same files, from its own copy rather than
from a bundle that may come from elsewhere.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ssdi8_edge.ground.artifacts import shipped
from ssdi8_edge.ground.errors import BundleError


def runtime_module(name: str) -> ModuleType:
    """`runtime.<name>` of the shipped board runtime."""
    folder = str(shipped("jetson"))
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"runtime.{name}")


def open_checked_bundle(folder: Path, *, hash_all: bool = False) -> Any:
    """The bundle in `folder`, or in its subfolder bundle/ if `folder` is a run folder.

    Raises:
        BundleError: it is not a bundle, of another schema, or a file is missing or altered.
    """
    module = runtime_module("bundle")
    try:
        bundle = module.open_bundle(bundle_folder(folder))
        bundle.check_files(None) if hash_all else bundle.check_files()
    except module.BundleProblem as problem:
        raise BundleError(f"{problem.message};", f"{problem.hint}.") from problem
    return bundle


def bundle_folder(folder: Path) -> Path:
    """A run folder stands for the bundle inside it."""
    inner = folder / "bundle"
    return inner if (inner / "manifest.json").is_file() else folder


def _command(folder: Path, arguments: list[str]) -> list[str]:
    script = shipped("jetson") / "run_engine.py"
    return [sys.executable, str(script), str(bundle_folder(folder)), *arguments]


def run_engine(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run run_engine.py on a bundle with this interpreter, and wait for it."""
    return subprocess.run(_command(folder, arguments), capture_output=True, text=True, check=False)


def become_engine(folder: Path, arguments: list[str]) -> NoReturn:
    """Turn this process into run_engine.py: its output, signals and exit code are the command's."""
    command = _command(folder, arguments)
    os.execv(command[0], command)
