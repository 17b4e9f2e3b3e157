"""--interactive with a chat template, and what is remembered: /save, /load, --state-dir."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, NEMOTRON, SPECIAL, SPECIAL_TOKENS
from hybrid_builds import build_hybrid, request, toy_layout, write_hybrid
from tiny_bundle import CHUNK, make_bundle, pack
from tiny_model import byte_tokenizer, one_thread, write_text

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import Bundle, open_bundle
from runtime.chat_template import ChatTemplate
from runtime.command_line import run as run_engine
from runtime.dialogue import TemplateChat, chat_prompt
from runtime.options import open_cache
from runtime.problems import BundleProblem
from runtime.session import Session
from runtime.states.prefix_cache import PrefixCache
from runtime.text import TextCodec
from ssdi8_edge.compile.pipeline import Build
from ssdi8_edge.ground.errors import CheckpointError

__all__ = ["one_thread", "toy_layout"]  # fixtures, taken over
Turns = list[dict[str, Any]]
Command = Callable[..., tuple[int, Turns, str]]


def bundle_with(folder: Path, template: str) -> Path:
    """The tiny bundle, whose model repeats `CHAIN`, with a chat template."""
    make_bundle(folder, "fp16", special=SPECIAL)
    chat = {"templates": {"default": template}, "special_tokens": SPECIAL_TOKENS}
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    pack(folder, recipe={"name": "edge-w8a8", "state_dtype": "fp16"}, text={"end_ids": [0, 3]})
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with(tmp_path_factory.mktemp("chatml") / "tiny", CHATML)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with(tmp_path_factory.mktemp("nemotron") / "tiny", NEMOTRON)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a template."""
    return make_bundle(tmp_path_factory.mktemp("plain") / "tiny", "fp16")


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """--interactive in this process: exit code, turns, stderr."""

    def command(folder: Path, lines: str, *arguments: str) -> tuple[int, Turns, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        options = ("--interactive", "--json", "--max-new-tokens=6", "--threads=1")
        code = run_engine([str(folder), *options, *arguments], folder)
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    yield command


@pytest.fixture
def prompt(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """--prompt in this process: the report."""

    def command(folder: Path, text: str, *arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        options = ("--json", "--max-new-tokens=6", "--threads=1")
        code = run_engine([str(folder), "--prompt", text, *options, *arguments], folder)
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return command


def tokens_of(bundle: Bundle, messages: list[dict[str, str]], **variables: Any) -> list[int]:
    template = ChatTemplate.of(bundle)
    assert template is not None
    return TextCodec(bundle).encode_whole(template.render(messages, **variables))[0]


# --------------------------------------------------------------------------------------------------
# turns


def test_turns_are_messages_and_what_was_said_is_not_read_again(
    chatml: Path, chat: Command
) -> None:
    code, turns, err = chat(chatml, "hello\nand then\n", "--system", "Be brief.")
    assert code == 0 and "This is a chat" in err
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    bundle = open_bundle(chatml)
    first = tokens_of(bundle, messages)
    assert turns[0]["prompt_tokens"] == len(first) and turns[0]["kept_tokens"] == 0
    # All but the last token of the answer, which was not run yet.
    assert turns[1]["kept_tokens"] == len(first) + 5
    tail = "<|im_end|>\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\n"
    assert turns[1]["prompt_tokens"] == 1 + len(TextCodec(bundle).encode_whole(tail)[0])


def test_a_user_can_write_on_several_lines(chatml: Path, chat: Command) -> None:
    code, turns, _ = chat(chatml, '"""\na\n\nb\n/reset\n"""\n\nc\n"""\nd\n')
    assert code == 0
    assert [turn["prompt"] for turn in turns] == ["a\n\nb\n/reset", "c", "d"]


def test_ctrl_c_leaves_a_block(
    chatml: Path, chat: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(['"""', "a", KeyboardInterrupt(), "b", EOFError()])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    code, turns, err = chat(chatml, "")
    assert code == 0 and [turn["prompt"] for turn in turns] == ["b"] and "\nCtrl-D ends.\n" in err


def test_reset_starts_anew_and_help_helps(chatml: Path, chat: Command) -> None:
    _, turns, err = chat(chatml, "hello\n/help\n/reset\nhello\n")
    assert "/save FILE" in err
    assert turns[0]["tokens"] == turns[1]["tokens"]
    # The states of the first time are still held, as far as a state has to go on.
    assert turns[1]["kept_tokens"] + turns[1]["prompt_tokens"] == turns[0]["prompt_tokens"]
    assert turns[1]["kept_tokens"] % CHUNK == 0 < turns[1]["kept_tokens"]


def test_what_is_no_command_is_said_to_the_model(chatml: Path, chat: Command) -> None:
    _, turns, err = chat(chatml, "/no_think why\n/saved\n/save\n/reset now\n")
    assert [turn["prompt"] for turn in turns] == ["/no_think why", "/saved"]
    assert "/save needs the name of a file; see /help." in err
    assert "/reset takes nothing; see /help." in err


def test_thoughts_are_asked_for(nemotron: Path, chat: Command) -> None:
    bundle = open_bundle(nemotron)
    message = [{"role": "user", "content": "why"}]
    for flags, variables in (
        ([], {}),
        (["--think"], {"enable_thinking": True}),
        (["--no-think"], {"enable_thinking": False}),
    ):
        _, turns, _ = chat(nemotron, "why\n", *flags)
        assert turns[0]["prompt_tokens"] == len(tokens_of(bundle, message, **variables))


REFUSED = {
    "both": ("nemotron", ["--think", "--no-think"], "exclude each other"),
    "unknown": ("chatml", ["--think"], "knows no thinking"),
    "no template, thoughts": ("plain", ["--no-think"], "has no chat template, which --no-think"),
    "no template, system": ("plain", ["--system", "a"], "has no chat template, which --system"),
}


def test_info_says_that_it_is_a_chat_model(
    chatml: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_engine([str(chatml), "--info"], chatml) == 0
    assert "\nchat     by the checkpoint's template\n" in capsys.readouterr().out
    for folder in (chatml, plain):
        assert run_engine([str(folder), "--info", "--json"], folder) == 0
        assert json.loads(capsys.readouterr().out)["chat"] == (folder == chatml)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_does_not_know_is_refused(
    case: str, chat: Command, request: pytest.FixtureRequest
) -> None:
    which, arguments, said = REFUSED[case]
    code, turns, err = chat(request.getfixturevalue(which), "a\n", *arguments)
    assert code == 2 and not turns and said in err and err.count("\n") == 1


def test_a_template_that_refuses_a_turn_leaves_the_chat(tmp_path: Path, chat: Command) -> None:
    text = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + CHATML
    code, turns, err = chat(bundle_with(tmp_path / "tiny", text), "a\nbad\nb\n")
    assert code == 0 and [turn["prompt"] for turn in turns] == ["a", "b"]
    assert "does not take this chat (no)" in err and turns[1]["kept_tokens"] > 0


def test_without_a_template_the_text_goes_on(plain: Path, chat: Command) -> None:
    code, turns, err = chat(plain, "a\nb\n")
    assert code == 0 and "There is no chat template" in err
    codec = TextCodec(open_bundle(plain))
    assert turns[0]["prompt_tokens"] == codec.encode("a").shape[1]
    assert turns[1]["kept_tokens"] == turns[0]["prompt_tokens"] + 5


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    chatml: Path, chat: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said until then is an answer."""
    forward, calls = OnnxRuntimeBackend.forward, 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*arguments, **named)

    monkeypatch.setattr(OnnxRuntimeBackend, "forward", interrupted)
    code, turns, _ = chat(chatml, "a\nb\n")
    assert code == 0 and [turn["finish"] for turn in turns] == ["interrupt", "length"]
    asked = turns[0]["prompt_tokens"] + len(turns[0]["tokens"])
    assert turns[1]["kept_tokens"] == asked - 1


# --------------------------------------------------------------------------------------------------
# from a checkpoint


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid's checkpoint with a chat template, and its run folder."""
    scene = tmp_path_factory.mktemp("hybrid")
    model = write_hybrid(scene / "hybrid")
    tokenizer = byte_tokenizer(250)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(CHATML)
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    write_text(scene / "text.txt", size=300)
    build_hybrid(scene)
    return scene


def test_a_build_packs_the_template(scene: Path, chat: Command) -> None:
    """Its end token ends an answer; a chat that fills the context says so and can start anew."""
    bundle = open_bundle(scene / "run" / "bundle")
    assert {250, 251} & bundle.end_ids == {251}
    code, turns, err = chat(bundle.root, "hi\nhi\n/reset\nho\n")
    assert code == 0 and [turn["prompt"] for turn in turns] == ["hi", "ho"]
    asked = tokens_of(bundle, [{"role": "user", "content": "hi"}])
    assert turns[0]["prompt_tokens"] == len(asked)
    assert "and the context of" in err and "--context" in err


def test_another_template_packs_anew_and_quantizes_nothing(scene: Path) -> None:
    (scene / "hybrid" / "chat_template.jinja").write_text(CHATML.replace("assistant", "model"))
    assert Build(request(scene)).run().ran == ["bundle"]
    template = ChatTemplate.of(open_bundle(scene / "run" / "bundle"))
    assert template is not None and "model" in template.render([{"role": "user", "content": ""}])
    (scene / "hybrid" / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Build(request(scene))


# --------------------------------------------------------------------------------------------------
# tokens and marks


class Scripted:
    """Says what it is told."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, logits: np.ndarray) -> int:
        return next(self._ids)


def test_thoughts_that_a_template_drops_are_read_anew_from_the_question_on(
    nemotron: Path,
) -> None:
    """The next turn has another text; the state behind the question is still one of it."""
    bundle = open_bundle(nemotron)
    session = Session(bundle, OnnxRuntimeBackend(bundle, threads=1))
    codec, template = TextCodec(bundle), ChatTemplate.of(bundle)
    assert template is not None
    dialogue = TemplateChat(template, codec, bundle, "Be brief, and do not say all that you know.")
    talk = session.conversation(PrefixCache(1 << 20))
    asked = dialogue.ask("a question of some length", [])
    assert asked.ids == tokens_of(bundle, dialogue._asked)
    answer = codec.encode_whole("so many thoughts</think>\nyes<|im_end|>")[0]
    list(talk.generate(talk.lead_to(asked.ids), Scripted(answer), len(answer), (), asked.marks))
    talk.keep()
    dialogue.heard(talk.ids, [])
    again = dialogue.ask("more", talk.ids)
    assert "thoughts" not in again.text and "yes<|im_end|>" in again.text
    assert again.ids == tokens_of(bundle, dialogue._asked)
    talk.lead_to(again.ids)
    question = len(
        codec.encode_whole(asked.text.removesuffix("<|im_start|>assistant\n<think>\n"))[0]
    )
    assert 0 < question - question % CHUNK <= len(talk.ids) < len(asked.ids)


def test_an_answer_keeps_its_tokens_where_the_tokenizer_would_spell_others(chatml: Path) -> None:
    bundle = open_bundle(chatml)
    codec, template = TextCodec(bundle), ChatTemplate.of(bundle)
    assert template is not None
    dialogue = TemplateChat(template, codec, bundle)
    asked = dialogue.ask("hello", [])
    letters = [codec.encode_whole(letter)[0][0] for letter in "theboard"]
    assert codec.encode_whole("theboard")[0] != letters
    said = [*asked.ids, *letters, 3]
    dialogue.heard(said, [])
    again = dialogue.ask("more", said)
    assert again.ids[: len(said)] == said
    assert codec.decode_behind([], again.ids) == again.text
    assert (
        again.ids[len(said) :]
        == codec.encode_whole(again.text.partition("theboard<|im_end|>")[2])[0]
    )


def test_states_are_kept_behind_the_system_prompt(chatml: Path) -> None:
    """Another chat with the same one does not read it again."""
    bundle = open_bundle(chatml)
    template, codec = ChatTemplate.of(bundle), TextCodec(bundle)
    assert template is not None
    system = {"role": "system", "content": "the board runs the model and the model runs the board"}
    session = Session(bundle, OnnxRuntimeBackend(bundle, threads=1))
    cache = PrefixCache(1 << 20)
    of_system = len(codec.encode_whole(template.render([system], add_generation_prompt=False))[0])
    for question, kept in (("a", 0), ("something else", of_system - of_system % CHUNK)):
        asked = chat_prompt(
            template, codec, bundle, [system, {"role": "user", "content": question}]
        )
        talk = session.conversation(cache)
        rest = talk.lead_to(asked.ids)
        assert len(asked.ids) - rest.shape[1] == kept
        list(talk.read(rest, asked.marks))
    assert of_system > CHUNK


# --------------------------------------------------------------------------------------------------
# remembered


def test_a_chat_that_was_saved_goes_on(chatml: Path, tmp_path: Path, chat: Command) -> None:
    """In another run, and after /reset: the same answer from the same state."""
    file = tmp_path / "a chat.state"
    _, whole, _ = chat(chatml, f"hello\n/save {file}\nand then\n", "--system", "Be brief.")
    _, later, _ = chat(chatml, f"x\n/load {file}\nand then\n")
    _, started, _ = chat(chatml, "and then\n", "--load-state", str(file))
    for turn in (later[1], started[0]):
        assert {**turn, "ttft_s": 0, "tpot_s": 0} == {**whole[1], "ttft_s": 0, "tpot_s": 0}


def test_what_cannot_be_loaded_leaves_the_chat(
    chatml: Path, plain: Path, tmp_path: Path, chat: Command, prompt: Callable[..., Any]
) -> None:
    text, foreign = tmp_path / "text.state", tmp_path / "foreign.state"
    prompt(chatml, "hello", "--save-state", str(text))
    prompt(plain, "hello", "--save-state", str(foreign))
    lines = f"a\n/load {tmp_path}/none\n/load {text}\n/load {foreign}\n/save {tmp_path}/no/\0\nb\n"
    code, turns, err = chat(chatml, lines)
    assert code == 0 and turns[1]["kept_tokens"] > 0
    for said in (
        *("none cannot be read", "that of a text and not of a chat", "with another"),
        "cannot be written to",
    ):
        assert said in err
    code, turns, err = chat(chatml, "a\n", "--load-state", str(text))
    assert code == 2 and not turns and "not of a chat" in err


def test_there_is_nothing_to_save_before_the_first_answer(
    chatml: Path, tmp_path: Path, chat: Command
) -> None:
    code, _, err = chat(chatml, f"/save {tmp_path}/a\n")
    assert code == 0 and "there is no state to save yet" in err and not [*tmp_path.iterdir()]


def test_a_prompt_goes_on_from_a_file(
    plain: Path, tmp_path: Path, chat: Command, prompt: Callable[..., Any]
) -> None:
    """As a conversation does that never stopped; its file can be gone on from again."""
    file, second = str(tmp_path / "a.state"), str(tmp_path / "b.state")
    _, turns, _ = chat(plain, "the board\nand\nmore\n")
    one = prompt(plain, "the board", "--save-state", file)
    for _ in range(2):
        two = prompt(plain, "\nand", "--load-state", file, "--save-state", second)
        assert two["kept_tokens"] == turns[1]["kept_tokens"]
    three = prompt(plain, "\nmore", "--load-state", second)
    assert [each["tokens"] for each in (one, two, three)] == [turn["tokens"] for turn in turns]


def test_a_folder_of_states_is_used_by_the_next_run(
    plain: Path, tmp_path: Path, prompt: Callable[..., Any]
) -> None:
    text = "the board runs the model and the model runs the board " * 3
    arguments = ("--state-dir", str(tmp_path / "states"))
    first, again = (prompt(plain, text, *arguments) for _ in range(2))
    assert first["kept_tokens"] == 0 < again["kept_tokens"]
    assert again["kept_tokens"] + again["prompt_tokens"] == first["prompt_tokens"]
    assert again["tokens"] == first["tokens"] == prompt(plain, text)["tokens"]
    (file, *_) = (tmp_path / "states").rglob("*.state")
    file.write_bytes(b"torn")
    noted = prompt(plain, text, *arguments)
    assert any(str(file) in note for note in noted["notes"])
    assert noted["tokens"] == first["tokens"]


def test_a_budget_that_holds_no_state_is_named(plain: Path, tmp_path: Path) -> None:
    """Rather than a folder that stays empty for ever."""
    bundle = open_bundle(plain)
    session = Session(bundle, OnnxRuntimeBackend(bundle, threads=1))
    large = dataclasses.replace(bundle.model.states["conv_state.0"], shape=(3 << 20, 1))
    model = dataclasses.replace(bundle.model, states={"conv_state.0": large})
    session = dataclasses.replace(session, bundle=dataclasses.replace(bundle, model=model))
    asked = argparse.Namespace(state_dir=str(tmp_path / "states"), state_memory=5)
    with pytest.raises(
        BundleProblem, match=r"takes 6\.0 MiB, more than --state-memory 5; give it 6"
    ):
        open_cache(session, asked)
    assert not (tmp_path / "states").exists()


def test_a_folder_that_cannot_be_made_is_named(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code = run_engine([str(plain), "--prompt", "a", "--state-dir", str(tmp_path / "file")], plain)
    out, err = capsys.readouterr()
    assert code == 2 and not out and "name another --state-dir" in err and err.count("\n") == 1
