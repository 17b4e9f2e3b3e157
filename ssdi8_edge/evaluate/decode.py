"""Teacher-forced decoding, token by token: what a model does when it generates.

Perplexity is measured on prefill, which computes in chunks; generating takes another path through
the same model: one token a call, its states rounded to their type after each. Here every token of a
text is given, one a call, and the logits are compared with those of the first model's prefill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ssdi8_edge.evaluate.subject import Subject
from ssdi8_edge.evaluate.texts import Text
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.progress import Track, silent

# Positions whose logits are held at once; a multiple of the usual chunk sizes, so that prefill in
# such pieces is prefill in one go.
PIECE = 256
# The text in so many parts, to see whether errors grow along it.
PARTS = 8


@dataclass(frozen=True)
class Decoding:
    """One sequence, decoded token by token.

    Attributes:
        tokens: of the text, from its start; each but the last predicts the next.
        perplexity: of decoding; prefill_perplexity: of the same model's prefill of the same tokens.
        kl: mean over positions of KL(first model's prefill ‖ this decoding), nats; prefill_kl: the
            same of this model's prefill. None for a model with other tokens.
        kl_parts: kl over consecutive parts of the text, to see whether it grows.
    """

    model: str
    engine: str
    text: str
    tokens: int
    perplexity: float
    prefill_perplexity: float
    kl: float | None = None
    prefill_kl: float | None = None
    kl_parts: tuple[float, ...] = ()


class _Run:
    """One model on the text: a sequence that is prefilled in pieces, and one that is decoded."""

    def __init__(self, subject: Subject, ids: Tensor) -> None:
        self.subject = subject
        self.ids = ids
        self._prefilled, self._decoded = subject.sequence(), subject.sequence()
        self._loss = self._prefill_loss = self._prefill_kl = 0.0
        self._kl: list[float] = []

    def add(self, part: slice, reference: Tensor | None) -> Tensor:
        """Run these tokens; returns the logits (L, V) of their prefill.

        `reference`: the first model's, of the same positions; None where they cannot be compared.
        """
        tokens = self.ids[part].to(self.subject.device)
        following = self.ids[part.start + 1 : part.stop + 1].to(self.subject.device)
        prefill = self._prefilled(tokens[None])[0]
        decoded = torch.cat([self._decoded(token.view(1, 1))[0] for token in tokens])
        # The last token of the text predicts nothing.
        count = len(following)
        log_prefill, log_decoded = (
            logits[:count].double().log_softmax(-1) for logits in (prefill, decoded)
        )
        self._prefill_loss -= log_prefill.gather(1, following[:, None]).sum().item()
        self._loss -= log_decoded.gather(1, following[:, None]).sum().item()
        if reference is not None:
            log_r = reference[:count].double().log_softmax(-1).to(log_decoded.device)
            self._kl += _divergence(log_r, log_decoded).tolist()
            self._prefill_kl += _divergence(log_r, log_prefill).sum().item()
        return prefill

    def result(self, text: Text) -> Decoding:
        predicted = len(self.ids) - 1
        compared = len(self._kl)
        bounds = [compared * part // PARTS for part in range(PARTS + 1)]
        return Decoding(
            model=self.subject.name,
            engine=self.subject.engine,
            text=text.name,
            tokens=len(self.ids),
            perplexity=_exp(self._loss / predicted),
            prefill_perplexity=_exp(self._prefill_loss / predicted),
            kl=sum(self._kl) / compared if compared else None,
            prefill_kl=self._prefill_kl / compared if compared else None,
            kl_parts=tuple(sum(self._kl[a:b]) / (b - a) for a, b in pairwise(bounds) if b > a),
        )


def decodings(
    subjects: Sequence[Subject], text: Text, tokens: int, track: Track = silent
) -> list[Decoding]:
    """Decode the first `tokens` tokens of `text` by each model, the first being compared with.

    Raises:
        UsageError: the text is shorter.
    """
    runs = []
    for subject in subjects:
        ids = text.windows(subject.tokenizer, tokens, 1)[0]
        if len(ids) < tokens:
            raise UsageError(
                f"{text.name} holds {len(ids)} tokens;", f"--decode {tokens} needs as many."
            )
        runs.append(_Run(subject, ids))
    first = runs[0]
    turns = [(start, n) for start in range(0, tokens, PIECE) for n in range(len(runs))]
    reference: Tensor | None = None
    with torch.inference_mode():
        for start, n in track(turns, f"{text.name}, {tokens} tokens one by one"):
            run = runs[n]
            comparable = run.subject.vocabulary == first.subject.vocabulary and torch.equal(
                run.ids, first.ids
            )
            part = slice(start, min(start + PIECE, tokens))
            if n == 0:
                reference = run.add(part, None)
            else:
                run.add(part, reference if comparable else None)
    return [run.result(text) for run in runs]


def _divergence(log_r: Tensor, log_p: Tensor) -> Tensor:
    """KL(r ‖ p) of each row, nats."""
    return (log_r.exp() * (log_r - log_p)).sum(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
