"""What a client may ask for: a body of OpenAI's API -> an `Order`, whose every value is checked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.sampling import SAMPLING
from runtime.serve.fields import Fields, RequestProblem
from runtime.serve.limits import (
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Limits,
)
from runtime.text import TextCodec

# What OpenAI's API has where nothing is given. A command line has others.
DEFAULTS = {"temperature": 1.0}
COMPLETION_TOKENS = 16
# They name users and accounts, and change no answer.
NAMES_ALONE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

# Gives the constraint of one answer anew for each prompt: a mask over logits, see `Sampler`.
Grammar = Callable[[], Any]


@dataclass(frozen=True)
class Order:
    """One request: the same settings for each of its prompts.

    Attributes:
        prompts: token ids of each.
        texts: of each, as it is echoed.
        logprobs: how many of the likeliest tokens are told with each token; None: no logprobs.
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
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Reader:
    """Reads bodies for one bundle.

    Attributes:
        model: its name, the only one that a request may give.
        room: tokens of prompt and answer together; None: any number.
        scores_prompts: whether the engine gives logits of all positions of a prompt.
        grammar: of a response_format, or None where the library for it is missing.
    """

    codec: TextCodec
    model: str
    limits: Limits
    room: int | None
    scores_prompts: bool
    grammar: Callable[[Mapping[str, Any]], Grammar]

    def completion(self, body: Mapping[str, Any]) -> Order:
        """An order of /v1/completions.

        Raises:
            RequestProblem: a field is unknown or wrong.
            BundleProblem: a prompt is empty.
        """
        fields = Fields(body)
        texts, prompts = self._prompts(fields)
        echo = fields.flag("echo")
        logprobs = fields.number("logprobs", int, None, 0, MAX_TOP_LOGPROBS)
        least = 0 if echo else 1
        new_tokens = fields.number("max_tokens", int, None, least, self.limits.new_tokens)
        fields.only("best_of", 1)
        fields.only("suffix", "")
        if echo and logprobs is not None and not self.scores_prompts:
            raise RequestProblem(
                "this engine gives no logits of a prompt, so that echo has no logprobs",
                "leave one of them out, or serve a bundle of target host-cpu",
                param="logprobs",
            )
        return self._order(
            fields,
            prompts,
            texts,
            COMPLETION_TOKENS if new_tokens is None else new_tokens,
            logprobs,
            echo,
        )

    def _prompts(self, fields: Fields) -> tuple[list[str], list[np.ndarray]]:
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
                prompts.append(self.codec.encode(each))
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

    def _order(
        self,
        fields: Fields,
        prompts: list[np.ndarray],
        texts: list[str],
        new_tokens: int | None,
        logprobs: int | None,
        echo: bool,
    ) -> Order:
        """What both kinds of requests have; `new_tokens` None takes what there is room for."""
        self._check_model(fields)
        longest = max(prompt.shape[1] for prompt in prompts)
        if longest > self.limits.prompt_tokens:
            raise RequestProblem(
                f"the prompt has {longest} tokens and this server takes"
                f" {self.limits.prompt_tokens}",
                "give a shorter one, or start the server with a larger --max-prompt-tokens",
                code="context_length_exceeded",
            )
        most = self.limits.new_tokens
        if self.room is not None:
            most = min(most, self.room - longest)
            if (new_tokens or 1) > most:
                raise RequestProblem(
                    f"the prompt has {longest} tokens and {new_tokens or 1} are to follow, and the"
                    f" context of {self.model} is {self.room} tokens",
                    "give a shorter prompt or a smaller max_tokens",
                    code="context_length_exceeded",
                )
        stream = fields.flag("stream")
        stream_options = fields.object("stream_options")
        include_usage = False
        if stream_options is not None:
            include_usage = stream_options.flag("include_usage")
            stream_options.ignore("include_obfuscation")
            stream_options.done()
        fields.only("n", 1)
        order = Order(
            prompts=prompts,
            texts=texts,
            sampling=_sampling(fields),
            bias=self._bias(fields),
            stops=_stops(fields),
            new_tokens=most if new_tokens is None else new_tokens,
            logprobs=logprobs,
            echo=echo,
            stream=stream,
            include_usage=include_usage,
            grammar=self._grammar(fields),
        )
        fields.ignore(*NAMES_ALONE)
        fields.done()
        return order

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
