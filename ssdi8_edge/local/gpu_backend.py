"""The quantized model on an NVIDIA GPU through the CUDA kernels, without TensorRT.

`GpuBackend` is a backend of the board's runtime (`runtime.backends.protocol.Backend`), so that
generating, benchmarking and verifying are the code that boards run.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime import command_line
from runtime.backends.choose import BACKENDS
from ssdi8_edge.checkpoints.quantized import is_quantized_checkpoint, load_quantized
from ssdi8_edge.ground.artifacts import QUANTIZED
from ssdi8_edge.ground.board_runtime import bundle_folder
from ssdi8_edge.ground.device import require_device
from ssdi8_edge.ground.errors import Interrupted, UsageError
from ssdi8_edge.models.block import States
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.ops import kernel_library
from ssdi8_edge.ops.kernel_limits import require_kernels


@dataclass(frozen=True)
class DeviceArray:
    """A tensor on the GPU; numpy copies it to the host when it looks."""

    tensor: Tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.tensor.cpu().numpy()
        return array if dtype is None else array.astype(dtype)


class GpuBackend:
    """One model on one GPU; see `runtime.backends.protocol.Backend` for the meaning of the methods.

    There is one set of states per batch size, updated in place: a sequence ends where the next one
    of its batch size starts. A shape (batch, length, positions kept) that comes a second time is
    captured in a CUDA graph and replayed from then on; that is every decode step but the first.
    A model whose states grow runs op by op: its references read the position on the host.
    """

    runtime = "torch"
    engine: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    max_keep: int | None = None
    sequences: int | None = 1

    def __init__(self, model: QuantizedModel, device: str = "cuda") -> None:
        """`model` has a context where its states grow."""
        if not kernel_library.available():
            kernel_library.load()  # says what is missing, if it is the library
            raise UsageError("torch finds no CUDA GPU here;", "use --device cpu.")
        if model.recipe.quantized:
            require_kernels(model.description.misfit(), device, "use --device cpu.")
        self._model = model
        self._grows = model.description.grows(model.recipe)
        self._device = torch.device(device)
        self._states: dict[int, list[States]] = {}
        self._steps: dict[tuple[int, int, int], _Step | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.versions: Mapping[str, str] = {
            "numpy": np.__version__,
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
        }
        name = torch.cuda.get_device_name(self._device)
        self.description = f"CUDA kernels under torch {torch.__version__} ({name})"

    @property
    def gpu_bytes(self) -> int:
        """What torch holds of the GPU's memory, weights included."""
        return torch.cuda.memory_reserved(self._device)

    def zero_states(self, batch: int) -> Mapping[str, DeviceArray]:
        """The states of this batch size, set to zero."""
        if batch not in self._states:
            self._states[batch] = self._model.zero_states(batch)
        for state in self._model.named_states(self._states[batch]).values():
            state.zero_()
        return self._named(batch)

    def load_states(self, held: Mapping[str, np.ndarray]) -> Mapping[str, DeviceArray]:
        """Copied into the states of batch size 1."""
        states = self.zero_states(1)
        for name, value in held.items():
            states[name].tensor.copy_(torch.from_numpy(value))
        return states

    def forward(
        self,
        ids: np.ndarray,
        states: Mapping[str, DeviceArray],
        keep: int = 1,
        position: int = 0,
    ) -> tuple[np.ndarray, Mapping[str, DeviceArray]]:
        """Tokens (b, l) int32 -> logits (b, keep, vocab) float32 and the states, in place."""
        batch, length = ids.shape
        own = self._named(batch)
        for name, state in states.items():
            if state.tensor.data_ptr() != own[name].tensor.data_ptr():
                own[name].tensor.copy_(state.tensor)
        key = (batch, length, keep)
        tokens = torch.from_numpy(np.ascontiguousarray(ids))
        if self._grows or key not in self._steps:
            self._steps[key] = None
            logits = self._run(tokens.to(self._device), keep, position)
        else:
            step = self._steps[key] or self._capture(key)
            step.tokens.copy_(tokens)
            step.graph.replay()
            logits = step.logits
        return logits.cpu().numpy(), self._named(batch)

    def layer_times(self) -> list[list[tuple[str, float]]]:
        """Not measured here: a graph has no layers; use a profiler of the CUDA toolkit."""
        return []

    def close(self) -> None:
        """Free graphs, states and the model."""
        self._steps.clear()
        self._states.clear()
        self.__dict__.pop("_model", None)
        torch.cuda.empty_cache()

    def _named(self, batch: int) -> dict[str, DeviceArray]:
        states = self._model.named_states(self._states[batch])
        return {name: DeviceArray(state) for name, state in states.items()}

    def _run(self, tokens: Tensor, keep: int, position: int = 0) -> Tensor:
        states = self._states[tokens.shape[0]]
        with kernel_library.states_in_place():
            logits, after = self._model.forward(tokens, states, keep, position=position)
        for old, new in zip(states, after, strict=True):
            for before, now in zip(old, new, strict=True):
                if before.data_ptr() != now.data_ptr():  # an op that has no kernel
                    before.copy_(now)
        return logits

    def _capture(self, key: tuple[int, int, int]) -> _Step:
        batch, length, keep = key
        tokens = torch.zeros((batch, length), dtype=torch.int32, device=self._device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        # The default stream cannot be captured; torch brings one of its own.
        own = None if stream == torch.cuda.default_stream(self._device) else stream
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self._pool, stream=own):
            logits = self._run(tokens, keep)
        self._steps[key] = step = _Step(graph, tokens, logits)
        return step


def run_on_gpu(run: Path, arguments: list[str], device: str) -> int:
    """run_engine.py's `arguments` on the quantized checkpoint of a run folder; the exit code.

    Raises:
        UsageError: there is no such GPU, no kernel library, or the run folder has no checkpoint.
        Interrupted: Ctrl-C where the runtime does not answer it.
    """
    require_device(device)
    if not is_quantized_checkpoint(run / QUANTIZED):
        raise UsageError(
            f"{run} has no {QUANTIZED}/ folder, which a GPU needs beside the bundle;",
            "name the run folder of a build.",
        )
    kernel_library.load()
    BACKENDS[GpuBackend.runtime] = lambda bundle, options: GpuBackend(
        load_quantized(run / QUANTIZED, device, bundle.model.context or 0), device
    )
    command = [str(bundle_folder(run)), "--backend", GpuBackend.runtime, *arguments]
    # The runtime answers Ctrl-C itself, which comes to it as in a process of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = command_line.run(command, run)
    except KeyboardInterrupt as stopped:
        raise Interrupted("stopped.") from stopped
    finally:
        signal.signal(signal.SIGINT, before)
    return code


@dataclass(frozen=True)
class _Step:
    """A captured call, with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor
