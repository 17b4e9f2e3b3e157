"""The mean of a token's values and those of all tokens before it, which a cache keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def running_mean_reference(x: Tensor, cache: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, L, E) FP16 and the cache (B, 1, T, E) FP16 of the tokens before -> FP16 and the cache.

    The cache takes x in its rows position to position + L - 1. Sums of FP16 are exact in FP64.
    """
    first, end = int(position), int(position) + x.shape[1]
    if end > cache.shape[2]:
        raise ValueError(f"a cache of {cache.shape[2]} tokens cannot take {end}")
    cache = cache.clone()
    cache[:, 0, first:end] = x
    seen = torch.arange(cache.shape[2]) <= torch.arange(first, end)[:, None]
    total = seen.double() @ cache[:, 0].double()
    count = torch.arange(first + 1, end + 1).double()[:, None]
    return (total / count).float().half(), cache


def _body(a: Attributes, form: BodyForm) -> str:
    f = t.compute_type(form)
    return "\n".join(
        [
            t.ints("axis_1", [1]),
            t.ints("axis_2", [2]),
            t.ints("none", [0]),
            t.ints("far", [2**31 - 1]),
            t.ints("vector", [1]),
            "zero = Constant <value = int64 {0}> ()",
            "one = Constant <value = int64 {1}> ()",
            "start = Reshape (position, vector)",
            "tokens = Shape <start = 1, end = 2> (x)",
            "end = Add (start, tokens)",
            "end_token = Squeeze (end)",
            "row = Unsqueeze (x, axis_1)",
            "before = Slice (cache, none, start, axis_2)",
            "behind = Slice (cache, end, far, axis_2)",
            "cache_out = Concat <axis = 2> (before, row, behind)",
            "rows = Squeeze (cache_out, axis_1)",
            t.cast("wide", "rows", f),
            "capacity = Shape <start = 1, end = 2> (rows)",
            "capacity_scalar = Squeeze (capacity)",
            "key_row = Range (zero, capacity_scalar, one)",
            "query_row = Range (position, end_token, one)",
            "query = Unsqueeze (query_row, axis_1)",
            "seen = LessOrEqual (key_row, query)",
            t.cast("mask", "seen", f),
            "total = MatMul (mask, wide)",
            "counted = Add (query, one)",
            t.cast("count", "counted", f),
            "mean_wide = Div (total, count)",
            t.cast("mean32", "mean_wide", t.FP32),
            t.cast("y", "mean32", t.FP16),
        ]
    )


RUNNING_MEAN = Op("RunningMean", ("y", "cache_out"), running_mean_reference, _body, plugin=False)
