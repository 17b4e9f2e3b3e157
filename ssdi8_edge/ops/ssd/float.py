"""State-space duality in FP32: what the INT8 ops approximate, and the recurrence that it equals.

Written from the SSD paper (Dao & Gu, "Transformers are SSMs", arXiv 2405.21060).

Axis letters: b batch, l token, h head, p head channel, g group of B and C, n state, c chunk,
k source and m target position inside a chunk, r head within its group (h = g * r).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Observe = Callable[[str, Tensor], None]


def to_chunks(tensor: Tensor, chunk_size: int) -> Tensor:
    """(b, l, ...) -> (b, c, chunk_size, ...), FP32, zeros after the last token."""
    padding = -tensor.shape[1] % chunk_size
    padded = F.pad(tensor.float(), (0, 0) * (tensor.ndim - 2) + (0, padding))
    return padded.reshape(tensor.shape[0], -1, chunk_size, *tensor.shape[2:])


def step_width(dt_raw: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float]) -> Tensor:
    """dt = clamp(softplus(dt_raw + dt_bias)), FP32; dt_raw (..., h), dt_bias (h)."""
    return F.softplus(dt_raw.float() + dt_bias.float()).clamp(*dt_limit)


def chunk_cumsum(
    dt_raw: Tensor, dt_bias: Tensor, A: Tensor, chunk_size: int, dt_limit: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Step widths and their accumulated log-decay.

    dt_raw (b, l, h), dt_bias and A (h), A < 0. Returns dt and a, both (b, h, c, k) FP32, with
    a[k] = sum over j <= k of A * dt[j]; it restarts in each chunk. dt is 0 after the last token,
    so that padding neither decays nor feeds the state.
    """
    dt = to_chunks(step_width(dt_raw, dt_bias, dt_limit), chunk_size).permute(0, 3, 1, 2)
    return dt, (dt * A.float()[:, None, None]).cumsum(-1)


def chunk_state(x: Tensor, B: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    """State that each chunk builds from nothing: S[p, n] = sum_k w[k] x[k, p] B[k, n].

    w[k] = exp(a[last] - a[k]) * dt[k]. x (b, c, k, h, p), B (b, c, k, g, n), dt and a
    (b, h, c, k); returns (b, c, h, p, n).
    """
    weight = (a[..., -1:] - a).exp() * dt
    weighted = (x * weight.permute(0, 2, 3, 1)[..., None]).unflatten(3, (B.shape[3], -1))
    return torch.einsum("bckgrp,bckgn->bcgrpn", weighted, B).flatten(2, 3)


def state_passing(states: Tensor, a: Tensor, initial_state: Tensor | None) -> Tensor:
    """Carries the state over the chunks: R[c + 1] = exp(a[c, last]) * R[c] + S[c].

    states (b, c, h, p, n), a (b, h, c, k), initial_state (b, h, p, n) or None for zeros. Returns
    R (b, c + 1, h, p, n): the state entering each chunk, then the final state.
    """
    decay = a[..., -1].exp()[..., None, None]
    first = torch.zeros_like(states[:, 0]) if initial_state is None else initial_state.float()
    passed = [first]
    for c in range(states.shape[1]):
        passed.append(decay[:, :, c] * passed[-1] + states[:, c])
    return torch.stack(passed, dim=1)


def chunk_scan(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: Tensor, a: Tensor, passed: Tensor
) -> Tensor:
    """Output of each chunk from the state that enters it and from its own tokens.

    y[m] = exp(a[m]) C[m] R + sum_{k <= m} (C[m] . B[k]) exp(a[m] - a[k]) dt[k] x[k] + D x[m].
    x (b, c, k, h, p), B and C (b, c, k, g, n), D (h), dt and a (b, h, c, k), passed
    (b, c, h, p, n), the states entering the chunks. Returns (b, c, k, h, p).
    """
    groups, length = B.shape[3], x.shape[2]
    x_grouped = x.unflatten(3, (groups, -1))
    a_chunk, dt_chunk = (t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (a, dt))

    carried = torch.einsum("bcmgn,bcgrpn->bcmgrp", C, passed.unflatten(2, (groups, -1)))
    carried = carried * a_chunk.exp().permute(0, 1, 4, 2, 3)[..., None]

    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    # a never rises, but a parallel cumulative sum can round it upwards: exp must not exceed 1.
    log_decay = (a_chunk[..., :, None] - a_chunk[..., None, :]).clamp(max=0.0)
    decay = log_decay.masked_fill(~causal, -math.inf).exp()
    products = torch.einsum("bcmgn,bckgn->bcgmk", C, B)
    scores = products[:, :, :, None] * decay * dt_chunk[..., None, :]
    within = torch.einsum("bcgrmk,bckgrp->bcmgrp", scores, x_grouped)
    return (carried + within).flatten(3, 4) + D.float()[:, None] * x


def ssd_chunked(
    x: Tensor,
    dt_raw: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """SSD over l >= 1 tokens in chunks of min(chunk_size, l); FP32 for any input type.

    x (b, l, h, p), dt_raw (b, l, h), dt_bias, A and D (h), B and C (b, l, g, n), initial_state
    (b, h, p, n). Returns y (b, l, h, p) and the final state (b, h, p, n). `observe` receives
    "dt" (b, l, h), "chunk_state" (b, c, h, p, n) and "passed_state" (b, c + 1, h, p, n).
    """
    length = x.shape[1]
    chunk = min(chunk_size, length)
    # Autocast would turn the products below into half precision; decays need FP32.
    # Sizes alone, on "meta", have none.
    with torch.autocast(device_type="cpu" if x.is_meta else x.device.type, enabled=False):
        dt, a = chunk_cumsum(dt_raw, dt_bias, A, chunk, dt_limit)
        x_chunk, B_chunk, C_chunk = (to_chunks(t, chunk) for t in (x, B, C))
        states = chunk_state(x_chunk, B_chunk, dt, a)
        passed = state_passing(states, a, initial_state)
        y = chunk_scan(x_chunk, B_chunk, C_chunk, D, dt, a, passed[:, :-1])
    if observe is not None:
        observe("dt", dt.flatten(2).transpose(1, 2)[:, :length])
        observe("chunk_state", states)
        observe("passed_state", passed)
    return y.flatten(1, 2)[:, :length], passed[:, -1]


def ssd_step(
    x: Tensor,
    dt_raw: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: h <- exp(A dt) h + dt x B, y = h C + D x; FP32.

    x (b, h, p), dt_raw (b, h), dt_bias, A and D (h), B and C (b, g, n), state (b, h, p, n).
    Returns y (b, h, p) and the new state.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B_head, C_head = (t.float().repeat_interleave(heads_per_group, dim=1) for t in (B, C))
    x = x.float()
    dt = step_width(dt_raw, dt_bias, dt_limit)
    decay = (dt * A.float()).exp()[..., None, None]
    new_state = decay * state.float() + (dt[..., None] * x)[..., None] * B_head[:, :, None]
    y = (new_state * C_head[:, :, None]).sum(-1)
    return y + D.float()[:, None] * x, new_state
