"""Whole models by the engine `kernels`: emulated kernels, a fake driver, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_engine import emulated_gpu
from fake_cuda import Cuda
from kernel_fixtures import GPU
from pure_bundle import MAX_TOKENS, VOCABULARY, pure_bundle
from tiny_model import one_thread

from runtime.backends.kernels.backend import KernelsBackend
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions
from runtime.bundle import Bundle
from runtime.session import Session

__all__ = ["one_thread"]  # a fixture, taken over

pytestmark = pytest.mark.skipif(GPU, reason="shown by the emulation alone")
# Logits of the portable graph are those of FP64; see TOLERANCE in test_gpu_backend.py.
TOLERANCE = 2e-2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("fp16", {}),
    "edge-w8a8": ("edge-w8a8", {}),
    "edge-w8a8 modular": ("edge-w8a8", {"ssd_ops": "modular"}),
    "edge-w4a8": ("edge-w4a8", {}),
    "ssdi8-w8a8": ("ssdi8-w8a8", {}),
    "ssdi8-w8a8 modular": ("ssdi8-w8a8", {"ssd_ops": "modular"}),
}

MakeBundle = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            method, changes = MODELS[name]
            folder = tmp_path_factory.mktemp("pure") / "bundle"
            made[name] = pure_bundle(folder, method, **changes)
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


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_portable_graph(
    bundles: MakeBundle, cuda: Cuda, options: BackendOptions, name: str
) -> None:
    """A prompt in pieces, then 16 tokens: called, recorded and repeated as graphs."""
    bundle = bundles(name)
    ids = tokens(1, MAX_TOKENS + 6)
    reference = Session(bundle, OnnxRuntimeBackend(bundle, threads=1))
    with Session(bundle, KernelsBackend(bundle, options)) as session:
        want, want_states = reference.prefill(ids, 2)
        got, states = session.prefill(ids, 2)
        errors = [relative_error(got, want)]
        for i in range(16):
            step = tokens(1, 1, seed=i)
            want, want_states = reference.backend.forward(step, want_states)
            got, states = session.backend.forward(step, states)
            errors.append(relative_error(got, want))
        for state in want_states:
            errors.append(relative_error(states[state], want_states[state]))
        print(name, ["%.1e" % e for e in errors])
        assert max(errors) < TOLERANCE
        assert cuda.launches > 0 and session.backend.notes == []
