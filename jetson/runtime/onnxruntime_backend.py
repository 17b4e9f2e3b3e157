"""Runs the portable graph with onnxruntime, on the CPU of any machine."""

from __future__ import annotations

import numpy as np
import onnxruntime

from runtime.backend import States
from runtime.bundle import Bundle, BundleProblem, RunFailure

GRAPH = "model.portable.onnx"
ERRORS_ONLY = 3  # onnxruntime's warnings speak to those who export a graph, not to those who run it


class OnnxRuntimeBackend:
    """A session on the portable graph; see `Backend` for the meaning of the methods."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        path = bundle.path(GRAPH)
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BundleProblem(
                f"onnxruntime {onnxruntime.__version__} cannot load {path} ({error})",
                "upgrade onnxruntime, or copy the bundle again",
            ) from error
        self._shapes = bundle.model.state_shapes
        self._dtypes = bundle.state_dtypes()
        self._check_names()
        self.description = f"onnxruntime {onnxruntime.__version__} (CPU)"

    def _check_names(self) -> None:
        expected = {"input_ids", "logits_to_keep", *self._dtypes}
        found = {tensor.name for tensor in self._session.get_inputs()}
        if found != expected:
            odd = sorted(found ^ expected)[0]
            raise BundleProblem(
                f"{GRAPH} and the manifest disagree about the input {odd}", "pack the bundle again"
            )
        self._outputs = ["logits", *(_output_name(name) for name in self._dtypes)]

    def zero_states(self, batch: int) -> States:
        """Zeros: conv_state.i (b, k-1, c) float16, ssm_state.i (b, h, p, n) as the recipe says."""
        return {
            name: np.zeros(shape, self._dtypes[name]) for name, shape in self._shapes(batch).items()
        }

    def forward(self, ids: np.ndarray, states: States, keep: int = 1) -> tuple[np.ndarray, States]:
        """Tokens (b, l) int32 -> logits (b, keep, vocab) float32 and states; inputs stay intact."""
        feed = {"input_ids": ids, "logits_to_keep": np.array(keep, np.int64), **states}
        try:
            logits, *new_states = self._session.run(self._outputs, feed)
        except Exception as error:  # see __init__
            raise RunFailure(
                f"onnxruntime failed on {ids.shape[1]} tokens ({error})",
                "run --verify to see whether the bundle is intact",
            ) from error
        return logits, dict(zip(self._dtypes, new_states, strict=True))


def _output_name(state: str) -> str:
    """conv_state.3 -> conv_state_out.3"""
    kind, layer = state.split(".")
    return f"{kind}_out.{layer}"
