"""Logits -> token: each function against its definition, the order, the seeds, the table."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import tiny_bundle  # noqa: F401  (puts jetson/ on the path)
import torch
import transformers

from runtime.problems import RunFailure
from runtime.sampling import SAMPLING, Sampler, Tokens, min_p, settings, top_p
from runtime.sampling import frequency_penalty as frequency
from runtime.sampling import presence_penalty as presence
from runtime.sampling import repetition_penalty as repetition

PROMPT = np.array([[4, 9, 9, 2]])
GENERATED = [7, 7, 7, 4]


def make_logits(rows: int, vocabulary: int, seed: int) -> np.ndarray:
    """(rows, vocabulary) float32, every seventh row with many equal values."""
    logits = np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)
    logits[::7] = np.round(logits[::7])
    return logits


# Recorded before there were penalties and min-p: SHA-256 of str() of the tokens.
RECORDED = [
    ({}, "dbe6ed1a62e9"),
    ({"temperature": 0.7}, "185c30c07cbf"),
    ({"temperature": 1.5, "top_k": 5, "seed": 1}, "1084fa0549c7"),
    ({"temperature": 1.0, "top_p": 0.8, "seed": 2}, "7569603880b3"),
    ({"temperature": 2.5, "top_k": 40, "top_p": 0.95, "seed": 3}, "b36aed8d2220"),
    ({"temperature": 0.3, "top_k": 1000, "top_p": 0.0, "seed": 4}, "dbe6ed1a62e9"),
    ({"temperature": 1e-310}, "094dc2edcd0d"),
]


@pytest.mark.parametrize(("options", "digest"), RECORDED, ids=str)
def test_seeds_give_what_they_always_gave(options: dict[str, Any], digest: str) -> None:
    sample = Sampler(490, **options)
    tokens = [sample(row) for row in make_logits(500, 500, seed=11)]
    assert hashlib.sha256(str(tokens).encode()).hexdigest()[:12] == digest


def test_repetition_counts_prompt_and_text_once() -> None:
    tokens = Tokens(PROMPT[0], np.array(GENERATED))
    logits = np.array([1.0, -1, 2, -2, 3, -3, 4, -4, 0, 6])
    expected = [1, -1, 2 / 1.5, -2, 2, -3, 4, -6, 0, 4]
    assert repetition(1.5, tokens, logits).tolist() == pytest.approx(expected)
    assert logits[9] == 6  # the argument stays what it was


def test_presence_and_frequency_count_the_text_alone() -> None:
    tokens = Tokens(PROMPT[0], np.array(GENERATED))
    logits = np.zeros(10)
    assert presence(0.5, tokens, logits).tolist() == [0, 0, 0, 0, -0.5, 0, 0, -0.5, 0, 0]
    assert frequency(0.5, tokens, logits).tolist() == [0, 0, 0, 0, -0.5, 0, 0, -1.5, 0, 0]
    assert presence(0.5, Tokens(PROMPT[0]), logits).tolist() == [0] * 10


@pytest.mark.parametrize("seed", range(20))
def test_distribution_is_that_of_transformers(seed: int) -> None:
    """Repetition penalty, temperature, top-k, top-p and min-p, in its order."""
    draw = np.random.default_rng(seed)
    given = {
        "repetition_penalty": draw.uniform(0.5, 2),
        "temperature": draw.uniform(0.3, 3),
        "top_k": int(draw.integers(5, 60)),
        "top_p": draw.uniform(0.5, 1),
        "min_p": draw.uniform(0, 0.2),
    }
    logits = draw.normal(0, 3, 100)
    ids = draw.integers(0, 100, 12)
    processors = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]),
            transformers.TemperatureLogitsWarper(given["temperature"]),
            transformers.TopKLogitsWarper(given["top_k"]),
            transformers.TopPLogitsWarper(given["top_p"]),
            transformers.MinPLogitsWarper(given["min_p"]),
        ]
    )
    scores = processors(torch.from_numpy(ids)[None], torch.from_numpy(logits)[None])
    expected = torch.softmax(scores, -1)[0].numpy()
    ours = logits
    for option in SAMPLING:
        if option.name in given and option.adjust is not None:
            ours = option.adjust(given[option.name], Tokens(ids), ours)
    weights = np.exp(ours - ours.max())
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-9, atol=1e-15)


def test_min_p_keeps_tokens_relative_to_the_likeliest() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    for value, kept in ((0.05, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)):
        assert np.isfinite(min_p(value, Tokens(), logits)).sum() == kept
    assert np.isfinite(min_p(1.0, Tokens(), np.zeros(4))).sum() == 4  # equally likely ones stay


def test_top_p_of_zero_keeps_one() -> None:
    assert np.isfinite(top_p(0.0, Tokens(), np.array([1.0, 2.0, 2.0]))).tolist() == [
        False,
        True,
        False,
    ]


def test_greedy_with_penalties() -> None:
    """At temperature 0 a token loses its place, once it was taken or stood in the prompt."""
    logits = np.array([3.0, 2.5, 2.0, -1], np.float32)

    def take(count: int, **given: float) -> list[int]:
        sample = Sampler(4, **given)
        sample.read(np.array([[1]]))
        return [sample(logits) for _ in range(count)]

    assert take(4) == [0, 0, 0, 0]
    assert take(4, presence_penalty=1.2) == [0, 1, 2, 0]  # 3, 2.5, 2, then 1.8 over 1.3 and 0.8
    assert take(4, frequency_penalty=0.6) == [0, 1, 0, 2]
    assert take(3, repetition_penalty=2.0) == [0, 2, 0]  # 1 counts from the prompt: 1.25
    assert take(3, repetition_penalty=2.0, top_k=1, top_p=0.1, min_p=1) == [0, 2, 0]


def test_what_was_generated_is_prompt_in_the_next_turn() -> None:
    logits = np.array([3.0, 2.5, 2.0], np.float32)
    sample = Sampler(3, presence_penalty=1.0)
    sample.read(np.array([[2]]))
    assert [sample(logits), sample(logits)] == [0, 1]
    sample.read(np.array([[2]]))
    assert sample(logits) == 0
    sample = Sampler(3, repetition_penalty=2.0)
    assert [sample(logits), sample(logits)] == [0, 1]
    sample.read(np.array([[0]]))
    assert sample(logits) == 2


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0, "frequency_penalty": 1.0}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float, given: dict[str, float]) -> None:
    with pytest.raises(RunFailure, match="NaN or infinite"):
        Sampler(3, **given)(np.array([0, bad, 1], np.float32))


def test_extremes_stay_numbers() -> None:
    """The limits of every row, with logits at the limits of FP32 and some of -inf."""
    edge = np.finfo(np.float32).max
    logits = np.array([edge, 1, -edge, -np.inf, 0], np.float32)
    for option in SAMPLING:
        for value in (option.least, min(option.most, 1e300)):
            given = {"temperature": 1.0, option.name: option.kind(value)}
            sample = Sampler(5, **given)
            assert all(sample(logits) in range(5) for _ in range(3)), given


def test_default_is_in_range_and_changes_nothing() -> None:
    assert settings({}) == {option.name: option.default for option in SAMPLING}
    assert settings({"top_k": 3, "other": 1})["top_k"] == 3 and "other" not in settings(
        {"other": 1}
    )
    for option in SAMPLING:
        assert option.least <= option.default <= option.most
        assert isinstance(option.default, option.kind)
