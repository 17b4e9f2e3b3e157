"""Perplexity over windows of a text, and how far a model is from the one it was made from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from runtime.failures import during
from runtime.files import sha256
from ssdi8_edge.evaluate.subject import Subject
from ssdi8_edge.evaluate.texts import Text, text_file
from ssdi8_edge.ground.decimals import fixed
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.spool import GPU_TOKENS_PER_BATCH

# docs/method.md §11.1: non-overlapping blocks of 2048 tokens.
WINDOW = 2048
# docs/method.md §11.3: what an average over positions hides.
CONTEXTS = (512, 2048, 8192)
LAST = 256
# From the end of one window of the long-context table to that of the next: non-overlapping windows
# of 8192 tokens would leave too few scored tokens to tell methods apart.
SPACING = 2048
# Log-probabilities of so many positions at a time: at 50,000 tokens of vocabulary and 2048
# positions each copy of them would take 0.8 GB.
SLICE = 256
ALL = 1 << 40


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, in nats per token, of the last tokens of windows.

    Attributes:
        window_tokens: length of a window; each starts from zero states.
        scored_tokens: how many of its last tokens count.
        kl: mean over the scored tokens of KL(first model ‖ this one), nats; None for the first, and
            for a model with other tokens.
        top1_agreement: fraction of the scored tokens where both have the same likeliest token.
        change_stderr: standard error of the change of perplexity against the first model, relative:
            of the mean over windows of the difference in their losses. None for one window.
        saturation: site -> fraction of INT8 values at the end of their range, in the worst layer;
            empty where nothing is INT8 or the engine does not count.
        loss: the mean negative log-likelihood itself; finite where its exponential may not be.
        reason: why figures are infinite or no numbers, in a sentence.
    """

    model: str
    engine: str
    text: str
    windows: int
    window_tokens: int
    scored_tokens: int
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None
    change_stderr: float | None = None
    saturation: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    reason: str | None = None


def exponential(loss: float) -> float:
    """Infinite where the result is beyond a float: from 709.8 nats on."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def reason_of(subject: Subject, loss: float, beyond_fp16: Sequence[str]) -> str | None:
    """Why figures are infinite or no numbers, in a sentence; None: they are not."""
    if beyond_fp16:
        return beyond_fp16[0]
    if not math.isfinite(loss):
        return f"{subject.source} ({subject.name}) computes logits that are not numbers."
    if not math.isfinite(exponential(loss)):
        return f"{subject.source} ({subject.name}) loses {fixed(loss, 0)} nats per token."
    return None


class _Tally:
    """Sums over the scored positions of one model."""

    def __init__(self) -> None:
        # Nats per token of each window. All windows score as many tokens.
        self.losses: list[float] = []
        self.compared = 0
        self.kl = 0.0
        self.same_top = 0
        self.saturation: defaultdict[str, float] = defaultdict(float)
        self.beyond_fp16: list[str] = []

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """logits and reference (S, T, V) FP32 of S windows predict targets (S, T)."""
        for i in range(len(targets)):
            self._add_window(logits[i], targets[i], None if reference is None else reference[i])

    def _add_window(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        nll = 0.0
        for start in range(0, len(targets), SLICE):
            part = slice(start, start + SLICE)
            # FP64: KL to an FP16 model is a difference in the seventh digit.
            log_p = logits[part].double().log_softmax(-1)
            nll -= log_p.gather(1, targets[part, None].to(log_p.device)).sum().item()
            if reference is None:
                continue
            log_r = reference[part].double().log_softmax(-1)
            self.compared += len(log_r)
            self.kl += (log_r.exp() * (log_r - log_p)).sum().item()
            # A row with a NaN is NaN throughout, and its likeliest token is none.
            known = ~(log_r[:, 0] + log_p[:, 0]).isnan()
            self.same_top += int((known & (log_r.argmax(-1) == log_p.argmax(-1))).sum())
        self.losses.append(nll / len(targets))

    def add_saturation(self, fractions: dict[str, float], windows: int) -> None:
        """Windows are of one length, so that the mean of their fractions is the fraction."""
        for site, fraction in fractions.items():
            self.saturation[site] += windows * fraction

    def worst_saturation(self) -> dict[str, float]:
        """`layers.{i}.<site>` sums -> site: mean over windows in the worst layer."""
        worst: dict[str, float] = {}
        for name, total in self.saturation.items():
            site = name.rsplit(".", 1)[-1]
            worst[site] = max(worst.get(site, 0.0), total / len(self.losses))
        return worst

    def change_stderr(self, first: _Tally) -> float | None:
        """Paired, window by window: the text is the same, so that what both find hard cancels."""
        if not self.compared or len(self.losses) < 2:
            return None
        changes = [ours - theirs for ours, theirs in zip(self.losses, first.losses, strict=True)]
        if not all(map(math.isfinite, changes)):
            return math.nan
        return stdev(changes) / math.sqrt(len(changes))

    def result(
        self, subject: Subject, text: Text, window: int, scored: int, first: _Tally
    ) -> Perplexity:
        # Not fmean, which refuses infinite values of both signs.
        loss = sum(self.losses) / len(self.losses)
        return Perplexity(
            model=subject.name,
            engine=subject.engine,
            text=text.name,
            windows=len(self.losses),
            window_tokens=window,
            scored_tokens=scored,
            perplexity=exponential(loss),
            loss=loss,
            kl=self.kl / self.compared if self.compared else None,
            top1_agreement=self.same_top / self.compared if self.compared else None,
            change_stderr=self.change_stderr(first),
            saturation=self.worst_saturation(),
            reason=reason_of(subject, loss, self.beyond_fp16),
        )


def perplexity(
    subject: Subject, text: Path, limit: int | None = None, track: Track = silent
) -> Perplexity:
    """Perplexity of one model on a UTF-8 text, see `perplexities`."""
    return perplexities([subject], text_file(text), limit, track)[0]


def perplexities(
    subjects: Sequence[Subject], text: Text, limit: int | None = None, track: Track = silent
) -> list[Perplexity]:
    """Perplexity of each model on `text`, the first being the one compared with.

    Args:
        limit: the first so many windows; None takes all. A text shorter than a window is one.

    Raises:
        UsageError: a tokenizer that belongs to another model, or a text too short.
    """
    return _measure(subjects, text, windows_of(subjects, text, WINDOW, limit), track)


def long_context(
    subjects: Sequence[Subject], text: Text, limit: int | None = None, track: Track = silent
) -> list[list[Perplexity]]:
    """Of each model, the perplexity of the last 256 tokens of windows of 512, 2048 and 8192.

    A window ends every 2048 tokens, from the 8192nd on; longer ones overlap. The scored tokens are
    the same for every length, and so is all that precedes them but how much of it the model sees:
    windows of one length differ from those of another in the context alone.

    Args:
        limit: the first so many windows of each length; None takes all.

    Raises:
        UsageError: the text is shorter than the longest window.
    """
    # The text as windows of one token: no more of it than the windows take.
    tokens = CONTEXTS[-1] + (limit - 1) * SPACING if limit else None
    require_contexts(subjects, text)
    ids = [each.flatten() for each in windows_of(subjects, text, 1, tokens)]
    windows = [each.unfold(0, CONTEXTS[-1], SPACING) for each in ids]
    by_length = [
        _measure(subjects, text, [each[:, -length:] for each in windows], track, LAST)
        for length in CONTEXTS
    ]
    return [list(of_model) for of_model in zip(*by_length, strict=True)]


def require_contexts(subjects: Sequence[Subject], text: Text) -> None:
    """Refuse a text that `long_context` would refuse, before anything is measured.

    Raises:
        UsageError: it is shorter than the longest window, or that is longer than a model's context.
    """
    require_context(subjects, CONTEXTS[-1], "the long-context table")
    found = min(len(each) for each in windows_of(subjects, text, 1, CONTEXTS[-1]))
    if found < CONTEXTS[-1]:
        raise UsageError(
            f"{text.name} holds {found} tokens;",
            f"the long-context table needs a text of at least {CONTEXTS[-1]}.",
        )


def require_context(subjects: Sequence[Subject], tokens: int, what: str) -> None:
    """Refuse a model whose context is shorter than `what`.

    Raises:
        UsageError: it is.
    """
    for subject in subjects:
        if subject.context is not None and subject.context < tokens:
            raise UsageError(
                f"{subject.source} has a context of {subject.context} tokens, and {what} takes "
                f"{tokens};",
                f"build it with --context {tokens} or more, or name its quantized/ folder.",
            )


def windows_of(
    subjects: Sequence[Subject], text: Text, tokens: int, limit: int | None
) -> list[Tensor]:
    """Windows (S, T) INT64 of each model; those with the same tokenizer share them."""
    read: dict[str, Tensor] = {}
    found = []
    for subject in subjects:
        key = sha256(subject.tokenizer)
        if key not in read:
            read[key] = text.windows(subject.tokenizer, tokens, limit or ALL)
        found.append(read[key])
    return found


def _measure(
    subjects: Sequence[Subject],
    text: Text,
    windows: Sequence[Tensor],
    track: Track,
    scored: int | None = None,
) -> list[Perplexity]:
    """Each model on its windows; the last `scored` tokens of a window count, or all that can.

    Models take turns at each batch of windows, so that one batch of the first one's logits is all
    that is kept. A CPU gains nothing by more than a window at once.
    """
    first = subjects[0]
    tallies = [_Tally() for _ in subjects]
    longest = max(ids.shape[1] for ids in windows)
    require_context(subjects, longest, f"a window of {text.name}")
    size = 1 if first.device == "cpu" else max(1, GPU_TOKENS_PER_BATCH // longest)
    starts = range(0, max(map(len, windows)), size)
    turns = [(start, n) for start in starts for n in range(len(subjects))]
    reference: Tensor | None = None
    for start, n in track(turns, f"{text.name}, {windows[0].shape[1]} tokens"):
        ids = windows[n][start : start + size]
        if not len(ids):
            continue
        count = scored or ids.shape[1] - 1
        with during(
            f"evaluating {subjects[n].name} on {text.name}", less_memory(subjects, longest)
        ):
            subjects[n].beyond_fp16.clear()
            logits, fractions = subjects[n].counted_logits(ids, count + 1)
            tallies[n].beyond_fp16 += subjects[n].beyond_fp16[:1]
            predicting = logits[:, :-1]
            comparable = subjects[n].vocabulary == first.vocabulary and torch.equal(
                windows[n], windows[0]
            )
            tallies[n].add(predicting, ids[:, -count:], reference if n and comparable else None)
            tallies[n].add_saturation(fractions, len(ids))
        if n == 0:
            reference = predicting
    return [
        tally.result(subject, text, own.shape[1], scored or own.shape[1] - 1, tallies[0])
        for tally, subject, own in zip(tallies, subjects, windows, strict=True)
    ]


def less_memory(subjects: Sequence[Subject], window: int = 0) -> str:
    """What takes less memory."""
    ways = ["end other programs"]
    if len(subjects) > 1:
        ways.append("name fewer models at once")
    if window > WINDOW:
        ways.append("leave out --long-context")
    if any(subject.device != "cpu" for subject in subjects):
        ways.append("give --device cpu")
    return ", or ".join(ways)
