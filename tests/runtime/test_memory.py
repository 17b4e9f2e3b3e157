"""What running a bundle takes, and that it is refused where it cannot fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_bundle import make_bundle

from runtime import memory
from runtime.bundle import Bundle, open_bundle
from runtime.command_line import run
from runtime.problems import BundleProblem
from ssdi8_edge.boards.store.deploy import require_memory
from ssdi8_edge.ground.errors import BoardError

MIB = 2**20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(make_bundle(tmp_path_factory.mktemp("memory") / "tiny"))


def test_parts(bundle: Bundle) -> None:
    """Recurrent states twice, for every sequence; this model has no weights apart and no cache."""
    parts = memory.least_memory(bundle, batch=3)
    assert parts == {
        "its weights": 0,
        "its recurrent states": 6 * bundle.model.state_bytes(),
        "its keys and values": 0,
    }


def test_misfit_names_the_largest() -> None:
    parts = {"its weights": 30 * MIB, "its keys and values": 10 * MIB}
    assert memory.misfit(parts, 40 * MIB) is None
    said = memory.misfit(parts, 40 * MIB - 1)
    assert said and "takes 40.0 MiB" in said and "its weights (30.0 MiB)" in said


def test_run_refuses_and_force_goes_on(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence before the graph is loaded; swap counts; who does not tell may try."""
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    monkeypatch.setattr(memory, "swap_free", lambda: 0)
    asked = ["--prompt", "the", "--max-new-tokens", "1", "--threads", "1"]
    assert run(asked, bundle.root) == 2
    assert "its recurrent states" in capsys.readouterr().err
    assert run([*asked, "--force"], bundle.root) == 0
    monkeypatch.setattr(memory, "swap_free", lambda: 1 << 30)
    memory.require_memory(bundle)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require_memory(bundle)
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    monkeypatch.setattr(memory, "swap_free", lambda: 0)
    with pytest.raises(BundleProblem, match="--force"):
        memory.require_memory(bundle)


def test_deploy_refuses_before_it_sends(bundle: Bundle) -> None:
    """By what the board says; one that says nothing may try."""
    facts: Any = SimpleNamespace(memory_free_mb=0.0, swap_free_mb=None)
    with pytest.raises(BoardError, match=r"recurrent states.*--force"):
        require_memory("orin", bundle, facts)
    facts.swap_free_mb = 10.0
    require_memory("orin", bundle, facts)
    facts.memory_free_mb = None
    require_memory("orin", bundle, facts)
