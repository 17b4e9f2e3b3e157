"""Chat templates: rendered as transformers renders them, whatever they do; where they are found."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, SPECIAL_TOKENS, STYLES, chat_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from runtime import chat_template
from runtime.chat_template import ChatTemplate
from runtime.problems import BundleProblem
from runtime.tokenizer import Tokenizer
from ssdi8_edge.ground.chat_templates import chat_templates
from ssdi8_edge.ground.errors import CheckpointError

SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "é<&>'", "parameters": {"b": 1, "a": [None]}}}]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer(), **SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    chat_tokenizer().save(str(path))
    return Tokenizer(path)


def template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, SPECIAL_TOKENS, "it")


# --------------------------------------------------------------------------------------------------
# as transformers does

TEXTS = st.text(
    st.sampled_from(" \n\tabé🙂<>&'\"{}%") | st.characters(codec="utf-8"), max_size=12
) | st.sampled_from(["<|im_end|>", "a<s>b", "</think>x", "{{ 7 * 7 }}", "  padded  ", "a\r\nb"])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    style=st.sampled_from(sorted(STYLES)),
    texts=st.lists(TEXTS, min_size=1, max_size=5),
    system=st.none() | TEXTS,
    tools=st.sampled_from([None, TOOLS]),
    ends=st.booleans(),
    variables=st.fixed_dictionaries(
        {}, optional={"enable_thinking": st.booleans(), "thinking": st.booleans()}
    ),
)
def test_text_and_tokens_are_those_of_transformers(
    theirs: PreTrainedTokenizerFast,
    ours: Tokenizer,
    style: str,
    texts: list[str],
    system: str | None,
    tools: Any,
    ends: bool,
    variables: dict[str, bool],
) -> None:
    """What a user writes that spells a special token included: it becomes one, in both."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text, "tool_calls": None}
        for i, text in enumerate(texts)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    asked = {"chat_template": STYLES[style], "tools": tools, "add_generation_prompt": ends}
    wanted = theirs.apply_chat_template(messages, tokenize=False, **asked, **variables)
    text = template(STYLES[style]).render(messages, tools, ends, **variables)
    assert text == wanted
    ids = theirs.apply_chat_template(messages, return_dict=False, **asked, **variables)
    assert ours.encode_whole(text)[0] == ids


def test_templates_by_name(theirs: PreTrainedTokenizerFast) -> None:
    """That for tools is chosen with tools, as there."""
    named = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    found = ChatTemplate(named, {}, "it")
    assert found.render([SYSTEM]) == "plain"
    assert found.render([SYSTEM], TOOLS) == "tools"
    assert ChatTemplate({"only": "one"}, {}, "it").render([SYSTEM], TOOLS) == "one"
    with pytest.raises(BundleProblem, match="none of them is called default"):
        ChatTemplate({"a": "", "b": ""}, {}, "it")


def test_thinking_is_asked_for_where_a_template_knows_it() -> None:
    known = {style: template(text).thinking for style, text in STYLES.items()}
    assert known["nemotron"](True) == {"enable_thinking": True}
    assert known["granite"](False) == {"thinking": False}
    assert known["chatml"](None) == {}
    with pytest.raises(BundleProblem, match="knows no thinking"):
        known["chatml"](False)


# --------------------------------------------------------------------------------------------------
# whatever a template does

NASTY = {
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "wrong type": ("{{ 'a' + 1 }}", "can only concatenate"),
    "no end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not come to an end",
    ),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "too much": ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than"),
    "a text of gigabytes": ("{{ 'x' * 9999999999 }}", "more than"),
    "a list of gigabytes": ("{{ 9999999999 * [0] }}", "more than"),
    "a huge power": ("{{ 9 ** 999999999 }}", "large power"),
    "a wide range": ("{{ range(999999999) }}", "Range too big"),
    "leaves the sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "changes the messages": ("{{ messages.append(1) }}", "not"),
    "reads a file": ("{% include '/etc/passwd' %}", "no loader"),
}


@pytest.mark.parametrize("case", NASTY)
def test_a_template_that_fails_is_one_sentence(case: str) -> None:
    text, reason = NASTY[case]
    with pytest.raises(BundleProblem) as refused:
        template(text).render([SYSTEM])
    said = str(refused.value)
    assert said.startswith("the chat template of it does not take this chat (")
    assert reason in said and said.endswith(".") and "\n" not in said


@pytest.mark.parametrize("text", ["{% if %}", "{{", "{% endfor %}", "{% foo %}", "{{ x | foo }}"])
def test_a_template_that_is_none_is_refused_at_once(text: str) -> None:
    with pytest.raises(BundleProblem, match="the chat template of it cannot be read"):
        template(text)


def test_jinja2_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, or one with holes."""
    import jinja2

    monkeypatch.setattr(jinja2, "__version__", "3.0.3")
    with pytest.raises(BundleProblem, match=r"jinja2 3\.0\.3 is too old .* -m pip install"):
        template("")
    original = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BundleProblem, match=r"jinja2, which a chat needs, .* -m pip install"):
        chat_template._import_jinja2()


# --------------------------------------------------------------------------------------------------
# where a checkpoint has them


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a file": ({"chat_template.jinja": "é\n"}, {"default": "é\n"}),
    "the tokenizer's config": ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
    "a list": (
        {"tokenizer_config.json": {"chat_template": NAMED}},
        {"default": "d", "tool_use": "t"},
    ),
    "the processor's": ({"chat_template.json": {"chat_template": "p"}}, {"default": "p"}),
    "a folder": (
        {"chat_template.jinja": "d", "additional_chat_templates/rag.jinja": "r"},
        {"default": "d", "rag": "r"},
    ),
    "a file counts first": (
        {"chat_template.jinja": "f", "tokenizer_config.json": {"chat_template": NAMED}},
        {"default": "f", "tool_use": "t"},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found(place: str, tmp_path: Path) -> None:
    files, wanted = PLACES[place]
    for name, content in files.items():
        write(tmp_path, name, content)
    found = chat_templates(tmp_path)
    assert found is not None and found["templates"] == wanted


def test_special_tokens_are_found(tmp_path: Path) -> None:
    assert chat_templates(tmp_path) is None
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<m>", "pad_token": "<p>"})
    config = {
        "chat_template": "x",
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": None,
        "extra_special_tokens": {"image_token": "<i>"},
    }
    write(tmp_path, "tokenizer_config.json", config)
    found = chat_templates(tmp_path)
    assert found is not None
    assert found["special_tokens"] == {"bos_token": "<s>", "pad_token": "<p>", "image_token": "<i>"}


WRONG: dict[str, Callable[[Path], None]] = {
    "a number": lambda to: write(to, "tokenizer_config.json", {"chat_template": 3}),
    "unnamed": lambda to: write(to, "tokenizer_config.json", {"chat_template": [{"template": ""}]}),
    "no text": lambda to: write(
        to, "tokenizer_config.json", {"chat_template": [{"name": "a", "template": 1}]}
    ),
    "not UTF-8": lambda to: (to / "chat_template.jinja").write_bytes(b"\xff") and None,
    "no template": lambda to: write(to, "chat_template.jinja", "{% if %}"),
    "no default": lambda to: write(
        to,
        "tokenizer_config.json",
        {"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_template_is_refused_by_name(case: str, tmp_path: Path) -> None:
    WRONG[case](tmp_path)
    with pytest.raises(CheckpointError) as refused:
        chat_templates(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_the_styles_are_different() -> None:
    """Or the comparison would show little."""
    rendered = {template(text).render([SYSTEM]) for text in STYLES.values()}
    assert len(rendered) == len(STYLES) and template(CHATML).variables == {
        "messages",
        "add_generation_prompt",
    }
