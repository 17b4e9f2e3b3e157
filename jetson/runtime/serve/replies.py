"""The objects of OpenAI's API: whole answers, chunks of streamed ones, logprobs, usage, errors.

A `Writer` makes those of one request. `/v1/completions` and `/v1/chat/completions` differ in names
and in the form of logprobs alone.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from runtime.problems import BundleProblem
from runtime.serve.fields import RequestProblem
from runtime.serve.generation import Ended, Piece, ToldToken
from runtime.text import TextCodec

Json = dict[str, Any]


class TokenNames:
    """The text of single tokens, as it is behind other text."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._anchor = codec.encode("a")[0].tolist()[-1:]
        self._before = codec.decode(self._anchor)
        self.text = lru_cache(maxsize=1 << 14)(self._text)

    def _text(self, token: int) -> str:
        if not self._codec.shows(token):
            return self._codec.name(token)
        text = self._codec.decode([*self._anchor, token])
        return text.removeprefix(self._before)


@dataclass
class Answer:
    """All that came of one choice."""

    text: str = ""
    tokens: list[ToldToken] = field(default_factory=list)
    ended: Ended | None = None

    def add(self, piece: Piece) -> None:
        """Append what came."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ended = piece.ended or self.ended


class Writer(ABC):
    """Answers to one request."""

    whole: str  # the name of the object of an answer
    chunk: str  # and of a piece of one
    prefix: str  # of ids

    def __init__(self, model: str, names: TokenNames, logprobs: bool) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._names = names
        self._logprobs = logprobs
        self._head = {"created": int(time.time()), "model": model}

    def answer(self, answers: Sequence[Answer]) -> Json:
        """The whole answer, one choice per prompt."""
        choices = [
            {
                "index": index,
                **self.message(each.text),
                "logprobs": self.logprobs(index, each.tokens) if self._logprobs else None,
                "finish_reason": each.ended.finish if each.ended else None,
            }
            for index, each in enumerate(answers)
        ]
        ended = [each.ended for each in answers if each.ended]
        return {**self._object(self.whole), "choices": choices, **usage(ended)}

    def piece(self, piece: Piece) -> Json:
        """A chunk of a streamed answer."""
        choice = {
            "index": piece.index,
            **self.delta(piece.text),
            "logprobs": self.logprobs(piece.index, piece.tokens) if self._logprobs else None,
            "finish_reason": piece.ended.finish if piece.ended else None,
        }
        return {**self._object(self.chunk), "choices": [choice]}

    def last(self, ended: Sequence[Ended]) -> Json:
        """The chunk that tells the usage."""
        return {**self._object(self.chunk), "choices": [], **usage(ended)}

    def first(self) -> list[Json]:
        """Chunks before any text."""
        return []

    @abstractmethod
    def message(self, text: str) -> Json:
        """The part of a choice that has the text."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """The same of a chunk."""

    @abstractmethod
    def logprobs(self, index: int, tokens: Sequence[ToldToken]) -> Json:
        """Log-probabilities of the next tokens of a choice."""

    def _object(self, name: str) -> Json:
        return {"id": self.id, "object": name, **self._head}


class CompletionWriter(Writer):
    """Of /v1/completions."""

    whole = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, names: TokenNames, logprobs: bool) -> None:
        super().__init__(model, names, logprobs)
        self._characters: Counter[int] = Counter()  # told so far of each choice

    def message(self, text: str) -> Json:
        return {"text": text}

    def delta(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, index: int, tokens: Sequence[ToldToken]) -> Json:
        texts = [self._names.text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._characters[index])
            self._characters[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: ToldToken) -> Json | None:
        """Of several tokens with the same text, the likeliest."""
        if token.logprob is None:
            return None
        found: Json = {}
        for other, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(self._names.text(other), logprob)
        return found


class ChatWriter(Writer):
    """Of /v1/chat/completions."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return [{**self._object(self.chunk), "choices": [choice]}]

    def message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, index: int, tokens: Sequence[ToldToken]) -> Json:
        content = [
            {
                **self._named(token.id, token.logprob),
                "top_logprobs": [self._named(*each) for each in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> Json:
        text = self._names.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(ended: Sequence[Ended]) -> Json:
    """Tokens and seconds of all choices; the rates are what one of them had on average."""
    prompt = sum(each.prompt_tokens for each in ended)
    cached = sum(each.cached_tokens for each in ended)
    new = sum(each.new_tokens for each in ended)
    prompt_s = sum(each.prompt_s for each in ended)
    decode_s = sum(each.decode_s for each in ended)
    steps = sum(max(0, each.new_tokens - 1) for each in ended)  # the first comes with the prompt
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "timings": {
            "prompt_s": prompt_s,
            "decode_s": decode_s,
            "tokens_per_s": steps / decode_s if steps and decode_s else None,
        },
    }


def error(problem: BundleProblem) -> tuple[int, Json, dict[str, str]]:
    """Status, object and headers of a problem."""
    status, param, code, headers = 500, None, None, {}
    if isinstance(problem, RequestProblem):
        status, param, code = problem.status, problem.param, problem.code
        headers = problem.headers
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": str(problem), "type": kind, "param": param, "code": code}
    return status, {"error": told}, headers
