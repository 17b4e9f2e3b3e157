"""Token windows of a text, and the tensors that flow from layer to layer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssdi8_edge.errors import UsageError

# Sequences go through a layer together up to this many tokens.
TOKENS_PER_BATCH = 2048


class Spool:
    """Tensors of one shape per sample, in a temporary file: the stream between two layers.

    Calibration sets outgrow memory before layers do. Deleted when closed or garbage-collected.
    """

    def __init__(self, samples: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        # Lives as long as the spool: a with block would end too early.
        self._file = tempfile.TemporaryFile(prefix="ssdi8-")  # noqa: SIM115
        self._shape, self._dtype = shape, dtype
        self._bytes = int(np.prod(shape)) * dtype.itemsize
        self.samples = samples

    def __getitem__(self, part: slice) -> Tensor:
        self._file.seek(part.start * self._bytes)
        data = bytearray(self._file.read((part.stop - part.start) * self._bytes))
        return torch.from_numpy(np.frombuffer(data, self._dtype).reshape(-1, *self._shape))

    def __setitem__(self, part: slice, value: Tensor) -> None:
        self._file.seek(part.start * self._bytes)
        self._file.write(value.cpu().contiguous().numpy().astype(self._dtype, copy=False).data)

    def close(self) -> None:
        self._file.close()


def read_tokens(text: Path, tokenizer: Path, tokens: int, samples: int) -> Tensor:
    """The first `samples` windows of `tokens` tokens of a UTF-8 text: (S, T) INT64.

    The file is read line by line, so that it may be larger than memory. A text shorter than one
    window gives one shorter sample; fewer windows than asked are all used.

    Raises:
        UsageError: the file is missing, is not UTF-8, or holds fewer than 16 tokens.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    ids: list[int] = []
    try:
        with text.open(encoding="utf-8") as lines:
            # Tokenized in blocks of lines: long enough that joins between them do not matter.
            block: list[str] = []
            size = 0
            for line in lines:
                block.append(line)
                size += len(line)
                if size >= 1 << 16:
                    ids += encoder.encode("".join(block), add_special_tokens=False).ids
                    block, size = [], 0
                    if len(ids) >= tokens * samples:
                        break
            ids += encoder.encode("".join(block), add_special_tokens=False).ids
    except UnicodeDecodeError as error:
        raise UsageError(f"{text} is not UTF-8 text;", "give a plain text file.") from error
    except OSError as error:
        raise UsageError(f"cannot read {text}: {error.strerror};", "name a text file.") from error
    if len(ids) < 16:
        raise UsageError(f"{text} holds {len(ids)} tokens;", "calibration needs at least 16.")
    tokens = min(tokens, len(ids))
    samples = min(samples, len(ids) // tokens)
    return torch.tensor(ids[: samples * tokens]).reshape(samples, tokens)


def batches(ids: Tensor) -> list[slice]:
    """Samples that go through a layer together."""
    size = max(1, TOKENS_PER_BATCH // ids.shape[1])
    return [slice(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]
