"""--serve: what clients get, with OpenAI's own and curl; limits, queue, keys and stopping."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import Served
from tiny_bundle import CHAIN, SENTENCE, make_bundle, run_engine, run_json

from runtime.backends.protocol import BackendOptions
from runtime.bundle import open_bundle
from runtime.command_line import run
from runtime.sampling import Sampler
from runtime.session import Session
from runtime.text import TextCodec

LONG = SENTENCE * 3  # more than one piece of a prompt
# So hot that the tiny model leaves its chain.
HOT = {"temperature": 60.0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def served(packed: Path) -> Iterator[Served]:
    with Served(packed, "--parallel=4", "--queue=16", "--max-answer-tokens=4000") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With keys and narrow limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# of the house\nfirst-key\n\nsecond-key\n")
    limits = ("--max-body-bytes=2000", "--max-prompt-tokens=20", "--max-seconds=0.5")
    more = ("--max-answer-tokens=1000000", "--allow-host=board.lan", f"--api-key-file={keys}")
    with Served(packed, *limits, *more) as server:
        server.headers["Authorization"] = "Bearer first-key"
        yield server


def alone(folder: Path, prompt: str, tokens: int, **sampling: float) -> str:
    """What the model says where nothing else runs."""
    bundle = open_bundle(folder)
    codec = TextCodec(bundle)
    ids = codec.encode(prompt)
    with Session.open(bundle, BackendOptions(threads=1)) as session:
        sample = Sampler(codec.vocabulary, **sampling)
        sample.read(ids)
        steps = list(session.generate(ids, sample, tokens, codec.end_ids))
    said = [step.token for step in steps if step.token not in codec.end_ids]
    return codec.decode(said)


def completion(served: Served, **body: Any) -> dict[str, Any]:
    status, answer, _ = served.ask("/v1/completions", {"temperature": 0, **body})
    assert status == 200, answer
    return dict(answer)


def refused(served: Served, *words: str, status: int = 400, **body: Any) -> dict[str, Any]:
    """The error of a completion, which has all `words` in one sentence."""
    found, answer, _ = served.ask("/v1/completions", body)
    assert found == status, answer
    message = answer["error"]["message"]
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message, message
    return dict(answer["error"])


# --------------------------------------------------------------------------------------------------
# clients


def test_openai_client_whole_and_streamed(
    served: Served, client: openai.OpenAI, packed: Path
) -> None:
    """Both say what --prompt says, and what they took."""
    known = run_json(packed, "--prompt", LONG, "--max-new-tokens", "30")
    asked: dict[str, Any] = {"model": served.model, "prompt": LONG, "temperature": 0}
    whole = client.completions.create(**asked, max_tokens=30)
    assert whole.choices[0].text == known["text"]
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == known["prompt_tokens"]
    assert whole.usage.completion_tokens == 30
    chunks = list(
        client.completions.create(
            **asked, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == known["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model


def test_sixteen_clients_at_once_get_what_one_alone_gets(served: Served, packed: Path) -> None:
    """More than there are slots: prompts of one and of several pieces, each with its own seed."""
    prompts = [f"{LONG[: 4 + 9 * number]}{number}" for number in range(16)]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        asked: dict[str, Any] = {"max_tokens": 24, "seed": number, **HOT}
        if number % 2:
            answer = await client.completions.create(
                model=served.model, prompt=prompts[number], **asked
            )
            return answer.choices[0].text
        stream = await client.completions.create(
            model=served.model, prompt=prompts[number], stream=True, **asked
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="any", max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    answers = asyncio.run(all_of_them())
    assert len(set(answers)) == 16
    for number, answer in enumerate(answers):
        assert answer == alone(packed, prompts[number], 24, seed=number, **HOT)


def test_every_reply_under_load_is_right_and_accounted_for(packed: Path) -> None:
    """Forty clients on three slots; some are refused and ask again, some leave in the middle."""
    known = {seed: alone(packed, SENTENCE, 16, seed=seed, **HOT) for seed in range(5)}
    counted = {"right": 0, "refused": 0, "left": 0}

    async def ask(client: openai.AsyncOpenAI, model: str, number: int) -> None:
        endless = {"max_tokens": 4000, "temperature": 0}
        short = {"max_tokens": 16, "seed": number % 5, **HOT}
        asked: dict[str, Any] = endless if number % 8 == 0 else short
        while True:
            try:
                stream = await client.completions.create(
                    model=model, prompt=SENTENCE, stream=True, **asked
                )
                break
            except openai.RateLimitError:
                counted["refused"] += 1
                await asyncio.sleep(0.1)
        if number % 8 == 0:
            await anext(stream)
            await stream.close()
            counted["left"] += 1
        else:
            said = "".join([chunk.choices[0].text async for chunk in stream])
            assert said == known[number % 5]
            counted["right"] += 1

    async def all_of_them(server: Served) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0
        ) as client:
            await asyncio.gather(*(ask(client, server.model, number) for number in range(40)))

    with Served(packed, "--parallel=3", "--queue=20") as server:
        asyncio.run(all_of_them(server))
        assert counted["right"] == 35 and counted["left"] == 5 and counted["refused"]
        wait_until(lambda: server.metric("ssdi8_cancelled_requests_total") == 5)
        wait_until(lambda: server.metric("ssdi8_active_sequences") == 0)
        assert server.metric("ssdi8_waiting_sequences") == 0
        told = server.ask("/metrics")[1]
        for status, count in ((200, 40), (429, counted["refused"])):
            line = f'ssdi8_requests_total{{path="/v1/completions",status="{status}"}} {count}.0'
            assert line in told.splitlines()
    assert sum(", first after" in line for line in server.said) == 35
    assert not [line for line in server.said if SENTENCE[:9] in line]


def test_curl_without_buffering(served: Served, packed: Path) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 5, "stream": True, "temperature": 0})
    done = subprocess.run(
        ["curl", "-sN", "-d", body, f"{served.url}/v1/completions"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    events = done.stdout.split("\n\n")
    assert done.returncode == 0 and events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == alone(packed, "a", 5)


def test_a_list_of_prompts_is_a_choice_each(served: Served, packed: Path) -> None:
    """Text and token ids; the request takes one place, however many prompts it has."""
    codec = TextCodec(open_bundle(packed))
    texts = [f"{SENTENCE[: 5 + n]}{n}" for n in range(9)]
    ids = [codec.encode(text)[0].tolist() for text in texts]
    by_text = completion(served, prompt=texts, max_tokens=6)["choices"]
    by_ids = completion(served, prompt=ids, max_tokens=6)["choices"]
    assert [choice["index"] for choice in by_text] == list(range(9))
    assert by_text == by_ids
    assert [choice["text"] for choice in by_text] == [alone(packed, text, 6) for text in texts]
    assert completion(served, prompt=ids[0], max_tokens=6)["choices"] == by_ids[:1]


# --------------------------------------------------------------------------------------------------
# what an answer is


def test_echo_with_logprobs_scores_the_prompt(served: Served, packed: Path) -> None:
    """Of each token the log-probability that the graph gives it, over several pieces."""
    bundle = open_bundle(packed)
    codec = TextCodec(bundle)
    ids = codec.encode(LONG)
    with Session.open(bundle, BackendOptions(threads=1)) as session:
        logits, _ = session.prefill(ids, keep=ids.shape[1])
    scores = logits[0, :, : codec.vocabulary].astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    choice = completion(served, prompt=LONG, max_tokens=1, echo=True, logprobs=2)["choices"][0]
    told = choice["logprobs"]
    tokens = ids[0].tolist()
    assert choice["text"].startswith(LONG)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    expected = [scores[i, token] for i, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(told["token_logprobs"][1:-1], expected, atol=1e-4)
    likeliest = [max(each.values()) for each in told["top_logprobs"][1:]]
    np.testing.assert_allclose(likeliest, scores.max(-1), atol=1e-4)
    assert told["text_offset"] == np.cumsum([0, *map(len, told["tokens"])])[:-1].tolist()
    assert "".join(told["tokens"][:-1]) == LONG
    no_answer = completion(served, prompt=LONG, max_tokens=0, echo=True)
    assert no_answer["choices"][0]["text"] == LONG
    assert no_answer["usage"]["completion_tokens"] == 0


def test_an_end_of_text_is_counted_and_not_shown(packed: Path, tmp_path: Path) -> None:
    stops = make_bundle(tmp_path / "stops", stops=True)
    with Served(stops) as server:
        choice = completion(server, prompt="a", max_tokens=9, logprobs=0)
        assert choice["choices"][0]["text"] == ""
        assert choice["choices"][0]["finish_reason"] == "stop"
        assert choice["choices"][0]["logprobs"]["tokens"] == ["<|endoftext|>"]
        assert choice["usage"]["completion_tokens"] == 1


def test_stop_texts_end_an_answer_also_across_tokens(served: Served) -> None:
    say = completion(served, prompt=CHAIN, max_tokens=40)["choices"][0]["text"]
    assert CHAIN in say
    choice = completion(served, prompt=CHAIN, max_tokens=40, stop=["nowhere", CHAIN[1:3]])
    assert choice["choices"][0]["finish_reason"] == "stop"
    assert choice["choices"][0]["text"] == say[: say.index(CHAIN[1:3])]
    assert choice["usage"]["completion_tokens"] < 40


def test_bias_and_seed(served: Served, packed: Path) -> None:
    wanted = TextCodec(open_bundle(packed)).encode("q")[0, -1]
    asked = {"prompt": "so", "max_tokens": 3, "logit_bias": {str(wanted): 100}}
    banned = {"prompt": "so", "max_tokens": 12, "logit_bias": {str(wanted): -100}, **HOT}
    assert "q" in completion(served, **asked)["choices"][0]["text"]
    assert "q" not in completion(served, **banned)["choices"][0]["text"]
    texts = {
        seed: completion(served, prompt="so", max_tokens=20, seed=seed, **HOT)["choices"][0]["text"]
        for seed in (1, 2, -1)
    }
    again = completion(served, prompt="so", max_tokens=20, seed=-1, **HOT)
    assert again["choices"][0]["text"] == texts[-1] and len(set(texts.values())) == 3
    free = {completion(served, prompt="so", max_tokens=20, **HOT)["choices"][0]["text"]
            for _ in range(3)}  # fmt: skip
    assert len(free) == 3


def test_an_answer_is_json_of_the_schema(served: Served) -> None:
    """However the model is inclined: it says something else at every step if it may."""
    pytest.importorskip("llguidance", reason="llguidance (optional on a board) masks by grammar")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}, "on": {"type": "boolean"}},
        "required": ["n", "on"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        choice = completion(
            served, prompt="x", max_tokens=60, seed=seed, response_format=form, **HOT
        )["choices"][0]
        value = json.loads(choice["text"])
        assert set(value) == {"n", "on"} and value["n"] <= 99 and choice["finish_reason"] == "stop"
    broken = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    refused(served, "schema", "nonsense", prompt="x", response_format=broken)
    free = {"type": "json_object"}
    text = completion(served, prompt="x", max_tokens=5, response_format=free)["choices"][0]["text"]
    assert text.startswith("{")


# --------------------------------------------------------------------------------------------------
# what is refused


def test_wrong_fields_are_named(served: Served) -> None:
    refused(served, "temprature", "not known", prompt="a", temprature=1)
    assert refused(served, "temperature", prompt="a", temperature="hot")["param"] == "temperature"
    refused(served, "top_p", "from 0 to 1", prompt="a", top_p=2)
    refused(served, "n ", "1", prompt="a", n=2)
    refused(served, "prompt", max_tokens=1)
    refused(served, "prompt", "below", prompt=[10**6])
    refused(served, "max_tokens", "4000", prompt="a", max_tokens=4001)
    refused(served, "stream_options.x", prompt="a", stream_options={"x": 1})
    refused(served, "JSON", prompt="\ud800")
    error = refused(served, "no model", status=404, model="gpt-4", prompt="a")
    assert error["code"] == "model_not_found"
    for body in (b"", b"[1]", b"{", b'{"prompt": NaN}', b"\xff", b"[" * 100000):
        assert served.ask("/v1/completions", body)[0] == 400
    assert served.ask("/v1/nothing")[0] == 404
    assert served.ask("/v1/completions")[0] == 405
    assert served.ask("/../../etc/passwd")[0] == 404


def test_body_prompt_and_time_have_limits(strict: Served) -> None:
    refused(strict, "2000 bytes", status=413, prompt="a" * 3000)
    error = refused(strict, "tokens", "20", prompt=LONG)
    assert error["code"] == "context_length_exceeded"
    choice = completion(strict, prompt="a", max_tokens=1_000_000)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"]


def test_a_full_queue_says_when_to_come_again(packed: Path) -> None:
    """And a client that goes away makes room, streamed or not."""
    with Served(packed, "--parallel=1", "--queue=2", "--max-answer-tokens=1000000") as server:
        endless = {"prompt": "a", "max_tokens": 1_000_000, "temperature": 0}
        hanging = []
        for stream in (True, False, True):
            sock = socket.create_connection(tuple(server.host.split(":")))  # type: ignore[arg-type]
            body = json.dumps({**endless, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            hanging.append(sock)
            wait_until(lambda: server.metric("ssdi8_active_sequences") == 1)
        wait_until(lambda: server.metric("ssdi8_waiting_sequences") == 2)
        status, answer, headers = server.ask("/v1/completions", {"prompt": "a"})
        assert status == 429 and answer["error"]["code"] == "queue_full"
        assert int(headers["retry-after"]) >= 1
        # Those that wait first: they leave their places, too.
        for count, sock in enumerate(reversed(hanging), start=1):
            sock.close()
            wait_until(partial(gone, server, count))
        wait_until(lambda: server.metric("ssdi8_active_sequences") == 0)
        assert completion(server, prompt="a", max_tokens=2)


def gone(server: Served, count: int) -> bool:
    return server.metric("ssdi8_cancelled_requests_total") == count


def wait_until(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------
# who may come in


def test_keys(strict: Served) -> None:
    for shown in ("", "Bearer", "Bearer wrong", "Basic first-key", "first-key"):
        status, answer, headers = strict.ask("/v1/models", Authorization=shown)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert "first-key" not in json.dumps(answer)
    for key in ("first-key", "second-key"):
        assert strict.ask("/v1/models", Authorization=f"Bearer {key}")[0] == 200
    assert strict.ask("/metrics", Authorization="")[0] == 401
    for path in ("/health", "/"):
        assert strict.ask(path, Authorization="")[0] == 200


Refusal = Callable[..., str]


@pytest.fixture
def refusal(packed: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What --serve says with options that do not fit: one sentence, exit code 2."""

    def call(*options: str) -> str:
        assert run(["--serve", *options], packed) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.endswith(".\n") and said.err.count("\n") == 1
        return said.err

    return call


def test_a_key_file_without_a_key_is_named(refusal: Refusal, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert "cannot be read" in refusal(f"--api-key-file={keys}")
    for content, word in (("", "no key"), ("a b\n", "space"), ("é\n", "ASCII")):
        keys.write_text(content)
        said = refusal(f"--api-key-file={keys}")
        assert word in said and str(keys) in said


def test_beyond_loopback_only_with_a_key(refusal: Refusal) -> None:
    for host in ("0.0.0.0", "::", "board.example"):
        said = refusal("--host", host)
        assert host in said and "--api-key-file" in said


def test_a_missing_package_is_named(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("runtime.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = refusal()
    assert "uvicorn" in said and "setup.sh --serve" in said


def test_pages_from_elsewhere_are_kept_out(served: Served) -> None:
    """DNS rebinding comes with a foreign Host, and a request across sites with an Origin."""
    port = served.host.partition(":")[2]
    for host in (served.host, f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert served.ask("/health", Host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example", "[", "a]"):
        assert served.ask("/health", Host=host)[0] in (400, 403)
    ask = {"prompt": "a", "max_tokens": 1}
    for origin in (
        "http://evil.example",
        "null",
        f"http://localhost:{port}",
        "file://",
        "http://[",
    ):
        assert served.ask("/v1/completions", ask, Origin=origin)[0] == 403
    assert served.ask("/v1/completions", ask, Origin=served.url)[0] == 200


def test_a_name_can_be_allowed(strict: Served) -> None:
    assert strict.ask("/health", Host="board.lan:80")[0] == 200
    assert strict.ask("/health", Host="board.wan:80")[0] == 403


# --------------------------------------------------------------------------------------------------
# starting and stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_answers_end(packed: Path, number: int) -> None:
    with Served(packed) as server:
        stream = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any").completions.create(
            model=server.model, prompt="a", max_tokens=400, stream=True, temperature=0
        )
        texts = [next(stream).choices[0].text]
        server.process.send_signal(number)
        chunks = list(stream)
        texts += [chunk.choices[0].text for chunk in chunks]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert "".join(texts) == alone(packed, "a", 400)
        assert server.process.wait(30) == 0
        stream.response.close()
    assert server.said[-1] == "stopped\n"


def test_a_taken_port_is_one_sentence(served: Served, refusal: Refusal) -> None:
    port = served.host.partition(":")[2]
    said = refusal(f"--port={port}")
    assert port in said and "--port" in said


def test_the_unit_file_starts_the_same_server(packed: Path) -> None:
    options = ["--serve", "--print-unit", "--parallel=2", "--allow-host=100% $x"]
    result = run_engine(packed, *options)
    assert result.returncode == 0
    unit = result.stdout.decode()
    start = re.search("(?m)^ExecStart=(.*)$", unit)
    assert start and "--print-unit" not in start[1]
    assert str(packed / "run_engine.py") in start[1] and '"--allow-host=100%% $$x"' in start[1]
    if shutil.which("systemd-analyze"):
        file = packed.parent / "ssdi8-edge.service"
        file.write_text(unit)
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--user", str(file)], capture_output=True, text=True
        )
        assert str(file) not in checked.stderr, checked.stderr
