"""Inputs of the kernels: random tensors, and rows of which each changes one thing.

Columns that a kernel must not read hold NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_compare import (
    guarded_allocations,
    kernel_of,
    reference,
)
from kernel_fixtures import (
    DEVICE,
    skip_unless_affordable,
    synchronize,
)
from torch import Tensor

from ssdi8_edge.numerics.int8 import scale_from_absmax
from ssdi8_edge.ops import OPS


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def random_int8(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator, device=DEVICE, dtype=torch.int8)


def token_scaling(scaling: str, scale: float) -> list[Tensor]:
    """The static scale of all tokens; with scaling "dynamic" there is none."""
    return [torch.tensor([scale], device=DEVICE)] if scaling == "static" else []


def scale_of_tokens(generator: torch.Generator, x: Tensor) -> Tensor:
    shape = (*x.shape[:-1], 1)
    return torch.rand(shape, generator=generator, device=DEVICE) * 1e-2 + 1e-4


def ones_of_tokens(x: Tensor) -> Tensor:
    return torch.ones((*x.shape[:-1], 1), device=DEVICE)


def scale_and_bias(generator: torch.Generator, n_out: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(n_out, generator=generator, device=DEVICE) * 1e-2 + 1e-4
    return scale, normal(generator, n_out, dtype=torch.float32)


def w4_weight(
    generator: torch.Generator, n_out: int, n_in: int, group_size: int, sigma: float
) -> tuple[Tensor, Tensor]:
    factor = torch.rand((n_out, n_in // group_size), generator=generator, device=DEVICE)
    return random_int8(generator, n_out, n_in // 2), ((0.2 + 0.8 * factor) * sigma).half()


def integer_scales(generator: torch.Generator, n_out: int, n_in: int, group_size: int) -> Tensor:
    shape = (n_out, n_in // group_size)
    scales = torch.randint(-15, 16, shape, dtype=torch.int8, device=DEVICE, generator=generator)
    return scales + (scales >= 0)  # from -15 to 16, not 0


def conv_case(
    generator: torch.Generator,
    batch: int,
    length: int,
    d_inner: int,
    ngroups: int,
    d_state: int,
    d_conv: int = 4,
    magnitude: float = 1.0,
    scale: float = 0.02,
    rotation: str = "hadamard",
    heads: int = 8,
) -> tuple[list[Tensor], dict[str, Any]]:
    conv_dim = d_inner + 2 * ngroups * d_state
    zxbcdt = torch.full(
        (batch, length, d_inner + conv_dim + heads), torch.nan, dtype=torch.float16, device=DEVICE
    )
    columns = normal(generator, batch, length, conv_dim) * magnitude
    zxbcdt[..., d_inner : d_inner + conv_dim] = columns
    inputs = [
        zxbcdt,
        normal(generator, batch, d_conv - 1, conv_dim) * magnitude,
        normal(generator, conv_dim, d_conv, dtype=torch.float32) * 0.5,
        normal(generator, conv_dim, dtype=torch.float32) * 0.5,
        torch.rand(ngroups, generator=generator, device=DEVICE) * scale + scale / 2,
        torch.rand(ngroups, generator=generator, device=DEVICE) * scale + scale / 2,
    ]
    attributes = {
        "d_inner": d_inner,
        "conv_dim": conv_dim,
        "d_conv": d_conv,
        "ngroups": ngroups,
        "rotation": rotation,
        "rounding": "half_even",
    }
    return inputs, attributes


ATTENTION_BASE: dict[str, Any] = {
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "batch": 1,
    "position": 0,
    "length": 5,
    "room": 3,  # behind the last token
    "first_column": 0,
    "rope_theta": 0.0,
    "magnitude": 1.0,
}


def attention_case(
    generator: torch.Generator, row: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Caches hold something everywhere, NaN among the scales behind the tokens."""
    case = ATTENTION_BASE | row
    heads, kv, d = (case[name] for name in ("n_heads", "n_kv_heads", "head_dim"))
    batch, length, first = case["batch"], case["length"], case["first_column"]
    capacity = case["position"] + length + case["room"]
    columns = (heads + 2 * kv) * d
    projected = torch.full(
        (batch, length, first + columns + 3), torch.nan, dtype=torch.float16, device=DEVICE
    )
    projected[..., first : first + columns] = (
        normal(generator, batch, length, columns) * 2 * case["magnitude"]
    )
    rows = (batch, kv, capacity)
    caches = []
    for _ in "kv":
        scale = torch.rand(rows, generator=generator, device=DEVICE).half() / 40
        scale[..., case["position"] :] = torch.nan
        caches += [random_int8(generator, *rows, d), scale]
    position = torch.tensor(case["position"], device=DEVICE)
    return [projected, *caches, position], {
        name: case[name] for name in OPS["Ssdi8Attention"].attributes
    }


SSD_BASE = {
    "batch": 1,
    "length": 515,
    "nheads": 4,
    "headdim": 64,
    "ngroups": 1,
    "d_state": 128,
    "chunk_size": 256,
    "gate": "fp32",
    "rounding": "half_even",
    "scaling": "dynamic",
    "state": torch.float32,
    "scale": 1.0,  # of every scale that is an input: below 1 saturates
    "dt_shift": 0.0,
}
STATIC = {"scaling": "static"}
RELEASED = STATIC | {"gate": "q0.7"}
NONE = {"scaling": "none"}
SSD_ROWS: list[dict[str, Any]] = [
    {},
    *({"length": n} for n in (2, 5, 63, 64, 65, 255, 256, 257, 2048)),
    {"batch": 2},
    {"batch": 3, "length": 300, "nheads": 80},
    {"length": 2048, "nheads": 24},
    {"length": 2048, "nheads": 80, "d_state": 64},
    {"length": 700, "nheads": 8, "d_state": 64, "chunk_size": 128},
    *({"ngroups": n, "nheads": 8} for n in (2, 8)),
    {"headdim": 128},
    # heads that do not fill 64 channels, or two times 64
    *({"headdim": p, "length": 300, "batch": 2} for p in (32, 80)),
    *(STATIC | {"headdim": p, "length": 100} for p in (32, 80)),
    *(RELEASED | {"headdim": p, "length": 100} for p in (32, 80)),
    {"headdim": 80, "d_state": 64, "length": 100},
    {"headdim": 80, "d_state": 256, "length": 100, "chunk_size": 64},
    {"headdim": 80, "ngroups": 2, "chunk_size": 128, "length": 200, "rounding": "half_away"},
    {"d_state": 64},
    {"d_state": 256},
    {"d_state": 256, "chunk_size": 128, "headdim": 128, "batch": 2},
    {"d_state": 256, "chunk_size": 128, "length": 300},
    *({"chunk_size": n} for n in (64, 128)),
    {"chunk_size": 64, "d_state": 64, "length": 1000},
    {"chunk_size": 64, "d_state": 256, "length": 150},
    STATIC,
    STATIC | {"dt_shift": 6.0},
    STATIC | {"chunk_size": 64, "length": 300},
    STATIC | {"chunk_size": 128, "batch": 2, "headdim": 128},
    STATIC | {"d_state": 256},
    STATIC | {"d_state": 64, "length": 200},
    STATIC | {"scale": 0.1},
    STATIC | {"scale": 0.1, "rounding": "half_away"},
    STATIC | {"length": 2048, "nheads": 40},
    RELEASED,
    RELEASED | {"d_state": 64, "length": 300},
    RELEASED | {"rounding": "half_away", "length": 2048},
    RELEASED | {"scale": 0.1, "state": torch.float16, "d_state": 256},
    {"rounding": "half_away"},
    {"rounding": "half_away", "d_state": 64},
    {"rounding": "half_away", "d_state": 256, "length": 2048, "nheads": 80},
    {"state": torch.float16},
    {"scale": 0.1},  # CB alone
    {"dt_shift": 6.0},  # decays by e^-100 within 64 positions
    {"dt_shift": -12.0},
]
FP16_ROWS: list[dict[str, Any]] = [
    NONE | row
    for row in (
        {},
        *({"length": n} for n in (2, 5, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 2048)),
        {"batch": 2},
        {"batch": 3, "length": 300, "nheads": 80},
        # More heads than an H100 or H200 holds at once: chunks of 128.
        *({"batch": 8, "length": 300, "nheads": 80, "d_state": n} for n in (64, 128, 256)),
        {"length": 2048, "nheads": 80, "d_state": 64},
        *({"ngroups": n, "nheads": 8} for n in (2, 8)),
        {"headdim": 128},
        *({"headdim": p, "length": 100, "batch": 2} for p in (32, 80)),
        {"headdim": 80, "d_state": 256, "length": 100, "chunk_size": 64},
        {"d_state": 64},
        {"d_state": 256, "headdim": 128, "batch": 2},
        *({"chunk_size": n} for n in (64, 128)),
        {"chunk_size": 64, "d_state": 256, "length": 1000},
        {"chunk_size": 128, "d_state": 64, "length": 1000},
        {"state": torch.float16},
        {"dt_shift": 6.0},
        {"dt_shift": -12.0},
    )
]


def ssd_case(generator: torch.Generator, row: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with scales from the absolute maxima of these very tensors."""
    case = SSD_BASE | row
    batch, length, heads, p = (case[k] for k in ("batch", "length", "nheads", "headdim"))
    groups, n = case["ngroups"], case["d_state"]
    skip_unless_affordable(batch * length * heads * p * n)
    dt_column = heads * p + 3
    zxbcdt = normal(generator, batch, length, dt_column + heads + 2)
    zxbcdt[..., :dt_column] = float("nan")
    zxbcdt[..., dt_column + heads :] = float("nan")
    a: dict[str, Any] = {
        "x": normal(generator, batch, length, heads * p),
        "b_q": random_int8(generator, batch, length, groups * n),
        "c_q": random_int8(generator, batch, length, groups * n),
        "zxbcdt": zxbcdt,
        "ssm_state": normal(generator, batch, heads, p, n, dtype=case["state"]),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, device=DEVICE) + case["dt_shift"],
        "A": -torch.linspace(1.0, 16.0, heads, device=DEVICE).flip(0),
        "D": normal(generator, heads, dtype=torch.float32),
        "b_scale": torch.full((groups,), 0.02, device=DEVICE),
        "c_scale": torch.full((groups,), 0.03, device=DEVICE),
    }
    attributes = {k: case[k] for k in OPS["Ssdi8SsdScan"].attributes if k in case} | {
        "dt_column": dt_column,
        "dt_min": 0.0,
        "dt_max": float("inf"),
    }
    case["attributes"] = attributes

    a["cb_scale"] = torch.full((groups,), 0.02 * 0.03 * 74**2 * n**0.5 / 28, device=DEVICE)
    a["cb_scale"] *= case["scale"]
    a |= dict.fromkeys(("x_scale", "state_scale"))
    if case["scaling"] == "static":
        a |= channel_scales(case, a)
    case["inputs"] = a
    return case


def channel_scales(case: dict[str, Any], a: dict[str, Any]) -> dict[str, Any]:
    """The inputs of scaling "static"."""
    attributes, chunk, length = case["attributes"], case["chunk_size"], case["length"]
    dt, decay = reference(
        *("Ssdi8ChunkCumsum", a["zxbcdt"], a["dt_bias"], a["A"]),
        **select("Ssdi8ChunkCumsum", attributes),
    )
    x = a["x"].float().unflatten(2, (case["nheads"], case["headdim"]))
    ends = torch.arange(length, device=DEVICE)
    last = ((ends // chunk + 1) * chunk).clamp_max(length) - 1
    w = torch.exp(decay[..., last] - decay) * dt  # (B, H, L)
    absmax = (w.transpose(1, 2)[..., None] * x).abs().amax((0, 1))
    scales = {"x_scale": scale_from_absmax(absmax) * case["scale"]}
    states = reference(
        *("Ssdi8ChunkState", a["x"], a["b_q"], dt, decay, a["b_scale"]),
        **select("Ssdi8ChunkState", attributes | {"gate": "fp32", "scaling": "dynamic"}),
    )
    absmax = torch.maximum(states.abs().amax((0, 1, 4)), a["ssm_state"].float().abs().amax((0, 3)))
    scales["state_scale"] = scale_from_absmax(1.5 * absmax) * case["scale"]
    return scales


def select(op: str, attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: attributes[k] for k in OPS[op].attributes}


# What an SSD op of its own computes, by the names that the next ones take.
SSD_STAGES = {
    "Ssdi8ChunkCumsum": ("dt", "a"),
    "Ssdi8ChunkState": ("states",),
    "Ssdi8StatePassing": ("passed", "passed_scale", "final"),
}


def ssd_arguments(op: str, values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in OPS[op].inputs]


def module_inputs(values: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """With what the references of the modules compute."""
    values = dict(values)
    for op, names in SSD_STAGES.items():
        made = reference(op, *ssd_arguments(op, values), **select(op, attributes))
        values |= zip(names, made if isinstance(made, tuple) else (made,), strict=True)
    return values


def run_ssd_kernel(op: str, values: dict[str, Any], attributes: dict[str, Any]) -> Any:
    with guarded_allocations():
        got = kernel_of(op)(*ssd_arguments(op, values), **select(op, attributes))
        synchronize()
    return got
