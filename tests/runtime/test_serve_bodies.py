"""Bodies that nobody foresaw: the server answers 4xx in one sentence, never 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_bundle  # noqa: F401  (puts jetson/ on the path, so it comes first)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Served
from tiny_bundle import make_bundle, pack

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/states")

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["json_object", "json_schema", "1", "-1", "a", "\x00", "\u202e", 1e308, -0.0])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = (
    *("prompt", "messages", "model", "user", "metadata", "suffix", "tools", "n", "best_of"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop"),
    *("logprobs", "top_logprobs", "echo", "stream", "stream_options", "response_format"),
    *("name", "state", "save_state", "cache_prompt", "chat_template_kwargs", "tool_choice"),
)
MESSAGES = [{"role": "user", "content": "a"}]
PROMPTS = st.sampled_from(["a", ["a", "b"], [1, 2], [[1], [2, 3]], "", []])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = {"templates": {"default": template}, "special_tokens": {}}
    (folder / "chat.json").write_text(json.dumps(chat))
    pack(folder)
    with Served(folder, "--max-answer-tokens=64", "--max-seconds=20") as server:
        yield server


def assert_told(status: int, answer: Any) -> None:
    if status == 200:
        return
    assert 400 <= status < 500, answer
    message = answer["error"]["message"]
    assert message.endswith(".") and "\n" not in message and "Traceback" not in message


FEW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60) | VALUES.map(json.dumps))
def test_what_is_no_request(served: Served, path: str, body: bytes | str) -> None:
    data = body if isinstance(body, bytes) else body.encode()
    status, answer, _ = served.ask(path, data, "POST")
    assert status >= 400
    assert_told(status, answer)


@FEW
@given(
    path=st.sampled_from(PATHS),
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    prompt=PROMPTS,
)
def test_fields_with_any_value(
    served: Served, path: str, fields: dict[str, Any], prompt: Any
) -> None:
    said = {"messages": MESSAGES} if "chat" in path else {"prompt": prompt}
    body = {**said, **({"name": "a"} if "states" in path else {}), **fields}
    status, answer, _ = served.ask(path, json.dumps(body).encode())
    assert_told(status, answer)
    assert served.ask("/health")[0] == 200
