"""The SSD of the FP16 baseline, and the ops that every recipe shares: bodies against references."""

from __future__ import annotations

import pytest
import torch
from case_table import (
    SSD_CASES,
    ssd_inputs,
)
from op_bodies import compare_body

from ssdi8_edge.ops.glue import embedding_int8_reference, pack_rows, unpack_rows


def test_small_bodies() -> None:
    """Embedding, the last positions and the cast of the logits copy values: exact."""
    g = torch.Generator().manual_seed(8)
    table = torch.randn(50, 16, generator=g).half()
    ids = torch.randint(0, 50, (2, 7), generator=g, dtype=torch.int32)
    compare_body("Embedding", [table, ids], {})
    hidden, residual = torch.randn(2, 7, 16, generator=g).half(), torch.randn(2, 7, 16, generator=g)
    for keep in (1, 3, 7):
        compare_body("LastPositions", [hidden, residual, torch.tensor(keep)], {})
    compare_body("Logits", [hidden], {})


def test_int8_embedding_body() -> None:
    """Every INT8 value at every place of a word, and rows whose values leave FP16's normal range:
    exact, as are the values that were packed."""
    every = torch.arange(-128, 128, dtype=torch.int8)
    g = torch.Generator().manual_seed(9)
    q = torch.cat([every.repeat(4)[None], torch.full((2, 1024), -128, dtype=torch.int8)])
    q[2] = 127
    q = torch.cat([q, torch.randint(-128, 128, (40, 1024), generator=g, dtype=torch.int8)])
    packed = pack_rows(q)
    assert packed.dtype is torch.int32 and torch.equal(unpack_rows(packed), q.int())
    scale = torch.rand(len(q), 1, generator=g) * 10.0 ** torch.randint(-8, 2, (len(q), 1))
    ids = torch.randint(0, len(q), (2, 50), generator=g, dtype=torch.int32)
    ids[0, :3] = torch.arange(3)
    compare_body("EmbeddingInt8", [packed, scale, ids], {})
    hidden, residual = embedding_int8_reference(packed, scale, ids)
    assert torch.equal(hidden, (q.float() * scale).half()[ids.long()])
    assert residual.shape == hidden.shape and not residual.any()


# The baseline has no rounding to INT8 that the other rows could change.
FP16_SCAN_ROWS = [
    name
    for name, case in SSD_CASES.items()
    if case.gate == "fp32" and case.rounding == "half_even" and case.data != "saturating"
]


@pytest.mark.parametrize("name", FP16_SCAN_ROWS)
def test_fp16_scan_body(name: str) -> None:
    """The baseline's SSD: FP32 in torch, FP64 in the body; 1 FP16 step in 2 % of the values.

    Row sums are up to 160 terms: FP32 errors of 1e-6 relative against half an FP16 step of 5e-4
    move about 1 value in 200, more where terms cancel.
    """
    case = SSD_CASES[name]
    t = ssd_inputs(case)
    b, c = ((t[f"{k}_q"].float() / 64).half() for k in "bc")
    if case.data == "extreme":
        t["x"], b, c = t["x"] / 6e4, b / 2, c / 2
        t["ssm_state"] = t["ssm_state"] / 6e4
    inputs = [t["x"], b, c, *(t[k] for k in ("zxbcdt", "ssm_state", "dt_bias", "A", "D"))]
    attributes = {"chunk_size": case.chunk, **case.geometry, **case.time_step}
    compare_body("SsdScan", inputs, attributes, fp16_fraction=0.02)
