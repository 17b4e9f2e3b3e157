"""The ops as slow loops, written from the specification alone.

In integers, FP32 scalars of NumPy and Python floats. Integer outputs of a reference must be equal
bit for bit, FP16 outputs too, unless a tolerance says otherwise: their sums are evaluated in FP64
and rounded once, so that the order does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from case_table import (
    SsdCase,
    first_difference,
)
from torch import Tensor

from ssdi8_edge.numerics.formats import Scaling
from ssdi8_edge.numerics.int8 import Rounding

f32 = np.float32
ROUNDINGS: tuple[Rounding, ...] = ("half_even", "half_away")


def rounded(v: np.ndarray, rounding: Rounding) -> np.ndarray:
    """To whole numbers, INT64, without saturation."""
    v = np.asarray(v)
    if rounding == "half_even":
        return np.rint(v).astype(np.int64)
    half = v.dtype.type(0.5)
    return (np.floor(np.abs(v) + half) * np.sign(v)).astype(np.int64)


def saturated(v: np.ndarray, rounding: Rounding) -> np.ndarray:
    limited = np.clip(np.asarray(v), -1e9, 1e9).astype(np.asarray(v).dtype)
    return np.clip(rounded(limited, rounding), -128 if rounding == "half_even" else -127, 127)


def slow_softplus(v: float) -> float:
    return max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def slow_silu(v: float) -> np.float32:
    return f32(v / (1 + math.exp(-v))) if v > -700 else f32(0)


def slow_cumsum(t: dict[str, np.ndarray], case: SsdCase) -> tuple[np.ndarray, np.ndarray]:
    """dt and a (B, H, L), token by token."""
    dt = np.zeros((case.batch, case.heads, case.length), f32)
    a = np.zeros_like(dt)
    first = case.d_inner + case.conv_dim
    for b, h in np.ndindex(case.batch, case.heads):
        total = 0.0
        for i in range(case.length):
            raw = f32(t["zxbcdt"][b, i, first + h]) + t["dt_bias"][h]
            step = min(max(slow_softplus(float(raw)), case.dt_min), case.dt_max)
            dt[b, h, i] = step
            total = float(t["A"][h]) * float(dt[b, h, i]) + (total if i % case.chunk else 0.0)
            a[b, h, i] = total
    return dt, a


def chunk_slices(case: SsdCase) -> Iterator[tuple[int, slice]]:
    for c, start in enumerate(range(0, case.length, case.chunk)):
        yield c, slice(start, min(start + case.chunk, case.length))


def slow_largest(v: np.ndarray, axis: int, case: SsdCase) -> tuple[np.ndarray, np.ndarray]:
    """INT8 of `v` and its step along `axis`, by division in FP64 and one rounding to FP32."""
    top = np.maximum(np.abs(v).max(axis), f32(1e-30)).astype(np.float64)
    inverse = (127 / top).astype(f32)
    return saturated(v * np.expand_dims(inverse, axis), case.rounding), (top / 127).astype(f32)


def slow_chunk_state(
    t: dict[str, np.ndarray], dt: np.ndarray, a: np.ndarray, case: SsdCase
) -> np.ndarray:
    """(B, C, H, P, N): integer sums token by token, then FP32 or INT8; FP16 sums, then FP16."""
    chunks = -(-case.length // case.chunk)
    shape = (case.batch, chunks, case.heads, case.headdim, case.d_state)
    out = np.zeros(shape, f32 if case.gate == "fp32" else np.int64)
    x = t["x"].reshape(case.batch, case.length, case.heads, case.headdim)
    b_q = t["b_q"].reshape(case.batch, case.length, case.ngroups, case.d_state).astype(np.int64)
    for b, h in np.ndindex(case.batch, case.heads):
        g = h // (case.heads // case.ngroups)
        for c, part in chunk_slices(case):
            total = np.zeros((case.headdim, case.d_state), np.int64)
            last = float(a[b, h, part.stop - 1])
            tokens = range(part.start, part.stop)
            w = [f32(math.exp(last - float(a[b, h, i])) * float(dt[b, h, i])) for i in tokens]
            x_h = x[b, part, h].astype(f32)
            if case.scaling == "none":
                v = (x_h * np.array(w).astype(np.float16).astype(f32)[:, None]).astype(np.float16)
                sums = v.astype(np.float64).T @ b_q[b, part, g].astype(np.float64)
                out[b, c, h] = (sums.astype(f32) * t["b_scale"][g]).astype(np.float16)
                continue
            if case.scaling == "dynamic":
                q, step = slow_largest(x_h * np.array(w)[:, None], 0, case)
            else:
                step = t["x_scale"][h]
                q = saturated(x_h * (f32(1) / step) * np.array(w)[:, None], case.rounding)
            multiplier = step * t["b_scale"][g]
            for i in tokens:
                total += q[i - part.start][:, None] * b_q[b, i, g][None, :]
            if case.gate == "fp32":
                out[b, c, h] = total.astype(f32) * multiplier[:, None]
            else:
                factor = multiplier / t["state_scale"][h]
                out[b, c, h] = saturated(total.astype(f32) * factor[:, None], case.rounding)
    return out


def slow_gate(gamma: float, rounding: Rounding) -> int:
    """Q0.7: exact, by rationals."""
    v = Fraction(float(f32(gamma))) * 128
    q = round(v) if rounding == "half_even" else math.floor(v + Fraction(1, 2))
    return min(q, 127)


def slow_passing(
    t: dict[str, np.ndarray], states: np.ndarray, a: np.ndarray, case: SsdCase
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """passed (B, C, H, P, N) as integers, with scaling "none" as FP16, its steps, the final state
    in the type of the first."""
    passed = np.zeros(states.shape, np.float16 if case.scaling == "none" else np.int64)
    steps = np.broadcast_to(t["state_scale"], states.shape[:-1]).copy()
    final = np.zeros_like(t["ssm_state"])
    for b, h in np.ndindex(case.batch, case.heads):
        scale = t["state_scale"][h][:, None]
        inverse = f32(1) / scale
        start = t["ssm_state"][b, h].astype(f32)
        real = start.copy()
        whole = rounded(start * inverse, case.rounding)
        for c, part in chunk_slices(case):
            gamma = f32(math.exp(float(a[b, h, part.stop - 1])))
            if case.gate == "fp32":
                if case.scaling == "none":
                    passed[b, c, h], steps[b, c, h] = real.astype(np.float16), 1
                else:
                    passed[b, c, h] = saturated(real * inverse, case.rounding)
                if case.scaling == "dynamic":
                    passed[b, c, h], steps[b, c, h] = slow_largest(real, 1, case)
                real = gamma * real + states[b, c, h]
            else:
                passed[b, c, h] = np.clip(
                    whole, -128 if case.rounding == "half_even" else -127, 127
                )
                gate = slow_gate(float(gamma), case.rounding)
                # floor((carry · gate + 64) / 128): halves go up, also below zero
                whole = np.array([(int(v) * gate + 64) // 128 for v in whole.flat]).reshape(
                    whole.shape
                ) + states[b, c, h].astype(np.int64)
        if case.gate == "fp32":
            final[b, h] = real
        else:
            limit = np.clip(whole, -128 if case.rounding == "half_even" else -127, 127)
            final[b, h] = limit.astype(f32) * scale
    return passed, steps, final


def slow_cb(t: dict[str, np.ndarray], b: int, g: int, part: slice, case: SsdCase) -> np.ndarray:
    """CB of one chunk and group, zero above the diagonal, entry by entry, in steps of cb_scale.

    FP16, but INT8 with static scales.
    """
    b_q, c_q = (
        t[k].reshape(case.batch, case.length, case.ngroups, -1)[b, part, g].astype(np.int64)
        for k in ("b_q", "c_q")
    )
    factor = t["c_scale"][g] * t["b_scale"][g] / t["cb_scale"][g]
    n = len(b_q)
    cb = np.zeros((n, n))
    for m in range(n):
        for k in range(m + 1):
            steps = f32(int((c_q[m] * b_q[k]).sum())) * factor
            if case.scaling != "static":
                cb[m, k] = np.float16(np.clip(steps, -65504, 65504))
            else:
                cb[m, k] = saturated(steps, case.rounding)
    return cb


def slow_scan(
    t: dict[str, np.ndarray],
    dt: np.ndarray,
    a: np.ndarray,
    passed: np.ndarray,
    passed_scale: np.ndarray,
    case: SsdCase,
) -> np.ndarray:
    """y (B, L, H, P) FP16, position by position, FP64 sums."""
    x = t["x"].reshape(case.batch, case.length, case.heads, case.headdim)
    c_q = t["c_q"].reshape(case.batch, case.length, case.ngroups, case.d_state).astype(np.int64)
    y = np.zeros(x.shape, np.float16)
    for b, h in np.ndindex(case.batch, case.heads):
        g = h // (case.heads // case.ngroups)
        for c, part in chunk_slices(case):
            cb = slow_cb(t, b, g, part, case)
            # Decays continue flat to the end of a short chunk.
            a_k = a[b, h, part].astype(np.float64)
            dt_k = dt[b, h, part].astype(np.float64)
            x_h = x[b, part, h].astype(np.float64)
            scan1_scale = (t["c_scale"][g] * passed_scale[b, c, h]).astype(np.float64)
            for m in range(len(cb)):
                i = part.start + m
                dot = passed[b, c, h].astype(np.float64) @ c_q[b, i, g].astype(np.float64)
                total = dot * scan1_scale * math.exp(a_k[m])
                for k in range(m + 1):
                    real = float(cb[m, k]) * float(t["cb_scale"][g])
                    weight = f32(real * math.exp(a_k[m] - a_k[k]) * dt_k[k])
                    total += float(np.float16(weight)) * x_h[k]
                total += float(t["D"][h]) * x[b, i, h].astype(np.float64)
                y[b, i, h] = total.astype(f32).astype(np.float16)
    return y


def as_numpy(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def assert_same(got: Tensor, want: np.ndarray) -> None:
    """Equal values and shapes; the message says where they first differ."""
    found = got.numpy().reshape(want.shape)
    assert np.isfinite(found.astype(np.float64)).all()
    assert np.array_equal(found, want), first_difference(found, want)


def quantized_token(
    v: np.ndarray, scaling: Scaling, scale: float, rounding: Rounding
) -> tuple[np.ndarray, np.float32]:
    """FP32 values of one token: INT8, and their scale."""
    if scaling == "static":
        return saturated(v * (f32(1) / f32(scale)), rounding), f32(scale)
    top = max(np.abs(v).max(), f32(1e-30))
    return saturated(v * (f32(127) / top), rounding), top / f32(127)
