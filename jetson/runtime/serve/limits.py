"""What a client may take of the server."""

from __future__ import annotations

from dataclasses import dataclass

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 128  # of one request


@dataclass(frozen=True)
class Limits:
    """Numbers that the command line sets."""

    parallel: int  # sequences that go on together
    queue: int  # requests that wait while all slots are taken
    body_bytes: int
    prompt_tokens: int
    new_tokens: int
    seconds: float  # of one request, the wait included

    @property
    def requests(self) -> int:
        """Requests that are taken in at a time; one more is told to come again."""
        return self.parallel + self.queue
