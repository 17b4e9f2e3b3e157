"""The TensorRT plugins on a GPU: their outputs against the torch references.

The inputs, and what may differ and by how much, are those of the kernels' own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import (
    NONE,
    RELEASED,
    SSD_STAGES,
    STATIC,
    attention_case,
    conv_case,
    integer_scales,
    normal,
    random_int8,
    scale_and_bias,
    scale_of_tokens,
    select,
    ssd_arguments,
    ssd_case,
    token_scaling,
    w4_weight,
)
from kernel_compare import (
    BOUNDARY_FRACTION,
    CONV_FRACTIONS,
    NORM_FRACTIONS,
    TOKEN_SCALE_TOLERANCE,
    assert_close,
    assert_near,
    guarded_allocations,
    reference,
    relative_error,
)
from plugin_harness import TORCH_TYPES, Harness, Plugin, forms, open_plugins
from torch import Tensor

from ssdi8_edge.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NORM = {"eps": 1e-5, "rounding": "half_even"}
# Outputs that may lie where an input lies.
IN_PLACE = {
    "residual_out": "residual",
    "conv_state_out": "conv_state",
    "ssm_state_out": "ssm_state",
    **{f"{name}_out": name for name in ("k_cache", "k_scale", "v_cache", "v_scale")},
}

Check = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Case:
    op: str
    inputs: list[Tensor]
    attributes: dict[str, Any]
    checks: Sequence[Check]

    def reference(self) -> tuple[Tensor, ...]:
        want = reference(self.op, *self.inputs, **self.attributes)
        return want if isinstance(want, tuple) else (want,)


def steps_in(fraction: float) -> Check:
    return partial(assert_close, max_fraction=fraction)


def within(limit: float) -> Check:
    def check(got: Tensor, want: Tensor) -> None:
        assert relative_error(got, want) < limit

    return check


def rms_norm(g: torch.Generator, batch: int, length: int, scaling: str) -> Case:
    shape = (batch, length, 768)
    inputs = [normal(g, *shape), normal(g, *shape, dtype=torch.float32)]
    inputs += token_scaling(scaling, 0.03)
    checks = [steps_in(f) for f in NORM_FRACTIONS]
    return Case("Ssdi8RmsNorm", inputs, {**NORM, "scaling": scaling}, checks)


def linear(g: torch.Generator, batch: int, length: int) -> Case:
    x = random_int8(g, batch, length, 768)
    inputs = [x, scale_of_tokens(g, x), random_int8(g, 3352, 768), *scale_and_bias(g, 3352)]
    return Case("Ssdi8Linear", inputs, {}, [steps_in(0.0)])


def linear_w4(g: torch.Generator, batch: int, length: int, integer: bool) -> Case:
    group_size = 32 if integer else 128
    packed, group_scale = w4_weight(g, 3352, 768, group_size, 15.0)
    if integer:
        group_scale = integer_scales(g, 3352, 768, group_size)
    x = random_int8(g, batch, length, 768)
    inputs = [x, scale_of_tokens(g, x), packed, group_scale, *scale_and_bias(g, 3352)]
    return Case("Ssdi8LinearW4", inputs, {"group_size": group_size}, [steps_in(0.0)])


def causal_conv1d(g: torch.Generator, batch: int, length: int) -> Case:
    inputs, attributes = conv_case(g, batch, length, 1536, 1, 128)
    return Case("Ssdi8CausalConv1d", inputs, attributes, [steps_in(f) for f in CONV_FRACTIONS])


def rms_norm_gated(g: torch.Generator, batch: int, length: int, scaling: str) -> Case:
    inputs = [normal(g, batch, length, 1536), normal(g, batch, length, 3352)]
    inputs += [torch.ones(1536, device="cuda"), *token_scaling(scaling, 0.03)]
    attributes = {**NORM, "d_inner": 1536, "ngroups": 1, "scaling": scaling}
    checks = [steps_in(f) for f in (BOUNDARY_FRACTION, TOKEN_SCALE_TOLERANCE)]
    return Case("Ssdi8RmsNormGated", inputs, attributes, checks)


def norm_then_gate(g: torch.Generator, batch: int, length: int) -> Case:
    case = rms_norm_gated(g, batch, length, "dynamic")
    return replace(case, op="Ssdi8NormThenGate")


def quantize(g: torch.Generator, batch: int, length: int) -> Case:
    attributes = {"width": 5120, "rotation": "none", "rounding": "half_even", "scaling": "dynamic"}
    checks = [steps_in(f) for f in NORM_FRACTIONS[1:]]
    return Case("Ssdi8Quantize", [normal(g, batch, length, 5120)], attributes, checks)


def activation(g: torch.Generator, batch: int, length: int, scaling: str) -> Case:
    x = normal(g, batch, length, 4608)
    attributes = {"activation": "silu_gate", "width": 2304, "x_column": 2304}
    choices = {"rotation": "blocks", "rounding": "half_even", "scaling": scaling}
    checks = [steps_in(f) for f in NORM_FRACTIONS[1:]]
    inputs = [x, x, *token_scaling(scaling, 0.03)]
    return Case("Ssdi8Activation", inputs, {**attributes, **choices}, checks)


def attention(g: torch.Generator, batch: int, length: int) -> Case:
    row = {"n_heads": 12, "n_kv_heads": 4, "position": 70, "room": 0}
    inputs, attributes = attention_case(g, {**row, "batch": batch, "length": length})
    checks = [within(1e-3), *[steps_in(0.0)] * 4]
    return Case("Ssdi8Attention", inputs, attributes, checks)


def ssd(op: str, g: torch.Generator, batch: int, length: int, **row: Any) -> Case:
    """An SSD op on the outputs of the references before it."""
    case = ssd_case(g, {"batch": batch, "length": length, **row})
    values, attributes = case["inputs"], case["attributes"]
    for stage, names in SSD_STAGES.items():
        if op in (stage, "Ssdi8SsdScan"):
            break
        made = reference(stage, *ssd_arguments(stage, values), **select(stage, attributes))
        values.update(zip(names, made if isinstance(made, tuple) else (made,), strict=True))
    checks: dict[str, list[Check]] = {
        "Ssdi8ChunkCumsum": [within(1e-6), within(1e-6)],
        "Ssdi8ChunkState": [assert_near],
        "Ssdi8StatePassing": [assert_near, within(1e-5), within(2e-4)],
        "Ssdi8ChunkScan": [within(1e-3)],
        "Ssdi8SsdScan": [within(2e-3), within(2e-3)],
    }
    inputs = [tensor for tensor in ssd_arguments(op, values) if tensor is not None]
    return Case(op, inputs, select(op, attributes), checks[op])


SSD_CHOICES: dict[str, dict[str, Any]] = {
    "": {},
    " static": STATIC,
    " released": RELEASED,
    " none": NONE,
}
CASES: dict[str, Callable[[torch.Generator, int, int], Case]] = {
    "rms_norm": partial(rms_norm, scaling="dynamic"),
    "rms_norm static": partial(rms_norm, scaling="static"),
    "linear": linear,
    "linear_w4": partial(linear_w4, integer=False),
    "linear_w4 integer": partial(linear_w4, integer=True),
    "causal_conv1d": causal_conv1d,
    "rms_norm_gated": partial(rms_norm_gated, scaling="dynamic"),
    "rms_norm_gated static": partial(rms_norm_gated, scaling="static"),
    "norm_then_gate": norm_then_gate,
    "quantize": quantize,
    "activation": partial(activation, scaling="dynamic"),
    "activation static": partial(activation, scaling="static"),
    "attention": attention,
    **{
        f"{name}{suffix}": partial(ssd, op, **row)
        for name, op in (
            ("chunk_cumsum", "Ssdi8ChunkCumsum"),
            ("chunk_state", "Ssdi8ChunkState"),
            ("state_passing", "Ssdi8StatePassing"),
            ("chunk_scan", "Ssdi8ChunkScan"),
            ("ssd_scan", "Ssdi8SsdScan"),
        )
        for suffix, row in SSD_CHOICES.items()
    },
    "state_passing fp16": partial(ssd, "Ssdi8StatePassing", state=torch.float16),
    "ssd_scan fp16": partial(ssd, "Ssdi8SsdScan", state=torch.float16),
}


@pytest.fixture(scope="module")
def harness() -> Harness:
    return open_plugins()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(1)


class Engine:
    """What a builder and an execution context do with a node, for one case at a time."""

    def __init__(self, harness: Harness, case: Case) -> None:
        self.harness = harness
        plugin = harness.create(case.op, case.attributes)
        assert plugin is not None, harness.messages()
        stored = harness.create(case.op, plugin.serialized(), runtime=True)
        assert stored is not None, harness.messages()
        self.built: Plugin = plugin
        self.running: Plugin = stored.attach()

    def prepare(self, case: Case) -> tuple[list[Tensor], Callable[[], None]]:
        """Outputs for the case, and a call that fills them on the current stream."""
        inputs = forms(case.inputs)
        outputs = self.built.output_forms(inputs)
        assert outputs is not None, self.harness.messages()
        assert self.built.configure(inputs, outputs), self.harness.messages()
        made = [
            torch.empty(shape, dtype=TORCH_TYPES[kind], device="cuda") for kind, shape in outputs
        ]
        size = self.built.workspace(inputs, outputs)
        scratch = torch.empty((size,), dtype=torch.uint8, device="cuda")

        def enqueue() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            reads = [t.data_ptr() for t in case.inputs]
            writes = [t.data_ptr() for t in made]
            workspace = scratch.data_ptr() if size else None
            assert self.running.on_shape_change(inputs, outputs), self.harness.messages()
            done = self.running.enqueue(inputs, outputs, reads, writes, workspace, stream)
            assert done, self.harness.messages()

        return made, enqueue


def run(engine: Engine, case: Case) -> list[Tensor]:
    with guarded_allocations():
        outputs, enqueue = engine.prepare(case)
        enqueue()
        torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_references(
    harness: Harness, generator: torch.Generator, name: str
) -> None:
    """One plugin object serves every batch and length, in any order."""
    make = CASES[name]
    engine = Engine(harness, make(generator, 1, 1))
    for batch, length in ((1, 300), (2, 130), (1, 1), (2, 1), (1, 515)):
        case = make(generator, batch, length)
        got = run(engine, case)
        for check, g, w in zip(case.checks, got, case.reference(), strict=True):
            check(g, w)


@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize("name", CASES)
def test_replay_of_a_captured_call(
    harness: Harness, generator: torch.Generator, name: str, length: int
) -> None:
    """Captured in a CUDA graph: nothing is allocated or waited for, and new inputs are read."""
    case = CASES[name](generator, 1, length)
    engine = Engine(harness, case)
    outputs, enqueue = engine.prepare(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    changed = case.inputs[0]
    for new in (-changed, changed.flip(1)):
        changed.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [output.clone() for output in outputs]
        assert all(torch.equal(r, p) for r, p in zip(replayed, run(engine, case), strict=True))


@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm",
        "causal_conv1d",
        "attention",
        "state_passing",
        "state_passing fp16",
        "ssd_scan",
        "ssd_scan fp16",
    ],
)
def test_carried_tensors_may_be_updated_in_place(
    harness: Harness, generator: torch.Generator, name: str, length: int
) -> None:
    case = CASES[name](generator, 2, length)
    op = OPS[case.op]
    pairs = [
        (op.outputs.index(output), op.inputs.index(source))
        for output, source in IN_PLACE.items()
        if output in op.outputs
    ]
    assert pairs
    engine = Engine(harness, case)
    want = run(engine, case)
    outputs, enqueue = engine.prepare(case)
    for i, j in pairs:
        outputs[i] = case.inputs[j]
    enqueue()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(outputs, want, strict=True))
