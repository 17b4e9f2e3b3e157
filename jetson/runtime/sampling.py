"""Logits -> token id, and the one table of the options that say how.

A new way of sampling is a function here, (value, tokens so far, logits) -> logits, and a row of
`SAMPLING`. Command lines, their help and the JSON record of a run are made from the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.problems import RunFailure


@dataclass
class Tokens:
    """What a sequence holds so far, as int arrays of any length."""

    prompt: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    generated: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


# The value of an option, the tokens so far, logits (vocab,) float64 -> logits of that shape. A
# function changes nothing that it is given, and leaves the likeliest of the tokens that it keeps
# above -inf.
Adjust = Callable[[float, Tokens, np.ndarray], np.ndarray]

# The same of what is no number: logits (vocab,) float64 -> logits, one of them above -inf.
Mask = Callable[[np.ndarray], np.ndarray]


def repetition_penalty(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Divide positive logits of tokens that occurred by `value`, multiply negative ones.

    Keskar et al. 2019 (CTRL) divide all of them; negative ones, too, shall become less likely, as
    transformers and vLLM have it. Prompt and generated text count, as there.
    """
    ids = np.concatenate([tokens.prompt, tokens.generated])
    before, logits = logits[ids], logits.copy()
    logits[ids] = np.where(before < 0, before * value, before / value)
    return logits


def presence_penalty(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Subtract `value` once from each token that was generated; the prompt does not count.

    As OpenAI's API defines it, and vLLM.
    """
    return logits - value * (np.bincount(tokens.generated, minlength=logits.size) > 0)


def frequency_penalty(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Subtract `value` for each time that a token was generated; the prompt does not count.

    As OpenAI's API defines it, and vLLM.
    """
    return logits - value * np.bincount(tokens.generated, minlength=logits.size)


def temperature(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Divide by `value`, after the largest logit became 0, so that nothing overflows upwards."""
    with np.errstate(over="ignore"):  # a temperature near zero makes all but the best -inf
        return (logits - logits.max()) / value


def top_k(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Keep the `value` likeliest tokens, and those as likely as the last of them."""
    if value >= logits.size:
        return logits
    return _keep(logits, logits >= np.partition(logits, -int(value))[-int(value)])


def top_p(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Keep the likeliest tokens that together reach the probability `value`, at least one.

    Holtzman et al. 2020, nucleus sampling.
    """
    probabilities = _softmax(logits)
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    keep = np.empty(logits.size, bool)
    keep[order] = before < value
    keep[order[0]] = True
    return _keep(logits, keep)


def min_p(value: float, tokens: Tokens, logits: np.ndarray) -> np.ndarray:
    """Keep tokens at least `value` times as likely as the likeliest; Nguyen et al. 2024."""
    return _keep(logits, logits - logits.max() >= math.log(value))


def _keep(logits: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(keep, logits, -np.inf)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class SamplingOption:
    """A number that says how to generate: `name` in JSON, --name with dashes on command lines."""

    name: str
    kind: type[int] | type[float]
    default: float  # with it, `adjust` is not called
    least: float
    most: float  # infinity: no limit
    metavar: str
    help: str
    adjust: Adjust | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


# Logits are adjusted in the order of the rows. Penalties come first, since they judge what the
# model gave. Then the temperature, so that what follows cuts the distribution which is drawn from.
# Then the cuts, each among what the one before it kept. This is the order of transformers; vLLM
# applies min-p before top-k, and llama.cpp the temperature at the end, both after the penalties.
SAMPLING = (
    SamplingOption("max_new_tokens", int, 64, 1, math.inf, "N", "end after so many tokens"),
    SamplingOption(
        *("repetition_penalty", float, 1.0, 0.01, 100, "R"),
        "above 1: tokens of prompt and text become less likely, however often they occurred",
        repetition_penalty,
    ),
    SamplingOption(
        *("presence_penalty", float, 0.0, -2, 2, "A"),
        "taken from the logit of each token that was generated",
        presence_penalty,
    ),
    SamplingOption(
        *("frequency_penalty", float, 0.0, -2, 2, "A"),
        "the same, for each time that it was generated",
        frequency_penalty,
    ),
    SamplingOption(
        *("temperature", float, 0.0, 0, math.inf, "T"),
        "sample; 0 always takes the likeliest token",
        temperature,
    ),
    SamplingOption(
        *("top_k", int, 0, 0, math.inf, "K"), "sample among the K likeliest tokens; 0: all", top_k
    ),
    SamplingOption(
        *("top_p", float, 1.0, 0, 1, "P"),
        "sample among the likeliest that together have this probability",
        top_p,
    ),
    SamplingOption(
        *("min_p", float, 0.0, 0, 1, "P"),
        "sample among tokens at least P times as likely as the likeliest",
        min_p,
    ),
    SamplingOption("seed", int, 0, 0, math.inf, "S", "of the sampling"),
)


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every row of `SAMPLING`: what was given under its name, else its default."""
    return {option.name: given.get(option.name, option.default) for option in SAMPLING}


class Sampler:
    """Greedy at temperature 0, else a draw; equal seeds and settings, equal sequences.

    Penalties count at temperature 0 as well. All of it on the host: greedy over the 50 280 logits
    of the published models took numpy 3 to 7 us on one core of a server, and a kernel for it would
    still have to be launched and waited for.
    """

    def __init__(self, vocabulary: int, masks: Sequence[Mask] = (), **given: float) -> None:
        """`vocabulary`: ids that the tokenizer knows; the embedding may have more, as padding.

        Args:
            masks: what else changes the logits, before all rows of `SAMPLING`.
            given: values under the names of `SAMPLING`; what is absent has its default.
        """
        values = settings(given)
        self._vocabulary = vocabulary
        self._masks = masks
        self._active = [
            (option.adjust, values[option.name])
            for option in SAMPLING
            if option.adjust is not None and values[option.name] != option.default
        ]
        self._greedy = values["temperature"] == 0
        self._generator = np.random.default_rng(int(values["seed"]))
        self._tokens = Tokens()

    def read(self, prompt: np.ndarray) -> None:
        """A prompt, (1, l) ids, goes on from all before, which is prompt from now on.

        So the turns of a conversation count as they do with an API that is sent all of them anew.
        """
        before = self._tokens
        self._tokens = Tokens(np.concatenate([before.prompt, before.generated, prompt[0]]))

    def forget(self) -> None:
        """No token was read or generated yet; the draws go on."""
        self._tokens = Tokens()

    def __call__(self, logits: np.ndarray) -> int:
        """Choose a token after `logits` (vocab,) float32.

        Raises:
            RunFailure: the largest of them is infinite, or one is NaN.
        """
        scores = logits[: self._vocabulary]
        best = int(scores.argmax())  # the first NaN where there is one
        if not np.isfinite(scores[best]):
            raise RunFailure("the model gave logits that are NaN or infinite", "run --verify")
        if self._active or self._masks:
            scores = scores.astype(np.float64)
            for mask in self._masks:
                scores = mask(scores)
            for adjust, value in self._active:
                scores = adjust(value, self._tokens, scores)
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(self._generator.choice(scores.size, p=_softmax(scores)))
        self._tokens.generated = np.append(self._tokens.generated, token)
        return token
