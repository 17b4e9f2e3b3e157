"""One sequence that the server generates, between two calls of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from runtime.sampling import Mask, Sampler
from runtime.serve.order import Order
from runtime.serve.steps import Seat
from runtime.stop import StopTexts
from runtime.text import TextCodec, TextStream


@dataclass(frozen=True)
class ToldToken:
    """A token with the log-probability, in nats, that the model gave it; None for a first one.

    `top`: the likeliest tokens at its place, the likeliest first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Ended:
    """How a sequence ended: `finish` is "stop" or "length"."""

    finish: str
    prompt_tokens: int
    cached_tokens: int  # of these, not read anew
    new_tokens: int
    prompt_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first, which comes with the prompt."""
        later = self.new_tokens - 1
        return later / self.decode_s if later > 0 and self.decode_s else None

    def describe(self) -> str:
        """For a log: numbers, and nothing of what was said."""
        rate = self.tokens_per_s
        return (
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} from a state),"
            f" {self.new_tokens} new, {self.finish}, first after {self.prompt_s:.2f} s"
            + (f", {rate:.1f} tokens/s" if rate else "")
        )


@dataclass(frozen=True)
class Piece:
    """What was added to a sequence: text, and tokens where logprobs were asked for."""

    index: int
    text: str = ""
    tokens: tuple[ToldToken, ...] = ()
    ended: Ended | None = None
    problem: Exception | None = None  # ended as well


Deliver = Callable[[Piece], None]
Keep = Callable[["Generation"], None]


@dataclass
class Generation:
    """A prompt and what follows it. Only the engine's thread works on it, but for `cancelled`.

    Attributes:
        deadline: time.monotonic() at which it ends as if it were long enough.
        deliver: gets each piece as it comes; the last one has `ended` or `problem`.
        cancelled: set by any thread: nobody waits for it.
        ids: what is to be run before the first token is chosen; the end of it is the prompt.
        cached: how many of them were run before it began.
    """

    order: Order
    index: int
    codec: TextCodec
    deadline: float
    deliver: Deliver
    cancelled: bool = False
    seat: Seat = field(default_factory=Seat)
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        order = self.order
        self.prompt: list[int] = order.prompts[self.index][0].tolist()
        self._grammar = order.grammar() if order.grammar else None
        masks: list[Mask] = [_Bias(order.bias)] if order.bias else []
        masks += [self._grammar.mask] if self._grammar else []
        self._sample = Sampler(self.codec.vocabulary, masks, **order.sampling)
        self._stop = StopTexts(order.stops)
        self._began: float | None = None
        self._first_token: float | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of all positions of the prompt are wanted."""
        return self.order.echo and self.order.logprobs is not None

    def begin(self, seat: Seat, ids: list[int]) -> None:
        """It has a seat, and its prompt is to be read so far that `ids` were run."""
        self._began = time.monotonic()
        self.seat, self.ids, self.cached = seat, ids, len(seat.slot.ids)
        self._sample.read(np.array([ids]))
        self._stream = TextStream(self.codec, ids)
        if self.order.echo:
            first = self.prompt[:1] if self.scores_prompt else ()
            self._give(
                self.order.texts[self.index], tuple(ToldToken(token, None, ()) for token in first)
            )

    def prompt_logits(self, start: int, logits: np.ndarray) -> None:
        """Tell the tokens behind positions `start`… of the prompt; `logits` (l, vocab)."""
        following = self.prompt[start + 1 : start + 1 + len(logits)]
        told = [self._told(token, row) for token, row in zip(following, logits, strict=False)]
        self._give("", tuple(told))

    def next_token(self, logits: np.ndarray, keep: Keep) -> None:
        """Choose the token after `logits` (vocab,) and give its text; the slot runs it next.

        Args:
            keep: is called before the client learns that this was the end.
        """
        if len(self.tokens) >= self.order.new_tokens:
            self._end("length", keep)
            return
        token = self._sample(logits)
        if self._first_token is None:
            self._first_token = time.monotonic()
        self.tokens.append(token)
        self.seat.slot.pending = [token]
        told = () if self.order.logprobs is None else (self._told(token, logits),)
        if token in self.codec.end_ids:
            self._end("stop", keep, told)
            return
        self._give(self._stop.add(self._stream.add(token)), told)
        if (self._grammar is not None and self._grammar.took(token)) or self._stop.found:
            self._end("stop", keep)
        elif len(self.tokens) >= self.order.new_tokens or time.monotonic() > self.deadline:
            self._end("length", keep)

    def fail(self, problem: Exception) -> None:
        """End it by a problem."""
        self.over = True
        self.deliver(Piece(self.index, problem=problem))

    def _end(self, finish: str, keep: Keep, told: tuple[ToldToken, ...] = ()) -> None:
        keep(self)
        text = ""
        if not self._stop.found:
            text = self._stop.add(self._stream.finish()) + self._stop.flush()
            finish = "stop" if self._stop.found else finish
        self.over = True
        now = time.monotonic()
        began = self._began or now
        first = self._first_token or now
        ended = Ended(
            finish=finish,
            prompt_tokens=len(self.ids),
            cached_tokens=self.cached,
            new_tokens=len(self.tokens),
            prompt_s=first - began,
            decode_s=now - first,
        )
        self.deliver(Piece(self.index, text, told, ended))

    def _give(self, text: str, told: tuple[ToldToken, ...]) -> None:
        if text or told:
            self.deliver(Piece(self.index, text, told))

    def _told(self, token: int, logits: np.ndarray) -> ToldToken:
        scores = logits[: self.codec.vocabulary].astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        count = min(self.order.logprobs or 0, scores.size)
        best = np.argpartition(-scores, count - 1)[:count] if count else np.empty(0, np.int64)
        best = best[np.argsort(-scores[best], kind="stable")]
        top = tuple((int(each), float(scores[each])) for each in best)
        return ToldToken(token, float(scores[token]), top)


class _Bias:
    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.array(list(bias), np.int64)
        self._values = np.array(list(bias.values()), np.float64)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[self._ids] += self._values
        return logits
