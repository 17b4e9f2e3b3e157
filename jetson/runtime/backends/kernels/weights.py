"""model.safetensors, mapped: from the file to the GPU piece by piece, no copy on the host."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.backends.device_states import aligned
from runtime.backends.kernels.arena import BLOCK
from runtime.problems import BundleProblem

COPY = 32 * 2**20  # bytes of one copy; Ctrl-C is heard between two


class Place(NamedTuple):
    """Of a tensor: its bytes in the file, and where they go."""

    start: int
    nbytes: int
    block: int
    offset: int


class Weights:
    """Tensors of a weights file, with the blocks of GPU memory that they will fill.

    A block takes tensors up to BLOCK bytes; one that is larger by itself has its own.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Raises BundleProblem where the file does not hold all `names`."""
        self._path = path
        self.places: dict[str, Place] = {}
        self.blocks: list[int] = []
        found = _positions(path)
        for name in names:
            if name not in found:
                raise BundleProblem(f"{path} has no tensor {name}", "copy the bundle again")
            self._place(name, *found[name])

    def _place(self, name: str, start: int, nbytes: int) -> None:
        size = aligned(nbytes)
        if not self.blocks or self.blocks[-1] + size > BLOCK:
            self.blocks.append(0)
        self.places[name] = Place(start, nbytes, len(self.blocks) - 1, self.blocks[-1])
        self.blocks[-1] += size

    def load(self, blocks: Sequence[int], upload: Callable[[int, np.ndarray], None]) -> None:
        """Copy all of them; `blocks` are addresses for `self.blocks`."""
        with self._path.open("rb") as file:
            # Not closed: it goes with its last reader, which may be that of an interrupted copy.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for place in self.places.values():
            target = blocks[place.block] + place.offset
            for done in range(0, place.nbytes, COPY):
                count = min(COPY, place.nbytes - done)
                upload(target + done, np.frombuffer(mapped, np.uint8, count, place.start + done))
            # What was copied need not stay in memory, which a board's GPU shares.
            mapped.madvise(mmap.MADV_DONTNEED)


def _positions(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor -> its first byte in the file, and how many there are."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        entries = {name: each["data_offsets"] for name, each in header.items() if name[0] != "_"}
        found = {n: (8 + size + begin, end - begin) for n, (begin, end) in entries.items()}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise BundleProblem(
            f"{path} is not a safetensors file ({error!r})", "copy the bundle again"
        ) from error
    if found and max(start + count for start, count in found.values()) > path.stat().st_size:
        raise BundleProblem(f"{path} was cut short", "copy the bundle again")
    return found
