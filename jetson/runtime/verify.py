"""Does this machine compute what the host computed? Compares with the bundle's golden vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runtime.backend import Backend
from runtime.bundle import Bundle, BundleProblem
from runtime.generate import prefill

GOLDEN = "golden.npz"
TOLERANCE = 1e-3  # relative, in the Frobenius norm, for states and logits alike


@dataclass(frozen=True)
class Comparison:
    """One tensor against its golden twin."""

    name: str
    relative_error: float  # infinite where a value is NaN or infinite, or the shapes differ

    @property
    def agrees(self) -> bool:
        return self.relative_error <= TOLERANCE


def relative_error(got: np.ndarray, golden: np.ndarray) -> float:
    """‖got − golden‖ / ‖golden‖; infinite where they cannot be compared."""
    if got.shape != golden.shape or not (np.isfinite(got).all() and np.isfinite(golden).all()):
        return float("inf")
    difference = np.linalg.norm(got.astype(np.float64) - golden.astype(np.float64))
    norm = np.linalg.norm(golden.astype(np.float64))
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / norm)


def compare_with_golden(backend: Backend, bundle: Bundle) -> Iterator[Comparison]:
    """States layer by layer, then the prefill's logits, then those of each decode step.

    In this order the first one that differs is nearest to the cause.
    """
    golden = _load_golden(bundle)
    expected = golden["logits"]
    logits, states = prefill(backend, bundle, golden["input_ids"], keep=expected.shape[1])
    for name in bundle.model.state_shapes(1):
        yield Comparison(name, relative_error(np.asarray(states[name]), golden[name]))
    yield Comparison("logits", relative_error(logits, expected))
    for step, expected in enumerate(golden["decode_logits"]):
        logits, states = backend.forward(golden["decode_ids"][:, step : step + 1], states)
        yield Comparison(f"decode_logits[{step}]", relative_error(logits[0, 0], expected))


def _load_golden(bundle: Bundle) -> dict[str, np.ndarray]:
    path = bundle.path(GOLDEN)
    names = ["input_ids", "logits", "decode_ids", "decode_logits", *bundle.model.state_shapes(1)]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (KeyError, ValueError, OSError) as error:
        raise BundleProblem(
            f"{path} is not a set of golden vectors for {bundle.name} ({error})",
            "pack the bundle again",
        ) from error
