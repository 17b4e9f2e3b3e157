"""The quantized model: one data flow, run on tensors or recorded as a graph.

The parameters of a block are a mapping from name to tensor (or graph value), with the names used in
`run_block`; in the checkpoint `layers.{i}.` stands before them. Outside the blocks there are
`embedding.weight`, `norm_f.weight` or `norm_f.scale`, and `lm_head.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssdi8_edge.fp16_range import IN_FP32, RangeWatch, enter, see, watched
from ssdi8_edge.methods import DEFAULT_METHOD, QuantConfig
from ssdi8_edge.model import Mamba2Config
from ssdi8_edge.ops import fp16
from ssdi8_edge.ops.causal_conv1d import CAUSAL_CONV1D
from ssdi8_edge.ops.linear import LINEAR, LINEAR_W4
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.ops.rms_norm_gated import RMS_NORM_GATED
from ssdi8_edge.ops.ssd_scan import SSD_SCAN, ssd_modules
from ssdi8_edge.quantize.dequantized import dequantized_ssd

# An infinite dt limit in FP32 attributes: larger than any softplus of an FP16 input.
UNLIMITED = 3.4e38

Parameters = Mapping[str, Any]


class State(NamedTuple):
    """What a block carries from call to call: conv (B, W - 1, E2) FP16, ssm (B, H, P, N)."""

    conv: Any
    ssm: Any


def state_dtype(recipe: QuantConfig) -> torch.dtype:
    """Type of the SSM state between calls."""
    return torch.float16 if recipe.state_dtype == "fp16" else torch.float32


def zero_state(config: Mamba2Config, recipe: QuantConfig, batch: int, device: Any = None) -> State:
    """The state before the first token."""
    conv = (batch, config.d_conv - 1, config.conv_dim)
    ssm = (batch, config.nheads, config.headdim, config.d_state)
    return State(
        torch.zeros(conv, dtype=torch.float16, device=device),
        torch.zeros(ssm, dtype=state_dtype(recipe), device=device),
    )


@dataclass(frozen=True)
class NodeAttributes:
    """Node attributes that follow from the model's sizes and the recipe."""

    config: Mamba2Config
    recipe: QuantConfig

    @property
    def conv(self) -> dict[str, Any]:
        c = self.config
        return {"d_inner": c.d_inner, "conv_dim": c.conv_dim, "d_conv": c.d_conv}

    @property
    def heads(self) -> dict[str, Any]:
        c = self.config
        low, high = c.dt_limit
        return {
            "chunk_size": c.chunk_size,
            "nheads": c.nheads,
            "headdim": c.headdim,
            "ngroups": c.ngroups,
            "d_state": c.d_state,
            "dt_column": c.d_inner + c.conv_dim,
            "dt_min": float(low),
            "dt_max": min(float(high), UNLIMITED),
        }

    @property
    def ssd(self) -> dict[str, Any]:
        return {
            **self.heads,
            "gate": self.recipe.gate,
            "rounding": self.recipe.rounding,
            "scaling": self.recipe.scaling,
        }

    @property
    def gated(self) -> dict[str, Any]:
        c = self.config
        return {"eps": c.norm_eps, "d_inner": c.d_inner, "ngroups": c.ngroups}


class Int8Input(NamedTuple):
    """The input of an INT8 linear: q (B, L, In) INT8 and token_scale (B, L, 1) FP32."""

    q: Any
    token_scale: Any

    def real(self) -> Tensor:
        """The values that it stands for, FP32."""
        value: Tensor = self.q.float() * self.token_scale
        return value


def linear(p: Parameters, name: str, x: Int8Input, recipe: QuantConfig) -> Any:
    """The recipe's INT8 linear: FP16 (B, L, Out)."""
    scale, bias = p[f"{name}.scale"], p[f"{name}.bias"]
    if f"{name}.packed" in p:
        packed, group_scale = p[f"{name}.packed"], p[f"{name}.group_scale"]
        y = LINEAR_W4(*x, packed, group_scale, scale, bias, group_size=recipe.group_size)
    else:
        y = LINEAR(*x, p[f"{name}.weight"], scale, bias)
    return see(f"the output of {name}", y)


def run_mixer(
    p: Parameters, attributes: NodeAttributes, hidden: Any, residual: Any, state: State
) -> tuple[Any, Int8Input, State]:
    """Norm to gated norm of an INT8 block: (residual', input of out_proj, state')."""
    recipe = attributes.recipe
    rounding = recipe.rounding
    residual, u = norm(p, "u_scale", attributes, hidden, residual)
    zxbcdt = linear(p, "in_proj", u, recipe)
    if recipe.ssd == "dequantized":
        y, zxbcdt, *carried = dequantized_ssd(
            *(p, recipe, attributes.conv, attributes.heads, zxbcdt, *state)
        )
        _see_ssd(y, carried[1])
        return residual, _gated(p, attributes, y, zxbcdt), State(*carried)
    x, b, c, conv = CAUSAL_CONV1D(
        *(zxbcdt, state.conv, p["conv1d.weight"], p["conv1d.bias"], p["b_scale"], p["c_scale"]),
        **attributes.conv,
        ngroups=attributes.config.ngroups,
        rotation=recipe.bc_rotation,
        rounding=rounding,
    )
    see("x behind the convolution", x)
    scales = [p[k] for k in ("b_scale", "c_scale", "cb_scale")]
    scales += _static(p, "x_scale", "state_scale")
    ssd = ssd_modules if recipe.ssd_ops == "modular" else SSD_SCAN
    y, ssm = ssd(
        *(x, b, c, zxbcdt, state.ssm, p["dt_bias"], p["A"], p["D"], *scales), **attributes.ssd
    )
    _see_ssd(y, ssm)
    return residual, _gated(p, attributes, y, zxbcdt), State(conv, ssm)


def _see_ssd(y: Any, state: Any) -> None:
    see("y, the output of SSD,", y)
    see("the SSM state", state)


def norm(
    p: Parameters, scale: str, attributes: NodeAttributes, hidden: Any, residual: Any
) -> tuple[Any, Int8Input]:
    """residual' and the INT8 input of the linear behind; `scale` names its static scale."""
    residual, *u = RMS_NORM(
        *(hidden, residual, *_static(p, scale)),
        eps=attributes.config.residual_eps,
        rounding="half_even",
        scaling=attributes.recipe.input_scaling,
    )
    return residual, Int8Input(*u)


def _gated(p: Parameters, attributes: NodeAttributes, y: Any, zxbcdt: Any) -> Int8Input:
    """out_proj's input."""
    return Int8Input(
        *RMS_NORM_GATED(
            *(y, zxbcdt, p["gate_norm.weight"], *_static(p, "r_scale")),
            **attributes.gated,
            rounding=attributes.recipe.rounding,
            scaling=attributes.recipe.input_scaling,
        )
    )


def _static(p: Parameters, *names: str) -> list[Any]:
    """Those of the scales that the recipe has calibrated."""
    return [p[name] for name in names if name in p]


def run_block(
    p: Parameters, attributes: NodeAttributes, hidden: Any, residual: Any, state: State
) -> tuple[Any, Any, State]:
    """One block: hidden (B, L, D) FP16 and residual (B, L, D) FP32 in, their successors out."""
    if attributes.recipe.quantized:
        residual, r, state = run_mixer(p, attributes, hidden, residual, state)
        return linear(p, "out_proj", r, attributes.recipe), residual, state
    eps = attributes.config.residual_eps
    residual, u = fp16.RMS_NORM(hidden, residual, p["norm.weight"], eps=eps)
    see("the input of in_proj", u)
    zxbcdt = see("the output of in_proj", fp16.LINEAR(u, p["in_proj.weight"]))
    x, b, c, conv = fp16.CAUSAL_CONV1D(
        *(zxbcdt, state.conv, p["conv1d.weight"], p["conv1d.bias"]), **attributes.conv
    )
    for name, value in (("x", x), ("B", b), ("C", c)):
        see(f"{name} behind the convolution", value)
    y, ssm = fp16.SSD_SCAN(
        *(x, b, c, zxbcdt, state.ssm, p["dt_bias"], p["A"], p["D"]), **attributes.heads
    )
    _see_ssd(y, ssm)
    r = fp16.RMS_NORM_GATED(y, zxbcdt, p["gate_norm.weight"], **attributes.gated)
    see("the input of out_proj", r)
    out = see("the output of out_proj", fp16.LINEAR(r, p["out_proj.weight"]))
    return out, residual, State(conv, ssm)


def run_head(p: Parameters, attributes: NodeAttributes, hidden: Any, residual: Any) -> Any:
    """Final norm and lm_head: logits (B, L, V) FP32."""
    if attributes.recipe.lm_head == "fp16":
        eps = attributes.config.residual_eps
        _, normed = fp16.RMS_NORM(hidden, residual, p["norm_f.weight"], eps=eps)
        see("the input of lm_head", normed)
        logits = fp16.LINEAR(normed, p["lm_head.weight"])
    else:
        _, u = norm(p, "norm_f.scale", attributes, hidden, residual)
        logits = LINEAR(*u, p["lm_head.weight"], p["lm_head.scale"], p["lm_head.bias"])
    return fp16.LOGITS(see("the logits", logits))


Scope = Callable[[str], AbstractContextManager[Any]]


def run_model(
    layer: Callable[[int], Parameters],
    top: Parameters,
    attributes: NodeAttributes,
    input_ids: Any,
    states: list[State],
    keep: Any,
    scope: Scope = lambda name: nullcontext(),
) -> tuple[Any, list[State]]:
    """Embedding to logits of the last `keep` positions, with carried states.

    `layer(i)` gives the parameters of block i; `top` those outside the blocks.
    """
    hidden, residual = fp16.EMBEDDING(top["embedding.weight"], input_ids)
    new_states = []
    for i, state in enumerate(states):
        enter(f"layers.{i}")
        with scope(f"layers.{i}"):
            hidden, residual, state = run_block(layer(i), attributes, hidden, residual, state)
        new_states.append(state)
    enter("head")
    with scope("head"):
        hidden, residual = fp16.LAST_POSITIONS(hidden, residual, keep)
        logits = run_head(top, attributes, hidden, residual)
    return logits, new_states


# What is FP16 in the baseline and not in other methods: it is scaled, or added in FP32.
SCALED = ("the input of in_proj", "the input of out_proj", "the output of out_proj")


def watched_model(
    model: QuantizedMamba2, tell: Callable[[str], None] | None = None
) -> AbstractContextManager[RangeWatch]:
    """Inside, `model` raises CheckpointError where a tensor leaves FP16, and names it.

    `tell` is handed the sentence instead.
    """
    recipe = model.recipe

    def remedy(name: str) -> str:
        if recipe.quantized:
            return "calibrate on text like this; if it stays so, " + IN_FP32
        if name in SCALED:
            return (
                f"choose --method {DEFAULT_METHOD}, which scales it; "
                "`evaluate` of the checkpoint itself computes in FP32."
            )
        return IN_FP32

    return watched(recipe.name, remedy, tell)


class QuantizedMamba2:
    """A quantized checkpoint in memory: the torch reference of what a bundle computes."""

    def __init__(
        self, config: Mamba2Config, recipe: QuantConfig, tensors: Mapping[str, Tensor]
    ) -> None:
        self.attributes = NodeAttributes(config, recipe)
        self._top: dict[str, Any] = {}
        self._layers: list[dict[str, Any]] = [{} for _ in range(config.n_layer)]
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, index, local = name.split(".", 2)
                self._layers[int(index)][local] = tensor
            else:
                self._top[name] = tensor
        self._top.setdefault("lm_head.weight", self._top["embedding.weight"])

    @property
    def config(self) -> Mamba2Config:
        return self.attributes.config

    @property
    def recipe(self) -> QuantConfig:
        return self.attributes.recipe

    def zero_states(self, batch: int) -> list[State]:
        device = self._top["embedding.weight"].device
        return [
            zero_state(self.config, self.recipe, batch, device) for _ in range(self.config.n_layer)
        ]

    def forward(
        self,
        input_ids: Tensor,
        states: list[State] | None = None,
        keep: int = 1,
        scope: Scope = lambda name: nullcontext(),
    ) -> tuple[Tensor, list[State]]:
        """input_ids (B, L) -> logits (B, keep, V) FP32 and the states after the last token."""
        with torch.inference_mode():
            return run_model(
                self._layers.__getitem__,
                self._top,
                self.attributes,
                input_ids,
                self.zero_states(input_ids.shape[0]) if states is None else states,
                torch.tensor(keep),
                scope,
            )
