"""What a block is. A model is a list of blocks; each block is of one kind.

Every kind computes, on the residual stream (B, L, D):

    u = rms_norm(stream)            the same for all kinds
    projected = in_proj(u)          one linear layer, whose rows are the kind's `parts`
    r, states' = inner(projected, states)
    stream' = stream + out_proj(r)  one linear layer of `width` columns

So norms, linear layers, rotations, calibration of their inputs, GPTQ and compensation need to know
no kind. A checkpoint that stores several linear layers beside each other (query, key, value; gate
and up) has them stacked by its reader. A kind is one module of `models.kinds`: it says its sizes,
its parameters, its states and `inner`, in floating point and quantized.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.observers import Observers, of_linear_inputs
from ssdi8_edge.numerics.formats import InputRotation
from ssdi8_edge.numerics.fp16_range import see
from ssdi8_edge.ops.linear import LINEAR, LINEAR_W4
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.recipes.recipe import QuantConfig

Observe = Callable[[str, Tensor], None]
Layer = dict[str, Tensor]  # the tensors of one block by their local names
Parameters = Mapping[str, Any]  # the same, as tensors or as values of a graph
States = tuple[Any, ...]  # what a block carries, in the order of its `states`
# (parameters, "in_proj" or "out_proj", its input, recipe) -> FP16 (B, L, Out)
Linear = Callable[[Parameters, str, Any, QuantConfig], Any]
OwnBlock = TypeVar("OwnBlock", bound="Block")

NORM = "norm.weight"
IN_PROJ = "in_proj.weight"
OUT_PROJ = "out_proj.weight"
# Only of models whose linear layers have biases.
IN_BIAS = "in_proj.bias"
OUT_BIAS = "out_proj.bias"


TORCH_TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a block carries from call to call.

    Attributes:
        name: of the graph's input; the number of the block stands behind it: `conv_state.3`.
        shape: without the batch.
        update: a call writes all of it anew ("replace"), or rows of its tokens ("append") along
            axis 1 of the shape, which is that of the tensor without the batch.
        ops: those of the block that come before it and after the state before it, where an error
            in this state is looked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["fp16", "fp32", "int8"]
    update: Literal["replace", "append"]
    ops: tuple[str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_TYPES[self.dtype]

    def with_room(self, state: Tensor, tokens: int) -> Tensor:
        """`state`, if it grows, with rows for so many tokens at least."""
        missing = tokens - state.shape[2] if self.update == "append" else 0
        if missing <= 0:
            return state
        rows = state.new_zeros((*state.shape[:2], missing, *state.shape[3:]))
        return torch.cat([state, rows], 2)

    def zeros(self, batch: int, device: Any = None) -> Tensor:
        """What it is before the first token."""
        return torch.zeros((batch, *self.shape), dtype=self.torch_dtype, device=device)


class Int8Input(NamedTuple):
    """The input of an INT8 linear: q (B, L, In) INT8 and token_scale (B, L, 1) FP32."""

    q: Any
    token_scale: Any

    def real(self) -> Tensor:
        """The values that it stands for, FP32."""
        value: Tensor = self.q.float() * self.token_scale
        return value


@dataclass(frozen=True)
class Context:
    """What all blocks of a model have in common when they run.

    Attributes:
        d_model: width of the residual stream.
        residual_eps: of the norms that read the residual stream.
        linear: what computes in_proj and out_proj of a quantized block: `linear`, but for
            benchmarks that compare it with another.
        position: () INT64, tokens before this call.
    """

    recipe: QuantConfig
    d_model: int
    residual_eps: float
    linear: Linear
    position: Any = None


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """Sizes of one block, a frozen dataclass for each kind; wrong ones raise CheckpointError.

    Attributes:
        in_bias, out_bias: whether in_proj and out_proj have biases.
    """

    kind: ClassVar[str]  # as in manifests: the name of its module
    # The ops behind the last state, where an error that no state shows is looked for.
    last_ops: ClassVar[tuple[str, ...]]

    in_bias: bool = False
    out_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[OwnBlock], fields: Mapping[str, Any]) -> OwnBlock:
        """Inverse of `to_dict`. Raises CheckpointError on an unknown or missing field."""
        try:
            return cls(**{k: v for k, v in fields.items() if k != "kind"})
        except TypeError as error:
            raise CheckpointError(f"The model configuration does not fit: {error}.") from error

    def adapted(self: OwnBlock, recipe: QuantConfig) -> OwnBlock:
        """The block as the recipe wants it."""
        return self

    @property
    def context(self) -> int:
        """Tokens that its states have room for; 0: none of them grows, or no build has set it."""
        return 0

    def with_context(self: OwnBlock, tokens: int) -> OwnBlock:
        """The block with room for `tokens` in its states that grow."""
        return self

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, int]:
        """The rows of in_proj, in order."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Columns of out_proj."""

    @property
    def rotation(self) -> InputRotation:
        """Of out_proj's input in a quantized block: see `hadamard.apply`."""
        return "full"

    @property
    def prompt_multiple(self) -> int:
        """Tokens; a prompt that is cut at multiples of it gives the same bits as in one piece."""
        return 1

    def own_parameters(self) -> dict[str, tuple[int, ...]]:
        """Local name and shape of what the checkpoint holds besides norm and linear layers."""
        return {}

    def parameters(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Local name and shape of every tensor of the checkpoint, in the order of the data."""
        rows = sum(self.parts.values())
        return {
            NORM: (d_model,),
            IN_PROJ: (rows, d_model),
            **({IN_BIAS: (rows,)} if self.in_bias else {}),
            **self.own_parameters(),
            OUT_PROJ: (d_model, self.width),
            **({OUT_BIAS: (d_model,)} if self.out_bias else {}),
        }

    def states(self, recipe: QuantConfig) -> tuple[StateSpec, ...]:
        """What it carries, in the order of the data."""
        return ()

    def inner_products(self, tokens: int, before: int) -> int:
        """Multiplications that `inner` takes at least, for so many tokens behind others."""
        return 0

    def misfit(self) -> str | None:
        """The first size that has no INT8 kernel, and those that have; None: all have."""
        return None

    def check_widths(self, check: Callable[[str, int], Any]) -> None:
        """Call `check` with name and size of every width of its linear layers."""
        check("width", self.width)

    def require_rotations(self, recipe: QuantConfig) -> None:
        """Raises UsageError where the recipe rotates something that has no rotation here."""
        return None

    def require_computable(
        self, index: int, layer: Layer, absmax: Mapping[str, Tensor] | None = None
    ) -> None:
        """Raises CheckpointError where a graph cannot compute block `index`.

        `layer` holds its FP32 tensors, `absmax` what calibration saw, if there was one.
        """
        return None

    def kept_in_fp16(self, recipe: QuantConfig) -> dict[str, str]:
        """Statistics of what the ops of every quantized method pass on in FP16 -> words for it."""
        return {f"in_proj.{part}": f"the {part} that in_proj gives" for part in self.parts}

    # --- in floating point ---

    @abstractmethod
    def float_block(self, d_model: int, norm_eps: float) -> FloatBlock:
        """A module with random weights, named as `parameters`."""

    # --- from floating point to quantized ---

    def observers(self, layer: Layer) -> Observers:
        """What calibration collects of this block, whose FP32 tensors are `layer`."""
        return Observers(self.parts, self.rotation)

    def reordered(
        self, layer: Layer, statistics: Mapping[str, Tensor], recipe: QuantConfig
    ) -> tuple[Layer, Any]:
        """The same block with its channels in an order that the recipe wants, and that order."""
        return layer, None

    def own_tensors(self, layer: Layer, recipe: QuantConfig) -> Layer:
        """Of the quantized checkpoint: what `inner` reads besides scales, FP32."""
        return {}

    def scales(
        self, statistics: Mapping[str, Tensor], recipe: QuantConfig, order: Any = None
    ) -> Layer:
        """Of the quantized checkpoint: the scales that the recipe calibrates."""
        return of_linear_inputs(statistics, recipe)

    # --- quantized, on tensors or on values of a graph ---

    @abstractmethod
    def inner(
        self, p: Parameters, context: Context, projected: Any, states: States
    ) -> tuple[Any, States]:
        """From in_proj's output (B, L, rows) FP16 to out_proj's input, and the next states.

        That input is an `Int8Input`; with a recipe that quantizes nothing, FP16 (B, L, width).
        """


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, computed and returned in FP32; x (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight.float()


class FloatBlock(nn.Module, ABC):
    """One block in floating point: the reference that quantized ones are compared with.

    A kind's constructor adds what is its own, and `out_proj` last: random weights are drawn in the
    order of the data.
    """

    out_proj: nn.Linear

    def __init__(self, block: Block, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.in_proj = nn.Linear(d_model, sum(block.parts.values()), bias=block.in_bias)

    @abstractmethod
    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        """in_proj's output (b, l, rows) -> out_proj's input (b, l, width), and the next states."""

    def forward(
        self, residual: Tensor, states: States | None = None, observe: Observe | None = None
    ) -> tuple[Tensor, States]:
        """residual (b, l, d) FP32; returns its successor and the states after the last token.

        A sequence may be given in pieces of any length: the states continue it exactly. `observe`
        sees, once each per call: "u" (b, l, d) input and "in_proj" output of in_proj, what the kind
        shows, "r" (b, l, width) input and "out" (b, l, d) output of out_proj.
        """
        u = self.norm(residual).to(self.in_proj.weight.dtype)
        if observe is not None:
            observe("u", u)
        projected = self.in_proj(u)
        if observe is not None:
            observe("in_proj", projected)
        r, states = self.inner(projected, states, observe)
        r = r.to(self.out_proj.weight.dtype)
        out = self.out_proj(r)
        if observe is not None:
            observe("r", r)
            observe("out", out)
        return residual + out.float(), states


def static(p: Parameters, *names: str) -> list[Any]:
    """Those of the scales that the recipe has calibrated."""
    return [p[name] for name in names if name in p]


def norm(
    p: Parameters, scale: str, context: Context, hidden: Any, residual: Any
) -> tuple[Any, Int8Input]:
    """residual' and the INT8 input of the linear behind; `scale` names its static scale."""
    residual, *u = RMS_NORM(
        *(hidden, residual, *static(p, scale)),
        eps=context.residual_eps,
        rounding="half_even",
        scaling=context.recipe.input_scaling,
    )
    return residual, Int8Input(*u)


def linear(p: Parameters, name: str, x: Int8Input, recipe: QuantConfig) -> Any:
    """The recipe's INT8 linear: FP16 (B, L, Out)."""
    scale, bias = p[f"{name}.scale"], p[f"{name}.bias"]
    if f"{name}.packed" in p:
        packed, group_scale = p[f"{name}.packed"], p[f"{name}.group_scale"]
        y = LINEAR_W4(*x, packed, group_scale, scale, bias, group_size=recipe.group_size)
    else:
        y = LINEAR(*x, p[f"{name}.weight"], scale, bias)
    return see(f"the output of {name}", y)


def require_sizes(owner: Any, *names: str) -> None:
    """Raises CheckpointError unless the named fields are positive whole numbers."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} must be a positive integer, not {value!r}.")


def least_common_multiple(blocks: tuple[Block, ...]) -> int:
    """Tokens; see `Block.prompt_multiple`."""
    return math.lcm(*(block.prompt_multiple for block in blocks))
