"""What a recipe is: every choice of a quantization method, and which of them go together.

docs/method.md says what each choice computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.numerics.formats import Gate, Rotation, Rounding, Scaling

# Columns that share a W4 scale, at least.
LEAST_GROUP = 16


@dataclass(frozen=True)
class QuantConfig:
    """Every choice of a method; saved in the quantized checkpoint and honoured by all stages.

    Attributes:
        name: of the preset, or the user's own.
        about: one line for the table of methods.
        linear: in_proj and out_proj: FP16, W8A8 with one weight scale per tensor, per part of
            in_proj ("w8_block": z, x, B, C, dt) or per output row, or W4A8 with a scale per row
            and group.
        group_size: input columns that share a W4 scale; fewer where it divides no width, see
            `for_columns`.
        group_scales: of W4 in steps of the row: "fp16", as released, or "integer", -15 to 16,
            which a kernel applies with a fraction of the instructions.
        group_search: a W4 group's scale: from its largest weight ("absmax", as released), or the
            one of least squared error ("mse"), which may be negative: -8 to 7 is not symmetric.
        gptq: choose the values of weights by GPTQ instead of rounding to nearest.
        descent: passes of coordinate descent over the values that GPTQ has chosen.
        compensation: κ of docs/method.md §7.5: how much of the difference from the FP model, as far
            as the INT8 input tells it, is put into the weights before they are rounded.
        lm_head: FP16, or a linear layer with an INT8 input like those of blocks: W8A8 per output
            row, or W4A8 in groups.
        embedding: rows in FP16, or in INT8 with a scale each.
        clip: end of the INT8 range of B and C, and of u and r if their scale is static: the largest
            value calibrated on ("absmax"), or where the squared error is least ("mse").
        input_scaling: of u and r, the inputs of in_proj and out_proj, and of that of an INT8
            lm_head: "static", one calibrated scale, as released, or "dynamic", each token in units
            of its own largest value.
        ssd: "fp16" leaves SSD unquantized; "int8" is SSDi8's INT8 path; "dequantized" keeps
            in_proj's output, the convolution, x, B and C in INT8 but computes in FP16, as Quamba
            does: for comparing accuracy, no op runs it.
        ssd_ops: one fused op, or the paper's modules as four.
        bc_granularity: scales of B, C and CB per group, or one per tensor.
        bc_rotation: of B and C before they become INT8, see `formats.Rotation`.
        x_granularity: static scales of w·x and of the states (of x, with ssd "dequantized"): per
            (head, channel), or one per tensor. For "dequantized" also: one from a percentile, or
            one per cluster of channels that are alike (`quantize.clusters`).
        gate: how the state travels between chunks, see `formats.Gate`.
        state_observer: "local" calibrates the state scale on chunk states before passing, as
            released; "passed" also on the states that are stored after it.
        rounding: of the SSD tensors and of the input of out_proj.
        scaling: of w·x and of the passed states: "static", calibrated as released, "dynamic",
            each in units of its own largest value, or "none": FP16; see `formats.Scaling`.
        ssm_params: "int8" stores A_log and D in INT8 per tensor, as released; "fp32" does not.
        correction: closed-form mean correction carried in the bias of out_proj: "none", "out" (the
            output of out_proj, as released), "residual" (the residual stream behind it).
        correction_strength: λ, a fixed factor; None shrinks each channel by its own reliability.
        state_dtype: of the SSM state between calls.
        kv: keys and values of attention between calls: INT8 with a scale per token and head, or
            FP16, which they always are with linear "fp16".
        chunk_size: None keeps the model's.
        calibration_tokens, calibration_samples: length and number of calibration sequences.
    """

    name: str
    about: str = ""
    linear: Literal["fp16", "w8_tensor", "w8_block", "w8_row", "w4"] = "w8_row"
    group_size: int = 128
    group_scales: Literal["fp16", "integer"] = "integer"
    group_search: Literal["absmax", "mse"] = "mse"
    gptq: bool = True
    descent: int = 0
    compensation: float = 0.5
    lm_head: Literal["fp16", "w8_row", "w4"] = "fp16"
    embedding: Literal["fp16", "int8_row"] = "fp16"
    clip: Literal["absmax", "mse"] = "mse"
    input_scaling: Literal["static", "dynamic"] = "dynamic"
    ssd: Literal["fp16", "int8", "dequantized"] = "int8"
    ssd_ops: Literal["fused", "modular"] = "fused"
    bc_granularity: Literal["group", "tensor"] = "group"
    bc_rotation: Rotation = "hadamard"
    x_granularity: Literal["head_channel", "tensor", "tensor_percentile", "cluster"] = (
        "head_channel"
    )
    gate: Gate = "fp32"
    state_observer: Literal["local", "passed"] = "passed"
    rounding: Rounding = "half_even"
    scaling: Scaling = "dynamic"
    ssm_params: Literal["fp32", "int8"] = "fp32"
    correction: Literal["none", "out", "residual"] = "out"
    correction_strength: float | None = 0.15
    state_dtype: Literal["fp16", "fp32"] = "fp16"
    kv: Literal["int8", "fp16"] = "int8"
    chunk_size: int | None = None
    calibration_tokens: int = 512
    calibration_samples: int = 128

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            allowed = get_args(hints[field.name])
            value = getattr(self, field.name)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise UsageError(
                    f"recipe {self.name}: {field.name} is {value!r};",
                    f"it must be one of {', '.join(map(repr, allowed))}.",
                )
        if (self.linear == "fp16") != (self.ssd == "fp16"):
            raise UsageError(
                f"recipe {self.name} combines linear {self.linear!r} with ssd {self.ssd!r};",
                "both must be fp16, or neither.",
            )
        for table, kept in (("lm_head", self.lm_head), ("embedding", self.embedding)):
            if self.linear == "fp16" and kept != "fp16":
                raise UsageError(
                    f"recipe {self.name} combines linear 'fp16' with {table} {kept!r};",
                    "choose a method that quantizes.",
                )
        stored_only = self.x_granularity in ("tensor_percentile", "cluster")
        if stored_only and self.ssd != "dequantized":
            raise UsageError(
                f"recipe {self.name} combines x_granularity {self.x_granularity!r} with ssd "
                f"{self.ssd!r};",
                "it needs ssd 'dequantized'.",
            )
        if self.ssd == "dequantized" and self.bc_rotation != "none":
            raise UsageError(
                f"recipe {self.name} combines bc_rotation {self.bc_rotation!r} with ssd "
                "'dequantized';",
                "it needs ssd 'int8'.",
            )
        if self.gate == "q0.7" and self.scaling != "static":
            raise UsageError(
                f"recipe {self.name} combines gate 'q0.7' with scaling {self.scaling!r};",
                "an integer carry needs scaling 'static'.",
            )

    @property
    def quantized(self) -> bool:
        """Whether any part is INT8: such models are rotated."""
        return self.linear != "fp16"

    @property
    def head(self) -> QuantConfig:
        """The recipe for a quantized lm_head, as if it were a linear layer of a block."""
        return _for_linear(self, self.lm_head)

    def choosing(self, **choices: str | None) -> QuantConfig:
        """The recipe with other fields; those that are None stay.

        What differs becomes a part of the name: another recipe has another run folder.

        Raises:
            UsageError: a field cannot be that, or not together with the others.
        """
        mine = self.to_dict()
        new = {k: v for k, v in choices.items() if v is not None and v != mine[k]}
        if not new:
            return self
        name = "+".join([self.name, *(f"{field}-{value}" for field, value in new.items())])
        return type(self)(**{**mine, **new, "name": name})

    def for_columns(self, columns: int) -> QuantConfig:
        """The recipe for a linear layer of so many input columns.

        Groups that do not divide them are halved until they do, down to `LEAST_GROUP`.
        """
        return _with_groups_in(self, columns)

    def require_exportable(self) -> None:
        """Raises UsageError for a recipe that no op computes."""
        if self.ssd == "dequantized":
            raise UsageError(
                f"method {self.name} is for comparing accuracy only, no engine runs it;",
                "use it with `evaluate`, or build it with --until quantize.",
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantConfig:
        """The recipe that `to_dict` gave.

        Raises:
            UsageError: a field does not exist, or one is missing: what it stood for is not known.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        lacks, unknown = sorted(known - fields.keys()), sorted(fields.keys() - known)
        for words, names in (("lacks", lacks), ("has the unknown", unknown)):
            if names:
                raise UsageError(
                    f"the recipe was written by another version: it {words} {', '.join(names)};",
                    "quantize again.",
                )
        return cls(**fields)


@functools.cache
def _for_linear(recipe: QuantConfig, linear: Any) -> QuantConfig:
    return dataclasses.replace(recipe, linear=linear)


@functools.cache
def _with_groups_in(recipe: QuantConfig, columns: int) -> QuantConfig:
    group = recipe.group_size
    while columns % group and group % 2 == 0 and group > LEAST_GROUP:
        group //= 2
    return dataclasses.replace(recipe, group_size=group) if columns % group == 0 else recipe
