"""Logits -> token id."""

from __future__ import annotations

import numpy as np

from runtime.bundle import RunFailure


class Sampler:
    """Greedy at temperature 0, else temperature, top-k and top-p; equal seeds, equal sequences.

    All of it on the host: greedy over the 50 280 logits of the published models took numpy 3 to 7
    us on one core of a server, and a kernel for it would still have to be launched and waited for.
    """

    def __init__(
        self,
        vocabulary: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """`vocabulary`: ids that the tokenizer knows; the embedding may have more, as padding.

        `top_k` 0 and `top_p` 1 keep all of them.
        """
        self._vocabulary = vocabulary
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._generator = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Choose a token after `logits` (vocab,) float32."""
        scores = logits[: self._vocabulary]
        best = int(scores.argmax())  # the first NaN where there is one
        if not np.isfinite(scores[best]):
            raise RunFailure("the model gave logits that are NaN or infinite", "run --verify")
        if self._temperature == 0:
            return best
        scores = scores.astype(np.float64)
        if 0 < self._top_k < scores.size:
            scores[scores < np.partition(scores, -self._top_k)[-self._top_k]] = -np.inf
        with np.errstate(over="ignore"):  # a temperature near zero makes all but the best -inf
            weights = np.exp((scores - scores.max()) / self._temperature)
        weights /= weights.sum()
        if self._top_p < 1:
            self._drop_tail(weights)
        return int(self._generator.choice(weights.size, p=weights))

    def _drop_tail(self, weights: np.ndarray) -> None:
        """Keep the likeliest tokens that together reach top_p, at least one."""
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[1:][before[1:] >= self._top_p]] = 0
        weights /= weights.sum()
