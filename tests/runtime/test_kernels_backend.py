"""Whole models by the engine `kernels`: emulated kernels, a fake driver, against onnxruntime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_engine import emulated_gpu
from exported_bundle import MAX_TOKENS, VOCABULARY, TinyBundle, hybrid_bundle, pure_bundle
from fake_cuda import Cuda
from kernel_fixtures import GPU
from tiny_model import one_thread

from runtime.backends.kernels.arena import BLOCK
from runtime.backends.kernels.backend import KernelsBackend
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions
from runtime.bundle import Bundle, open_bundle
from runtime.engine.driver import Device
from runtime.files import PROGRAM
from runtime.problems import BundleProblem, MemoryRanOut, RunFailure
from runtime.session import Session
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.ops.op import Op

__all__ = ["one_thread"]  # a fixture, taken over

pytestmark = pytest.mark.skipif(GPU, reason="shown by the emulation alone")
# FP32 inside an op against FP64, as in test_gpu_backend.py; measured up to 1.8e-2.
TOLERANCE = 4e-2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("fp16", {}),
    "edge-w8a8": ("edge-w8a8", {}),
    "edge-w8a8 modular": ("edge-w8a8", {"ssd_ops": "modular"}),
    "edge-w4a8": ("edge-w4a8", {}),
    "ssdi8-w8a8": ("ssdi8-w8a8", {}),
    "ssdi8-w8a8 modular": ("ssdi8-w8a8", {"ssd_ops": "modular"}),
    "hybrid edge-w8a8": ("edge-w8a8", {}),
    "hybrid edge-w4a8": ("edge-w4a8", {}),
}

MakeBundle = Callable[[str], TinyBundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    made: dict[str, TinyBundle] = {}

    def make(name: str) -> TinyBundle:
        if name not in made:
            method, changes = MODELS[name]
            folder = tmp_path_factory.mktemp("exported") / "bundle"
            make_bundle = hybrid_bundle if name.startswith("hybrid") else pure_bundle
            made[name] = make_bundle(folder, method, **changes)
        return made[name]

    return make


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, of which nothing is held in the end."""
    with emulated_gpu() as gpu:
        yield gpu
        assert gpu.leaks() == []


@pytest.fixture
def options(emulated_library: Path) -> BackendOptions:
    return BackendOptions(plugins=emulated_library)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))
    return ids.astype(np.int32)


def relative_error(got: Any, want: Any) -> float:
    got, want = (np.asarray(each, np.float64) for each in (got, want))
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def kernels_of_ops(
    model: QuantizedModel, ids: np.ndarray, states: Any, position: int
) -> tuple[Any, Any]:
    """The same kernels called op by op on tensors of torch, each with memory of its own."""

    def call(op: Op, *inputs: Any, **attributes: Any) -> Any:
        kernel = op.runnable_kernel()
        assert kernel is not None
        return kernel(*inputs, **attributes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", call)
        return model.forward(torch.from_numpy(ids), states, ids.shape[1], position=position)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_portable_graph(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, name: str
) -> None:
    """A prompt in pieces, then 16 tokens: called, recorded and repeated as graphs."""
    bundle = bundles(name).bundle
    ids = tokens(1, MAX_TOKENS + 6)
    reference = Session(bundle, OnnxRuntimeBackend(bundle, threads=1))
    with Session(bundle, KernelsBackend(bundle, options)) as session:
        want, want_states = reference.prefill(ids, 2)
        got, states = session.prefill(ids, 2)
        assert relative_error(got, want) < TOLERANCE
        for i in range(16):
            step = tokens(1, 1, seed=i)
            position = ids.shape[1] + i
            want, want_states = reference.backend.forward(step, want_states, 1, position)
            got, states = session.backend.forward(step, states, 1, position)
            assert relative_error(got, want) < TOLERANCE
        for state in want_states:
            assert relative_error(states[state], want_states[state]) < TOLERANCE
        assert cuda.launches == 14 and session.backend.notes == []


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_as_each_kernel_alone(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, name: str
) -> None:
    """Two sequences, lengths that repeat and grow: nothing in the arena is overwritten too early,
    and no state is read from the wrong slot."""
    made = bundles(name)
    backend = KernelsBackend(made.bundle, options)
    states, want_states = backend.zero_states(2), None
    position = 0
    for i, length in enumerate((5, 5, 5, 70, 1, 1, 1, 1)):
        ids = tokens(2, length, seed=i)
        want, want_states = kernels_of_ops(made.model, ids, want_states, position)
        got, states = backend.forward(ids, states, length, position)
        assert np.array_equal(got, want.numpy())
        position += length
    for state, tensor in made.model.named_states(want_states).items():
        whole = np.asarray(states[state])  # of a cache, for the whole context
        assert np.array_equal(whole[tuple(map(slice, tensor.shape))], tensor.numpy())
    backend.close()


def test_sequences_do_not_meet(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """A second sequence, also of another batch size, gives what it gives alone."""
    backend = KernelsBackend(bundles("edge-w8a8").bundle, options)
    first, second = tokens(1, 9), tokens(1, 9, seed=1)
    alone = backend.forward(second, backend.zero_states(1))[0].copy()
    for _ in range(3):
        backend.forward(first, backend.zero_states(1))
        backend.forward(np.concatenate([first, second]), backend.zero_states(2))
        again, _ = backend.forward(second, backend.zero_states(1))
        assert np.array_equal(again, alone)
    old = backend.zero_states(1)
    backend.forward(first, old)
    with pytest.raises(ValueError, match="these states are gone"):
        np.asarray(old["ssm_state.0"])
    backend.close()


@pytest.mark.parametrize("name", ["edge-w8a8", "hybrid edge-w8a8"])
def test_states_come_back(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, name: str
) -> None:
    """Read to the host and loaded again, after others: the same bits as never interrupted."""
    backend = KernelsBackend(bundles(name).bundle, options)
    prompt, step = tokens(1, 70), tokens(1, 1, seed=1)
    _, states = backend.forward(prompt, backend.zero_states(1))
    held = {state: np.asarray(states[state]) for state in states}
    want = backend.forward(step, states, 1, 70)[0].copy()
    backend.forward(tokens(2, 9), backend.zero_states(2))
    for _ in range(3):
        got, after = backend.forward(step, backend.load_states(held), 1, 70)
        assert np.array_equal(got, want)
    assert any(not np.array_equal(np.asarray(after[state]), held[state]) for state in held)
    backend.close()


def test_memory(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """No piece is larger than a block, and what is too little is said before a weight is loaded."""
    bundle = bundles("edge-w8a8").bundle
    KernelsBackend(bundle, options).close()
    assert 0 < cuda.largest_allocation <= BLOCK
    cuda.memory_limit = 100_000
    cuda.largest_allocation = 0
    with pytest.raises(MemoryRanOut, match=r"takes .* for 128 tokens at once, and .* are free"):
        KernelsBackend(bundle, options)
    assert cuda.largest_allocation == 0
    cuda.refuse_stream = True
    with pytest.raises(MemoryRanOut, match="no room for a stream"):
        KernelsBackend(bundle, options)


def test_profile(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """Events give each call its time, in the order of the program, and nothing is recorded."""
    bundle = bundles("edge-w8a8").bundle
    backend = KernelsBackend(bundle, replace(options, profiling=True))
    states = backend.zero_states(1)
    for length in (3, 1):
        _, states = backend.forward(tokens(1, length), states)
    program = json.loads(bundle.path(PROGRAM).read_text())
    names = [call["name"] for call in program["calls"]]
    assert [[name for name, _ in run] for run in backend.layer_times()] == [names, names]
    assert {seconds for run in backend.layer_times() for _, seconds in run} == {1e-3}
    assert cuda.launches == 0
    backend.close()


def test_interrupted_at_any_wait(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """Ctrl-C leaves the states that were read: the step is repeated with the same result."""
    backend = KernelsBackend(bundles("edge-w8a8").bundle, options)
    _, states = backend.forward(tokens(1, 7), backend.zero_states(1))
    before = {name: np.asarray(states[name]) for name in states}
    step = tokens(1, 1)
    cuda.interrupt_next_wait = True
    with pytest.raises(KeyboardInterrupt):
        backend.forward(step, states)
    assert all(np.array_equal(np.asarray(states[name]), before[name]) for name in states)
    got = backend.forward(step, states)[0].copy()
    _, states = backend.forward(tokens(1, 7), backend.zero_states(1))
    assert np.array_equal(got, backend.forward(step, states)[0])
    backend.close()


def test_interrupted_while_loading(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two weights frees those that were there."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Device, "upload", stop)
    with pytest.raises(KeyboardInterrupt):
        KernelsBackend(bundles("edge-w8a8").bundle, options)


def test_lost_gpu(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """One sentence, and closing does not complain once more."""
    backend = KernelsBackend(bundles("edge-w8a8").bundle, options)
    states = backend.zero_states(1)
    cuda.lost = True
    with pytest.raises(RunFailure, match=r"the GPU failed .*719.*; run --verify"):
        backend.forward(tokens(1, 3), states)
    backend.close()


def test_without_graphs(bundles: MakeBundle, cuda: Cuda, options: BackendOptions) -> None:
    """Where nothing can be recorded, it is said once and calls run one by one."""
    cuda.refuse_capture = True
    backend = KernelsBackend(bundles("edge-w8a8").bundle, options)
    states = backend.zero_states(1)
    for _ in range(5):
        _, states = backend.forward(tokens(1, 1), states)
    assert len(backend.notes) == 1 and "without CUDA graphs" in backend.notes[0]
    backend.close()


def changed(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], None]) -> Bundle:
    """A copy of the bundle with another program."""
    shutil.copytree(bundle.root, folder)
    program = json.loads((folder / PROGRAM).read_text())
    change(program)
    (folder / PROGRAM).write_text(json.dumps(program))
    return open_bundle(folder)


def without_kernel(program: dict[str, Any]) -> None:
    program["calls"][2] |= {"op": "Attention", "launch": None}


def refused_size(program: dict[str, Any]) -> None:
    scans = [call for call in program["calls"] if call["op"] == "Ssdi8SsdScan"]
    scans[1]["launch"]["fields"]["chunk_size"] = 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(abi=p["abi"] + 1), "has ABI version .* was made for"),
        (lambda p: p.update(schema=9), "has schema 9 and this script reads 1"),
        (lambda p: p.pop("structs"), "is not a program"),
        (without_kernel, "needs the op Attention, for which there is no CUDA kernel"),
        (
            lambda p: p["structs"]["rms_norm"].update(more="pointer"),
            "disagree about the parameters of rms_norm",
        ),
        (refused_size, "cannot run this .*chunk"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    bundles: MakeBundle,
    cuda: Cuda,
    options: BackendOptions,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    bundle = changed(bundles("edge-w8a8").bundle, tmp_path / "changed", change)
    with pytest.raises(BundleProblem, match=message):
        backend = KernelsBackend(bundle, options)
        try:
            backend.forward(tokens(1, 3), backend.zero_states(1))
        finally:
            backend.close()


def test_gpu_and_library_that_do_not_fit(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, tmp_path: Path
) -> None:
    bundle = bundles("edge-w8a8").bundle
    cuda.capability = (7, 5)
    with pytest.raises(BundleProblem, match=r"compute capability 7\.5, .* need 8\.0 \(Ampere\)"):
        KernelsBackend(bundle, options)
    with pytest.raises(BundleProblem, match=r"no libssdi8_kernels\.so yet; .*setup\.sh"):
        KernelsBackend(bundle, BackendOptions())
    with pytest.raises(BundleProblem, match="there is no kernel library"):
        KernelsBackend(bundle, BackendOptions(plugins=tmp_path / "gone.so"))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(BundleProblem, match=r"text\.so cannot be loaded"):
        KernelsBackend(bundle, BackendOptions(plugins=tmp_path / "text.so"))


def test_tokens_that_the_model_does_not_have(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions
) -> None:
    backend = KernelsBackend(bundles("edge-w8a8").bundle, options)
    with pytest.raises(BundleProblem, match="a token that is not from 0 to 255"):
        backend.forward(np.array([[1, VOCABULARY]], np.int32), backend.zero_states(1))
    backend.close()
