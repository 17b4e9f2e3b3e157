"""The recipes that ship. A quantization method is data."""

from __future__ import annotations

from typing import Any

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.recipes.recipe import QuantConfig

# What all published methods share: absolute maxima, FP16 group scales for 4 bits, INT8 A_log and D.
_PUBLISHED: dict[str, Any] = {
    "group_search": "absmax",
    "group_scales": "fp16",
    "compensation": 0.0,
    "clip": "absmax",
    "ssm_params": "int8",
    "input_scaling": "static",
    "bc_rotation": "none",
}


def _released(name: str, about: str, **fields: Any) -> QuantConfig:
    """The paper as released: docs/method.md §5, with its rounding, gate and correction."""
    settings: dict[str, Any] = {
        **_PUBLISHED,
        "gate": "q0.7",
        "state_observer": "local",
        "rounding": "half_away",
        "scaling": "static",
    }
    return QuantConfig(name=name, about=about, **{**settings, **fields})


def _storage_only(name: str, about: str, **fields: Any) -> QuantConfig:
    """INT8 tensors around an FP16 SSD: docs/method.md §10.1; embedding and lm_head stay FP16."""
    settings: dict[str, Any] = {**_PUBLISHED, "ssd": "dequantized", "correction": "none"}
    return QuantConfig(name=name, about=about, **{**settings, **fields})


# W8A8 of SSDi8, of Quamba, and W4A8 of all.
_W8_TENSOR: dict[str, Any] = {"linear": "w8_tensor", "gptq": False}
_W8_BLOCK: dict[str, Any] = {"linear": "w8_block", "gptq": False}
_W4: dict[str, Any] = {"linear": "w4"}
# One scale for each tensor inside SSD.
_PER_TENSOR: dict[str, Any] = {"bc_granularity": "tensor", "x_granularity": "tensor"}


DEFAULT_METHOD = "edge-w8a8"

METHODS: dict[str, QuantConfig] = {
    config.name: config
    for config in (
        QuantConfig(
            name="edge-w8a8",
            about="ours: INT8 weights per row by GPTQ, inputs per token, rotated and clipped B and "
            "C, FP32 carry, dynamic scales inside SSD, compensation of input errors",
            embedding="int8_row",
        ),
        QuantConfig(
            name="edge-w4a8",
            about="ours with 4-bit weights in groups of 32, searched scales, descent after GPTQ, "
            "correction of the residual stream, INT8 lm_head",
            linear="w4",
            group_size=32,
            lm_head="w8_row",
            descent=4,
            correction="residual",
            correction_strength=None,
            embedding="int8_row",
        ),
        _released(
            "ssdi8-w8a8",
            "SSDi8 as released: one scale per weight, Q0.7 gate, FP16 Scan2",
            **_W8_TENSOR,
        ),
        _released(
            "ssdi8-w4a8",
            "SSDi8 as released with 4-bit GPTQ weights",
            **_W4,
        ),
        _storage_only(
            "quamba-w8a8",
            "Quamba: one scale per tensor, a percentile for x, FP16 SSD (accuracy only)",
            **{**_W8_BLOCK, **_PER_TENSOR, "x_granularity": "tensor_percentile"},
        ),
        _storage_only(
            "quamba2-w8a8",
            "Quamba2: x by sorted clusters, B and C per group, FP16 SSD (accuracy only)",
            **_W8_BLOCK,
            x_granularity="cluster",
        ),
        _storage_only(
            "quamba2-w4a8",
            "Quamba2 with 4-bit GPTQ weights (accuracy only)",
            **_W4,
            x_granularity="cluster",
        ),
        _released(
            "had-w8a8",
            "rotations, and SSDi8's INT8 SSD with one scale per tensor, no correction",
            **_W8_TENSOR,
            **_PER_TENSOR,
            correction="none",
        ),
        _released(
            "had-w4a8",
            "the same with 4-bit GPTQ weights",
            **_W4,
            **_PER_TENSOR,
            correction="none",
        ),
        _storage_only(
            "had-io-w8a8",
            "rotations, and INT8 tensors of one scale around an FP16 SSD (accuracy only)",
            **_W8_BLOCK,
            **_PER_TENSOR,
        ),
        _storage_only(
            "had-io-w4a8",
            "the same with 4-bit GPTQ weights (accuracy only)",
            **_W4,
            **_PER_TENSOR,
        ),
        QuantConfig(
            name="fp16",
            about="baseline: no quantization",
            linear="fp16",
            ssd="fp16",
            kv="fp16",
            compensation=0.0,
            bc_rotation="none",
            correction="none",
        ),
    )
}


def find_method(name: str) -> QuantConfig:
    """The preset of that name.

    Raises:
        UsageError: there is none; the message lists those that exist.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r};", f"known: {', '.join(METHODS)}.")
    return METHODS[name]
