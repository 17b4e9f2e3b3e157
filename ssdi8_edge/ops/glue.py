"""What every recipe's graph has before, between and behind its blocks; bodies are inlined."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def embedding_reference(table: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the FP16 table (V, D) as `hidden` (B, L, D), and a zero FP32 residual for it."""
    hidden = table[input_ids.long()]
    return hidden, torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)


def _embedding_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            "hidden = Gather (table, input_ids)",
            t.number("zero", 0.0),
            "hidden_shape = Shape (hidden)",
            "residual = Expand (zero, hidden_shape)",
        ]
    )


def last_positions_reference(
    hidden: Tensor, residual: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """The last `keep` (a scalar) positions of both (B, L, D): the only ones that need logits."""
    n = int(keep)
    return hidden[:, -n:], residual[:, -n:]


def _last_positions_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            t.ints("vector", [1]),
            "keep_vector = Reshape (keep, vector)",
            "start = Neg (keep_vector)",
            t.ints("stop", [2**31 - 1]),
            t.ints("axis", [1]),
            "hidden_kept = Slice (hidden, start, stop, axis)",
            "residual_kept = Slice (residual, start, stop, axis)",
        ]
    )


def side_by_side_reference(x: Tensor, y: Tensor) -> Tensor:
    """x (B, L, X) and y (B, L, Y) as one tensor (B, L, X + Y): two mixers before one out_proj."""
    return torch.cat([x, y], -1)


def _side_by_side_body(a: Attributes, form: BodyForm) -> str:
    return "pair = Concat <axis = 2> (x, y)"


def logits_reference(y: Tensor) -> Tensor:
    """Logits leave the graph in FP32, so that every runtime samples from the same type."""
    return y.float()


def _logits_body(a: Attributes, form: BodyForm) -> str:
    return t.cast("logits", "y", t.FP32)


EMBEDDING = Op(
    name="Embedding",
    outputs=("hidden", "residual"),
    reference=embedding_reference,
    body=_embedding_body,
    plugin=False,
)
LAST_POSITIONS = Op(
    name="LastPositions",
    outputs=("hidden_kept", "residual_kept"),
    reference=last_positions_reference,
    body=_last_positions_body,
    plugin=False,
)
SIDE_BY_SIDE = Op(
    name="SideBySide",
    outputs=("pair",),
    reference=side_by_side_reference,
    body=_side_by_side_body,
    plugin=False,
)
LOGITS = Op(
    name="Logits",
    outputs=("logits",),
    reference=logits_reference,
    body=_logits_body,
    plugin=False,
)
