"""Teacher-forced decoding, token by token: what a model does when it generates.

Perplexity is measured on prefill, which computes in chunks; generating takes another path through
the same model: one token a call, its states rounded to their type after each. Here every token of a
text is given, one a call, and the logits are compared with those of the first model's prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from runtime.failures import during
from ssdi8_edge.evaluate.subject import Subject
from ssdi8_edge.evaluate.texts import Text
from ssdi8_edge.evaluate.windows import (
    exponential,
    less_memory,
    reason_of,
    require_context,
    windows_of,
)
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
        loss: the mean negative log-likelihood of decoding, nats; finite where its exponential may
            not be.
        kl: mean over positions of KL(first model's prefill ‖ this decoding), nats; prefill_kl: the
            same of this model's prefill, 0 for the first. None for a model with other tokens.
        kl_parts: kl over consecutive parts of the text, to see whether it grows.
        reason: why figures are infinite or no numbers, in a sentence.
    """

    model: str
    engine: str
    text: str
    tokens: int
    perplexity: float
    prefill_perplexity: float
    loss: float
    kl: float | None = None
    prefill_kl: float | None = None
    kl_parts: tuple[float, ...] = ()
    reason: str | None = None


class _Run:
    """One model on the text: a sequence that is prefilled in pieces, and one that is decoded."""

    def __init__(self, subject: Subject, ids: Tensor) -> None:
        self.subject = subject
        self.ids = ids
        self._prefilled, self._decoded = subject.sequence(), subject.sequence()
        self._loss = self._prefill_loss = self._prefill_kl = 0.0
        self._kl: list[float] = []
        self._beyond_fp16: list[str] = []

    def add(self, part: slice, reference: Tensor | None, compared: bool) -> Tensor:
        """Run these tokens; returns the logits (L, V) of their prefill.

        Args:
            reference: the first model's logits of the same positions; None: this is the first.
            compared: whether it has the tokens of the first.
        """
        self.subject.beyond_fp16.clear()
        tokens = self.ids[part].to(self.subject.device)
        following = self.ids[part.start + 1 : part.stop + 1].to(self.subject.device)
        prefill = self._prefilled(tokens[None])[0]
        decoded = torch.cat([self._decoded(token.view(1, 1))[0] for token in tokens])
        self._beyond_fp16 += self.subject.beyond_fp16[:1]
        # The last token of the text predicts nothing.
        count = len(following)
        log_prefill, log_decoded = (
            logits[:count].double().log_softmax(-1) for logits in (prefill, decoded)
        )
        self._prefill_loss -= log_prefill.gather(1, following[:, None]).sum().item()
        self._loss -= log_decoded.gather(1, following[:, None]).sum().item()
        if compared:
            first = log_prefill if reference is None else reference[:count].double().log_softmax(-1)
            log_r = first.to(log_decoded.device)
            self._kl += _divergence(log_r, log_decoded).tolist()
            self._prefill_kl += _divergence(log_r, log_prefill).sum().item()
        return prefill

    def result(self, text: Text) -> Decoding:
        predicted = len(self.ids) - 1
        loss = self._loss / predicted
        compared = len(self._kl)
        bounds = [compared * part // PARTS for part in range(PARTS + 1)]
        return Decoding(
            model=self.subject.name,
            engine=self.subject.engine,
            text=text.name,
            tokens=len(self.ids),
            perplexity=exponential(loss),
            prefill_perplexity=exponential(self._prefill_loss / predicted),
            loss=loss,
            kl=sum(self._kl) / compared if compared else None,
            prefill_kl=self._prefill_kl / compared if compared else None,
            kl_parts=tuple(sum(self._kl[a:b]) / (b - a) for a, b in pairwise(bounds) if b > a),
            reason=reason_of(self.subject, loss, self._beyond_fp16),
        )


def decodings(
    subjects: Sequence[Subject], text: Text, tokens: int, track: Track = silent
) -> list[Decoding]:
    """Decode the first `tokens` tokens of `text` by each model, the first being compared with.

    Raises:
        UsageError: the text is shorter.
    """
    found = require_length(subjects, text, tokens)
    runs = [_Run(subject, ids) for subject, ids in zip(subjects, found, strict=True)]
    first = runs[0]
    turns = [(start, n) for start in range(0, tokens, PIECE) for n in range(len(runs))]
    reference: Tensor | None = None
    for start, n in track(turns, f"{text.name}, {tokens} tokens one by one"):
        run = runs[n]
        same = run.subject.vocabulary == first.subject.vocabulary
        compared = same and torch.equal(run.ids, first.ids)
        part = slice(start, min(start + PIECE, tokens))
        doing = f"decoding {text.name} by {run.subject.name}"
        with torch.inference_mode(), during(doing, less_memory(subjects)):
            prefill = run.add(part, reference if n else None, compared)
        if n == 0:
            reference = prefill
    return [run.result(text) for run in runs]


def require_length(subjects: Sequence[Subject], text: Text, tokens: int) -> list[Tensor]:
    """The first `tokens` tokens (T) of the text, as each model reads it.

    Raises:
        UsageError: it has fewer, or a model's context is shorter.
    """
    require_context(subjects, tokens, "--decode")
    found = [windows[0] for windows in windows_of(subjects, text, tokens, 1)]
    shortest = min(map(len, found))
    if shortest < tokens:
        raise UsageError(
            f"{text.name} holds {shortest} tokens, and --decode {tokens} needs {tokens};",
            "give fewer, or a longer text.",
        )
    return found


def _divergence(log_r: Tensor, log_p: Tensor) -> Tensor:
    """KL(r ‖ p) of each row, nats."""
    return (log_r.exp() * (log_r - log_p)).sum(-1)
