"""Attention: reference against a loop, body against reference, a prompt in pieces, the parser."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from op_bodies import compare_body
from slow_ops import assert_same, f32
from torch import Tensor

from ssdi8_edge.ops import OPS

# name: heads, KV heads, head_dim, first column, theta, batch, position, length, capacity
CASES: dict[str, tuple[int, int, int, int, float, int, int, int, int]] = {
    "prefill": (4, 4, 8, 0, 0.0, 1, 0, 9, 9),
    "grouped, later columns": (6, 2, 8, 5, 0.0, 1, 0, 9, 12),
    "chunk": (4, 2, 8, 0, 0.0, 1, 7, 5, 16),
    "decode": (4, 1, 8, 3, 0.0, 1, 11, 1, 12),
    "batch": (4, 2, 8, 0, 0.0, 2, 3, 4, 9),
    "rotary": (4, 2, 8, 0, 1e4, 2, 0, 9, 9),
    "rotary decode": (4, 2, 16, 2, 1e11, 1, 700, 1, 701),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def inputs_of(
    case: tuple[Any, ...], fp16: bool, magnitude: float = 1.0
) -> tuple[list[Tensor], dict[str, Any]]:
    """Caches hold something everywhere: what is not to be read, too."""
    heads, kv, d, first, theta, batch, position, length, capacity = case
    g = torch.Generator().manual_seed(11)
    columns = first + (heads + 2 * kv) * d + 3
    projected = (torch.randn(batch, length, columns, generator=g) * 2 * magnitude).half()
    rows = (batch, kv, capacity)
    caches: list[Tensor] = []
    for _ in "kv":
        if fp16:
            caches.append(torch.randn(*rows, d, generator=g).half())
        else:
            caches.append(torch.randint(-127, 128, (*rows, d), generator=g, dtype=torch.int8))
            caches.append((torch.rand(*rows, generator=g) / 40).half())
    sizes = {"n_heads": heads, "n_kv_heads": kv, "head_dim": d}
    attributes = {**sizes, "first_column": first, "rope_theta": theta}
    return [projected, *caches, torch.tensor(position)], attributes


def name_of(fp16: bool) -> str:
    return "Attention" if fp16 else "Ssdi8Attention"


def slow_rotary(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = float(f32(position) * f32(theta ** (-2 * i / len(x))))
        cos, sin = float(f32(math.cos(angle))), float(f32(math.sin(angle)))
        one, two = float(x[i]), float(x[i + half])
        out[i], out[i + half] = one * cos - two * sin, two * cos + one * sin
    return out


def slow_attention(inputs: list[Tensor], a: dict[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """o (B, L, Q, d) and the caches, token by token and head by head; sums by `fsum`."""
    projected, *caches, position = (tensor.numpy() for tensor in inputs)
    caches = [cache.copy() for cache in caches]
    heads, kv, d = a["n_heads"], a["n_kv_heads"], a["head_dim"]
    batch, length = projected.shape[:2]
    o = np.zeros((batch, length, heads, d), np.float16)

    def column(b: int, i: int, head: int) -> np.ndarray:
        start = a["first_column"] + head * d
        values = projected[b, i, start : start + d].astype(f32)
        turned = a["rope_theta"] and head < heads + kv
        return slow_rotary(values, int(position) + i, a["rope_theta"]) if turned else values

    def write(kind: int, b: int, head: int, row: int, values: np.ndarray) -> None:
        if len(caches) == 2:
            caches[kind][b, head, row] = values.astype(np.float16)
            return
        scale = np.float16(max(np.abs(values).max() / f32(127), f32(2.0**-24)))
        inverse = f32(1 / float(scale))
        caches[2 * kind][b, head, row] = np.clip(np.rint(values * inverse), -128, 127)
        caches[2 * kind + 1][b, head, row] = scale

    def read(kind: int, b: int, head: int, row: int) -> np.ndarray:
        if len(caches) == 2:
            return caches[kind][b, head, row].astype(np.float64)
        whole = caches[2 * kind][b, head, row].astype(np.float64)
        return whole * float(caches[2 * kind + 1][b, head, row])

    for b, i in np.ndindex(batch, length):
        row = int(position) + i
        for head in range(kv):
            write(0, b, head, row, column(b, i, heads + head))
            write(1, b, head, row, column(b, i, heads + kv + head))
        for head in range(heads):
            shared = head * kv // heads
            q = column(b, i, head).astype(np.float16).astype(np.float64)
            scores = [math.fsum(q * read(0, b, shared, t)) / math.sqrt(d) for t in range(row + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            values = [read(1, b, shared, t) for t in range(row + 1)]
            for c in range(d):
                mixed = math.fsum(w * v[c] for w, v in zip(weights, values, strict=True))
                o[b, i, head, c] = f32(mixed / math.fsum(weights))
    return o, caches


@pytest.mark.parametrize("fp16", [False, True], ids=["int8", "fp16"])
@cases
def test_attention_against_loops(case: tuple[Any, ...], fp16: bool) -> None:
    inputs, attributes = inputs_of(case, fp16)
    got, *got_caches = OPS[name_of(fp16)](*inputs, **attributes)
    want, want_caches = slow_attention(inputs, attributes)
    assert_same(got, want.reshape(got.shape))
    for found, wanted in zip(got_caches, want_caches, strict=True):
        assert_same(found, wanted)


@cases
def test_attention_bodies(case: tuple[Any, ...]) -> None:
    compare_body("Ssdi8Attention", *inputs_of(case, fp16=False))
    compare_body("Attention", *inputs_of(case, fp16=True))


@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1e3], ids=str)
def test_tokens_of_any_size(magnitude: float) -> None:
    """Zeros, values whose scale FP16 hardly holds, and scores that leave one weight."""
    case = CASES["batch"]
    compare_body("Ssdi8Attention", *inputs_of(case, fp16=False, magnitude=magnitude))


@pytest.mark.parametrize("fp16", [False, True], ids=["int8", "fp16"])
@pytest.mark.parametrize("theta", [0.0, 1e4])
def test_a_prompt_in_pieces_gives_the_same_bits(theta: float, fp16: bool) -> None:
    """Also with more queries than are handled at once, and with a larger cache."""
    length = 300
    (projected, *caches, _), a = inputs_of((4, 2, 8, 0, theta, 2, 0, length, length), fp16)
    op = OPS[name_of(fp16)]
    whole, *wanted = op(projected, *caches, torch.tensor(0), **a)
    room = [torch.cat([cache, cache[:, :, :9]], 2) for cache in caches]
    pieces, position = [], 0
    for size in (1, 7, 260, 31, 1):
        part = projected[:, position : position + size]
        piece, *room = op(part, *room, torch.tensor(position), **a)
        pieces.append(piece)
        position += size
    assert position == length
    assert torch.equal(torch.cat(pieces, 1), whole)
    for found, cache in zip(room, wanted, strict=True):
        assert torch.equal(found[:, :, :length], cache)


def test_int8_is_near_fp16() -> None:
    """A Gaussian's error of 0.6 % in k and v is one of about as much in o."""
    case = (6, 2, 64, 0, 0.0, 1, 0, 64, 64)
    found, wanted = (
        OPS[name_of(fp16)](*inputs, **attributes)[0].float()
        for fp16 in (False, True)
        for inputs, attributes in [inputs_of(case, fp16, magnitude=0.5)]
    )
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_a_full_cache_is_said() -> None:
    inputs, attributes = inputs_of((4, 2, 8, 0, 0.0, 1, 7, 5, 11), fp16=False)
    with pytest.raises(ValueError, match="a cache of 11 tokens cannot take 12"):
        OPS["Ssdi8Attention"](*inputs, **attributes)
