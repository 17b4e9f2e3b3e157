"""A hybrid model over SSH, as a user meets it: deployed, measured at two lengths, reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
from board_simulator.lab import Lab, needs_sshd
from hybrid_builds import CONTEXT, build_hybrid, toy_layout

from ssdi8_edge.boards.points.points import read_points

pytestmark = needs_sshd
__all__ = ["toy_layout"]  # a fixture


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    lab.serve("board")
    yield lab
    lab.close()


def test_deploy_sweep_profile_report(lab: Lab, tmp_path: Path) -> None:
    run = build_hybrid(tmp_path / "scene")
    board = ("--host", "board", "--store", lab.store("board"), "--python", sys.executable)

    def ssdi8(*arguments: object, exit_code: int = 0) -> commands.Result:
        done = commands.ssdi8(*arguments, folder=tmp_path)
        assert done.returncode == exit_code, done.stderr
        return done

    placed = json.loads(ssdi8("deploy", run, *board, "--json").stdout)
    assert placed["verification"]["verified"] is True

    lengths = ("--seq-lens", "16,32", "--new-tokens", 4, "--repeat", 2, "-o", "runs/s.jsonl")
    ssdi8("sweep", run, *board, *lengths)
    assert [point.length for point in read_points(tmp_path / "runs/s.jsonl")] == [16, 32]

    beyond = ("--seq-lens", CONTEXT, "--new-tokens", 4, "-o", "runs/beyond.jsonl")
    said = ssdi8("sweep", run, *board, *beyond, exit_code=2).stderr
    assert f"build it with --context {CONTEXT + 4} or more" in said.splitlines()[-1]

    ssdi8("profile", run, *board, "--seq-len", 16, "--repeat", 2, "-o", "runs/p.jsonl")
    profile = json.loads((tmp_path / "runs/p.jsonl").read_text())
    modules = {row["module"]: row["part"] for row in profile["phases"][0]["modules"]}
    assert modules["Attention"] == "attention" and modules["ChunkScan"] == "SSD"
    assert {"Activation", "Linear"} <= {*modules}

    ssdi8("report", "runs", "--csv", "p.csv")
    page = (tmp_path / "report.html").read_text()
    assert "Time to first token" in page and "16, Attention: " in page
