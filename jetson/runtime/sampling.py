"""Logits -> token id."""

from __future__ import annotations

import numpy as np

from runtime.bundle import RunFailure


class Sampler:
    """Greedy at temperature 0, else temperature and top-k; equal seeds give equal sequences."""

    def __init__(
        self, vocabulary: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> None:
        """`vocabulary`: ids that the tokenizer knows; the embedding may have more, as padding.

        `top_k` 0 keeps all of them.
        """
        self._vocabulary = vocabulary
        self._temperature = temperature
        self._top_k = top_k
        self._generator = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Choose a token after `logits` (vocab,) float32."""
        scores = logits[: self._vocabulary].astype(np.float64)
        if not np.isfinite(scores).all():
            raise RunFailure("the model gave logits that are NaN or infinite", "run --verify")
        if self._temperature == 0:
            return int(scores.argmax())
        if 0 < self._top_k < scores.size:
            scores[scores < np.partition(scores, -self._top_k)[-self._top_k]] = -np.inf
        with np.errstate(over="ignore"):  # a temperature near zero makes all but the best -inf
            weights = np.exp((scores - scores.max()) / self._temperature)
        return int(self._generator.choice(scores.size, p=weights / weights.sum()))
