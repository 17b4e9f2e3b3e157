"""Recipes: a quantization method is data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ssdi8_edge.errors import UsageError
from ssdi8_edge.formats import DecayScale, Gate, Rounding


@dataclass(frozen=True)
class QuantConfig:
    """Every choice of a method; saved in the quantized checkpoint and honoured by all stages.

    Attributes:
        name: of the preset, or the user's own.
        about: one line for the table of methods.
        linear: in_proj and out_proj: FP16, W8A8 with one weight scale per tensor or per output row,
            or W4A8 with a scale per row and group.
        group_size: input columns that share a W4 scale.
        group_scales: of W4 in steps of the row: "fp16", as released, or "integer", from 1 to 16,
            which a kernel applies with a fraction of the instructions (in groups of 128).
        gptq: choose W4 values by GPTQ instead of rounding to nearest.
        lm_head: FP16, or W8A8 per row with an INT8 norm_f.
        ssd: "fp16" leaves SSD unquantized; "int8" is SSDi8's INT8 path.
        ssd_ops: one fused op, or the paper's modules as four.
        bc_granularity: scales of B, C and CB per group, or one per tensor.
        x_granularity: scales of w·x and of the states per (head, channel), or one per tensor.
        gate: how the state travels between chunks, see `ops.chunk_state.Gate`.
        state_observer: "local" calibrates the state scale on chunk states before passing, as
            released; "passed" also on the states that are stored after it.
        scan2: "fp16", or "int8_offdiag": INT8 products left of the diagonal tiles.
        scan_tile: positions per tile of Scan2 for "int8_offdiag".
        rounding: of the SSD tensors and of the input of out_proj.
        decay_scale: of INT8 w·x, "static" as released, or in proportion to the "peak" of w in each
            chunk or tile; see `formats.DecayScale`.
        ssm_params: "int8" stores A_log and D in INT8 per tensor, as released; "fp32" does not.
        fold_gate_norm: fold the weight of the gated norm into out_proj, before the rotation.
        correction: closed-form mean correction carried in the bias of out_proj: "none", "out" (the
            output of out_proj, as released), "residual" (the residual stream behind it).
        correction_strength: λ, a fixed factor; None shrinks each channel by its own reliability.
        state_dtype: of the SSM state between calls.
        chunk_size: None keeps the model's.
        calibration_tokens, calibration_samples: length and number of calibration sequences.
    """

    name: str
    about: str = ""
    linear: Literal["fp16", "w8_tensor", "w8_row", "w4"] = "w8_row"
    group_size: int = 128
    group_scales: Literal["fp16", "integer"] = "integer"
    gptq: bool = False
    lm_head: Literal["fp16", "w8_row"] = "fp16"
    ssd: Literal["fp16", "int8"] = "int8"
    ssd_ops: Literal["fused", "modular"] = "fused"
    bc_granularity: Literal["group", "tensor"] = "group"
    x_granularity: Literal["head_channel", "tensor"] = "head_channel"
    gate: Gate = "fp32"
    state_observer: Literal["local", "passed"] = "passed"
    scan2: Literal["fp16", "int8_offdiag"] = "int8_offdiag"
    scan_tile: int = 64
    rounding: Rounding = "half_even"
    decay_scale: DecayScale = "peak"
    ssm_params: Literal["fp32", "int8"] = "fp32"
    fold_gate_norm: bool = True
    correction: Literal["none", "out", "residual"] = "residual"
    correction_strength: float | None = None
    state_dtype: Literal["fp16", "fp32"] = "fp16"
    chunk_size: int | None = None
    calibration_tokens: int = 2048
    calibration_samples: int = 32

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            allowed = get_args(hints[field.name])
            value = getattr(self, field.name)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise UsageError(
                    f"recipe {self.name}: {field.name} is {value!r}",
                    f"but must be one of {', '.join(map(repr, allowed))}.",
                )
        if (self.linear == "fp16") != (self.ssd == "fp16"):
            raise UsageError(
                f"recipe {self.name}: linear {self.linear!r} with ssd {self.ssd!r}",
                "is not a combination that exists: both are fp16, or neither.",
            )
        if self.gate == "q0.7" and self.decay_scale == "peak":
            raise UsageError(
                f"recipe {self.name}: gate 'q0.7' with decay_scale 'peak'",
                "is not a combination that exists: an integer carry needs decay_scale 'static'.",
            )

    @property
    def quantized(self) -> bool:
        """Whether any part is INT8: such models are rotated."""
        return self.linear != "fp16"

    def effective_scan_tile(self, chunk_size: int) -> int:
        """The tile that ChunkScan uses; chunk_size means that all of Scan2 is FP16."""
        return min(self.scan_tile, chunk_size) if self.scan2 == "int8_offdiag" else chunk_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantConfig:
        """Raises UsageError on a field that does not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise UsageError(
                    f"unknown recipe field {name!r};", f"known: {', '.join(sorted(known))}."
                )
        return cls(**fields)


def _released(name: str, about: str, **fields: Any) -> QuantConfig:
    """The paper as released: method §2 to §5, with its rounding, gate and calibration."""
    return QuantConfig(
        name=name,
        about=about,
        gate="q0.7",
        state_observer="local",
        scan2="fp16",
        rounding="half_away",
        decay_scale="static",
        ssm_params="int8",
        group_scales="fp16",
        fold_gate_norm=False,
        correction="out",
        correction_strength=0.15,
        calibration_tokens=512,
        calibration_samples=128,
        **fields,
    )


DEFAULT_METHOD = "edge-w8a8"

METHODS: dict[str, QuantConfig] = {
    config.name: config
    for config in (
        QuantConfig(
            name="edge-w8a8",
            about="ours: INT8 weights per row, FP32 carry, states calibrated as passed, "
            "INT8 Scan2 off the diagonal, peak decay scales, residual correction",
        ),
        QuantConfig(
            name="edge-w4a8",
            about="ours with 4-bit weights in groups of 128 by GPTQ",
            linear="w4",
            gptq=True,
        ),
        _released(
            "ssdi8-w8a8",
            "SSDi8 as released: one scale per weight, Q0.7 gate, FP16 Scan2",
            linear="w8_tensor",
        ),
        _released(
            "ssdi8-w4a8",
            "SSDi8 as released with 4-bit GPTQ weights",
            linear="w4",
            gptq=True,
        ),
        QuantConfig(
            name="fp16",
            about="baseline: no quantization",
            linear="fp16",
            ssd="fp16",
            correction="none",
            fold_gate_norm=False,
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
