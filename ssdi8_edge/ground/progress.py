"""Progress of long loops, without deciding how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps a sequence so that its progress can be shown; `label` says what is being done."""

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]: ...


def silent(items: Sequence[T], label: str) -> Iterable[T]:
    """The `Track` that shows nothing."""
    return items
