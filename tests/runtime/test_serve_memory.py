"""What the server remembers: chats that go on, states with names, a folder that outlives it."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import Served
from tiny_bundle import SENTENCE, make_bundle, pack

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions, States
from runtime.bundle import Bundle, open_bundle
from runtime.dialogue import ChatPrompt
from runtime.sampling import Sampler
from runtime.serve.fields import RequestProblem
from runtime.serve.generation import Generation, Piece
from runtime.serve.limits import Limits
from runtime.serve.named_states import NamedStates
from runtime.serve.order import Order, Reader
from runtime.serve.scheduler import Scheduler
from runtime.session import Session
from runtime.states.prefix_cache import PrefixCache
from runtime.states.slot import Slot
from runtime.text import TextCodec

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %}hm {% endif %}{% endif %}"
)
HOT = {"temperature": 60.0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a chat template."""
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    chat = {"templates": {"default": TEMPLATE}, "special_tokens": {}}
    (folder / "chat.json").write_text(json.dumps(chat))
    pack(folder)
    return folder


@pytest.fixture(scope="module")
def served(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("states")
    with Served(packed, f"--state-dir={folder}", "--prefill-tokens=8") as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def complete(served: Served, expected: int = 200, **body: Any) -> dict[str, Any]:
    status, answer, _ = served.ask("/v1/completions", {"temperature": 0, "max_tokens": 12, **body})
    assert status == expected, answer
    return dict(answer)


def text(answer: Mapping[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


# --------------------------------------------------------------------------------------------------
# chats


def test_a_chat_goes_on_from_the_states_of_its_turns(served: Served, client: openai.OpenAI) -> None:
    """Each turn is what a completion of the rendered chat says, and reads only what is new."""
    messages: list[Any] = [{"role": "system", "content": SENTENCE}]
    rendered = f"[system]{SENTENCE}\n"
    for turn in ("and then", "why so", "go on"):
        messages.append({"role": "user", "content": turn})
        rendered += f"[user]{turn}\n[assistant]"
        asked: dict[str, Any] = {"model": served.model, "messages": messages, "temperature": 0}
        whole = client.chat.completions.create(**asked, max_completion_tokens=20)
        stream = client.chat.completions.create(**asked, max_tokens=20, stream=True)
        chunks = [chunk.choices[0].delta for chunk in stream]
        said = whole.choices[0].message.content
        assert said and whole.choices[0].message.role == chunks[0].role == "assistant"
        assert "".join(delta.content or "" for delta in chunks) == said
        alone = complete(served, prompt=rendered, max_tokens=20, cache_prompt=False)
        assert text(alone) == said
        assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens == alone["usage"]["prompt_tokens"]
        assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        if turn != "and then":
            assert whole.usage.prompt_tokens_details.cached_tokens
        messages.append({"role": "assistant", "content": said})
        rendered += f"{said}\n"


def test_logprobs_and_thoughts_of_a_chat(served: Served, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "so"}]}]
    answer = client.chat.completions.create(
        model=served.model, messages=messages, logprobs=True, top_logprobs=3, max_tokens=4
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 4
    for token in told.content:
        best = token.top_logprobs
        assert len(best) == 3 and best[0].logprob == max(each.logprob for each in best)
    used = {
        think: served.ask(
            "/v1/chat/completions",
            {"messages": messages, "chat_template_kwargs": {"thinking": think}, "max_tokens": 1},
        )[1]["usage"]["prompt_tokens"]
        for think in (True, False)
    }
    assert used[True] > used[False]


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        (None, "messages"),
        ([], "messages"),
        (["a"], "messages[0]"),
        ([{"role": "robot", "content": "a"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content"),
        ([{"role": "user", "content": "a", "x": 1}], "messages[0].x"),
    ],
)
def test_messages_that_do_not_fit(served: Served, messages: Any, word: str) -> None:
    status, answer, _ = served.ask("/v1/chat/completions", {"messages": messages})
    assert status == 400 and word in answer["error"]["message"]


def test_tools_are_refused_by_name(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, answer, _ = served.ask("/v1/chat/completions", {**body, "tools": tools})
    assert status == 400 and "tools" in answer["error"]["message"]
    asked = {**body, "tools": [], "tool_choice": "none", "store": False}
    assert served.ask("/v1/chat/completions", asked)[0] == 200


# --------------------------------------------------------------------------------------------------
# states with names


def test_a_state_is_saved_listed_continued_and_deleted(served: Served, packed: Path) -> None:
    """Two answers go on from one state, each as if it had read all of the text."""
    status, made, _ = served.ask("/v1/states", {"name": "book", "prompt": SENTENCE})
    assert status == 200 and made["id"] == "book" and made["tokens"] > 8
    assert served.ask("/v1/states/book")[1] == made
    assert made in served.ask("/v1/states")[1]["data"]
    for more in (" and", " or else it"):
        forked = complete(served, prompt=more, state="book", save_state=f"book{len(more)}")
        assert text(forked) == text(complete(served, prompt=SENTENCE + more, cache_prompt=False))
        assert forked["usage"]["prompt_tokens_details"]["cached_tokens"] == made["tokens"]
    # What was said is in the state of the answer, its last token too.
    bundle = open_bundle(packed)
    codec = TextCodec(bundle)
    ids = [*codec.encode(SENTENCE)[0], *codec.encode(" and", continues=True)[0]]
    with Session.open(bundle, BackendOptions(threads=1)) as session:
        steps = session.generate(np.array([ids], np.int32), Sampler(codec.vocabulary), 12, ())
        ids += [step.token for step in steps]
    ids += codec.encode(" so", continues=True)[0].tolist()
    alone = complete(served, prompt=[int(token) for token in ids], cache_prompt=False)
    assert text(complete(served, prompt=" so", state="book4")) == text(alone)
    for name in ("book", "book4", "book11"):
        assert served.ask(f"/v1/states/{name}", method="DELETE")[0] == 200
    assert served.ask("/v1/states")[1]["data"] == []
    assert served.ask("/v1/states/book")[0] == 404
    assert complete(served, 404, prompt="a", state="book")["error"]["param"] == "state"


def test_a_chat_starts_from_a_state_that_it_goes_on_from(served: Served) -> None:
    messages = [{"role": "system", "content": SENTENCE}, {"role": "user", "content": "x"}]
    assert served.ask("/v1/states", {"name": "system", "messages": messages[:1]})[0] == 200
    body = {"state": "system", "cache_prompt": False, "max_tokens": 3}
    status, answer, _ = served.ask("/v1/chat/completions", {**body, "messages": messages})
    assert status == 200 and answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 8
    status, answer, _ = served.ask("/v1/chat/completions", {**body, "messages": messages[1:]})
    assert status == 400 and "go on" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "a" * 65, "ä", 1, ["a"], "a\n"])
def test_names_are_no_paths(served: Served, name: Any) -> None:
    status, answer, _ = served.ask("/v1/states", {"name": name, "prompt": "a"})
    assert status == 400 and "name" in answer["error"]["message"]
    assert complete(served, 400, prompt="a", save_state=name)
    for path in ("/v1/states/..%2fx", "/v1/states/.hidden", "/v1/states/%00"):
        assert served.ask(path)[0] in (400, 404)


def test_states_outlive_the_server_and_altered_ones_are_refused(
    packed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "states"
    prompt = SENTENCE + " again"
    with Served(packed, f"--state-dir={folder}") as server:
        for name in ("kept", "spoilt"):
            assert server.ask("/v1/states", {"name": name, "prompt": prompt})[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    spoilt = next(folder.rglob("spoilt.state"))
    content = bytearray(spoilt.read_bytes())
    content[-3] ^= 1
    spoilt.write_bytes(content)
    with Served(packed, f"--state-dir={folder}") as server:
        assert [state["id"] for state in server.ask("/v1/states")[1]["data"]] == ["kept"]
        assert any(str(spoilt) in line for line in server.said)
        again = complete(server, prompt=prompt + " so")
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 8


def test_a_kill_while_saving_leaves_the_old_state_or_the_new_one(
    packed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "states"
    texts = [SENTENCE * 40, SENTENCE * 41]
    sizes = set()
    for delay in (0.05, 0.15, 0.3):
        with Served(packed, f"--state-dir={folder}") as server:
            if sizes:
                [state] = server.ask("/v1/states")[1]["data"]
                assert state["tokens"] in sizes
                assert not [line for line in server.said if "note" in line]
            for prompt in texts:
                made = server.ask("/v1/states", {"name": "it", "prompt": prompt})[1]
                sizes.add(made["tokens"])

            def keep_saving(server: Served = server) -> None:
                try:
                    while True:
                        for prompt in texts:
                            server.ask("/v1/states", {"name": "it", "prompt": prompt})
                except (OSError, HTTPException):
                    pass  # it is gone, perhaps in the middle of an answer

            saving = threading.Thread(target=keep_saving)
            saving.start()
            time.sleep(delay)
            server.process.kill()
            saving.join(20)
    assert len(sizes) == 2


# --------------------------------------------------------------------------------------------------
# parts


def test_named_states_have_room_for_so_much(packed: Path) -> None:
    with Session.open(open_bundle(packed), BackendOptions(threads=1)) as session:
        slot = Slot()
        session.advance(slot, [1, 2, 3])
        snapshot = session.take(slot)
        named = NamedStates(session, 2 * snapshot.nbytes, None)
        for name in ("a", "b", "a"):
            named.save(name, snapshot)
        with pytest.raises(RequestProblem, match="delete some") as caught:
            named.save("c", snapshot)
        assert caught.value.status == 409
        named.delete("a")
        named.save("c", snapshot)
        assert [each["id"] for each in named.listed()] == ["b", "c"]


def test_prompt_and_answer_fit_into_the_context(packed: Path) -> None:
    """Of a model that has one; an answer without a length takes what is left."""
    codec = TextCodec(open_bundle(packed))
    limits = Limits(4, 4, 1 << 20, 1000, 500, 60.0)
    reader = Reader(codec, "it", limits, 30, True, lambda schema: lambda: None, render)
    assert reader.completion({"prompt": [1] * 20, "max_tokens": 10}).new_tokens == 10
    with pytest.raises(RequestProblem, match="30 tokens") as caught:
        reader.completion({"prompt": [1] * 20, "max_tokens": 11})
    assert caught.value.code == "context_length_exceeded"
    assert reader.chat({"messages": [{"role": "user", "content": "a"}]}).new_tokens == 12
    with pytest.raises(RequestProblem, match="30 tokens"):
        reader.chat({"messages": [{"role": "user", "content": "a"}], "max_tokens": 13})


def render(messages: Any, think: bool | None, answers: bool) -> ChatPrompt:
    return ChatPrompt("a", [1] * 18)


class OneAtATime(OnnxRuntimeBackend):
    """Holds the states of one sequence alone, as a library with fixed buffers does."""

    sequences: int | None = 1

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self._held = super().zero_states(1)

    def zero_states(self, batch: int) -> States:
        return self._into(super().zero_states(batch))

    def load_states(self, held: Mapping[str, np.ndarray]) -> States:
        return self._into(held)

    def forward(
        self, ids: np.ndarray, states: States, keep: int = 1, position: int = 0
    ) -> tuple[np.ndarray, States]:
        logits, states = super().forward(ids, states, keep, position)
        return logits, self._into(states)

    def _into(self, states: States) -> States:
        for name, value in states.items():
            self._held[name][:] = value  # type: ignore[index]
        return self._held


def test_sequences_do_not_mix_where_the_library_holds_one(packed: Path) -> None:
    """Prompts of one and several pieces, together; each says what it says alone."""
    bundle = open_bundle(packed)
    codec = TextCodec(bundle)
    prompts = [codec.encode(SENTENCE[: 3 + 11 * number]) for number in range(5)]
    pieces: queue.Queue[Piece] = queue.Queue()
    with Session(bundle, OneAtATime(bundle)) as session:
        named = NamedStates(session, 1 << 20, None)
        scheduler = Scheduler(session, 3, PrefixCache(1 << 20), named)
        for index in range(5):
            generation = Generation(
                order(prompts, seed=7), index, codec, time.monotonic() + 60, pieces.put
            )
            scheduler.submit(generation)
        scheduler.start()
        said = dict.fromkeys(range(5), "")
        ended = 0
        while ended < 5:
            piece = pieces.get(timeout=30)
            assert piece.problem is None
            said[piece.index] += piece.text
            ended += piece.ended is not None
        scheduler.close()
    for index, prompt in enumerate(prompts):
        with Session.open(bundle, BackendOptions(threads=1)) as session:
            sample = Sampler(codec.vocabulary, seed=7, **HOT)
            sample.read(prompt)
            steps = list(session.generate(prompt, sample, 20, codec.end_ids))
        tokens = [step.token for step in steps if step.token not in codec.end_ids]
        assert said[index] == codec.decode(tokens)


def order(prompts: list[np.ndarray], seed: int) -> Order:
    return Order(
        prompts=prompts,
        texts=[""] * len(prompts),
        sampling={**HOT, "seed": seed},
        bias={},
        stops=(),
        new_tokens=20,
        logprobs=None,
        echo=False,
        stream=False,
        include_usage=False,
        grammar=None,
        cache=False,
    )
