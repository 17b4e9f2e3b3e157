"""What a user sees of an exception: one sentence, never a traceback, unless it was asked for."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import COMMAND, Result, environment
from tiny_model import write_model, write_text

from runtime import command_line
from runtime import failures as shared
from runtime.problems import BundleProblem, MemoryRanOut
from ssdi8_edge.compile import bundle
from ssdi8_edge.ground import failures
from ssdi8_edge.ground.errors import Ssdi8Error, UsageError


def raised(work: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


# What the libraries really raise, where that can be had without a GPU.
WORDS = {
    "torch": (raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)), "1073741824.0 GiB"),
    "numpy": (raised(lambda: np.empty(1 << 60, np.uint8)), "1.00 EiB"),
    "python": (MemoryError(), None),
    "cuda": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        "20.00 MiB",
    ),
    "cublas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), None),
    "onnxruntime": (
        Exception("Failed to allocate memory for requested buffer of size 3145728"),
        "3.0 MiB",
    ),
    "C++": (RuntimeError("std::bad_alloc"), None),
    "system": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), None),
    "loader": (ImportError("libx.so: failed to map segment from shared object"), None),
    "ctypes": (OSError("libx.so: failed to map segment from shared object"), None),
    "threads": (RuntimeError("can't start new thread"), None),
}


@pytest.mark.parametrize("name", WORDS)
def test_every_lack_of_memory_is_one_sentence(name: str) -> None:
    """The stage, what was needed if known, what can be set lower; exit code 2."""
    error, needed = WORDS[name]

    def work() -> None:
        with shared.during("the stage export ran", "take less"), shared.during("", ""):
            raise error

    with pytest.raises(BaseException) as caught:
        work()
    caught.value.doing, caught.value.lower = "the stage export ran", "take less"
    for each in (caught.value, wrapped(caught.value)):
        found = failures.as_ours(each, "building")
        assert found.exit_code == 2
        assert "memory ran out while the stage export ran" in str(found), found
        assert str(found).endswith("; take less.")
        assert needed is None or f"where {needed} more were needed" in str(found), found
    assert ("GPU" in str(found)) == (name in ("cuda", "cublas"))


def wrapped(error: BaseException) -> BaseException:
    """As a place that takes any exception for a broken file would report it."""
    try:
        raise UsageError("t.json is not a tokenizer file", "name another.") from error
    except UsageError as found:
        return found


def test_the_innermost_stage_counts() -> None:
    with (
        pytest.raises(MemoryError) as caught,
        shared.during("outside", "outer"),
        shared.during("inside", "inner"),
    ):
        raise MemoryError
    assert str(failures.as_ours(caught.value, "x")) == "memory ran out while inside; inner."


def test_names_that_speak_of_memory_are_no_lack_of_it() -> None:
    """What the user named may say anything."""
    for error in (
        UsageError("/data/out of memory/x does not exist;", "name another."),
        FileNotFoundError(errno.ENOENT, "No such file", "/data/out of memory/x"),
    ):
        assert "ran out" not in str(failures.as_ours(error, "building"))


def test_what_nobody_foresaw() -> None:
    """What was done, kind and text of the exception, that it is unexpected; exit code 1."""
    found = failures.as_ours(ZeroDivisionError("float\n division by zero."), "running build")
    assert found.exit_code == 1
    assert str(found) == (
        "unexpected ZeroDivisionError while running build: float division by zero; "
        "repeat the command with --debug to see where, and report it."
    )


# --------------------------------------------------------------------------------------------------
# the commands


def with_package(place: Path, name: str, code: str) -> dict[str, str]:
    """An environment where importing `name` runs `code`."""
    (place / f"{name}.py").write_text(code)
    return environment(PYTHONPATH=f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def ask(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=env, check=False
    )


BROKEN = [
    ("onnx", "raise MemoryError", 2, "memory ran out while loading libraries; end other programs."),
    ("onnx", "import absent_thing", 2, "absent_thing cannot be imported (No module named"),
    ("onnx", "raise ImportError('libx.so: no such file', name='onnx')", 2, "onnx cannot be imp"),
    ("onnx", "1 / 0", 1, "unexpected ZeroDivisionError while loading libraries: division by zero;"),
    ("typer", "raise ImportError('torn', name='typer')", 2, "typer cannot be imported (torn)"),
    ("typer", "1 / 0", 1, "unexpected ZeroDivisionError while loading libraries: division by"),
]


@pytest.mark.parametrize(("package", "code", "exit_code", "words"), BROKEN)
def test_no_traceback_of_a_library(
    tmp_path: Path, package: str, code: str, exit_code: int, words: str
) -> None:
    """Whatever a package does while it loads."""
    env = with_package(tmp_path, package, code)
    result = ask("build", env=env)
    assert result.returncode == exit_code and result.stdout == ""
    assert result.stderr.startswith(f"ssdi8-edge: {words}"), result.stderr
    assert result.stderr.count("\n") == 1


LIBRARY_ERRORS = (
    "MemoryError",
    "ImportError('libx.so: failed to map segment from shared object')",
    "OSError('libx.so: failed to map segment from shared object: Cannot allocate memory')",
    "OSError(12, 'Cannot allocate memory')",
)


@pytest.mark.parametrize("error", LIBRARY_ERRORS)
def test_memory_that_ends_while_libraries_load(tmp_path: Path, error: str) -> None:
    """Whichever way a library says so, and wherever it is loaded: also inside a stage."""
    (tmp_path / "heavy.py").write_text(f"raise {error}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from runtime.failures import during, explain\n"
        "for stage in (False, True):\n"
        "    try:\n"
        "        if stage:\n"
        "            with during('building', 'take less'): import heavy\n"
        "        import heavy\n"
        "    except Exception as error: print(explain(error, 'running x').sentence)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(PYTHONPATH=str(Path(shared.__file__).parents[1])),
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == f"memory ran out while loading libraries; {shared.FEWER_TOKENS}."
    assert second == "memory ran out while loading libraries; take less."


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("command", [["build"], ["evaluate", "demo", "--text", "x"], ["methods"]])
def test_commands_under_a_limit_say_that_libraries_load(command: list[str]) -> None:
    """The system's own limit, which torch passes while it loads; `methods` loads none of that."""
    limited = ["sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", *COMMAND, *command]
    done = subprocess.run(
        limited, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), check=False
    )
    if command == ["methods"]:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    assert done.stderr.startswith("ssdi8-edge: memory ran out while loading libraries"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 256,000 rows, and a tokenizer of more than half as many tokens."""
    folder = write_model(tmp_path_factory.mktemp("wide") / "model", vocab_size=256_000)
    written = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"token{i}": i for i in range(len(vocabulary), 130_000)}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    write_text(folder / "text.txt")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize(
    ("room", "stage"),
    [(100, "opening .*/model"), (500, "the stage [a-z]+ ran, where 125.* needed")],
)
def test_a_large_vocabulary_without_memory_for_it(wide: Path, room: int, stage: str) -> None:
    """The table takes 125 MiB; `room` MiB are left once the libraries are loaded."""
    code = (
        "import resource, sys\n"
        "import safetensors.torch, tokenizers, ssdi8_edge.compile.pipeline\n"
        "from ssdi8_edge.cli import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + (int(sys.argv.pop(1)) << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "main()\n"
    )
    build = ["build", "--model", wide, "--calibration", wide / "text.txt", "--out", wide / "run"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(room), *map(str, build)],
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)),
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert re.match(f"ssdi8-edge: memory ran out while {stage}", last), done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(tmp_path: Path, place: str) -> None:
    """Before or after the command, with the sentence below it and the same exit code."""
    env = with_package(tmp_path, "onnx", "1 / 0")
    command = ["--debug", "build"] if place == "before" else ["build", "--debug"]
    result = ask(*command, env=env)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr and "onnx.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ssdi8-edge: unexpected ZeroDivisionError")


def test_debug_after_two_dashes_is_an_argument() -> None:
    result = ask("inspect", "--", "--debug")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--debug is not a bundle" in result.stderr


def test_the_boards_scripts(tmp_path: Path) -> None:
    """The same rule for run_engine.py and build_engine.py, while they load and after."""
    script = str(shared.__file__).replace("runtime/failures.py", "run_engine.py")
    env = with_package(tmp_path, "numpy", "1 / 0")
    for name in (script, script.replace("run_", "build_")):
        command = [sys.executable, name, str(tmp_path)]
        plain = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert plain.returncode == 1
        assert "unexpected ZeroDivisionError while loading libraries" in plain.stderr
        assert "Traceback" not in plain.stderr
        debug = subprocess.run(
            [*command, "--debug"], capture_output=True, text=True, env=env, check=False
        )
        assert debug.returncode == 1 and "Traceback" in debug.stderr


def test_board_keeps_its_own_words_for_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception that hides a lack of memory is not repeated; one that names it is."""
    guarded, ran_out = command_line._guarded, MemoryRanOut

    def fail(kind: Any) -> Any:
        def work() -> int:
            raise kind("the GPU has no 5 MiB left", "end other programs") from MemoryError()

        return work

    assert guarded("run_engine", fail(ran_out)) == 2
    assert "the GPU has no 5 MiB left" in capsys.readouterr().err
    assert guarded("run_engine", fail(BundleProblem)) == 2
    assert "run_engine: memory ran out while running" in capsys.readouterr().err


def test_threads_and_objects_that_go_say_one_sentence(tmp_path: Path) -> None:
    """Neither `Exception in thread` nor `Exception ignored in`, nor a library's warning."""
    code = (
        "import threading, warnings\n"
        "import ssdi8_edge\n"
        "from runtime import failures\n"
        "failures.quiet_libraries('ssdi8-edge')\n"
        "class Odd:\n"
        "    def __del__(self): 1 / 0\n"
        "Odd()\n"
        "warnings.warn('speaks to a programmer')\n"
        "thread = threading.Thread(target=lambda: 1 / 0)\n"
        "thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ssdi8-edge: unexpected ZeroDivisionError while working in the b")


# --------------------------------------------------------------------------------------------------
# the process that verifies a new bundle


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "exit_code", "words"),
    [
        (-9, "", "", 2, "it was killed, most likely because memory ran out; end other programs"),
        (-6, "", "terminate called: std::bad_alloc", 2, "most likely because memory ran out"),
        (-11, "", "", 1, "it was ended by SIGSEGV"),
        (
            2,
            "",
            "run_engine: memory ran out while x; y.\n",
            2,
            "failed: memory ran out while x; y;",
        ),
        (1, "", "run_engine: unexpected KeyError while x: 'a'; y.\n", 1, "unexpected KeyError"),
        (1, '{"comparisons": [], "problem": "f was altered."}', "", 1, "failed: f was altered;"),
        (1, '{"comparisons": [1], "problem": "differs."}', "", 1, "differs; the old bundle"),
    ],
)
def test_a_failed_verification_says_why(
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    stdout: str,
    stderr: str,
    exit_code: int,
    words: str,
) -> None:
    """Only other numbers are worth a report."""
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(bundle, "run_engine", lambda *_: done)
    with pytest.raises(Ssdi8Error) as caught:
        bundle._verify(Path("bundle"))
    assert caught.value.exit_code == exit_code
    assert words in str(caught.value), caught.value
    assert ("report this" in str(caught.value)) == ("[1]" in stdout)
