"""Many boards: the file that lists them, and doctor, deploy and sweep on all of them."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
from board_simulator.lab import Lab, needs_sshd
from board_simulator.server import free_port
from tiny_bundle import make_bundle, pack

from ssdi8_edge.boards.fleet.boards_file import read_fleet
from ssdi8_edge.boards.fleet.side_by_side import side_by_side
from ssdi8_edge.boards.points.points import read_points
from ssdi8_edge.ground.errors import BoardError, UsageError


def write(folder: Path, text: str) -> Path:
    path = folder / "boards.toml"
    path.write_text(text)
    return path


# --------------------------------------------------------------------------------------------------
# the file


def test_tags_choose(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[[board]]\nhost = "me@orin-1"\ntarget = "orin-nx"\ntags = ["lab", "nx"]\n'
        '[[board]]\nhost = "this-machine"\n[[board]]\nhost = "orin-3:2222"\ntags = ["nx"]\n',
    )
    assert [board.host for board in read_fleet(path)] == [
        "me@orin-1",
        "this-machine",
        "orin-3:2222",
    ]
    assert [board.host for board in read_fleet(path, ["lab"])] == ["me@orin-1"]
    assert [board.host for board in read_fleet(path, ["nx", "lab"])] == ["me@orin-1", "orin-3:2222"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("host = ", "is no TOML file"),
        ("", "board: Field required"),
        ("board = []", "at least 1 item"),
        ('[[board]]\ntarget = "x"', r"board\.0\.host: Field required"),
        ('[[board]]\nhost = ""', r"board\.0\.host: String should have at least 1"),
        ('[[board]]\nhost = "a"\nport = 3', r"board\.0\.port: Extra inputs"),
        ('[[board]]\nhost = "a"\ntags = "lab"', r"board\.0\.tags"),
        ('[[board]]\nhost = "-oProxyCommand=x"', "is no host"),
        ('[[board]]\nhost = "a"\n[[board]]\nhost = "a"', "names a twice"),
        ('[[board]]\nhost = "a"\ntags = ["other"]', "has a tag lab; its tags are: other"),
    ],
)
def test_a_file_that_does_not_fit(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_fleet(write(tmp_path, text), ["lab"])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_fleet(tmp_path / "none.toml")


# --------------------------------------------------------------------------------------------------
# side by side


def test_no_more_at_once_than_asked_and_all_are_done() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work(name: str) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        if name in ("3", "17"):
            raise BoardError(f"{name} is gone")
        return name * 2

    names = [str(i) for i in range(20)]
    outcome = side_by_side(names, work, at_once=4)
    assert most == 4
    assert list(outcome.errors) == ["3", "17"]
    assert outcome.results == {name: name * 2 for name in names if name not in ("3", "17")}
    assert list(outcome.results) == [name for name in names if name not in ("3", "17")]


# --------------------------------------------------------------------------------------------------
# commands, over SSH


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()


def ssdi8(folder: Path, *arguments: object, exit_code: int = 0) -> commands.Result:
    done = commands.ssdi8(*arguments, folder=folder)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@needs_sshd
def test_twenty_boards_of_which_some_fail(lab: Lab, tmp_path: Path) -> None:
    """One server behind nineteen names, one of them for another target; at the last nobody is."""
    lab.simulate("real")
    real = lab.config.read_text()
    for i in range(18):
        lab.config.write_text(lab.config.read_text() + real.replace("Host real", f"Host board-{i}"))
    tags = ['["lab", "some"]'] * 2 + ['["lab"]'] * 16
    entries = [f'[[board]]\nhost = "board-{i}"\ntags = {tag}\n' for i, tag in enumerate(tags)]
    entries.append(f'[[board]]\nhost = "127.0.0.1:{free_port()}"\ntags = ["some"]\n')
    entries.append('[[board]]\nhost = "real"\ntarget = "orin-nano"\ntags = ["some"]\n')
    fleet = write(tmp_path, "".join(entries))

    said = ssdi8(tmp_path, "doctor", "--fleet", fleet, "--at-once", 4, "--json", exit_code=3)
    found = json.loads(said.stdout)
    assert len(found["boards"]) == 19 and len(found["errors"]) == 1
    assert all(board["simulated"] for board in found["boards"].values())
    assert "1 of 20 boards failed" in said.stderr.splitlines()[-1]

    bundle = make_bundle(tmp_path / "bundle")
    pack(bundle, key="k" * 32, checkpoint={"source": "tiny", "sha256": "c" * 64})
    store = ("--store", tmp_path / "store", "--python", sys.executable)
    some = ("--fleet", fleet, "--tag", "some", "--at-once", 2, *store)
    said = ssdi8(tmp_path, "deploy", bundle, *some, "--json", exit_code=3)
    found = json.loads(said.stdout)
    assert [*found["boards"]] == ["board-0", "board-1"] and len(found["errors"]) == 2
    assert "takes bundles for orin-nano" in found["errors"]["real"]
    assert all(board["verification"]["verified"] for board in found["boards"].values())
    assert "2 of 4 boards failed" in said.stderr.splitlines()[-1]

    few = ("--seq-lens", 4, "--new-tokens", 2, "--repeat", 1, "--power-seconds", 0, "-o", "s.jsonl")
    said = ssdi8(tmp_path, "sweep", bundle, *some, *few, "--json", exit_code=3)
    assert {point.board for point in read_points(tmp_path / "s.jsonl")} == {"board-0", "board-1"}
    assert json.loads(said.stdout)["boards"].keys() == found["errors"].keys()


def test_options_that_do_not_fit_together(tmp_path: Path) -> None:
    fleet = write(tmp_path, '[[board]]\nhost = "this-machine"\n')
    for arguments, words in (
        (("doctor", "--fleet", fleet, "--host", "a"), "both name boards"),
        (("doctor", "--tag", "lab"), "add --fleet FILE"),
        (("doctor", "--fleet", fleet, "--print-profile"), "name it by --host"),
        (("deploy", tmp_path), "there is no board to deploy to"),
    ):
        said = ssdi8(tmp_path, *arguments, exit_code=2).stderr
        assert words in said.splitlines()[-1], said
