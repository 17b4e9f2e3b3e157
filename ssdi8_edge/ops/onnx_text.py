"""Pieces of ONNX text shared by the op bodies: the twins of `int8` and of the chunk helpers.

A body is text for `onnx.parser`. Each helper returns statements; names that start with the given
prefix are private to it. `F` is the type an op computes in: FP64 on a CPU, so that the rounded
result does not depend on the order of a sum or on who wrote `exp`; FP32 for NVIDIA's parser, which
has no FP64.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.formats import InputRotation, Rounding
from ssdi8_edge.numerics.int8 import LEAST_MAGNITUDE, QMAX
from ssdi8_edge.ops.op import Attributes, BodyForm

FP32, INT8, FP16 = 1, 3, 10


def compute_type(form: BodyForm) -> int:
    """ONNX element type of the arithmetic inside an op."""
    return 11 if form == "cpu" else 1


def ints(name: str, values: list[int]) -> str:
    """A 1-D INT64 constant."""
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def number(name: str, value: float, elem: int = FP32) -> str:
    """A floating-point scalar constant of ONNX element type `elem`."""
    kind = "double" if elem == 11 else "float"
    return f"{name} = Constant <value = {kind} {{{value!r}}}> ()"


def whole_numbers(name: str, values: Tensor, form: BodyForm) -> str:
    """A constant of the shape of `values`, in the type an op computes in."""
    kind = "double" if form == "cpu" else "float"
    size = ", ".join(map(str, values.shape))
    listed = ", ".join(str(int(v)) for v in values.flatten())
    return f"{name} = Constant <value = {kind}[{size}] {{{listed}}}> ()"


def numbers(name: str, values: Tensor) -> str:
    """A 1-D FP32 constant; the text of an FP32 value as FP64 is read back exactly."""
    listed = ", ".join(repr(float(v)) for v in values)
    return f"{name} = Constant <value = float[{len(values)}] {{{listed}}}> ()"


def cast(out: str, x: str, elem: int) -> str:
    return f"{out} = Cast <to = {elem}> ({x})"


def round_to_integer(out: str, v: str, rounding: Rounding) -> str:
    """`int8.round_to_integer` of the FP32 value `v`."""
    if rounding == "half_even":
        return f"{out} = Round ({v})"
    return "\n".join(
        [
            number(f"{out}_half", 0.5),
            f"{out}_abs = Abs ({v})",
            f"{out}_up = Add ({out}_abs, {out}_half)",
            f"{out}_floor = Floor ({out}_up)",
            f"{out}_sign = Sign ({v})",
            f"{out} = Mul ({out}_floor, {out}_sign)",
        ]
    )


def round_to_int8(out: str, v: str, rounding: Rounding, form: BodyForm) -> str:
    """`int8.round_to_int8` of the FP32 value `v`."""
    low = -128 if rounding == "half_even" else -QMAX
    p = f"{out}_r"
    lines = [
        round_to_integer(p, v, rounding),
        number(f"{p}_low", float(low)),
        number(f"{p}_high", float(QMAX)),
        f"{p}_clipped = Clip ({p}, {p}_low, {p}_high)",
    ]
    if form == "cpu":
        lines.append(cast(out, f"{p}_clipped", INT8))
    else:
        # TensorRT makes INT8 by quantization only; with scale 1 that is the same cast.
        lines += [
            number(f"{p}_one", 1.0),
            f"{p}_zero = Constant <value = int8 {{0}}> ()",
            f"{out} = QuantizeLinear ({p}_clipped, {p}_one, {p}_zero)",
        ]
    return "\n".join(lines)


def from_int8(out: str, q: str, form: BodyForm) -> str:
    """INT8 -> FP32 integers."""
    if form == "cpu":
        return cast(out, q, FP32)
    return f"{number(f'{out}_one', 1.0)}\n{out} = DequantizeLinear ({q}, {out}_one)"


def inverse(out: str, scale: str, form: BodyForm) -> str:
    """out = FP32(1 / scale).

    By way of FP64, which rounds to the same FP32: onnxruntime rewrites x · (1 / s) as x / s where
    it sees both, and the two round differently.
    """
    f = compute_type(form)
    return "\n".join(
        [
            number(f"{out}_unit", 1.0, f),
            cast(f"{out}_scale", scale, f),
            f"{out}_wide = Div ({out}_unit, {out}_scale)",
            cast(out, f"{out}_wide", FP32),
        ]
    )


def quantize(out: str, x: str, scale: str, rounding: Rounding, form: BodyForm) -> str:
    """`int8.quantize`: round(x · FP32(1 / scale)); `scale` broadcasts against the FP32 `x`."""
    return "\n".join(
        [
            inverse(f"{out}_inverse", scale, form),
            f"{out}_scaled = Mul ({x}, {out}_inverse)",
            round_to_int8(out, f"{out}_scaled", rounding, form),
        ]
    )


def quantize_by_largest(
    out: str, step: str, v: str, axis: int, rounding: Rounding, form: BodyForm
) -> str:
    """`int8.quantize_by_largest` of FP32 `v`: INT8 `out`, FP32 `step` (`axis` kept, of size 1)."""
    f = compute_type(form)
    p = f"{out}_l"
    return "\n".join(
        [
            f"{p}_abs = Abs ({v})",
            ints(f"{p}_axis", [axis]),
            f"{p}_found = ReduceMax <keepdims = 1> ({p}_abs, {p}_axis)",
            number(f"{p}_least", LEAST_MAGNITUDE),
            f"{p}_top32 = Max ({p}_found, {p}_least)",
            cast(f"{p}_top", f"{p}_top32", f),
            number(f"{p}_qmax", float(QMAX), f),
            f"{p}_inverse_wide = Div ({p}_qmax, {p}_top)",
            cast(f"{p}_inverse", f"{p}_inverse_wide", FP32),
            f"{p}_step_wide = Div ({p}_top, {p}_qmax)",
            cast(step, f"{p}_step_wide", FP32),
            f"{p}_scaled = Mul ({v}, {p}_inverse)",
            round_to_int8(out, f"{p}_scaled", rounding, form),
        ]
    )


def quantize_tokens(out: str, token_scale: str, x: str, a: Attributes, form: BodyForm) -> str:
    """`int8.quantize_tokens` of FP32 `x` (B, L, D); `scale` is an input of a static op."""
    if a["scaling"] == "dynamic":
        return quantize_by_largest(out, token_scale, x, 2, a["rounding"], form)
    return "\n".join(
        [
            quantize(out, x, "scale", a["rounding"], form),
            f"{out}_rows = Shape <start = 0, end = 2> ({x})",
            ints(f"{out}_one_column", [1]),
            f"{out}_column = Concat <axis = 0> ({out}_rows, {out}_one_column)",
            f"{token_scale} = Expand (scale, {out}_column)",
        ]
    )


def hadamard_transform(
    out: str,
    x: str,
    n: int,
    form: BodyForm,
    *,
    leading: int,
    rotation: InputRotation = "full",
) -> str:
    """`hadamard.apply` to the last axis, n, behind `leading` others; in the compute type."""
    if rotation == "none":
        return f"{out} = Identity ({x})"
    order = n if rotation == "full" and hadamard.exists(n) else hadamard.block_order(n)
    left, right = hadamard.factors(order)
    count = [] if order == n else [n // order]
    lines = []
    if rotation == "signs":
        signs = hadamard.signs(order).repeat(n // order)
        lines += [whole_numbers(f"{out}_signs", signs, form), f"{out}_x = Mul ({x}, {out}_signs)"]
        x = f"{out}_x"
    return "\n".join(
        [
            *lines,
            whole_numbers(f"{out}_left", left.t(), form),
            whole_numbers(f"{out}_right", right, form),
            ints(f"{out}_blocks", [0] * leading + count + [left.shape[0], right.shape[0]]),
            ints(f"{out}_whole", [0] * leading + [n]),
            f"{out}_in = Reshape ({x}, {out}_blocks)",
            f"{out}_by_right = MatMul ({out}_in, {out}_right)",
            f"{out}_by_both = MatMul ({out}_left, {out}_by_right)",
            f"{out}_flat = Reshape ({out}_by_both, {out}_whole)",
            number(f"{out}_root", order**-0.5, compute_type(form)),
            f"{out} = Mul ({out}_flat, {out}_root)",
        ]
    )


def rotate_and_quantize(
    out: str, token_scale: str, x: str, width: int, a: Attributes, form: BodyForm
) -> list[str]:
    """`hadamard.apply` by a["rotation"] to FP32 `x` (B, L, width), then `quantize_tokens`."""
    return [
        cast(f"{x}_wide", x, compute_type(form)),
        hadamard_transform(
            f"{x}_rotated_wide", f"{x}_wide", width, form, leading=2, rotation=a["rotation"]
        ),
        cast(f"{x}_rotated", f"{x}_rotated_wide", FP32),
        quantize_tokens(out, token_scale, f"{x}_rotated", a, form),
    ]


def slice_last(out: str, x: str, start: int, stop: int) -> str:
    """x[..., start:stop] of a rank-3 tensor."""
    return "\n".join(
        [
            ints(f"{out}_start", [start]),
            ints(f"{out}_stop", [stop]),
            ints(f"{out}_axis", [2]),
            f"{out} = Slice ({x}, {out}_start, {out}_stop, {out}_axis)",
        ]
    )


def per_head(out: str, scale_g: str, nheads: int, ngroups: int, parts: list[int]) -> str:
    """Repeat a per-group vector (G) for the heads of each group: (H), reshaped to `parts`."""
    return "\n".join(
        [
            ints(f"{out}_g1", [ngroups, 1]),
            ints(f"{out}_gr", [ngroups, nheads // ngroups]),
            ints(f"{out}_shape", parts),
            f"{out}_column = Reshape ({scale_g}, {out}_g1)",
            f"{out}_wide = Expand ({out}_column, {out}_gr)",
            f"{out} = Reshape ({out}_wide, {out}_shape)",
        ]
    )


def shape(name: str, parts: Sequence[int | str]) -> str:
    """A shape tensor; a string names a 1-element INT64 tensor."""
    if all(isinstance(part, int) for part in parts):
        return ints(name, [int(part) for part in parts])
    lines, names = [], []
    for i, part in enumerate(parts):
        names.append(part if isinstance(part, str) else f"{name}_{i}")
        if isinstance(part, int):
            lines.append(ints(f"{name}_{i}", [part]))
    return "\n".join([*lines, f"{name} = Concat <axis = 0> ({', '.join(names)})"])


def chunk_padding(length_of: str, axis: int, chunk: int, *, shrink: bool = False) -> str:
    """`length` (1): tokens of `length_of`; `chunk_count` and `chunk_tokens` (1): chunks, and tokens
    of each; `padding` (1): tokens up to a whole chunk; `padded_length` (1): with them.

    With `shrink`, a sequence shorter than a chunk is one chunk of its own length. It is divided by
    the constant all the same: TensorRT bounds a quotient by the bounds of its terms, and would make
    room for as many chunks as there are tokens.
    """
    tokens = "Min (length, chunk_size)" if shrink else "Identity (chunk_size)"
    return "\n".join(
        [
            f"length = Shape <start = {axis}, end = {axis + 1}> ({length_of})",
            ints("chunk_size", [chunk]),
            ints("chunk_one", [1]),
            f"chunk_tokens = {tokens}",
            "chunk_less_one = Sub (chunk_tokens, chunk_one)",
            ints("chunk_round_up", [chunk - 1]),
            "length_up = Add (length, chunk_round_up)",
            "chunk_count = Div (length_up, chunk_size)",
            "padded_length = Mul (chunk_count, chunk_tokens)",
            "padding = Sub (padded_length, length)",
        ]
    )


def pad_to_chunks(
    out: str, x: str, axis: int, parts: Sequence[int | str], mode: str = "constant"
) -> str:
    """Pad rank-3 `x` at the end of `axis` to whole chunks, then reshape to `parts`.

    After `chunk_padding`. mode "edge" repeats the last value: that is how the cumulative decay
    continues over positions with dt = 0.
    """
    zeros_before = ints(f"{out}_before", [0] * (3 + axis))
    rest = 2 - axis
    widths = [f"{out}_before", "padding"]
    lines = [zeros_before]
    if rest:
        lines.append(ints(f"{out}_after", [0] * rest))
        widths.append(f"{out}_after")
    return "\n".join(
        [
            *lines,
            f"{out}_pads = Concat <axis = 0> ({', '.join(widths)})",
            f'{out}_padded = Pad <mode = "{mode}"> ({x}, {out}_pads)',
            shape(f"{out}_shape", parts),
            f"{out} = Reshape ({out}_padded, {out}_shape)",
        ]
    )


def keep_length(out: str, x: str, axis: int) -> str:
    """Undo the padding of `chunk_padding` along `axis`."""
    return "\n".join(
        [
            ints(f"{out}_from", [0]),
            ints(f"{out}_axis", [axis]),
            f"{out} = Slice ({x}, {out}_from, length, {out}_axis)",
        ]
    )
