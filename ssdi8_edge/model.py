"""Mamba-2 in floating point: the reference that every quantized model is compared with.

Written from the SSD paper (Dao & Gu, "Transformers are SSMs", arXiv 2405.21060) and from what
state-spaces/mamba computes; parameter names are those of its published checkpoints.

Axis letters are those of `ops.ssd.float`, and d model; E = d_inner, E2 = channels of the
convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdi8_edge.errors import CheckpointError
from ssdi8_edge.ops.ssd.float import Observe, ssd_chunked, ssd_step


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 language model.

    `vocab_size` counts the rows of the embedding, padding included. `dt_limit` bounds the step
    width dt after softplus. Raises CheckpointError when the sizes do not fit together.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "headdim")
        for name in (*sizes, "ngroups", "chunk_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name} must be a positive integer, not {value!r}.")
        if self.d_inner % self.headdim:
            raise CheckpointError(
                f"d_inner = {self.d_inner} is not a multiple of headdim = {self.headdim}."
            )
        if self.nheads % self.ngroups:
            raise CheckpointError(
                f"{self.nheads} heads cannot be shared by ngroups = {self.ngroups} groups."
            )
        low, high = self.dt_limit
        if not 0.0 <= low < high:
            raise CheckpointError(f"dt_limit must rise from a bound >= 0, not {self.dt_limit!r}.")
        if not self.norm_eps > 0.0:
            raise CheckpointError(f"norm_eps must be positive, not {self.norm_eps!r}.")

    @property
    def d_inner(self) -> int:
        """E: channels of x, z and y."""
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        """H."""
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """E2 = E + 2GN: channels of x, B and C, which share one convolution."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """2E + 2GN + H: rows of in_proj, in the order z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.nheads

    @property
    def kernel_sizes(self) -> dict[str, int]:
        """What `ops.kernel_limits` asks for."""
        names = ("d_model", "d_inner", "headdim", "ngroups", "d_state", "d_conv", "chunk_size")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; an unbounded `dt_limit` is written as null."""
        fields = asdict(self)
        fields["dt_limit"] = [None if math.isinf(v) else v for v in self.dt_limit]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Mamba2Config:
        """Inverse of `to_dict`. Raises CheckpointError on an unknown or missing field."""
        values = dict(fields)
        if "dt_limit" in values:
            low, high = values["dt_limit"]
            values["dt_limit"] = (low, math.inf if high is None else high)
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"The model configuration does not fit: {error}.") from error


class LayerState(NamedTuple):
    """What one layer carries from one piece of a sequence to the next.

    conv: (b, d_conv - 1, E2), the latest rows of xBC before the convolution, oldest first.
    ssm:  (b, h, p, n), FP32.
    """

    conv: Tensor
    ssm: Tensor


# ---------------------------------------------------------------------------------------------
# Modules, in the order of the data
# ---------------------------------------------------------------------------------------------


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


class GatedRMSNorm(nn.Module):
    """The gate comes before the norm: v = y * silu(z), then RMS over each of `groups` blocks.

    y and z (..., size); computed and returned in FP32.
    """

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated * scale).flatten(-2) * self.weight.float()


class Mamba2Mixer(nn.Module):
    """in_proj, causal convolution, SSD, gated norm, out_proj."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        heads, channels = config.nheads, config.conv_dim
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        # As state-spaces/mamba starts its training: dt log-uniform in [1e-3, 1e-1], A in [-16, -1].
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(config.d_inner, config.ngroups, config.norm_eps)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def convolve(self, xBC: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        """Depthwise causal convolution and SiLU; returns (b, l, E2) and the new conv state."""
        length = xBC.shape[1]
        rows = torch.cat([conv_state.to(xBC.dtype), xBC], dim=1)
        weight, bias = self.conv1d.weight, self.conv1d.bias
        assert bias is not None
        # A sum of shifted rows: compilers fuse it, which they cannot do to a grouped convolution.
        total = bias + rows[:, :length] * weight[:, 0, 0]
        for tap in range(1, self.config.d_conv):
            total = total + rows[:, tap : tap + length] * weight[:, 0, tap]
        return F.silu(total), rows[:, length:]

    def forward(
        self, u: Tensor, state: LayerState | None, observe: Observe | None
    ) -> tuple[Tensor, LayerState]:
        """u (b, l, d), the normalised input; returns out (b, l, d) and the new state."""
        config = self.config
        E, E2, GN = config.d_inner, config.conv_dim, config.ngroups * config.d_state
        z, xBC, dt_raw = self.in_proj(u).split([E, E2, config.nheads], dim=-1)
        if state is None:
            state = LayerState(
                xBC.new_zeros(xBC.shape[0], config.d_conv - 1, E2),
                torch.zeros(
                    (xBC.shape[0], config.nheads, config.headdim, config.d_state), device=u.device
                ),
            )
        xBC, conv_state = self.convolve(xBC, state.conv)
        x, B, C = xBC.split([E, GN, GN], dim=-1)
        x = x.unflatten(-1, (config.nheads, config.headdim))
        B, C = (t.unflatten(-1, (config.ngroups, config.d_state)) for t in (B, C))

        A = -self.A_log.float().exp()
        if u.shape[1] == 1 and observe is None:
            tokens = (x[:, 0], dt_raw[:, 0], self.dt_bias, A, B[:, 0], C[:, 0], self.D)
            y, ssm_state = ssd_step(*tokens, state.ssm, dt_limit=config.dt_limit)
            y = y[:, None]
        else:
            for name, tensor in (("x", x), ("B", B), ("C", C)):
                if observe is not None:
                    observe(name, tensor)
            y, ssm_state = ssd_chunked(
                *(x, dt_raw, self.dt_bias, A, B, C, self.D),
                chunk_size=config.chunk_size,
                dt_limit=config.dt_limit,
                initial_state=state.ssm,
                observe=observe,
            )
        r = self.norm(y.flatten(-2), z).to(self.out_proj.weight.dtype)
        out = self.out_proj(r)
        if observe is not None:
            for name, tensor in (("y", y), ("r", r), ("out", out)):
                observe(name, tensor)
        return out, LayerState(conv_state, ssm_state)


class Mamba2Block(nn.Module):
    """Pre-norm, mixer, residual add. The residual stream is FP32."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self, residual: Tensor, state: LayerState | None = None, observe: Observe | None = None
    ) -> tuple[Tensor, LayerState]:
        """residual (b, l, d) FP32; returns its successor and the state after the last token.

        A sequence may be given in pieces of any length: the state continues it exactly. `observe`
        sees, once each per call: "u" (b, l, d) input of in_proj; "x" (b, l, h, p), "B" and "C"
        (b, l, g, n) after convolution and SiLU; "dt" (b, l, h); "chunk_state" (b, c, h, p, n)
        before and "passed_state" (b, c + 1, h, p, n) after state passing; "y" (b, l, h, p) with
        D * x; "r" (b, l, E) input and "out" (b, l, d) output of out_proj. While observed, a
        single token takes the chunked path too.
        """
        u = self.norm(residual).to(self.mixer.in_proj.weight.dtype)
        if observe is not None:
            observe("u", u)
        out, new_state = self.mixer(u, state, observe)
        return residual + out.float(), new_state


class Mamba2Backbone(nn.Module):
    """Embedding, blocks, final norm; exists for the names in the checkpoint."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class Mamba2LM(nn.Module):
    """Language model whose state dict has the names of the state-spaces checkpoints."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Mamba2Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        states: list[LayerState] | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """input_ids (b, l) int64; returns logits (b, keep, vocab_size) of the last `keep` positions
        (None: of all) and one state per layer."""
        residual = self.backbone.embedding(input_ids).float()
        new_states = []
        for i, layer in enumerate(self.backbone.layers):
            residual, state = layer(residual, None if states is None else states[i])
            new_states.append(state)
        kept = residual if keep is None else residual[:, -keep:]
        hidden = self.backbone.norm_f(kept).to(self.lm_head.weight.dtype)
        return self.lm_head(hidden), new_states

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of input_ids (b, l): returns (b, l + max_new_tokens)."""
        ids = [input_ids]
        states: list[LayerState] | None = None
        for _ in range(max_new_tokens):
            logits, states = self(ids[-1], states)
            ids.append(logits[:, -1:].argmax(-1))
        return torch.cat(ids, dim=1)
