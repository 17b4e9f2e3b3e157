"""The tensors that flow from layer to layer, kept where there is room for them."""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Sequences go through a layer together up to this many tokens.
TOKENS_PER_BATCH = 2048
# A GPU wants more at once than a CPU; for evaluation, where nothing is summed over a batch.
GPU_TOKENS_PER_BATCH = 8 * TOKENS_PER_BATCH


class Spool(Protocol):
    """Tensors of one shape per sample: the stream between two layers. Closed on leaving `with`."""

    def __getitem__(self, part: slice) -> Tensor: ...

    def __setitem__(self, part: slice, value: Tensor) -> None: ...

    def __enter__(self) -> Spool: ...

    def __exit__(self, *_: object) -> None: ...


def open_spool(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", scratch: Path | None = None
) -> Spool:
    """Room for `shape` (samples, …): on a GPU that computes, in its memory, else in a file.

    `scratch` says on which disk the file lies: the usual temporary folder may be memory.
    """
    if torch.device(device).type == "cpu":
        return FileSpool(shape, dtype, scratch)
    return DeviceSpool(shape, dtype, device)


class FileSpool:
    """In a temporary file, since calibration sets outgrow memory before layers do.

    The file has no name and goes when closed.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, scratch: Path | None = None
    ) -> None:
        # Lives as long as the spool: a with block would end too early.
        self._file = tempfile.TemporaryFile(prefix=".ssdi8-", dir=scratch)  # noqa: SIM115
        self._shape, self._dtype = shape[1:], torch.empty(0, dtype=dtype).numpy().dtype
        self._bytes = math.prod(self._shape) * dtype.itemsize

    def __getitem__(self, part: slice) -> Tensor:
        self._file.seek(part.start * self._bytes)
        data = bytearray(self._file.read((part.stop - part.start) * self._bytes))
        return torch.from_numpy(np.frombuffer(data, self._dtype).reshape(-1, *self._shape))

    def __setitem__(self, part: slice, value: Tensor) -> None:
        self._file.seek(part.start * self._bytes)
        self._file.write(value.cpu().contiguous().numpy().astype(self._dtype, copy=False).data)

    def __enter__(self) -> FileSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        # Closing flushes; after a full disk that would fail once more.
        with contextlib.suppress(OSError):
            self._file.close()


class DeviceSpool:
    """In the memory of a GPU: the way to the host and back would take longer than a layer."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self._memory: Tensor | None = torch.empty(shape, dtype=dtype, device=device)

    def __getitem__(self, part: slice) -> Tensor:
        assert self._memory is not None
        return self._memory[part]

    def __setitem__(self, part: slice, value: Tensor) -> None:
        assert self._memory is not None
        self._memory[part] = value

    def __enter__(self) -> DeviceSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory = None


def batches(ids: Tensor) -> list[slice]:
    """Samples that go through a layer together."""
    size = max(1, TOKENS_PER_BATCH // ids.shape[1])
    return [slice(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]
