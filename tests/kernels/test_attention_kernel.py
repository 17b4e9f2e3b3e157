"""The CUDA kernels of attention against their reference.

Caches hold something everywhere, NaN among the scales behind the tokens, and columns that are not
to be read hold NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import attention_case
from kernel_compare import assert_close, guarded_allocations, kernel_of, reference, relative_error
from kernel_fixtures import CUDA, DEVICE, synchronize
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops.kernel_library import states_in_place

pytestmark = CUDA
OP = "Ssdi8Attention"
# Weights, and values times their scales, are rounded to FP16 (2^-11 of each), and o once more; the
# reference rounds o alone.
OUTPUT_TOLERANCE = 1e-3
# Rotary in FP32 instead of FP64 may move a value, or a scale with all values of its row, across a
# rounding boundary; without rotary the caches are the same bits.
ROTARY_FRACTION = 2e-3

DECODE = {"length": 1, "position": 200}


def run(inputs: list[Tensor], attributes: dict[str, Any]) -> Any:
    with guarded_allocations():
        got = kernel_of(OP)(*inputs, **attributes)
        synchronize()
    return got


def assert_like_reference(
    got: Any, inputs: list[Tensor], attributes: dict[str, Any], tolerance: float = OUTPUT_TOLERANCE
) -> None:
    """NaN scales stay where they were."""
    want = reference(OP, *inputs, **attributes)
    seen = int(inputs[-1]) + inputs[0].shape[1]
    fraction = ROTARY_FRACTION if attributes["rope_theta"] else 0.0
    for found, wanted in zip(got[1:], want[1:], strict=True):
        assert_close(found[:, :, :seen], wanted[:, :, :seen], fraction)
        behind = [tensor[:, :, seen:].contiguous().view(torch.int8) for tensor in (found, wanted)]
        assert torch.equal(*behind)
    assert relative_error(got[0], want[0]) < tolerance


@pytest.mark.parametrize(
    "row",
    [
        {},
        *({"length": n} for n in (2, 15, 16, 17, 63, 64, 65, 130)),
        {"length": 70, "position": 30},
        {"length": 64, "position": 64, "room": 0},
        {"length": 40, "batch": 2},
        {"length": 40, "n_heads": 5, "n_kv_heads": 1},
        {"length": 40, "n_heads": 3, "n_kv_heads": 3},
        *({"length": 33, "position": 33, "head_dim": d} for d in (80, 96, 128)),
        {"length": 33, "first_column": 7},
        # decode: one range of the cache, and several
        {"length": 1},
        DECODE,
        DECODE | {"position": 0, "room": 640},
        DECODE | {"position": 63},
        DECODE | {"position": 64, "room": 700},
        DECODE | {"batch": 3, "length": 2},
        DECODE | {"n_heads": 40, "n_kv_heads": 8, "head_dim": 128},
        DECODE | {"n_heads": 20, "n_kv_heads": 1},  # more rows than an instruction has
        *(DECODE | {"head_dim": d} for d in (80, 96)),
    ],
    ids=str,
)
def test_attention(generator: torch.Generator, row: dict[str, Any]) -> None:
    inputs, attributes = attention_case(generator, row)
    assert_like_reference(run(inputs, attributes), inputs, attributes)


@pytest.mark.parametrize("theta", [1e4, 1e11])
@pytest.mark.parametrize(
    "row",
    [{"length": 40}, {"length": 20, "position": 700, "head_dim": 128}, {"length": 1}, DECODE],
    ids=str,
)
def test_rotary(generator: torch.Generator, row: dict[str, Any], theta: float) -> None:
    inputs, attributes = attention_case(generator, row | {"rope_theta": theta})
    assert_like_reference(run(inputs, attributes), inputs, attributes)


def test_rotary_of_late_positions(generator: torch.Generator) -> None:
    """The largest angles."""
    position = 131071
    case = {"length": 1, "position": position, "room": 0, "rope_theta": 1e11, "n_kv_heads": 1}
    inputs, attributes = attention_case(generator, case | {"n_heads": 1})
    got, want = run(inputs, attributes), reference(OP, *inputs, **attributes)
    for found, wanted in zip(got[1:], want[1:], strict=True):
        assert_close(found[:, :, position:], wanted[:, :, position:], ROTARY_FRACTION)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(("magnitude", "tolerance"), [(0.0, 0.0), (1e-6, 4e-3), (1e3, 1e-3)])
def test_tokens_of_any_size(
    generator: torch.Generator, magnitude: float, tolerance: float, length: int
) -> None:
    """Zeros, values that are a few of FP16's least steps, and scores that leave one weight."""
    row = {"length": length, "magnitude": magnitude}
    inputs, attributes = attention_case(generator, row)
    got = run(inputs, attributes)
    if magnitude:
        assert_like_reference(got, inputs, attributes, tolerance)
    else:
        assert not got[0].any() and not got[1][:, :, :length].any()


@pytest.mark.parametrize("length", [1, 40])
def test_in_place(generator: torch.Generator, length: int) -> None:
    """The caches that came are those that go, and nothing else of them changes."""
    inputs, attributes = attention_case(generator, {"length": length, "position": 100, "batch": 2})
    apart = run(inputs, attributes)
    with states_in_place():
        o, *caches = run(inputs, attributes)
    assert torch.equal(o, apart[0])
    for cache, given, wanted in zip(caches, inputs[1:5], apart[1:], strict=True):
        assert cache.data_ptr() == given.data_ptr()
        assert torch.equal(cache.view(torch.int8), wanted.view(torch.int8))


def test_a_prompt_in_pieces_fills_the_same_caches(generator: torch.Generator) -> None:
    """And gives the same o, up to how the tokens fall into tiles."""
    inputs, attributes = attention_case(generator, {"length": 150, "batch": 2})
    projected, *caches, _ = inputs
    whole, *wanted = run(inputs, attributes)
    pieces, position = [], 0
    for size in (1, 70, 2, 77):
        part = projected[:, position : position + size].contiguous()
        piece, *caches = run([part, *caches, torch.tensor(position, device=DEVICE)], attributes)
        pieces.append(piece)
        position += size
    assert relative_error(torch.cat(pieces, 1), whole) < OUTPUT_TOLERANCE
    for found, cache in zip(caches, wanted, strict=True):
        assert torch.equal(found.view(torch.int8), cache.view(torch.int8))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"head_dim": 32}, "head_dim 32, not 64, 80, 96 or 128"),
        ({"n_heads": 5}, "5 heads share 2"),
        ({"rope_theta": -1.0}, "rope_theta -1"),
        ({"rope_theta": 1e4, "room": 131072}, "rotary positions up to 131072, not 131077"),
        ({"room": -1}, "a cache of 4 tokens cannot take 5"),
    ],
    ids=str,
)
def test_refusals(generator: torch.Generator, row: dict[str, Any], message: str) -> None:
    small = {"head_dim": 64, "n_heads": 2, "n_kv_heads": 1} if "rope_theta" in row else {}
    inputs, attributes = attention_case(generator, small | row)
    with pytest.raises(Ssdi8Error, match=message):
        kernel_of(OP)(*inputs, **attributes)


def test_tokens_beyond_the_cache_are_not_stored(generator: torch.Generator) -> None:
    """A position that does not fit is the caller's mistake; memory stays whole."""
    inputs, attributes = attention_case(generator, {"length": 5, "position": 20, "room": 0})
    inputs[-1] = torch.tensor(23, device=DEVICE)
    _, k_cache, *_ = run(inputs, attributes)
    assert torch.equal(k_cache[:, :, :23], inputs[1][:, :, :23])
