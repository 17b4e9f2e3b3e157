"""Measured times beside their bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Beside:
    """One measured point of a plan's model, method and target.

    Attributes:
        board, mode: where it was measured; `simulated`: by stand-ins.
        length: of the prompt, in tokens.
        ttft_s, tpot_s: measured seconds to the first token, and a token.
        prompt_s, token_s: the least that each can take by its bound; None: not known.
    """

    board: str
    mode: str | None
    simulated: bool
    length: int
    ttft_s: float
    tpot_s: float | None
    prompt_s: float | None
    token_s: float | None

    @property
    def prompt_share(self) -> float | None:
        """Bound over measured: 1 is as fast as can be."""
        return None if self.prompt_s is None else self.prompt_s / self.ttft_s

    @property
    def token_share(self) -> float | None:
        """The same of a token."""
        if self.token_s is None or not self.tpot_s:
            return None
        return self.token_s / self.tpot_s

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"prompt_share": self.prompt_share, "token_share": self.token_share}
        return {**asdict(self), **shares}
