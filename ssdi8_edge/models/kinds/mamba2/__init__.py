"""Mamba-2: causal convolution, state-space duality (SSD), gated norm.

Axis letters: B batch, L token, H head, P channel of a head, G group of B and C, N state,
E = H·P channels of x, z and y, E2 = E + 2·G·N channels of the convolution. Sources: the SSD paper
(Dao & Gu, "Transformers are SSMs", arXiv 2405.21060); quantized as docs/method.md says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import (
    Block,
    Context,
    FloatBlock,
    Int8Input,
    Layer,
    Parameters,
    States,
    StateSpec,
    require_sizes,
    static,
)
from ssdi8_edge.models.kinds.mamba2 import calibration
from ssdi8_edge.models.kinds.mamba2.clusters import Order, permuted, sort_and_cluster
from ssdi8_edge.models.kinds.mamba2.dequantized import dequantized_ssd
from ssdi8_edge.models.kinds.mamba2.float_block import Mamba2FloatBlock
from ssdi8_edge.numerics import hadamard, int8
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.fp16_range import IN_FP32, see
from ssdi8_edge.ops import baseline
from ssdi8_edge.ops.activation import ACTIVATION, ACTIVATION_FP16
from ssdi8_edge.ops.causal_conv1d import CAUSAL_CONV1D
from ssdi8_edge.ops.kernel_limits import inner_width_misfit, size_misfit
from ssdi8_edge.ops.rms_norm_gated import NORM_THEN_GATE, RMS_NORM_GATED
from ssdi8_edge.ops.ssd.fused import SSD_SCAN, ssd_modules
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.recipes.recipe import QuantConfig

GateNorm = Literal["grouped", "norm_first", "none"]

# An infinite dt limit in FP32 attributes: larger than any softplus of an FP16 input.
UNLIMITED = 3.4e38
# What exp of FP64 holds is below e^709.8.
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Mamba2(Block):
    """Sizes of a Mamba-2 block.

    Attributes:
        d_inner: E.
        d_conv: taps of the convolution.
        chunk_size: tokens.
        dt_limit: bounds of the step width dt after softplus.
        norm_eps: of the gated norm.
        gate_norm: "grouped", a norm of each group behind the gate; "norm_first", before the gate;
            "none", the gate alone.
    """

    kind: ClassVar[str] = "mamba2"
    last_ops: ClassVar[tuple[str, ...]] = ("ChunkScan", "RmsNormGated", "Linear (out_proj)")

    d_inner: int
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    gate_norm: GateNorm = "grouped"

    def __post_init__(self) -> None:
        require_sizes(self, "d_inner", "d_state", "d_conv", "headdim", "ngroups", "chunk_size")
        if self.d_inner % self.headdim:
            raise CheckpointError(
                f"d_inner = {self.d_inner} is not a multiple of headdim = {self.headdim}."
            )
        if self.nheads % self.ngroups:
            raise CheckpointError(
                f"{self.nheads} heads cannot be shared by ngroups = {self.ngroups} groups."
            )
        if self.gate_norm not in get_args(GateNorm):
            raise CheckpointError(
                f"gate_norm must be one of {', '.join(get_args(GateNorm))}, not {self.gate_norm!r}."
            )
        low, high = self.dt_limit
        if not 0.0 <= low < high:
            raise CheckpointError(f"dt_limit must rise from a bound >= 0, not {self.dt_limit!r}.")
        if not 0.0 < self.norm_eps < math.inf:
            raise CheckpointError(f"norm_eps must be positive, not {self.norm_eps!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; an unbounded `dt_limit` is written as null."""
        limits = [None if math.isinf(v) else v for v in self.dt_limit]
        return super().to_dict() | {"dt_limit": limits}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Mamba2:
        """Inverse of `to_dict`. Raises CheckpointError on an unknown or missing field."""
        low, high = fields["dt_limit"]
        limits = (low, math.inf if high is None else high)
        return super().from_dict({**fields, "dt_limit": limits})

    def adapted(self, recipe: QuantConfig) -> Mamba2:
        """With the recipe's chunk size."""
        if recipe.chunk_size is None:
            return self
        return dataclasses.replace(self, chunk_size=recipe.chunk_size)

    # --- sizes and the row layout ---

    @property
    def nheads(self) -> int:
        """H."""
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """E2: channels of x, B and C, which share one convolution."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def parts(self) -> dict[str, int]:
        """The rows of in_proj, in order."""
        gn = self.ngroups * self.d_state
        return {"z": self.d_inner, "x": self.d_inner, "B": gn, "C": gn, "dt": self.nheads}

    @property
    def width(self) -> int:
        """Columns of out_proj."""
        return self.d_inner

    @property
    def rotation(self) -> InputRotation:
        """The gated norm rotates the whole width, where it can; a gate alone, blocks."""
        return "blocks" if self.gate_norm == "none" else "full"

    @property
    def prompt_multiple(self) -> int:
        """A chunk."""
        return self.chunk_size

    def own_parameters(self) -> dict[str, tuple[int, ...]]:
        """Convolution, heads, gated norm."""
        heads = (self.nheads,)
        norm = {} if self.gate_norm == "none" else {"gate_norm.weight": (self.d_inner,)}
        return {
            "conv1d.weight": (self.conv_dim, 1, self.d_conv),
            "conv1d.bias": (self.conv_dim,),
            "dt_bias": heads,
            "A_log": heads,
            "D": heads,
            **norm,
        }

    def states(self, recipe: QuantConfig) -> tuple[StateSpec, ...]:
        """conv_state: the last rows of xBC before the convolution; ssm_state, of the recurrence."""
        return (
            StateSpec(
                name="conv_state",
                shape=(self.d_conv - 1, self.conv_dim),
                dtype="fp16",
                update="replace",
                ops=("RmsNorm", "Linear (in_proj)"),
            ),
            StateSpec(
                name="ssm_state",
                shape=(self.nheads, self.headdim, self.d_state),
                dtype=recipe.state_dtype,
                update="replace",
                ops=("CausalConv1d", "ChunkCumsum", "ChunkState", "StatePassing"),
            ),
        )

    def inner_products(self, tokens: int, before: int) -> int:
        """Each token's into the state and out of it; chunks take more, the recurrence these."""
        return 2 * self.d_inner * self.d_state * tokens

    def misfit(self) -> str | None:
        """The first size that has no INT8 kernel, and those that have; None: all have."""
        names = ("headdim", "d_state", "chunk_size", "d_conv", "ngroups")
        sizes = {name: getattr(self, name) for name in names}
        return size_misfit(sizes) or inner_width_misfit("d_inner", self.d_inner)

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        """d_inner."""
        check("d_inner", self.d_inner)

    def require_rotations(self, recipe: QuantConfig) -> None:
        """Raises UsageError where B and C are rotated and d_state has no rotation."""
        if recipe.bc_rotation == "hadamard":
            fits = [
                each.name
                for each in METHODS.values()
                if each.bc_rotation == "none" and each.ssd != "dequantized"
            ]
            remedy = f"use a --method that does not rotate B and C: {', '.join(fits)}."
            hadamard.require("d_state", self.d_state, remedy)

    def require_computable(
        self, index: int, layer: Layer, absmax: Mapping[str, Tensor] | None = None
    ) -> None:
        """Refuses a head whose time step nothing bounds and whose exponential FP64 cannot hold.

        The ONNX function of softplus takes it; trained heads stay below 10.
        """
        raw = 0.0 if absmax is None else absmax["in_proj.dt"].amax().cpu()
        largest = layer["dt_bias"].cpu() + raw
        head = int(largest.argmax())
        if largest[head] > LARGEST_EXPONENT and math.isinf(self.dt_limit[1]):
            raise CheckpointError(
                f"layers.{index}: head {head} takes softplus of {largest[head].item():.4g}, the "
                "sum of dt and mixer.dt_bias, and a graph can do so up to "
                f"{LARGEST_EXPONENT:g}",
                IN_FP32,
            )

    def kept_in_fp16(self, recipe: QuantConfig) -> dict[str, str]:
        """Also x, y and, where it is FP16, the state."""
        state = {"passed_state": "the SSM state"} if recipe.state_dtype == "fp16" else {}
        own = {"x": "x behind the convolution", "y": "y, the output of SSD,"}
        return super().kept_in_fp16(recipe) | own | state

    # --- in floating point, and from there to quantized ---

    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        """A module with random weights."""
        return Mamba2FloatBlock(self, d_model, norm_eps)

    def observers(self, layer: Layer) -> calibration.Mamba2Observers:
        """What calibration collects."""
        return calibration.Mamba2Observers(self, -layer["A_log"].exp())

    def reordered(
        self, layer: Layer, statistics: Mapping[str, Tensor], recipe: QuantConfig
    ) -> tuple[Layer, Order | None]:
        """With x_granularity "cluster": heads and channels so that those that are alike adjoin."""
        if recipe.x_granularity != "cluster":
            return layer, None
        order = sort_and_cluster(statistics["x_mean"], self.ngroups)
        return permuted(layer, order.heads, order.channels), order

    def own_tensors(self, layer: Layer, recipe: QuantConfig) -> Layer:
        """Convolution and per-head parameters, and the gated norm's weight."""
        a_log, d = layer["A_log"], layer["D"]
        if recipe.ssm_params == "int8":
            a_log, d = (_through_int8(v) for v in (a_log, d))
        conv = {k: layer[k] for k in ("conv1d.weight", "conv1d.bias")}
        if recipe.ssd == "dequantized":
            sizes = [self.parts[name] for name in ("x", "B", "C")]
            conv = {
                k: torch.cat([_through_int8(part) for part in v.split(sizes)])
                for k, v in conv.items()
            }
        return {
            "conv1d.weight": conv["conv1d.weight"].squeeze(1),
            "conv1d.bias": conv["conv1d.bias"],
            "dt_bias": layer["dt_bias"],
            "A": -a_log.exp(),
            "D": d,
            **{k: layer[k] for k in ("gate_norm.weight",) if k in layer},
        }

    def scales(
        self, statistics: Mapping[str, Tensor], recipe: QuantConfig, order: Any = None
    ) -> Layer:
        """The static scales that the recipe computes with."""
        return calibration.activation_scales(statistics, recipe, self.parts, order)

    # --- quantized ---

    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        """Convolution, SSD and gated norm on zxbcdt = `projected`."""
        recipe = context.recipe
        y, projected, states = self.to_y(p, recipe, projected, states)
        if not recipe.quantized:
            return self.gated(p, y, projected), states
        quantization = {"rounding": recipe.rounding, "scaling": recipe.input_scaling}
        r_scale = static(p, "r_scale")
        if self.gate_norm == "none":
            r = ACTIVATION(
                *(y, projected, *r_scale), **self._gate, rotation=self.rotation, **quantization
            )
        else:
            op = RMS_NORM_GATED if self.gate_norm == "grouped" else NORM_THEN_GATE
            r = op(*(y, projected, p["gate_norm.weight"], *r_scale), **self._norm, **quantization)
        return Int8Input(*r), states

    def to_y(
        self, p: Parameters, recipe: QuantConfig, projected: Any, states: States
    ) -> tuple[Any, Any, States]:
        """Convolution and SSD: y (B, L, E) FP16, the projected values that the gate reads, and the
        next states. `projected` may have columns of others behind its own."""
        conv_state, ssm_state = states
        if not recipe.quantized:
            return self._baseline(p, projected, states)
        if recipe.ssd == "dequantized":
            own = projected[..., : sum(self.parts.values())]
            y, own, *carried = dequantized_ssd(
                *(p, recipe, self._conv, self._heads, own, conv_state, ssm_state)
            )
            _see_ssd(y, carried[1])
            return y, own, tuple(carried)
        x, b, c, conv_state = CAUSAL_CONV1D(
            *(projected, conv_state, p["conv1d.weight"], p["conv1d.bias"]),
            *(p["b_scale"], p["c_scale"]),
            **self._conv,
            ngroups=self.ngroups,
            rotation=recipe.bc_rotation,
            rounding=recipe.rounding,
        )
        see("x behind the convolution", x)
        scales = [p[k] for k in ("b_scale", "c_scale", "cb_scale")]
        scales += static(p, "x_scale", "state_scale")
        ssd = ssd_modules if recipe.ssd_ops == "modular" else SSD_SCAN
        y, ssm_state = ssd(
            *(x, b, c, projected, ssm_state, p["dt_bias"], p["A"], p["D"], *scales),
            **self._heads,
            gate=recipe.gate,
            rounding=recipe.rounding,
            scaling=recipe.scaling,
        )
        _see_ssd(y, ssm_state)
        return y, projected, (conv_state, ssm_state)

    def _baseline(self, p: Parameters, projected: Any, states: States) -> tuple[Any, Any, States]:
        conv_state, ssm_state = states
        x, b, c, conv_state = baseline.CAUSAL_CONV1D(
            *(projected, conv_state, p["conv1d.weight"], p["conv1d.bias"]), **self._conv
        )
        for name, value in (("x", x), ("B", b), ("C", c)):
            see(f"{name} behind the convolution", value)
        y, ssm_state = baseline.SSD_SCAN(
            *(x, b, c, projected, ssm_state, p["dt_bias"], p["A"], p["D"]), **self._heads
        )
        _see_ssd(y, ssm_state)
        return y, projected, (conv_state, ssm_state)

    def gated(self, p: Parameters, y: Any, projected: Any) -> Any:
        """y behind gate and norm in FP16 (B, L, E), not rotated."""
        if self.gate_norm == "none":
            return ACTIVATION_FP16(y, projected, **self._gate)
        grouped = self.gate_norm == "grouped"
        op = baseline.RMS_NORM_GATED if grouped else baseline.NORM_THEN_GATE
        return op(y, projected, p["gate_norm.weight"], **self._norm)

    # Node attributes.

    @property
    def _conv(self) -> dict[str, Any]:
        return {"d_inner": self.d_inner, "conv_dim": self.conv_dim, "d_conv": self.d_conv}

    @property
    def _heads(self) -> dict[str, Any]:
        low, high = self.dt_limit
        return {
            "chunk_size": self.chunk_size,
            "nheads": self.nheads,
            "headdim": self.headdim,
            "ngroups": self.ngroups,
            "d_state": self.d_state,
            "dt_column": self.d_inner + self.conv_dim,
            "dt_min": float(low),
            "dt_max": min(float(high), UNLIMITED),
        }

    @property
    def _gate(self) -> dict[str, Any]:
        return {"activation": "silu_gate", "width": self.d_inner, "x_column": 0}

    @property
    def _norm(self) -> dict[str, Any]:
        return {"eps": self.norm_eps, "d_inner": self.d_inner, "ngroups": self.ngroups}


def _see_ssd(y: Any, state: Any) -> None:
    see("y, the output of SSD,", y)
    see("the SSM state", state)


def _through_int8(value: Tensor) -> Tensor:
    scale = int8.scale_from_absmax(value.abs().amax())
    return int8.quantize(value, scale, "half_even").float() * scale
