"""What the model says to a prompt: text as it comes, tokens, why it ended, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.session import Step
from runtime.stop import StopTexts
from runtime.text import TextCodec, TextStream


@dataclass(frozen=True)
class Timings:
    """What a run took, without the time that printing takes."""

    prompt_tokens: int
    ttft_s: float | None  # time to first token; None when there was none
    tpot_s: float | None  # mean time per token after the first; None when there was one at most

    @classmethod
    def of(cls, prompt_tokens: int, seconds: list[float]) -> Timings:
        """From the seconds of each step, in their order."""
        first, rest = seconds[:1], seconds[1:]
        return cls(
            prompt_tokens=prompt_tokens,
            ttft_s=first[0] if first else None,
            tpot_s=sum(rest) / len(rest) if rest else None,
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate."""
        return 1 / self.tpot_s if self.tpot_s else None


@dataclass
class Answer:
    """What a prompt has led to so far; Ctrl-C ends it early and loses nothing.

    A stop text is among the tokens, and not in the text.
    """

    prompt_tokens: int  # that were read for it
    kept_tokens: int = 0  # before them, whose state was there
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: list[float] = field(default_factory=list)  # of each step
    finish: str = "length"  # or "stop" at end or stop text, "interrupt" at Ctrl-C

    @property
    def timings(self) -> Timings:
        return Timings.of(self.prompt_tokens, self.seconds)

    def describe(self) -> str:
        """Timings for people, in one line."""
        timings = self.timings
        kept = f" behind {self.kept_tokens} kept" if self.kept_tokens else ""
        parts = [f"{timings.prompt_tokens} prompt tokens{kept}", f"{len(self.tokens)} new"]
        if timings.ttft_s is not None:
            parts.append(f"TTFT {timings.ttft_s * 1e3:.1f} ms")
        if timings.tpot_s is not None:
            parts.append(f"TPOT {timings.tpot_s * 1e3:.2f} ms")
            parts.append(f"{timings.tokens_per_s:.1f} tokens/s")
        return ", ".join(parts)


def collect(
    steps: Iterator[Step],
    codec: TextCodec,
    prompt: np.ndarray,
    stops: Sequence[str],
    show: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    kept_tokens: int = 0,
) -> Answer:
    """Run `steps` after `prompt` (1, l) to their end or to one of `stops`.

    Args:
        show: is given the text as it comes.
        stopped: is asked after each token; Ctrl-C stops as well.
        kept_tokens: before the prompt, that were not read again.
    """
    answer = Answer(prompt.shape[1], kept_tokens)
    text_stream, stop = TextStream(codec, prompt[0].tolist()), StopTexts(stops)

    def give(new_text: str) -> None:
        answer.text += new_text
        show(new_text)

    try:
        for step in steps:
            answer.seconds.append(step.seconds)
            if step.token in codec.end_ids:
                answer.finish = "stop"
                break
            answer.tokens.append(step.token)
            give(stop.add(text_stream.add(step.token)))
            if stop.found:
                answer.finish = "stop"
                break
            if stopped():
                answer.finish = "interrupt"
                break
    except KeyboardInterrupt:
        answer.finish = "interrupt"
    finally:
        if not stop.found:
            give(stop.add(text_stream.finish()) + stop.flush())
            if stop.found:
                answer.finish = "stop"
    return answer
