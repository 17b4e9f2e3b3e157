"""Does this machine compute what the host computed? Compares with the bundle's golden vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runtime.bundle import Bundle
from runtime.files import GOLDEN
from runtime.problems import BundleProblem
from runtime.session import Session

# Relative, in the Frobenius norm. Where onnxruntime runs the reference's own arithmetic, states and
# logits agree far better than this.
EXACT = 1e-3
# Kernels compute in FP32 and move some INT8 values by one step, and later layers see the sum of it.
# Measured with the graph's FP32 form in onnxruntime, on the demo model and one of 36 M parameters:
# up to 4e-3 in what depends on one block alone, 6e-2 in deeper states, 3e-2 in logits. FP32 sums of
# the FP16 baseline, in another order, round to another FP16 value now and then: in onnxruntime up
# to 3e-4, and 2e-3 after 24 layers. Shallow states pass through every op once.
SHALLOW_TOLERANCE = 1e-2
DEEPER_TOLERANCE = 1e-1


def tolerance(exact: bool, shallow: bool) -> float:
    """How far a tensor may be from its golden twin.

    Args:
        exact: what computes does the reference's own arithmetic, whose sums have no order.
        shallow: it depends on one block alone.
    """
    if exact:
        return EXACT
    return SHALLOW_TOLERANCE if shallow else DEEPER_TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """One tensor against its golden twin."""

    name: str
    relative_error: float  # infinite where a value is NaN or infinite, or the shapes differ
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.relative_error <= self.tolerance


def relative_error(got: np.ndarray, golden: np.ndarray) -> float:
    """‖got − golden‖ / ‖golden‖; infinite where they cannot be compared."""
    if got.shape != golden.shape or not (np.isfinite(got).all() and np.isfinite(golden).all()):
        return float("inf")
    difference = np.linalg.norm(got.astype(np.float64) - golden.astype(np.float64))
    norm = np.linalg.norm(golden.astype(np.float64))
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / norm)


def compare_with_golden(session: Session) -> Iterator[Comparison]:
    """States layer by layer, then the prefill's logits, then those of each decode step.

    In this order the first one that differs is nearest to the cause.
    """
    bundle, backend = session.bundle, session.backend
    golden = _load_golden(bundle)
    length = golden["input_ids"].shape[1]
    taken = length + golden["decode_ids"].shape[1]
    bundle.require_room(taken, f"the golden vectors take {taken} tokens", "copy it again")
    expected = golden["logits"]
    if backend.max_keep is not None:
        expected = expected[:, -backend.max_keep :]
    logits, states = session.prefill(golden["input_ids"], keep=expected.shape[1])
    logits_error = relative_error(logits, expected)  # the next call may overwrite them

    exact = backend.runtime == "onnxruntime" and bundle.quantized

    def comparison(name: str, error: float, shallow: bool = False) -> Comparison:
        return Comparison(name, error, tolerance(exact, shallow))

    for name, state in bundle.model.states.items():
        got = np.asarray(states[name])
        # Of a state that grows, golden vectors hold the rows that were written.
        error = relative_error(got[:, :, :length] if state.grows else got, golden[name])
        yield comparison(name, error, state.shallow)
    yield comparison("logits", logits_error)
    for step, expected in enumerate(golden["decode_logits"]):
        token = golden["decode_ids"][:, step : step + 1]
        logits, states = backend.forward(token, states, position=length + step)
        yield comparison(f"decode_logits[{step}]", relative_error(logits[0, 0], expected))


def suspects(name: str, bundle: Bundle) -> tuple[str, ...]:
    """The ops that can be at fault where `name` is the first tensor to differ, in their order."""
    if name in bundle.model.states:
        return bundle.model.states[name].suspects
    return bundle.model.logits_suspects if name == "logits" else bundle.model.decode_suspects


def _load_golden(bundle: Bundle) -> dict[str, np.ndarray]:
    path = bundle.path(GOLDEN)
    names = ["input_ids", "logits", "decode_ids", "decode_logits", *bundle.model.states]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (KeyError, ValueError, OSError) as error:
        raise BundleProblem(
            f"{path} is not a set of golden vectors for {bundle.name} ({error})",
            "pack the bundle again",
        ) from error
