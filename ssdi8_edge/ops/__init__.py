"""The ops of a quantized Mamba-2, by name."""

from __future__ import annotations

from ssdi8_edge.ops.causal_conv1d import CAUSAL_CONV1D
from ssdi8_edge.ops.chunk_cumsum import CHUNK_CUMSUM
from ssdi8_edge.ops.chunk_scan import CHUNK_SCAN
from ssdi8_edge.ops.chunk_state import CHUNK_STATE
from ssdi8_edge.ops.fp16 import FP16_OPS
from ssdi8_edge.ops.linear import LINEAR, LINEAR_W4
from ssdi8_edge.ops.op import Op
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.ops.rms_norm_gated import RMS_NORM_GATED
from ssdi8_edge.ops.ssd_scan import SSD_SCAN
from ssdi8_edge.ops.state_passing import STATE_PASSING

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        RMS_NORM,
        LINEAR,
        LINEAR_W4,
        CAUSAL_CONV1D,
        CHUNK_CUMSUM,
        CHUNK_STATE,
        STATE_PASSING,
        CHUNK_SCAN,
        SSD_SCAN,
        RMS_NORM_GATED,
        *FP16_OPS,
    )
}
