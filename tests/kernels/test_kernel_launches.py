"""Launches of all kernels: streams, CUDA graphs, the order of threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    NONE,
    STATIC,
    attention_case,
    conv_case,
    normal,
    ones_of_tokens,
    random_int8,
    scale_and_bias,
    scale_of_tokens,
    ssd_arguments,
    ssd_case,
    w4_weight,
)
from kernel_compare import (
    kernel_of,
)
from kernel_fixtures import (
    CUDA,
    DEVICE,
    needs_emulation,
    needs_gpu,
    threads_in_order,
)
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error

pytestmark = CUDA


def calls(generator: torch.Generator, length: int) -> dict[str, tuple[Tensor, Callable[[], Any]]]:
    """Per op: the input whose values change, and a call of the kernel."""
    hidden = normal(generator, 1, length, 768)
    residual = normal(generator, 1, length, 768, dtype=torch.float32)
    x, weight = random_int8(generator, 1, length, 768), random_int8(generator, 3352, 768)
    packed, group_scale = w4_weight(generator, 3352, 768, 128, 15.0)
    scale, bias = scale_and_bias(generator, 3352)
    conv_inputs, conv_attributes = conv_case(generator, 1, length, 1536, 1, 128)
    y, z = normal(generator, 1, length, 1536), normal(generator, 1, length, 3352)
    ones = torch.ones(1536, device=DEVICE)
    attention_inputs, attention = attention_case(generator, {"length": length, "position": 70})
    ssd = ssd_case(generator, {"length": length})
    ssd_inputs = ssd_arguments("Ssdi8SsdScan", ssd["inputs"])
    fp16 = ssd_case(generator, NONE | {"length": length})
    fp16_inputs = ssd_arguments("Ssdi8SsdScan", fp16["inputs"])
    static = ssd_case(generator, STATIC | {"length": length})
    static_inputs = ssd_arguments("Ssdi8SsdScan", static["inputs"])
    of_tokens = scale_of_tokens(generator, x)
    quantized = {"rounding": "half_even", "scaling": "dynamic"}
    norm = {"eps": 1e-5, **quantized}
    gate = {"activation": "silu_gate", "width": 1536, "x_column": 1536}
    return {
        "rms_norm": (hidden, lambda: kernel_of("Ssdi8RmsNorm")(hidden, residual, **norm)),
        "linear": (x, lambda: (kernel_of("Ssdi8Linear")(x, of_tokens, weight, scale, bias),)),
        "linear_w4": (
            x,
            lambda: (
                kernel_of("Ssdi8LinearW4")(
                    *(x, of_tokens, packed, group_scale, scale, bias), group_size=128
                ),
            ),
        ),
        "causal_conv1d": (
            conv_inputs[0],
            lambda: kernel_of("Ssdi8CausalConv1d")(*conv_inputs, **conv_attributes),
        ),
        "rms_norm_gated": (
            y,
            lambda: kernel_of("Ssdi8RmsNormGated")(y, z, ones, d_inner=1536, ngroups=1, **norm),
        ),
        "norm_then_gate": (
            y,
            lambda: kernel_of("Ssdi8NormThenGate")(y, z, ones, d_inner=1536, ngroups=1, **norm),
        ),
        "quantize": (
            y,
            lambda: kernel_of("Ssdi8Quantize")(y, width=1536, rotation="full", **quantized),
        ),
        "activation": (
            z,
            lambda: kernel_of("Ssdi8Activation")(z, z, **gate, rotation="blocks", **quantized),
        ),
        "attention": (
            attention_inputs[0],
            lambda: kernel_of("Ssdi8Attention")(*attention_inputs, **attention)[:2],
        ),
        "ssd_scan": (
            ssd_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*ssd_inputs, **ssd["attributes"]),
        ),
        "ssd_scan none": (
            fp16_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*fp16_inputs, **fp16["attributes"]),
        ),
        "ssd_scan static": (
            static_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*static_inputs, **static["attributes"]),
        ),
    }


CALLED = [
    "rms_norm",
    "linear",
    "linear_w4",
    "causal_conv1d",
    "rms_norm_gated",
    "norm_then_gate",
    "quantize",
    "activation",
    "attention",
    "ssd_scan",
    "ssd_scan none",
    "ssd_scan static",
]


@needs_emulation
@pytest.mark.parametrize("op", CALLED)
def test_order_of_threads_changes_nothing(generator: torch.Generator, op: str) -> None:
    """As it would where a barrier is missing."""
    _, call = calls(generator, 70)[op]
    first = call()
    for seed in (1, 2):
        with threads_in_order(seed):
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


@needs_gpu
@pytest.mark.parametrize("op", CALLED)
@pytest.mark.parametrize("length", [1, 130])
def test_stream_and_graph(generator: torch.Generator, op: str, length: int) -> None:
    changed, call = calls(generator, length)[op]
    first = [t.clone() for t in call()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(on_stream, first, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    changed.copy_(changed.flip(1) if length > 1 else -changed)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_refusals(generator: torch.Generator) -> None:
    def refused(match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(Ssdi8Error, match=match):
            call()

    x, weight = random_int8(generator, 1, 2, 48), random_int8(generator, 8, 48)
    scale, bias = scale_and_bias(generator, 8)
    one = ones_of_tokens(x)
    refused("multiple of 32", lambda: kernel_of("Ssdi8Linear")(x, one, weight, scale, bias))
    refused("is expected", lambda: kernel_of("Ssdi8Linear")(x, one, weight.half(), scale, bias))
    refused("is expected", lambda: kernel_of("Ssdi8Linear")(x, one[:, 1:], weight, scale, bias))
    group_scale = torch.ones((8, 3), dtype=torch.float16, device=DEVICE)
    refused(
        "group size 16",
        lambda: kernel_of("Ssdi8LinearW4")(
            x, one, weight[:, :24], group_scale, scale, bias, group_size=16
        ),
    )
    norm = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}
    odd, even = normal(generator, 1, 2, 12), normal(generator, 1, 2, 64)
    refused("d_model 12", lambda: kernel_of("Ssdi8RmsNorm")(odd, odd.float(), **norm))
    y, ones = normal(generator, 1, 2, 60), torch.ones(60, device=DEVICE)
    gated = {**norm, "d_inner": 60, "ngroups": 1}
    refused("width 60", lambda: kernel_of("Ssdi8RmsNormGated")(y, y, ones, **gated))
    ones = torch.ones(64, device=DEVICE)
    gated = {**norm, "d_inner": 64, "ngroups": 1}
    for match, wrong in (
        ("scaling static needs scale", {"scaling": "static"}),
        ("scaling 2 out of range", {"scaling": "none"}),
    ):
        rms = norm | wrong
        refused(match, lambda a=rms: kernel_of("Ssdi8RmsNorm")(even, even.float(), **a))
        rms = gated | wrong
        refused(match, lambda a=rms: kernel_of("Ssdi8RmsNormGated")(even, even, ones, **a))
    inputs, attributes = conv_case(generator, 1, 2, 64, 1, 64, d_conv=5)
    refused("width 5", lambda: kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes))
    inputs, attributes = conv_case(generator, 1, 2, 64, 1, 16)
    refused("rotation of d_state 16", lambda: kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes))
