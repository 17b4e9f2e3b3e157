"""An op's ONNX body under onnxruntime, compared with its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from case_table import (
    ELEMENT_TYPES,
    first_difference,
    fp16_steps,
    session,
)
from torch import Tensor

from ssdi8_edge.compile.export import GraphBuilder
from ssdi8_edge.numerics.formats import Scaling
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import Op


def run_body(op: Op, inputs: list[Tensor], attributes: dict[str, Any]) -> list[np.ndarray]:
    """One node of `op` under onnxruntime, its shapes left open."""
    graph = GraphBuilder("cpu")
    names = op.inputs[: len(inputs)]
    values = [
        graph.input(name, ELEMENT_TYPES[tensor.dtype], [None] * tensor.dim())  # type: ignore[list-item]
        for name, tensor in zip(names, inputs, strict=True)
    ]
    with graph.scope("test"):
        outputs = op(*values, **attributes)
    reference = op(*inputs, **attributes)
    if not isinstance(reference, tuple):
        outputs, reference = (outputs,), (reference,)
    for value, name, tensor in zip(outputs, op.outputs, reference, strict=True):
        shape = [None] * tensor.dim()
        graph.output(value, f"{name}_result", ELEMENT_TYPES[tensor.dtype], shape)  # type: ignore[arg-type]
    built = graph.model()
    onnx.checker.check_model(built)
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return session(built).run(None, feed)


def compare_body(
    name: str, inputs: list[Tensor], attributes: dict[str, Any], fp16_fraction: float = 0.0
) -> None:
    """Body and reference of an op: equal, or FP16 outputs 1 step apart in a few places.

    Args:
        fp16_fraction: how many FP16 values may be off by one step (FP32 outputs: 1e-6 relative).
    """
    op = OPS[name]
    reference = op(*inputs, **attributes)
    reference = reference if isinstance(reference, tuple) else (reference,)
    for output, got, tensor in zip(
        op.outputs, run_body(op, inputs, attributes), reference, strict=True
    ):
        want = tensor.numpy()
        assert got.dtype == want.dtype and got.shape == want.shape, (name, output, got.shape)
        assert np.isfinite(want.astype(np.float64)).all(), (name, output)
        if not fp16_fraction or got.dtype not in (np.float16, np.float32):
            assert np.array_equal(got, want), f"{name}.{output}: {first_difference(got, want)}"
        elif got.dtype == np.float32:
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
        else:
            steps = np.abs(fp16_steps(got) - fp16_steps(want))
            # A value near zero is a difference of larger ones: its own steps are too fine.
            steps[np.abs(want) < 1e-3 * np.abs(want).max()] = 0
            assert steps.max(initial=0) <= 1, f"{name}.{output}: off by {steps.max()} steps"
            assert (steps > 0).mean() <= fp16_fraction, f"{name}.{output}"


def token_scaling(scaling: Scaling, scale: float) -> list[Tensor]:
    """The static scale of all tokens; with scaling "dynamic" there is none."""
    return [torch.tensor([scale])] if scaling == "static" else []


def random_int8(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
