"""Runs the portable graph with onnxruntime, on the CPU of any machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runtime.backends.protocol import LayerTimes, States
from runtime.bundle import Bundle
from runtime.files import PORTABLE_MODEL
from runtime.problems import BundleProblem, RunFailure

# Its warnings speak to those who export a graph, and its errors come as exceptions, too.
SILENT = 4
# Up to 1.23, the last for Python 3.10, it makes an op for FP64 that onnxruntime does not have.
UNWANTED_OPTIMIZERS = ["MatmulTransposeFusion"]
MICROSECOND = 1e-6


class OnnxRuntimeBackend:
    """A session on the portable graph; see `Backend` for the meaning of the methods."""

    runtime = "onnxruntime"
    engine: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    gpu_bytes: int | None = None
    max_keep: int | None = None
    sequences: int | None = None

    def __init__(self, bundle: Bundle, threads: int | None = None, profiling: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        if threads is not None:
            options.intra_op_num_threads = threads
        self._trace = Path(tempfile.mkdtemp(prefix="run_engine.")) if profiling else None
        if self._trace:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._trace / "trace")
        path = bundle.path(PORTABLE_MODEL)
        try:
            self._session = onnxruntime.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=UNWANTED_OPTIMIZERS,
            )
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            self.close()
            raise BundleProblem(
                f"onnxruntime {onnxruntime.__version__} cannot load {path} ({error})",
                "upgrade onnxruntime, or copy the bundle again",
            ) from error
        self._shapes = bundle.model.state_shapes
        self._dtypes = bundle.state_dtypes()
        self._output_of = {s.name: s.output for s in bundle.model.states.values()}
        self._grows = bundle.model.grows
        self._check_names()
        self.versions: Mapping[str, str] = {
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        }
        self.description = f"onnxruntime {onnxruntime.__version__} (CPU)"

    def _check_names(self) -> None:
        expected = {"input_ids", "logits_to_keep", *self._dtypes}
        if self._grows:
            expected.add("position")
        found = {tensor.name for tensor in self._session.get_inputs()}
        if found != expected:
            odd = sorted(found ^ expected)[0]
            raise BundleProblem(
                f"{PORTABLE_MODEL} and the manifest disagree about the input {odd}",
                "pack the bundle again",
            )
        self._outputs = ["logits", *self._output_of.values()]

    def zero_states(self, batch: int) -> States:
        """Zeros, of the shapes and types of the manifest."""
        return {
            name: np.zeros(shape, self._dtypes[name]) for name, shape in self._shapes(batch).items()
        }

    def load_states(self, held: Mapping[str, np.ndarray]) -> States:
        """The arrays themselves, since `forward` leaves its inputs intact."""
        return dict(held)

    def forward(
        self, ids: np.ndarray, states: States, keep: int = 1, position: int = 0
    ) -> tuple[np.ndarray, States]:
        """Tokens (b, l) int32 -> logits (b, keep, vocab) float32 and states; inputs stay intact."""
        feed = {"input_ids": ids, "logits_to_keep": np.array(keep, np.int64), **states}
        if self._grows:
            feed["position"] = np.array(position, np.int64)
        try:
            logits, *new_states = self._session.run(self._outputs, feed)
        except Exception as error:  # see __init__
            raise RunFailure(
                f"onnxruntime failed on {ids.shape[1]} tokens ({error})",
                "run --verify to see whether the bundle is intact",
            ) from error
        return logits, dict(zip(self._dtypes, new_states, strict=True))

    def layer_times(self) -> list[LayerTimes]:
        """Seconds of each graph node, without those of the nodes inside it."""
        trace = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self.close()
        runs = sorted(
            (event for event in trace if event.get("name") == "model_run"), key=lambda e: e["ts"]
        )
        nodes = [event for event in trace if event.get("cat") == "Node"]
        return [
            _own_times([node for node in nodes if run["ts"] <= node["ts"] <= _end(run)])
            for run in runs
        ]

    def close(self) -> None:
        """Remove the trace; the session holds memory alone."""
        if self._trace:
            shutil.rmtree(self._trace, ignore_errors=True)


def _end(event: Mapping[str, Any]) -> int:
    return event["ts"] + event["dur"]


def _own_times(nodes: list[dict[str, Any]]) -> LayerTimes:
    """Of an If or a Scan, only what its body did not take; onnxruntime runs node after node."""
    own: list[float] = []
    names = []
    open_nodes: list[tuple[int, int]] = []  # (index, end) of the nodes around the current one
    for node in sorted(nodes, key=lambda e: (e["ts"], -e["dur"])):
        while open_nodes and node["ts"] >= open_nodes[-1][1]:
            open_nodes.pop()
        if open_nodes:
            own[open_nodes[-1][0]] -= node["dur"]
        open_nodes.append((len(own), _end(node)))
        names.append(node["name"].removesuffix("_kernel_time"))
        own.append(node["dur"])
    return [(name, max(0.0, us) * MICROSECOND) for name, us in zip(names, own, strict=True)]
