"""Write a safetensors file tensor by tensor, so that a model need not fit in memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Names of the safetensors format.
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
}


class SafetensorsWriter:
    """Appends tensors to a temporary file; `close`, or the end of a with block, puts the
    header in front.

    The format wants its header first, and the header wants every offset: hence the second file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Lives as long as the writer: a with block would end too early.
        self._data = tempfile.TemporaryFile(prefix="ssdi8-", dir=path.parent)  # noqa: SIM115
        self._header: dict[str, Any] = {}
        self._offset = 0

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().cpu()
        size = data.numel() * data.element_size()
        self._data.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._header[name] = {
            "dtype": _DTYPES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._offset, self._offset + size],
        }
        self._offset += size

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            self.close()
        # Closing flushes; after a full disk that would fail once more.
        with contextlib.suppress(OSError):
            self._data.close()

    def close(self) -> None:
        """Write the file."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with self._path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, 1 << 22)
        self._data.close()


def data_start(path: Path) -> int:
    """Offset of the first data byte of a safetensors file."""
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """name -> {dtype, shape, data_offsets relative to `data_start`}."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header
