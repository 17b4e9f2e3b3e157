"""Sizes that are not known while a program is recorded: products of its symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """`number` times the symbols, in order of their names; "length/64" is the next whole number.

    Kernel calls multiply sizes, compare them and take `ceil_div` of them, nothing else.
    """

    number: int
    symbols: tuple[str, ...]

    def __mul__(self, other: Any) -> Size:
        if isinstance(other, Size):
            symbols = tuple(sorted(self.symbols + other.symbols))
            return Size(self.number * other.number, symbols)
        return Size(self.number * int(other), self.symbols)

    __rmul__ = __mul__

    def __str__(self) -> str:
        """Factors with * between them, as the runtime reads it."""
        number = [] if self.number == 1 else [str(self.number)]
        return "*".join([*number, *self.symbols])


def symbol(name: str) -> Size:
    """A size that a program leaves open."""
    return Size(1, (name,))


def ceil_div(size: Any, by: int) -> Any:
    """How many times `by` covers `size`, a number or one symbol."""
    if not isinstance(size, Size):
        return -(-size // by)
    assert size.number == 1 and len(size.symbols) == 1 and "/" not in size.symbols[0]
    return symbol(f"{size.symbols[0]}/{by}")
