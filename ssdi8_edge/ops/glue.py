"""What every recipe's graph has before, between and behind its blocks; bodies are inlined."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ops import onnx_text as t
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.op import Attributes, BodyForm, Op


def embedding_reference(table: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the FP16 table (V, D) as `hidden` (B, L, D), and a zero FP32 residual for it."""
    hidden = table[input_ids.long()]
    return hidden, torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)


def _embedding_kernel(call: Call) -> Any:
    rows, width = call.table.shape
    call.require(torch.float16, table=(rows, width))
    return _looked_up("embedding", call, width)


def _looked_up(launcher: str, call: Call, width: int) -> Any:
    rows = tuple(call.input_ids.shape)
    call.require(torch.int32, input_ids=rows)
    call.hidden = call.empty((*rows, width), torch.float16)
    call.residual = call.empty((*rows, width), torch.float32)
    call.tokens, call.d_model = math.prod(rows), width
    call.launch(launcher)
    return call.hidden, call.residual


def _embedding_body(a: Attributes, form: BodyForm) -> str:
    return "\n".join(
        [
            "hidden = Gather (table, input_ids)",
            t.number("zero", 0.0),
            "hidden_shape = Shape (hidden)",
            "residual = Expand (zero, hidden_shape)",
        ]
    )


def pack_rows(q: Tensor) -> Tensor:
    """INT8 rows (V, D) as INT32 (V, D / 4), as `embedding_int8_reference` takes them.

    D is a multiple of 4.
    """
    first, second, third, fourth = q.int().chunk(4, 1)
    packed: Tensor = ((fourth * 256 + third + 128) * 256 + second + 128) * 256 + first + 128
    return packed


def unpack_rows(packed: Tensor) -> Tensor:
    """Inverse of `pack_rows` on (…, D / 4): INT32 (…, D)."""
    low = [(packed >> shift & 255) - 128 for shift in (0, 8, 16)]
    return torch.cat([*low, packed >> 24], -1)


def embedding_int8_reference(
    packed: Tensor, scale: Tensor, input_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """`embedding_reference` with an INT8 table: hidden = FP16(FP32(q) · scale).

    Args:
        packed: (V, D / 4) INT32, = 2^24 · q3 + 2^16 · (q2 + 128) + 2^8 · (q1 + 128) + q0 + 128,
            with qk the k-th quarter of the row's INT8 values. TensorRT takes INT8 constants as
            weights of linear layers only, and INT32 as tables.
        scale: (V, 1) FP32, of the rows.
        input_ids: (B, L).
    """
    rows = input_ids.long()
    hidden = (unpack_rows(packed[rows]).float() * scale[rows]).half()
    return hidden, torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)


def _embedding_int8_kernel(call: Call) -> Any:
    rows, words = call.packed.shape
    call.require(torch.int32, packed=(rows, words))
    call.require(torch.float32, scale=(rows, 1))
    return _looked_up("embedding_int8", call, 4 * words)


def _embedding_int8_body(a: Attributes, form: BodyForm) -> str:
    # Halves and bytes by floors of FP32 quotients: exact, and right whether a library's integer
    # division rounds down or towards zero.
    return "\n".join(
        [
            "words = Gather (packed, input_ids)",
            "half_size = Constant <value = int32 {65536}> ()",
            "upper_word = Div (words, half_size)",
            "upper_part = Mul (upper_word, half_size)",
            "rest_word = Sub (words, upper_part)",
            t.cast("upper_rough", "upper_word", t.FP32),
            t.cast("rest", "rest_word", t.FP32),
            t.number("half_range", 65536.0),
            t.number("byte_range", 256.0),
            t.number("offset", 128.0),
            *_floor_division("carry", "lower", "rest", "half_range"),
            "upper = Add (upper_rough, carry)",
            *_floor_division("u1", "u0", "lower", "byte_range"),
            *_floor_division("q3", "u2", "upper", "byte_range"),
            "lower_three = Concat <axis = 2> (u0, u1, u2)",
            "signed = Sub (lower_three, offset)",
            "q = Concat <axis = 2> (signed, q3)",
            "row_scale = Gather (scale, input_ids)",
            "real = Mul (q, row_scale)",
            t.cast("hidden", "real", t.FP16),
            t.number("zero", 0.0),
            "hidden_shape = Shape (hidden)",
            "residual = Expand (zero, hidden_shape)",
        ]
    )


def _floor_division(quotient: str, remainder: str, x: str, by: str) -> list[str]:
    """Of whole numbers in FP32, by a power of two."""
    return [
        f"{quotient}_exact = Div ({x}, {by})",
        f"{quotient} = Floor ({quotient}_exact)",
        f"{quotient}_part = Mul ({quotient}, {by})",
        f"{remainder} = Sub ({x}, {quotient}_part)",
    ]


def last_positions_reference(
    hidden: Tensor, residual: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """The last `keep` (a scalar) positions of both (B, L, D): the only ones that need logits."""
    n = int(keep)
    return hidden[:, -n:], residual[:, -n:]


def _last_positions_kernel(call: Call) -> Any:
    call.batch, call.length, call.d_model = shape = tuple(call.hidden.shape)
    call.require(torch.float16, hidden=shape)
    call.require(torch.float32, residual=shape)
    call.keep = call.whole_number(call.keep)
    kept = (call.batch, call.keep, call.d_model)
    call.hidden_kept = call.empty(kept, torch.float16)
    call.residual_kept = call.empty(kept, torch.float32)
    call.launch("last_positions")
    return call.hidden_kept, call.residual_kept


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


def _logits_kernel(call: Call) -> Any:
    *rows, call.vocab_size = shape = tuple(call.y.shape)
    call.require(torch.float16, y=shape)
    call.logits = call.empty(shape, torch.float32)
    call.tokens = math.prod(rows)
    call.launch("logits")
    return call.logits


def _logits_body(a: Attributes, form: BodyForm) -> str:
    return t.cast("logits", "y", t.FP32)


EMBEDDING = Op(
    name="Embedding",
    outputs=("hidden", "residual"),
    reference=embedding_reference,
    body=_embedding_body,
    kernel=_embedding_kernel,
    in_torch=embedding_reference,
    plugin=False,
)
EMBEDDING_INT8 = Op(
    name="EmbeddingInt8",
    outputs=("hidden", "residual"),
    reference=embedding_int8_reference,
    body=_embedding_int8_body,
    kernel=_embedding_int8_kernel,
    in_torch=embedding_int8_reference,
    plugin=False,
)
LAST_POSITIONS = Op(
    name="LastPositions",
    outputs=("hidden_kept", "residual_kept"),
    reference=last_positions_reference,
    body=_last_positions_body,
    kernel=_last_positions_kernel,
    in_torch=last_positions_reference,
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
    kernel=_logits_kernel,
    in_torch=logits_reference,
    plugin=False,
)
