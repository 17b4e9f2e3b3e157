"""Causal attention over a cache of keys and values, which a call appends its own to.

Query heads share key heads in order (GQA): query head h reads KV head ⌊h · KV / Q⌋. Two forms: keys
and values in INT8 with a scale per token and head, or in FP16. Attention reads both from the cache,
those of this call included, so that a prompt gives the same bits whole and in pieces.
Source: docs/method.md §12.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.numerics.int8 import QMAX, quantize
from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op

# Of the scales in the cache: the least that FP16 holds, for tokens whose values are all zero.
LEAST_SCALE = 2.0**-24
# Queries that are handled at once: scores are (B, KV, Q / KV, queries, tokens) in FP64.
QUERIES = 256
# Of what a query must not see; exp of it is 0.
UNSEEN = -1e30


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """θ^(−2i/d) for i < d/2, FP32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (theta**-exponents).float()


def rotary(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """x (B, heads, L, d) turned by angle (position + i) · θ^(−2i/d), in FP32.

    Pairs are (i, i + d/2). The angle is an FP32 product, as models are trained with; its cosine and
    sine are rounded from FP64, and so is the sum.
    """
    tokens, d = x.shape[-2:]
    positions = (position + torch.arange(tokens, device=x.device)).float()
    angles = positions[:, None] * rotary_frequencies(d, theta).to(x.device)
    cos, sin = (f(angles.double()).float().double() for f in (torch.cos, torch.sin))
    first, second = x.double().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.float()


def heads_of(
    projected: Tensor,
    position: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    first_column: int,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Q, L, d), k and v (B, KV, L, d) FP32, from the columns q, k, v of in_proj's output."""
    parts = [n * head_dim for n in (n_heads, n_kv_heads, n_kv_heads)]
    columns = projected[..., first_column : first_column + sum(parts)].float()
    q, k, v = (
        part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in columns.split(parts, -1)
    )
    if rope_theta:
        q, k = (rotary(each, position, rope_theta) for each in (q, k))
    return q, k, v


def put(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """`cache` (B, KV, T, …) with `new` (B, KV, L, …) in its rows position to position + L - 1.

    Raises:
        ValueError: it has fewer rows.
    """
    first, tokens = int(position), new.shape[2]
    if first + tokens > cache.shape[2]:
        raise ValueError(f"a cache of {cache.shape[2]} tokens cannot take {first + tokens}")
    cache = cache.clone()
    cache[:, :, first : first + tokens] = new
    return cache


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """softmax(q · kᵀ / √d, causal) · v in FP64, rounded once: (B, L, Q·d) FP16.

    Args:
        q: (B, Q, L, d) FP16, of the tokens from `position` on.
        k, v: (B, KV, T, d) FP32, of all tokens; what lies behind this call's is not read.
    """
    first, length = int(position), q.shape[2]
    grouped = q.double().unflatten(1, (k.shape[1], -1))
    out = torch.empty(grouped.shape, dtype=torch.float16, device=q.device)
    for start in range(0, length, QUERIES):
        part = slice(start, min(start + QUERIES, length))
        seen = first + part.stop
        keys, values = (each[:, :, None, :seen].double() for each in (k, v))
        scores = (grouped[..., part, :] @ keys.mT) * q.shape[-1] ** -0.5
        query = torch.arange(first + part.start, seen, device=q.device)
        future = torch.arange(seen, device=q.device) > query[:, None]
        weights = torch.softmax(scores.masked_fill(future, UNSEEN), -1)
        out[..., part, :] = (weights @ values).float().half()
    return out.flatten(1, 2).transpose(1, 2).flatten(2)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, KV, L, d) FP32 as INT8, and its FP16 scale (B, KV, L): x ≈ scale · q."""
    top = x.abs().amax(-1)
    scale = (top / torch.full_like(top, QMAX)).clamp_min(LEAST_SCALE).half()
    return quantize(x, scale[..., None], "half_even"), scale


def attention_reference(
    projected: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor,
    v_scale: Tensor,
    position: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    first_column: int,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention with an INT8 cache; the queries are FP16.

    Args:
        projected: (B, L, R) FP16; from `first_column` on q (Q·d), k (KV·d), v (KV·d).
        k_cache, v_cache: (B, KV, T, d) INT8 of T ≥ position + L tokens.
        k_scale, v_scale: (B, KV, T) FP16: k ≈ k_scale · k_cache.
        position: () INT64, tokens before this call.
        rope_theta: θ of `rotary`; 0 gives no positions.

    Returns:
        o (B, L, Q·d) FP16, and the caches and scales with this call's rows.
    """
    q, k, v = heads_of(
        projected,
        position,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        first_column=first_column,
        rope_theta=rope_theta,
    )
    (k_q, k_s), (v_q, v_s) = quantize_rows(k), quantize_rows(v)
    caches = [(k_cache, k_q), (k_scale, k_s), (v_cache, v_q), (v_scale, v_s)]
    keys, key_scale, values, value_scale = (put(old, new, position) for old, new in caches)
    # Exact: 8 bits times 11.
    k_real, v_real = (
        c.float() * s[..., None].float() for c, s in ((keys, key_scale), (values, value_scale))
    )
    o = attend(q.half(), k_real, v_real, position)
    return o, keys, key_scale, values, value_scale


def attention_fp16_reference(
    projected: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    first_column: int,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with k_cache and v_cache (B, KV, T, d) in FP16: o, and the caches."""
    q, k, v = heads_of(
        projected,
        position,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        first_column=first_column,
        rope_theta=rope_theta,
    )
    keys, values = put(k_cache, k.half(), position), put(v_cache, v.half(), position)
    return attend(q.half(), keys.float(), values.float(), position), keys, values


# --- the twins in ONNX ---


def _heads_lines(a: Attributes, form: BodyForm) -> list[str]:
    """`heads_of` as statements: defines q, k, v, and the positions of this call.

    They begin at `start` (1) and end before `last` (1) or `end_token` ().
    """
    d, first = int(a["head_dim"]), int(a["first_column"])
    lines = [
        t.ints("axis_0", [0]),
        "start = Unsqueeze (position, axis_0)",
        "length = Shape <start = 1, end = 2> (projected)",
        "last = Add (start, length)",
        "end_token = Squeeze (last, axis_0)",
        "one = Constant <value = int64 {1}> ()",
        t.ints("axis_1", [1]),
    ]
    turned = bool(a["rope_theta"])
    counts = {"q": int(a["n_heads"]), "k": int(a["n_kv_heads"]), "v": int(a["n_kv_heads"])}
    for name, count in counts.items():
        lines += [
            t.slice_last(f"{name}_columns", "projected", first, first + count * d),
            t.ints(f"{name}_parts", [0, 0, count, d]),
            f"{name}_tokens = Reshape ({name}_columns, {name}_parts)",
            f"{name}_16 = Transpose <perm = [0, 2, 1, 3]> ({name}_tokens)",
            t.cast(f"{name}_plain" if turned and name != "v" else name, f"{name}_16", t.FP32),
        ]
        first += count * d
    if turned:
        lines += _angle_lines(d, float(a["rope_theta"]), form)
        lines += [line for name in "qk" for line in _rotary_lines(name, f"{name}_plain", d, form)]
    return lines


def _angle_lines(d: int, theta: float, form: BodyForm) -> list[str]:
    """`cos` and `sin` (L, d/2) of `rotary`, in the compute type."""
    f = t.compute_type(form)
    lines = [
        "tokens = Range (position, end_token, one)",
        t.cast("tokens32", "tokens", t.FP32),
        "token_column = Unsqueeze (tokens32, axis_1)",
        t.numbers("frequencies", rotary_frequencies(d, theta)),
        "angles32 = Mul (token_column, frequencies)",
        t.cast("angles", "angles32", f),
    ]
    for name, function in (("cos", "Cos"), ("sin", "Sin")):
        lines += [
            f"{name}_wide = {function} (angles)",
            t.cast(f"{name}_32", f"{name}_wide", t.FP32),
            t.cast(name, f"{name}_32", f),
        ]
    return lines


def _rotary_lines(out: str, x: str, d: int, form: BodyForm) -> list[str]:
    """`rotary` of FP32 `x` (B, heads, L, d), after `_angle_lines`."""
    p = f"{out}_turn"
    return [
        t.cast(f"{p}_wide", x, t.compute_type(form)),
        t.ints(f"{p}_halves", [d // 2, d // 2]),
        f"{p}_1, {p}_2 = Split <axis = 3> ({p}_wide, {p}_halves)",
        f"{p}_1c = Mul ({p}_1, cos)",
        f"{p}_2s = Mul ({p}_2, sin)",
        f"{p}_2c = Mul ({p}_2, cos)",
        f"{p}_1s = Mul ({p}_1, sin)",
        f"{p}_first = Sub ({p}_1c, {p}_2s)",
        f"{p}_second = Add ({p}_2c, {p}_1s)",
        f"{p}_turned = Concat <axis = 3> ({p}_first, {p}_second)",
        t.cast(out, f"{p}_turned", t.FP32),
    ]


def _put_lines(out: str, cache: str, new: str) -> list[str]:
    """`put` of `new` into `cache`, and `{out}_seen`: its rows up to this call's last."""
    return [
        t.ints(f"{out}_axis", [2]),
        t.ints(f"{out}_none", [0]),
        t.ints(f"{out}_far", [2**31 - 1]),
        f"{out}_before = Slice ({cache}, {out}_none, start, {out}_axis)",
        f"{out}_behind = Slice ({cache}, last, {out}_far, {out}_axis)",
        f"{out}_seen = Concat <axis = 2> ({out}_before, {new})",
        f"{out} = Concat <axis = 2> ({out}_seen, {out}_behind)",
    ]


def _attend_lines(keys: str, values: str, a: Attributes, form: BodyForm) -> list[str]:
    """`attend` as statements: `o` of FP32 `q`, `keys` and `values` of the tokens seen."""
    f = t.compute_type(form)
    heads, kv, d = (int(a[k]) for k in ("n_heads", "n_kv_heads", "head_dim"))
    return [
        t.cast("q_rounded", "q", t.FP16),
        t.cast("q_wide", "q_rounded", f),
        t.shape("grouped_shape", [0, kv, heads // kv, "length", d]),
        "q_grouped = Reshape (q_wide, grouped_shape)",
        t.ints("group_axis", [2]),
        t.cast("keys_wide", keys, f),
        "keys_t = Transpose <perm = [0, 1, 3, 2]> (keys_wide)",
        "keys_grouped = Unsqueeze (keys_t, group_axis)",
        "products = MatMul (q_grouped, keys_grouped)",
        t.number("unit", d**-0.5, f),
        "scores = Mul (products, unit)",
        "zero = Constant <value = int64 {0}> ()",
        "query_row = Range (position, end_token, one)",
        "key_row = Range (zero, end_token, one)",
        "query = Unsqueeze (query_row, axis_1)",
        "seen = LessOrEqual (key_row, query)",
        t.number("unseen", UNSEEN, f),
        "masked = Where (seen, scores, unseen)",
        "weights = Softmax <axis = -1> (masked)",
        t.cast("values_wide", values, f),
        "values_grouped = Unsqueeze (values_wide, group_axis)",
        "mixed = MatMul (weights, values_grouped)",
        t.cast("mixed32", "mixed", t.FP32),
        t.cast("mixed16", "mixed32", t.FP16),
        t.shape("heads_shape", [0, heads, "length", d]),
        "by_head = Reshape (mixed16, heads_shape)",
        "by_token = Transpose <perm = [0, 2, 1, 3]> (by_head)",
        t.ints("flat_shape", [0, 0, heads * d]),
        "o = Reshape (by_token, flat_shape)",
    ]


def _quantize_rows_lines(out: str, scale: str, x: str, form: BodyForm) -> list[str]:
    """`quantize_rows` of FP32 `x`: INT8 `out` and FP16 `scale`."""
    f = t.compute_type(form)
    return [
        f"{out}_abs = Abs ({x})",
        t.ints(f"{out}_axis", [-1]),
        f"{out}_top = ReduceMax <keepdims = 1> ({out}_abs, {out}_axis)",
        t.cast(f"{out}_top_wide", f"{out}_top", f),
        t.number(f"{out}_qmax", float(QMAX), f),
        f"{out}_step_wide = Div ({out}_top_wide, {out}_qmax)",
        t.cast(f"{out}_step", f"{out}_step_wide", t.FP32),
        t.number(f"{out}_least", LEAST_SCALE),
        f"{out}_step_least = Max ({out}_step, {out}_least)",
        t.cast(f"{out}_step16", f"{out}_step_least", t.FP16),
        t.quantize(out, x, f"{out}_step16", "half_even", form),
        f"{scale} = Squeeze ({out}_step16, {out}_axis)",
    ]


def _body(a: Attributes, form: BodyForm) -> str:
    lines = _heads_lines(a, form)
    for name in "kv":
        lines += [
            *_quantize_rows_lines(f"{name}_q", f"{name}_s", name, form),
            *_put_lines(f"{name}_cache_out", f"{name}_cache", f"{name}_q"),
            *_put_lines(f"{name}_scale_out", f"{name}_scale", f"{name}_s"),
            t.from_int8(f"{name}_whole", f"{name}_cache_out_seen", form),
            t.cast(f"{name}_steps", f"{name}_scale_out_seen", t.FP32),
            f"{name}_step_column = Unsqueeze ({name}_steps, {name}_q_axis)",
            f"{name}_real = Mul ({name}_whole, {name}_step_column)",
        ]
    return "\n".join([*lines, *_attend_lines("k_real", "v_real", a, form)])


def _fp16_body(a: Attributes, form: BodyForm) -> str:
    lines = _heads_lines(a, form)
    for name in "kv":
        lines += [
            t.cast(f"{name}_rounded", name, t.FP16),
            *_put_lines(f"{name}_cache_out", f"{name}_cache", f"{name}_rounded"),
        ]
    return "\n".join([*lines, *_attend_lines("k_cache_out_seen", "v_cache_out_seen", a, form)])


def _kernel(call: Call) -> Any:
    call.batch, call.length, call.row_stride = call.projected.shape
    call.capacity = call.k_cache.shape[2]
    rows = (call.batch, call.n_kv_heads, call.capacity)
    call.require(torch.float16, projected=tuple(call.projected.shape), k_scale=rows, v_scale=rows)
    cache = (*rows, call.head_dim)
    call.require(torch.int8, k_cache=cache, v_cache=cache)
    call.require(torch.int64, position=())
    for name in ("k_cache", "k_scale", "v_cache", "v_scale"):
        setattr(call, f"{name}_out", call.next_state(getattr(call, name)))
    shape = (call.batch, call.length, call.n_heads * call.head_dim)
    call.o = call.empty(shape, torch.float16)
    call.launch("attention")
    return call.o, call.k_cache_out, call.k_scale_out, call.v_cache_out, call.v_scale_out


ATTENTION = Op(
    name="Ssdi8Attention",
    outputs=("o", "k_cache_out", "k_scale_out", "v_cache_out", "v_scale_out"),
    reference=attention_reference,
    body=_body,
    kernel=_kernel,
    part="attention",
)
ATTENTION_FP16 = Op(
    name="Attention",
    outputs=("o", "k_cache_out", "v_cache_out"),
    reference=attention_fp16_reference,
    body=_fp16_body,
    plugin=False,
    part="attention",
)
