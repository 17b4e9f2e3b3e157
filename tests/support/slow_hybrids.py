"""Hybrid checkpoints, computed from their files alone: token by token, in FP64, nothing folded.

The judge of the package's reader and blocks, of which it uses nothing: formulas of the models'
makers with every multiplier where they put it. `write` makes small random checkpoints of the names
and shapes that published ones have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Config = Mapping[str, Any]
Weights = Callable[[str], Tensor]  # by the end of a stored name, FP64

# ---------------------------------------------------------------------------------------------
# Small checkpoints
# ---------------------------------------------------------------------------------------------


def write(folder: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A checkpoint of random weights, FP32, of which each shows in the logits."""
    g = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes.items():
        uniform, normal = torch.rand(shape, generator=g), torch.randn(shape, generator=g)
        if name.endswith("A_log"):
            tensors[name] = (1 + 7 * uniform).log()
        elif name.endswith("dt_bias"):
            tensors[name] = 4 * uniform - 4
        elif len(shape) == 1:
            tensors[name] = 0.5 + uniform
        elif "conv1d" in name:
            tensors[name] = 1.6 * uniform - 0.8
        else:
            tensors[name] = normal * shape[1] ** -0.5
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def mamba_shapes(
    at: str, d: int, heads: int, width: int, groups: int, state: int, *, taps: int = 4, norm: bool
) -> dict[str, tuple[int, ...]]:
    inner, conv = heads * width, heads * width + 2 * groups * state
    return {
        f"{at}.in_proj.weight": (inner + conv + heads, d),
        f"{at}.conv1d.weight": (conv, 1, taps),
        f"{at}.conv1d.bias": (conv,),
        **{f"{at}.{name}": (heads,) for name in ("dt_bias", "A_log", "D")},
        **({f"{at}.norm.weight": (inner,)} if norm else {}),
        f"{at}.out_proj.weight": (d, inner),
    }


def attention_shapes(
    at: str, d: int, heads: int, kv: int, width: int
) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.q_proj.weight": (heads * width, d),
        f"{at}.k_proj.weight": (kv * width, d),
        f"{at}.v_proj.weight": (kv * width, d),
        f"{at}.o_proj.weight": (d, heads * width),
    }


# ---------------------------------------------------------------------------------------------
# The pieces
# ---------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mamba(
    u: Tensor,
    w: Weights,
    *,
    heads: int,
    width: int,
    groups: int,
    state: int,
    limits: tuple[float, float],
    norm: str,
    eps: float,
    factors: tuple[float, ...] = (1.0,) * 5,
) -> Tensor:
    """u (L, D) -> (L, D); `factors` of z, x, B, C and dt; `norm` "grouped", "first" or "none"."""
    inner, shared = heads * width, groups * state
    z, x, B, C, dt = (u @ w("in_proj.weight").T).split([inner, inner, shared, shared, heads], -1)
    z, x, B, C, dt = (part * factor for part, factor in zip((z, x, B, C, dt), factors, strict=True))
    rows = torch.cat([x, B, C], -1)
    taps, bias = w("conv1d.weight")[:, 0], w("conv1d.bias")
    A, D, dt_bias = -w("A_log").exp(), w("D"), w("dt_bias")
    S = [torch.zeros(width, state, dtype=torch.float64) for _ in range(heads)]
    mixed = []
    for t in range(len(u)):
        total = bias.clone()
        for tap in range(taps.shape[1]):
            at = t - taps.shape[1] + 1 + tap
            if at >= 0:
                total += taps[:, tap] * rows[at]
        x_t, B_t, C_t = silu(total).split([inner, shared, shared])
        y = []
        for h in range(heads):
            group = h * groups // heads
            b, c = (part[group * state : (group + 1) * state] for part in (B_t, C_t))
            step = min(max(math.log1p(math.exp(dt[t, h] + dt_bias[h])), limits[0]), limits[1])
            x_h = x_t[h * width : (h + 1) * width]
            S[h] = math.exp(step * A[h]) * S[h] + step * x_h[:, None] * b[None]
            y.append(S[h] @ c + D[h] * x_h)
        mixed.append(torch.cat(y))
    y = torch.stack(mixed)
    if norm == "none":
        y = y * silu(z)
    else:
        y = y if norm == "first" else y * silu(z)
        part = inner // groups
        gamma = w("norm.weight")
        y = torch.cat(
            [rms(p, g, eps) for p, g in zip(y.split(part, -1), gamma.split(part), strict=True)], -1
        )
        y = y * silu(z) if norm == "first" else y
    return y @ w("out_proj.weight").T


def attention(
    u: Tensor,
    w: Weights,
    *,
    heads: int,
    kv: int,
    width: int,
    scale: float,
    theta: float | None = None,
    key_factor: float = 1.0,
) -> Tensor:
    """u (L, D) -> (L, D); `theta` of rotary positions, if there are any."""
    q, k, v = (u @ w(f"{name}_proj.weight").T for name in "qkv")
    k = k * key_factor
    out = torch.zeros(len(u), heads * width, dtype=torch.float64)

    def turned(row: Tensor, position: int) -> Tensor:
        if theta is None:
            return row
        result = row.clone()
        for i in range(width // 2):
            angle = position * theta ** (-2 * i / width)
            a, b = float(row[i]), float(row[i + width // 2])
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return result

    for h in range(heads):
        own, shared = (
            slice(i * width, (i + 1) * width) for i in (h, h * kv // heads)
        )  # query head h reads the key head of its group
        keys = torch.stack([turned(k[t, shared], t) for t in range(len(u))])
        for t in range(len(u)):
            scores = scale * keys[: t + 1] @ turned(q[t, own], t)
            weights = (scores - scores.max()).exp()
            out[t, own] = weights / weights.sum() @ v[: t + 1, shared]
    return out @ w("o_proj.weight").T


# ---------------------------------------------------------------------------------------------
# The families
# ---------------------------------------------------------------------------------------------


def logits(folder: Path, family: str, ids: Tensor, model: Mapping[str, Any]) -> Tensor:
    """ids (L,) -> (L, V) FP64 of a checkpoint; `model` is what its config.json means."""
    tensors = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}

    def at(prefix: str) -> Weights:
        return lambda name: tensors[f"{prefix}{name}"]

    return FAMILIES[family](at, ids, model)


def nemotron(at: Callable[[str], Weights], ids: Tensor, m: Mapping[str, Any]) -> Tensor:
    h, eps = at("backbone.")("embeddings.weight")[ids], m["eps"]
    for i, letter in enumerate(m["pattern"]):
        layer = at(f"backbone.layers.{i}.")
        w, u = at(f"backbone.layers.{i}.mixer."), rms(h, layer("norm.weight"), eps)
        if letter == "M":
            h = h + mamba(u, w, **m["mamba"], norm="grouped", eps=eps)
        elif letter == "*":
            h = h + attention(u, w, **m["attention"], scale=m["attention"]["width"] ** -0.5)
        else:
            h = h + (u @ w("up_proj.weight").T).clamp(min=0) ** 2 @ w("down_proj.weight").T
    return rms(h, at("backbone.")("norm_f.weight"), eps) @ at("")(m["head"]).T


def granite(at: Callable[[str], Weights], ids: Tensor, m: Mapping[str, Any]) -> Tensor:
    h, eps = m["embedding_multiplier"] * at("model.")("embed_tokens.weight")[ids], m["eps"]
    for i, word in enumerate(m["layers"]):
        layer = at(f"model.layers.{i}.")
        u = rms(h, layer("input_layernorm.weight"), eps)
        if word == "mamba":
            w = at(f"model.layers.{i}.mamba.")
            mixed = mamba(u, w, **m["mamba"], norm="grouped", eps=eps)
        else:
            w = at(f"model.layers.{i}.self_attn.")
            mixed = attention(u, w, **m["attention"], scale=m["attention_multiplier"])
        h = h + m["residual_multiplier"] * mixed
        u = rms(h, layer("post_attention_layernorm.weight"), eps)
        gate, up = (u @ layer("shared_mlp.input_linear.weight").T).chunk(2, -1)
        added = (silu(gate) * up) @ layer("shared_mlp.output_linear.weight").T
        h = h + m["residual_multiplier"] * added
    return rms(h, at("model.")("norm.weight"), eps) @ at("")(m["head"]).T / m["logits_scaling"]


def falcon(at: Callable[[str], Weights], ids: Tensor, m: Mapping[str, Any]) -> Tensor:
    h, eps = m["embedding_multiplier"] * at("model.")("embed_tokens.weight")[ids], m["eps"]
    gate_factor, down_factor = m["mlp_multipliers"]
    for i in range(m["layers"]):
        layer = at(f"model.layers.{i}.")
        u = rms(h, layer("input_layernorm.weight"), eps)
        mixed = mamba(
            m["ssm_in_multiplier"] * u,
            at(f"model.layers.{i}.mamba."),
            **m["mamba"],
            norm=m["norm"],
            eps=eps,
            factors=m["ssm_multipliers"],
        )
        seen = attention(
            m["attention_in_multiplier"] * u,
            at(f"model.layers.{i}.self_attn."),
            **m["attention"],
            scale=m["attention"]["width"] ** -0.5,
            key_factor=m["key_multiplier"],
        )
        h = h + m["ssm_out_multiplier"] * mixed + m["attention_out_multiplier"] * seen
        w = at(f"model.layers.{i}.feed_forward.")
        v = rms(h, layer("pre_ff_layernorm.weight"), eps)
        gated = silu(gate_factor * (v @ w("gate_proj.weight").T)) * (v @ w("up_proj.weight").T)
        h = h + down_factor * (gated @ w("down_proj.weight").T)
    normed = rms(h, at("model.")("final_layernorm.weight"), eps)
    return m["lm_head_multiplier"] * (normed @ at("")(m["head"]).T)


FAMILIES = {"nemotron": nemotron, "granite": granite, "falcon": falcon}
