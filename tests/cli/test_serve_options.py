"""ssdi8-edge serve on this machine: the options of run_engine.py --serve, passed on as they are."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from commands import assert_one_sentence, ssdi8
from serving import Served
from tiny_bundle import make_bundle, run_engine

from runtime import options as shared
from ssdi8_edge.ground.board_runtime import parse_serve
from ssdi8_edge.ground.errors import UsageError

TABLES = {**shared.LISTENING, **shared.SERVING, **shared.HOLDING, **shared.OPENING}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_both_command_lines_explain_the_same_options(bundle: Path) -> None:
    told = [ssdi8("serve", "--help").stdout, run_engine(bundle, "--help").stdout.decode()]
    for text in map(str.split, told):
        words = " ".join(text)
        for flag, what in TABLES.items():
            assert flag in text and " ".join(what["help"].split()[:6]) in words, flag


def test_it_serves_here_with_the_options_given(bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    command = [sys.executable, "-m", "ssdi8_edge", "serve", str(bundle)]
    options = ("--allow-host=board.lan", f"--api-key-file={keys}", "--max-answer-tokens=3")
    with Served(bundle, *options, command=command) as server:
        assert server.ask("/health", Host="board.lan")[0] == 200
        assert server.ask("/v1/models")[0] == 401
        server.headers["Authorization"] = "Bearer a-key"
        for tokens, status in ((3, 200), (4, 400)):
            body = {"prompt": "a", "max_tokens": tokens}
            assert server.ask("/v1/completions", body)[0] == status
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--host"),
        (["--stop"], "--host"),
        (["nowhere"], "nowhere"),
        (["x", "--port=70000"], "--port"),
        (["x", "--speed"], "--speed"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(words: list[str], named: str) -> None:
    assert_one_sentence(ssdi8("serve", *words), [named])


def test_a_wrong_value_is_refused_before_a_board_is_asked() -> None:
    with pytest.raises(UsageError, match="--parallel"):
        parse_serve(["x", "--host=board", "--parallel=0"])
    asked = parse_serve(["x", "--host=board", "--api-key-file=k", "--allow-host=a", "--queue=1"])
    assert asked.key_file == Path("k") and not [a for a in asked.arguments if "key" in a]
    assert {"--allow-host=a", "--queue=1", "--listen=127.0.0.1"} <= {*asked.arguments}
