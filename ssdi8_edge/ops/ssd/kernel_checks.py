"""What the kernel calls of the SSD ops check alike, and the types that scaling and gate ask for."""

from __future__ import annotations

from typing import Any

import torch

from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.sizes import ceil_div

GROUP_SCALES = ("b_scale", "c_scale", "cb_scale")


def require_tokens(call: Call, *int8: str) -> None:
    """x (B, L, H·P) FP16 and the named (B, L, G·N) INT8 tensors."""
    call.batch, call.length = call.x.shape[:2]
    tokens = (call.batch, call.length)
    call.require(torch.float16, x=(*tokens, call.nheads * call.headdim))
    columns = (*tokens, call.ngroups * call.d_state)
    call.require(torch.int8, **{name: columns for name in int8})


def require_decay(call: Call) -> None:
    """dt and a (B, H, L) FP32."""
    decay = (call.batch, call.nheads, call.length)
    call.require(torch.float32, dt=decay, a=decay)


def require_scales(call: Call, per_group: tuple[str, ...], per_channel: tuple[str, ...]) -> None:
    """Those of channels are there with scaling "static" only."""
    channels = (call.nheads, call.headdim)
    call.require(torch.float32, **{name: (call.ngroups,) for name in per_group})
    present = [name for name in per_channel if getattr(call, name) is not None]
    call.require(torch.float32, **{name: channels for name in present})


def require_state(call: Call, *shape: Any) -> None:
    """The SSM state, in either type."""
    call.state_fp32 = int(call.ssm_state.dtype is torch.float32)
    call.require(torch.float32 if call.state_fp32 else torch.float16, ssm_state=shape)
    call.ssm_state_out = call.next_state(call.ssm_state)


def chunks(call: Call) -> Any:
    """How many chunks the tokens are, a size."""
    return ceil_div(call.length, call.chunk_size)


def state_type(call: Call) -> torch.dtype:
    """Of the states of chunks."""
    if call.scaling == "none":
        return torch.float16
    return torch.float32 if call.gate == "fp32" else torch.int8


def passed_type(call: Call) -> torch.dtype:
    """Of the states that are passed between chunks."""
    return torch.float16 if call.scaling == "none" else torch.int8
