"""What a client may ask for: a body of OpenAI's API -> an `Order`, whose every value is checked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.chat_template import THINKING
from runtime.dialogue import ChatPrompt
from runtime.sampling import SAMPLING
from runtime.serve.fields import Fields, RequestProblem
from runtime.serve.limits import (
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Limits,
)
from runtime.serve.named_states import checked_name
from runtime.text import TextCodec

# What OpenAI's API has where nothing is given. A command line has others.
DEFAULTS = {"temperature": 1.0}
COMPLETION_TOKENS = 16
# They name users and accounts, and change no answer.
NAMES_ALONE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

# Roles that clients write, and those that templates know.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
WITHOUT_TOOLS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls")

# Gives the constraint of one answer anew for each prompt: a mask over logits, see `Sampler`.
Grammar = Callable[[], Any]


@dataclass(frozen=True)
class Order:
    """One request: the same settings for each of its prompts.

    Attributes:
        prompts: token ids of each.
        texts: of each, as it is echoed.
        logprobs: how many of the likeliest tokens are told with each token; None: no logprobs.
        cache: whether the state cache is looked up and added to.
        state: name of the state to go on from; with `whole_text` the prompt begins with its tokens,
            else it follows them.
        save_state: name for the state that the answer led to.
        marks: numbers of tokens behind which the cache is to hold the state.
    """

    prompts: Sequence[np.ndarray]
    texts: Sequence[str]
    sampling: Mapping[str, Any]
    bias: Mapping[int, float]
    stops: Sequence[str]
    new_tokens: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    grammar: Grammar | None
    cache: bool = True
    state: str | None = None
    save_state: str | None = None
    whole_text: bool = False
    marks: frozenset[int] = frozenset()


# Messages, whether to think (None: as the template likes), and whether an answer is to follow
# -> the chat; raises BundleProblem.
Render = Callable[[Sequence[Mapping[str, str]], "bool | None", bool], ChatPrompt]


@dataclass(frozen=True)
class _Asked:
    """What a request asks for in its own way; for the meaning see `Order`.

    `new_tokens`: None takes what there is room for.
    """

    prompts: list[np.ndarray]
    texts: list[str]
    new_tokens: int | None
    logprobs: int | None
    echo: bool
    state: str | None
    whole_text: bool = False
    marks: frozenset[int] = frozenset()

    @classmethod
    def of_chat(
        cls, prompt: ChatPrompt, new_tokens: int | None, logprobs: int | None, state: str | None
    ) -> _Asked:
        """What a rendered chat asks for."""
        ids = [np.array([prompt.ids], np.int32)]
        return cls(ids, [prompt.text], new_tokens, logprobs, False, state, True, prompt.marks)


@dataclass(frozen=True)
class Reader:
    """Reads bodies for one bundle.

    Attributes:
        model: its name, the only one that a request may give.
        room: tokens of prompt and answer together; None: any number.
        scores_prompts: whether the engine gives logits of all positions of a prompt.
        grammar: of a JSON schema; raises RequestProblem.
        render: of a chat; None where the bundle has no template.
    """

    codec: TextCodec
    model: str
    limits: Limits
    room: int | None
    scores_prompts: bool
    grammar: Callable[[Mapping[str, Any]], Grammar]
    render: Render | None

    def completion(self, body: Mapping[str, Any]) -> Order:
        """An order of /v1/completions.

        Raises:
            RequestProblem: a field is unknown or wrong.
            BundleProblem: a prompt is empty.
        """
        fields = Fields(body)
        state = _state_name(fields, "state")
        texts, prompts = self._prompts(fields, continues=state is not None)
        echo = fields.flag("echo")
        logprobs = fields.number("logprobs", int, None, 0, MAX_TOP_LOGPROBS)
        new_tokens = fields.number(
            "max_tokens", int, COMPLETION_TOKENS, 0 if echo else 1, self.limits.new_tokens
        )
        fields.only("best_of", 1)
        fields.only("suffix", "")
        if echo and logprobs is not None:
            self._require_prompt_logits(state)
        asked = _Asked(prompts, texts, new_tokens, logprobs, echo, state)
        return self._order(fields, asked)

    def saving(self, body: Mapping[str, Any]) -> Order:
        """An order of /v1/states: read a prompt or a chat, keep the state, write nothing.

        Raises:
            RequestProblem, BundleProblem: as for `completion` and `chat`.
        """
        fields = Fields({**body, "save_state": checked_name(body.get("name"))})
        fields.ignore("name")
        state = _state_name(fields, "state")
        if body.get("messages") is not None:
            prompt = self._rendered(fields, answers=False)
            return self._order(fields, _Asked.of_chat(prompt, 0, None, state))
        texts, prompts = self._prompts(fields, continues=state is not None)
        return self._order(fields, _Asked(prompts, texts, 0, None, False, state))

    def chat(self, body: Mapping[str, Any]) -> Order:
        """An order of /v1/chat/completions.

        Raises:
            RequestProblem: a field is unknown or wrong, or the bundle has no chat template.
            BundleProblem: the template does not take the messages.
        """
        fields = Fields(body)
        prompt = self._rendered(fields, answers=True)
        most = self.limits.new_tokens
        older = fields.number("max_tokens", int, None, 1, most)
        new_tokens = fields.number("max_completion_tokens", int, older, 1, most)
        top = fields.number("top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
        logprobs = top if fields.flag("logprobs") else None
        for name in WITHOUT_TOOLS:
            fields.only(name, [], "none", False, True)
        state = _state_name(fields, "state")
        return self._order(fields, _Asked.of_chat(prompt, new_tokens, logprobs, state))

    def _rendered(self, fields: Fields, answers: bool) -> ChatPrompt:
        """The messages by the template; `answers`: up to where an answer begins."""
        if self.render is None:
            raise RequestProblem(
                f"{self.model} has no chat template",
                "ask /v1/completions, or build the bundle from a checkpoint that has one",
                code="no_chat_template",
            )
        return self.render(_messages(fields), _thinking(fields), answers)

    def _require_prompt_logits(self, state: str | None) -> None:
        if not self.scores_prompts:
            raise RequestProblem(
                "this engine gives no logits of a prompt, so that echo has no logprobs",
                "leave one of them out, or serve a bundle of target host-cpu",
                param="logprobs",
            )
        if state is not None:
            raise RequestProblem(
                "echo has no logprobs behind a state", "leave one of them out", param="logprobs"
            )

    def _prompts(self, fields: Fields, continues: bool) -> tuple[list[str], list[np.ndarray]]:
        """Text, several texts, token ids, or several lists of token ids."""
        given = fields.take("prompt")
        is_ids = isinstance(given, list) and bool(given) and isinstance(given[0], int)
        if isinstance(given, str) or is_ids:
            given = [given]
        if not isinstance(given, list) or not given:
            fields.refuse("prompt", "is missing or empty", "give text, token ids, or a list of one")
        if len(given) > MAX_PROMPTS:
            fields.refuse("prompt", f"has {len(given)} prompts", f"give at most {MAX_PROMPTS}")
        texts, prompts = [], []
        for each in given:
            if isinstance(each, str):
                texts.append(each)
                prompts.append(self.codec.encode(each, continues))
            else:
                ids = self._token_ids(fields, each)
                texts.append(self.codec.decode(ids))
                prompts.append(np.array([ids], np.int32))
        return texts, prompts

    def _token_ids(self, fields: Fields, given: Any) -> list[int]:
        most = self.codec.vocabulary
        if (
            not isinstance(given, list)
            or not given
            or not all(type(token) is int and 0 <= token < most for token in given)
        ):
            fields.refuse(
                "prompt", "holds what is no prompt", f"give text or token ids below {most}"
            )
        return given

    def _order(self, fields: Fields, asked: _Asked) -> Order:
        """What both kinds of requests have."""
        self._check_model(fields)
        most = self._room_for(asked)
        include_usage = False
        if (stream_options := fields.object("stream_options")) is not None:
            include_usage = stream_options.flag("include_usage")
            stream_options.ignore("include_obfuscation")
            stream_options.done()
        fields.only("n", 1)
        save_state = _state_name(fields, "save_state")
        if save_state is not None and len(asked.prompts) > 1:
            fields.refuse("save_state", "names one state of several", "give one prompt")
        order = Order(
            prompts=asked.prompts,
            texts=asked.texts,
            sampling=_sampling(fields),
            bias=self._bias(fields),
            stops=_stops(fields),
            new_tokens=most if asked.new_tokens is None else asked.new_tokens,
            logprobs=asked.logprobs,
            echo=asked.echo,
            stream=fields.flag("stream"),
            include_usage=include_usage,
            grammar=self._grammar(fields),
            cache=fields.flag("cache_prompt", default=True),
            state=asked.state,
            save_state=save_state,
            whole_text=asked.whole_text,
            marks=asked.marks,
        )
        fields.ignore(*NAMES_ALONE)
        fields.done()
        return order

    def _room_for(self, asked: _Asked) -> int:
        """The most tokens of an answer; raises RequestProblem where there is no room for it."""
        longest = max(prompt.shape[1] for prompt in asked.prompts)
        if longest > self.limits.prompt_tokens:
            raise RequestProblem(
                f"the prompt has {longest} tokens and this server takes"
                f" {self.limits.prompt_tokens}",
                "give a shorter one, or start the server with a larger --max-prompt-tokens",
                code="context_length_exceeded",
            )
        if self.room is None:
            return self.limits.new_tokens
        new_tokens = 1 if asked.new_tokens is None else asked.new_tokens
        if longest + new_tokens > self.room:
            raise RequestProblem(
                f"the prompt has {longest} tokens and {new_tokens} are to follow, and the context"
                f" of {self.model} is {self.room} tokens",
                "give a shorter prompt or a smaller max_tokens",
                code="context_length_exceeded",
            )
        return min(self.limits.new_tokens, self.room - longest)

    def _check_model(self, fields: Fields) -> None:
        name = fields.text("model")
        if name is not None and name != self.model:
            raise RequestProblem(
                f"there is no model {name[:100]!r} here",
                f"name {self.model}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _bias(self, fields: Fields) -> dict[int, float]:
        """Token id -> what is added to its logit."""
        given = fields.object("logit_bias")
        if given is None:
            return {}
        bias = {}
        for token in given.names():
            known = re.fullmatch("[0-9]{1,9}", token) and int(token) < self.codec.vocabulary
            if not known:
                given.refuse("…", "has what is no token", f"ids are below {self.codec.vocabulary}")
            bias[int(token)] = given.number(token, float, 0.0, -100, 100)
        return bias

    def _grammar(self, fields: Fields) -> Grammar | None:
        form = fields.object("response_format")
        if form is None:
            return None
        kind = form.text("type")
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            described = form.object("json_schema")
            if described is None:
                form.refuse("json_schema", "is missing", "give an object that has a schema")
            schema = described.take("schema")
            if not isinstance(schema, (dict, bool)):
                described.refuse("schema", "is missing or no object", "give a JSON schema")
            described.ignore("name", "strict", "description")
            described.done()
        elif kind not in ("json_object", "text"):
            form.refuse("type", "is not known here", "give text, json_object or json_schema")
        form.done()
        return None if kind == "text" else self.grammar(schema)


def _state_name(fields: Fields, field: str) -> str | None:
    name = fields.take(field)
    return None if name is None else checked_name(name)


def _thinking(fields: Fields) -> bool | None:
    """What vLLM's clients send to a template that knows of thoughts."""
    given = fields.object("chat_template_kwargs")
    if given is None:
        return None
    wanted = {given.flag(name) for name in THINKING if name in given.names()}
    given.done()
    return wanted.pop() if len(wanted) == 1 else None


def _messages(fields: Fields) -> list[dict[str, str]]:
    """Role and text of each; parts of a text are joined."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        fields.refuse("messages", "is missing or empty", "give a list of messages")
    messages = []
    for number, each in enumerate(given):
        if not isinstance(each, dict):
            fields.refuse(f"messages[{number}]", "is no object", "give role and content")
        message = Fields(each, f"messages[{number}].")
        role = message.text("role")
        if role not in ROLES:
            message.refuse("role", "is not known here", f"give one of {', '.join(ROLES)}")
        content = _content(message)
        message.ignore("name", "refusal", "annotations")
        for name in ("tool_calls", "function_call", "audio"):
            message.only(name, [])
        message.done()
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _content(message: Fields) -> str:
    given = message.take("content")
    parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
    for part in parts:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not is_text or part["type"] != "text" or not isinstance(part["text"], str):
            message.refuse("content", "is no text", "give text, or parts of type text")
    return "".join(part["text"] for part in parts)


def _sampling(fields: Fields) -> dict[str, Any]:
    """A value for each row of `SAMPLING`; without a seed, one that nobody knows."""
    values = {}
    for option in SAMPLING:
        if option.name == "max_new_tokens":
            continue
        if option.name == "seed":
            given = fields.number("seed", int, None, -(2.0**63), 2.0**64)
            values["seed"] = secrets.randbits(63) if given is None else given % 2**64
        else:
            default = DEFAULTS.get(option.name, option.default)
            values[option.name] = fields.number(
                option.name, option.kind, default, option.least, option.most
            )
    return values


def _stops(fields: Fields) -> list[str]:
    given = fields.take("stop")
    stops = [given] if isinstance(given, str) else given or []
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops)
    ):
        fields.refuse(
            "stop",
            "does not fit",
            f"give at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
        )
    return stops
