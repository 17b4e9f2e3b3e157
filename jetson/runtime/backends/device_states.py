"""States that lie on a GPU: where each is in a slot, and what a caller holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

ALIGNMENT = 256  # bytes, which TensorRT asks for and memory of CUDA has


class Holder(Protocol):
    """A backend whose states lie in slots."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Graph names, layer by layer."""
        ...

    def read_state(self, name: str, slot: int) -> np.ndarray:
        """A copy of one state on the host."""
        ...

    def is_current(self, generation: int) -> bool:
        """Whether states of this generation are the last that were given out."""
        ...


class DeviceStates(Mapping[str, np.ndarray]):
    """States in one slot; an entry is copied to the host when it is asked for."""

    def __init__(self, backend: Holder, slot: int, generation: int) -> None:
        self._backend = backend
        self._slot = slot
        self._generation = generation

    def current_slot(self) -> int:
        """The slot, as long as no later call has taken it."""
        if not self._backend.is_current(self._generation):
            raise ValueError("these states are gone: go on with those of the last call")
        return self._slot

    def __getitem__(self, name: str) -> np.ndarray:
        return self._backend.read_state(name, self.current_slot())

    def __iter__(self) -> Iterator[str]:
        return iter(self._backend.state_names)

    def __len__(self) -> int:
        return len(self._backend.state_names)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def layout(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype]
) -> tuple[dict[str, int], int]:
    """Where each state begins in a slot, and how many bytes a slot has."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += aligned(math.prod(shape) * dtypes[name].itemsize)
    return offsets, end
