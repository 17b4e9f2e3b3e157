"""profiles/: every shipped target loads; a wrong file is one sentence with its name and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.targets import load_target, target_names

GOOD = """\
name = "bench"
about = "a board on the bench"
engines = ["tensorrt"]
where = "board"

[board]
compute_capability = "8.7"
memory_gb = 16
sms = 8

[engine]
batch = [1, 1, 4]
tokens = [1, 512, 2048]
workspace_mb = 512
"""


def change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_the_promised_targets_ship() -> None:
    promised = {"orin-nx", "orin-nx-8gb", "orin-nano", "orin-nano-4gb", "agx-orin"}
    promised |= {"agx-orin-32gb", "host-gpu", "host-cpu"}
    assert promised <= set(target_names())


@pytest.mark.parametrize("name", target_names())
def test_shipped_target(name: str) -> None:
    """The file's name is the target's; boards have sizes; the manifest's form is complete."""
    target = load_target(name)
    assert target.name == name and target.about
    assert (target.board is None) == (target.where == "here")
    assert target.max_tokens == target.engine.tokens[2] >= 256
    if target.board is not None:
        assert target.board.compute_capability == "8.7"  # all Orin modules
        assert target.engines == ["tensorrt", "kernels"]
    assert target.to_dict()["max_tokens"] == target.max_tokens


def test_the_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(GOOD)
    target = load_target(str(path))
    assert (target.name, target.max_tokens) == ("bench", 2048)


def test_a_target_cannot_be_changed() -> None:
    """Stages share it."""
    with pytest.raises(ValueError, match="frozen"):
        load_target("host-cpu").name = "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(change("about", "abuot"), ["about"], id="misspelt key"),
        pytest.param(GOOD + "turbo = 1\n", ["engine.turbo"], id="unknown key"),
        pytest.param(change("sms = 8\n", ""), ["board.sms"], id="missing key"),
        pytest.param(change("sms = 8", 'sms = "eight"'), ["board.sms"], id="wrong type"),
        pytest.param(change("sms = 8", "sms = 0"), ["board.sms"], id="out of range"),
        pytest.param(change('"tensorrt"', '"abacus"'), ["engines", "onnxruntime"], id="engines"),
        pytest.param(change('"bench"', '"Bench 1"'), ["name"], id="name with a space"),
        pytest.param(change("512, 2048", "4096, 2048"), ["tokens", "rise"], id="bad order"),
        pytest.param(change("[1, 512, 2048]", "[1, 2048]"), ["engine.tokens"], id="two numbers"),
        pytest.param(change("[1, 1, 4]", "[0, 1, 4]"), ["engine.batch"], id="batch of none"),
        pytest.param(GOOD + "=", ["not a TOML file", "line 15"], id="not TOML"),
        pytest.param("name = 1\nname = 2\n", ["not a TOML file"], id="key twice"),
        pytest.param("", ["name"], id="empty"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, words: list[str]) -> None:
    """The message names the file, the key and what to do; nothing of pydantic shows."""
    path = tmp_path / "bench.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_target(str(path))
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message
    assert caught.value.exit_code == 2 and caught.value.hint
    assert "\n" not in message and "pydantic" not in message


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_bytes(b"name = \xff")
    with pytest.raises(UsageError, match=r"bench\.toml is not a TOML file"):
        load_target(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml: No such file") as caught:
        load_target(str(tmp_path / "absent.toml"))
    assert "name an existing" in str(caught.value)


@pytest.mark.parametrize("name", ["orin-xx", "", "../profiles/orin-nx", "Orin-NX"])
def test_unknown_name(name: str) -> None:
    """The message lists the known ones; a name is never used as a path."""
    with pytest.raises(UsageError) as caught:
        load_target(name)
    assert repr(name) in str(caught.value) and "orin-nx" in str(caught.value)
