"""Sizes that a build refuses are those that the launchers refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    attention_case,
    conv_case,
    normal,
    random_int8,
    run_ssd_kernel,
    scale_and_bias,
    scale_of_tokens,
    ssd_case,
)
from kernel_compare import (
    kernel_of,
)
from kernel_fixtures import (
    CUDA,
    DEVICE,
)

from ssdi8_edge.ground.errors import Ssdi8Error, UsageError
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.ops.kernel_limits import require_kernels

pytestmark = CUDA

# Each differs in one size from a model that the kernels fit.
LIMITS: list[dict[str, int]] = [
    *({"headdim": n, "d_model": 2 * n} for n in (16, 32, 64, 80, 96, 128, 256)),
    *({"d_state": n} for n in (32, 64, 128, 256, 512)),
    *({"chunk_size": n} for n in (32, 64, 256, 512)),
    *({"d_conv": n} for n in (1, 2, 4, 5)),
    {"d_model": 48, "headdim": 32},
    {"d_model": 4096, "ngroups": 64},
    {"d_model": 4096, "ngroups": 128},
    {"d_model": 8192},
    {"d_model": 768, "ngroups": 3, "headdim": 32},  # d_inner with a rotation in blocks
]


@pytest.mark.parametrize("sizes", LIMITS, ids=str)
def test_limits_are_those_of_the_launchers(
    generator: torch.Generator, sizes: dict[str, int]
) -> None:
    """A build refuses for a board what the kernels of a block would refuse there, and no more."""
    fitting = {"d_model": 128, "d_state": 64, "chunk_size": 64, **sizes}
    width = fitting.pop("d_model")
    inner = 2 * width
    config = Mamba2(d_inner=inner, **fitting)
    model = Description(d_model=width, vocab_size=16, blocks=(config,))
    hidden, y = normal(generator, 1, 2, width), normal(generator, 1, 2, inner)
    norm = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}

    def conv() -> None:
        shape = (inner, config.ngroups, config.d_state, config.d_conv)
        inputs, attributes = conv_case(generator, 1, 2, *shape)
        kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)

    def ssd() -> None:
        row = {
            name: getattr(config, name)
            for name in ("nheads", "headdim", "ngroups", "d_state", "chunk_size")
        }
        case = ssd_case(generator, {**row, "length": 2})
        run_ssd_kernel("Ssdi8SsdScan", case["inputs"], case["attributes"])

    def linear(n_in: int) -> None:
        x, weight = random_int8(generator, 1, 2, n_in), random_int8(generator, 8, n_in)
        scale, bias = scale_and_bias(generator, 8)
        kernel_of("Ssdi8Linear")(x, scale_of_tokens(generator, x), weight, scale, bias)

    gated = {**norm, "d_inner": inner, "ngroups": config.ngroups}
    ones = torch.ones(inner, device=DEVICE)
    calls: list[Callable[[], Any]] = [
        lambda: kernel_of("Ssdi8RmsNorm")(hidden, hidden.float(), **norm),
        lambda: linear(width),
        conv,
        ssd,
        lambda: kernel_of("Ssdi8RmsNormGated")(y, y, ones, **gated),
        lambda: linear(inner),
    ]
    if any([refuses(call) for call in calls]):
        with pytest.raises(UsageError, match=r"the model's \w+ is \d+, but .* on a board; go on"):
            require_kernels(model.misfit(), "a board", "go on.")
    else:
        require_kernels(model.misfit(), "a board", "go on.")


@pytest.mark.parametrize("hidden", [32, 48, 96, 12544, 16384, 16416])
def test_limits_of_activations(generator: torch.Generator, hidden: int) -> None:
    """In place of linear layers, which take multiples of 32 only, as `kernel_limits` says."""
    x = normal(generator, 1, 1, hidden)
    choices = {"rounding": "half_even", "scaling": "dynamic", "rotation": "signs"}

    def call() -> None:
        attributes = {"activation": "relu2", "width": hidden, "x_column": 0}
        q, token_scale = kernel_of("Ssdi8Activation")(x, x, **attributes, **choices)
        scale, bias = scale_and_bias(generator, 8)
        kernel_of("Ssdi8Linear")(q, token_scale, random_int8(generator, 8, hidden), scale, bias)

    assert refuses(call) == (Mlp(hidden=hidden).misfit() is not None)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 256])
def test_limits_of_attention(generator: torch.Generator, head_dim: int) -> None:
    block = Attention(n_heads=2, n_kv_heads=1, head_dim=head_dim)
    row = {"n_heads": 2, "n_kv_heads": 1, "head_dim": head_dim, "length": 1}
    inputs, attributes = attention_case(generator, row)
    refused = refuses(lambda: kernel_of("Ssdi8Attention")(*inputs, **attributes))
    assert refused == (block.misfit() is not None)


def refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Ssdi8Error:
        return True
    return False
