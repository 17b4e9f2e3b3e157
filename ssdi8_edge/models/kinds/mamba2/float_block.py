"""Mamba-2 in floating point: the reference that every quantized model is compared with.

Written from the SSD paper and from what state-spaces/mamba computes; the equations are in
docs/method.md §2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdi8_edge.models.block import FloatBlock, Observe, States
from ssdi8_edge.ops.ssd.float import ssd_chunked, ssd_step

if TYPE_CHECKING:
    from ssdi8_edge.models.kinds.mamba2 import Mamba2


class GatedRMSNorm(nn.Module):
    """The gate comes before the norm: v = y * silu(z), then RMS over each of `groups` blocks.

    With `norm_first` it comes behind: y has the norm, and is gated then. y and z (..., size);
    computed and returned in FP32.
    """

    def __init__(self, size: int, groups: int, eps: float, norm_first: bool = False) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.norm_first = norm_first
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(z.float())
        if self.norm_first:
            return self._normed(y.float()) * gate
        return self._normed(y.float() * gate)

    def _normed(self, v: Tensor) -> Tensor:
        grouped = v.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped * scale).flatten(-2) * self.weight.float()


class Mamba2FloatBlock(FloatBlock):
    """Causal convolution, SSD, gated norm."""

    def __init__(self, block: Mamba2, d_model: int, norm_eps: float) -> None:
        super().__init__(block, d_model, norm_eps)
        self.sizes = block
        heads, channels = block.nheads, block.conv_dim
        self.conv1d = nn.Conv1d(channels, channels, block.d_conv, groups=channels)
        # As state-spaces/mamba starts its training: dt log-uniform in [1e-3, 1e-1], A in [-16, -1].
        # On "meta", torch would load its compiler for `exp`, which takes seconds.
        with torch.device("cpu"):
            dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
            self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(heads))
        if block.gate_norm != "none":
            self.gate_norm = GatedRMSNorm(
                block.d_inner, block.ngroups, block.norm_eps, block.gate_norm == "norm_first"
            )
        self.out_proj = nn.Linear(block.width, d_model, bias=block.out_bias)

    def convolve(self, xBC: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        """Depthwise causal convolution and SiLU; returns (b, l, E2) and the new conv state."""
        length = xBC.shape[1]
        rows = torch.cat([conv_state.to(xBC.dtype), xBC], dim=1)
        weight, bias = self.conv1d.weight, self.conv1d.bias
        assert bias is not None
        # A sum of shifted rows: compilers fuse it, which they cannot do to a grouped convolution.
        total = bias + rows[:, :length] * weight[:, 0, 0]
        for tap in range(1, self.sizes.d_conv):
            total = total + rows[:, tap : tap + length] * weight[:, 0, tap]
        return F.silu(total), rows[:, length:]

    def inner(
        self, projected: Tensor, states: States | None, observe: Observe | None
    ) -> tuple[Tensor, States]:
        """`observe` sees "x" (b, l, h, p), "B" and "C" (b, l, g, n) after convolution and SiLU;
        "dt" (b, l, h); "chunk_state" (b, c, h, p, n) before and "passed_state" (b, c + 1, h, p, n)
        after state passing; "y" (b, l, h, p) with D * x. While observed, a single token takes the
        chunked path too. States: conv (b, d_conv - 1, E2), ssm (b, h, p, n) FP32.
        """
        sizes = self.sizes
        E, E2, GN = sizes.d_inner, sizes.conv_dim, sizes.ngroups * sizes.d_state
        z, xBC, dt_raw = projected.split([E, E2, sizes.nheads], dim=-1)
        if states is None:
            states = (
                xBC.new_zeros(xBC.shape[0], sizes.d_conv - 1, E2),
                torch.zeros(
                    (xBC.shape[0], sizes.nheads, sizes.headdim, sizes.d_state), device=xBC.device
                ),
            )
        xBC, conv_state = self.convolve(xBC, states[0])
        x, B, C = xBC.split([E, GN, GN], dim=-1)
        x = x.unflatten(-1, (sizes.nheads, sizes.headdim))
        B, C = (t.unflatten(-1, (sizes.ngroups, sizes.d_state)) for t in (B, C))

        A = -self.A_log.float().exp()
        if projected.shape[1] == 1 and observe is None:
            tokens = (x[:, 0], dt_raw[:, 0], self.dt_bias, A, B[:, 0], C[:, 0], self.D)
            y, ssm_state = ssd_step(*tokens, states[1], dt_limit=sizes.dt_limit)
            y = y[:, None]
        else:
            for name, tensor in (("x", x), ("B", B), ("C", C)):
                if observe is not None:
                    observe(name, tensor)
            y, ssm_state = ssd_chunked(
                *(x, dt_raw, self.dt_bias, A, B, C, self.D),
                chunk_size=sizes.chunk_size,
                dt_limit=sizes.dt_limit,
                initial_state=states[1],
                observe=observe,
            )
        if observe is not None:
            observe("y", y)
        if sizes.gate_norm == "none":
            return y.flatten(-2).float() * F.silu(z.float()), (conv_state, ssm_state)
        return self.gate_norm(y.flatten(-2), z), (conv_state, ssm_state)
