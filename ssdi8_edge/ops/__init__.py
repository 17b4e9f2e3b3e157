"""The ops of a quantized Mamba-2, by name."""

from __future__ import annotations

from ssdi8_edge.ops.baseline import BASELINE_OPS
from ssdi8_edge.ops.causal_conv1d import CAUSAL_CONV1D
from ssdi8_edge.ops.glue import GLUE_OPS
from ssdi8_edge.ops.linear import LINEAR, LINEAR_W4
from ssdi8_edge.ops.op import Op
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.ops.rms_norm_gated import RMS_NORM_GATED
from ssdi8_edge.ops.ssd.chunk_state import CHUNK_STATE
from ssdi8_edge.ops.ssd.cumsum import CHUNK_CUMSUM
from ssdi8_edge.ops.ssd.fused import SSD_SCAN
from ssdi8_edge.ops.ssd.passing import STATE_PASSING
from ssdi8_edge.ops.ssd.scan import CHUNK_SCAN

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
        *GLUE_OPS,
        *BASELINE_OPS,
    )
}
