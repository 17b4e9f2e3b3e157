"""Cutting a sequence into chunks, for the torch references (their ONNX twins: `onnx_text`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pad_tokens(x: Tensor, dim: int, chunk: int, edge: bool = False) -> Tensor:
    """Pad `dim` at its end to a multiple of `chunk`, with zeros, or with the last value."""
    padding = -x.shape[dim] % chunk
    if not padding:
        return x
    if edge:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        shape = list(x.shape)
        shape[dim] = padding
        return torch.cat([x, last.expand(shape)], dim)
    widths = [0, 0] * (x.dim() - dim - 1) + [0, padding]
    return functional.pad(x, widths)


def chunks_of_tokens(x: Tensor, chunk: int, heads: int, width: int) -> Tensor:
    """(B, L, heads · width) -> (B, C, heads, K, width), zero-padded."""
    padded = pad_tokens(x, 1, chunk)
    return padded.unflatten(2, (heads, width)).unflatten(1, (-1, chunk)).transpose(2, 3)


def chunks_of_decay(a: Tensor, chunk: int, edge: bool) -> Tensor:
    """(B, H, L) -> (B, C, H, K); edge for the cumulative decay, zeros for dt."""
    return pad_tokens(a, 2, chunk, edge).unflatten(2, (-1, chunk)).transpose(1, 2)


def given(scale: Tensor | None, name: str) -> Tensor:
    """`scale`, which only scaling "dynamic" may leave out.

    Raises:
        ValueError: it was left out.
    """
    if scale is None:
        raise ValueError(f'scaling "static" needs {name}')
    return scale


def per_head(scale: Tensor, heads: int) -> Tensor:
    """Repeat a per-group vector (G) for the heads of each group: (H)."""
    return scale.repeat_interleave(heads // scale.shape[0])
