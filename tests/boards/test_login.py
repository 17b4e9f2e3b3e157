"""Login shells and scripts on a board: what they print is skipped, what they read is never ours."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssdi8_edge.boards.link import call, process
from ssdi8_edge.boards.link.local import LocalConnection, _LocalChannel
from ssdi8_edge.boards.link.process import Channel
from ssdi8_edge.ground.errors import BoardError


class _ShellChannel(_LocalChannel):
    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self._writing = threading.Lock()
        self._process = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )


class LoginShell(LocalConnection):
    """This machine, reached as sshd does: by the login shell, which runs `script` before."""

    def __init__(self, folder: Path, script: str = "", shell: tuple[str, ...] = ("bash",)) -> None:
        super().__init__(str(folder / "store"))
        self.name = "board"
        self._shell = shell
        self._script = folder / "rc"
        self._script.write_text(script)

    def open_channel(self, program: str) -> Channel:
        command = f"exec {shlex.quote(sys.executable)} -I -S -c {shlex.quote(program)}"
        return _ShellChannel([*self._shell, "-c", command], {"BASH_ENV": str(self._script)})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (process, call):
        monkeypatch.setattr(module, "START_S", 1.5)


@pytest.mark.parametrize(
    "script",
    [
        "echo Welcome; echo '{}'; printf 'no newline'",
        "echo on stderr >&2; stty -echo; tput cols",
        "read -t 0.2 -p 'continue? ' answer",
        "head -c 100000 /dev/zero | tr '\\0' x",
    ],
)
def test_scripts_that_print_or_try_to_read_do_no_harm(tmp_path: Path, script: str) -> None:
    """Nothing of ours is there to be read before our program runs."""
    board = LoginShell(tmp_path, script)
    assert board.run(["echo", "mine"]).stdout == "mine\n"
    board.write_bytes(str(tmp_path / "file"), b"as it is")
    assert board.read_bytes(str(tmp_path / "file")) == b"as it is"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("read answer", ""),
        ("echo 'Continue? [y/n]'; read -r answer", "Continue? [y/n]"),
        ("cat >/dev/null", ""),
        ("exec bash", ""),
        ("printf '\\033[2J\\rwait'; sleep 4", "wait"),
    ],
)
def test_scripts_that_wait_are_said_instead_of_a_hang(
    tmp_path: Path, script: str, said: str
) -> None:
    """And another shell that reads standard input gets no line of our program to run."""
    begin = time.monotonic()
    with pytest.raises(BoardError, match="did not run our command within") as caught:
        LoginShell(tmp_path, script).run(["touch", str(tmp_path / "ran")])
    assert time.monotonic() - begin < 15
    text = str(caught.value)
    assert said in text and "~/.bashrc" in text and "interactive" in text
    assert text.isprintable() and caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("script", "shell", "words"),
    [
        ("exit 0", ("bash",), "exit status 0"),
        ("exec tmux-is-no-terminal", ("bash",), "not found"),
        ("exec false", ("bash",), "exit status 1"),
        (
            "",
            ("sh", "-c", "echo This account is currently not available.; exit 1"),
            "not available",
        ),
        ("", ("sh", "-c", "echo \"'exec' is not recognized\" >&2; exit 1"), "not recognized"),
    ],
)
def test_a_login_that_ends_early_is_said(
    tmp_path: Path, script: str, shell: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BoardError, match="ended without running our command") as caught:
        LoginShell(tmp_path, script, shell).run(["true"])
    assert words in str(caught.value) and "chsh" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("bash: line 1: exec: python3: not found", 127),
        ("python3: Command not found.", 1),  # csh
        ("fish: Unknown command: python3", 127),
    ],
)
def test_shells_without_python(tmp_path: Path, words: str, status: int) -> None:
    shell = ("sh", "-c", f"echo '{words}' >&2; exit {status}")
    with pytest.raises(BoardError, match="board has no python3; install it there"):
        LoginShell(tmp_path, shell=shell).run(["true"])
