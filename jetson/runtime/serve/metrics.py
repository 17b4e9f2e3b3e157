"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    exposition,
    generate_latest,
)

from runtime.machine import process_memory
from runtime.serve.generation import Ended

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 300)


class Metrics:
    """Counters of one server."""

    content_type = exposition.CONTENT_TYPE_LATEST

    def __init__(self, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "ssdi8_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self._prompt = Counter("ssdi8_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter(
            "ssdi8_cached_tokens", "Of these, found in the state cache", registry=registry
        )
        self._new = Counter("ssdi8_new_tokens", "Tokens generated", registry=registry)
        self._cancelled = Counter(
            "ssdi8_cancelled_requests", "Requests whose client went away", registry=registry
        )
        self._first = Histogram(
            "ssdi8_first_token_seconds",
            "From a slot to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self._decode = Counter("ssdi8_decode_seconds", "Seconds of later tokens", registry=registry)
        for name, what, read in (
            ("ssdi8_active_sequences", "Sequences that have a slot", active),
            ("ssdi8_waiting_sequences", "Sequences that wait for one", waiting),
            ("ssdi8_resident_bytes", "Resident memory", lambda: process_memory()[0] or 0),
        ):
            Gauge(name, what, registry=registry).set_function(read)

    def answered(self, path: str, status: int) -> None:
        """A request got its status; `path` is a route of ours, not what a client wrote."""
        self._requests.labels(path, str(status)).inc()

    def ended(self, ended: Ended) -> None:
        """A sequence came to its end."""
        self._prompt.inc(ended.prompt_tokens)
        self._cached.inc(ended.cached_tokens)
        self._new.inc(ended.new_tokens)
        self._first.observe(ended.prompt_s)
        self._decode.inc(ended.decode_s)

    def gone(self) -> None:
        """A client went away before its answer was whole."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
