"""Runs the engine that build_engine.py made, on the GPU.

States live on the GPU twice, A and B: a call reads one and writes the other, so that nothing is
copied, and a call that is interrupted leaves the states that it read intact. Decode is recorded in
two CUDA graphs, A to B and B to A, each with an execution context of its own, since a graph is good
only as long as nothing changes in its context. A graph holds the copy of the token to the GPU, the
engine, and the copy of the logits into pinned memory: 200 KB for 50 280 tokens, a few microseconds
at a board's bandwidth, of the milliseconds that a token takes. So sampling stays on the host.

States that grow live there once: input and output are bound to one address, and a call writes the
rows of its tokens alone. An interrupted call is repeated at its position, and writes them again.
`position` lies in device memory, where plugins read it.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.device_states import DeviceStates, layout
from runtime.backends.protocol import BackendOptions, LayerTimes, States
from runtime.backends.tensorrt_context import Context
from runtime.bundle import HASHED_AT_LOAD, Bundle
from runtime.engine.cuda import Gpu
from runtime.engine.libcuda import Graph, this_gpu
from runtime.engine.store import (
    REBUILD,
    STORE,
    Engine,
    choose_engine,
    engines_in,
    find_plugins,
    no_engine,
    surroundings,
)
from runtime.engine.tensorrt_api import LogLines, deserialize, import_tensorrt, load_plugins, logger
from runtime.machine import this_machine
from runtime.problems import BundleProblem, RunFailure

PREFILL, DECODE = 0, 1  # optimization profiles


class TensorRtBackend:
    """An engine with its states; see `Backend` for the meaning of the methods."""

    runtime = "tensorrt"
    max_keep: int | None = 1  # the engine computes the last position alone
    sequences: int | None = 1

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        """Raises BundleProblem where no engine fits, RunFailure where one does not load."""
        store = options.engines or bundle.root / STORE
        if not engines_in(store):
            raise no_engine(bundle, store)
        self._trt = import_tensorrt()
        facts = this_gpu()
        plugins = _plugin_library(bundle, store, options.plugins)
        here = surroundings(bundle, plugins, self._trt.__version__, facts, this_machine())
        engine, differs = choose_engine(bundle, store, here)
        engine.check(None if options.hash_all else HASHED_AT_LOAD)
        built_for = {**engine.log["requirements"], **engine.log["conditions"]}
        self.engine: Mapping[str, Any] | None = {
            "key": engine.key,
            "built_for": built_for,
            "differs": differs,
        }
        self.notes = [
            f"the engine was built for {text}; build one for this state with {REBUILD}"
            for text in differs
        ]
        if options.reason:
            self.notes.append(options.reason)
        self._batches, self._tokens = (built_for["shapes"][k] for k in ("batch", "tokens"))
        self._vocabulary = bundle.model.vocab_size
        self._shapes = bundle.model.state_shapes
        self._dtypes = bundle.state_dtypes()
        self._output_of = {s.name: s.output for s in bundle.model.states.values()}
        self._growing = {s.name for s in bundle.model.states.values() if s.grows}
        self._lines = LogLines()
        self._contexts: list[Context] = []  # prefill, decode from A, decode from B
        self._graphs: dict[int, Graph] = {}  # by the slot that they read
        self._ran: set[int] = set()  # slots that decode read once, which capture demands
        self._capture = not options.profiling
        self._times: list[LayerTimes] | None = [] if options.profiling else None
        self._generation = 0
        self._batch = 0
        self._gpu = Gpu()
        try:
            self._load(engine, plugins)
        except BaseException:
            self.close()
            raise
        self.versions: Mapping[str, str] = {
            "numpy": np.__version__,
            "tensorrt": self._trt.__version__,
            "pycuda": self._gpu.version,
            "cuda": facts.cuda,
        }
        self.description = f"TensorRT {self._trt.__version__} on {facts.name}, {facts.sms} SMs"

    def _load(self, engine: Engine, plugins: Path | None) -> None:
        self._log = logger(self._trt, self._lines)
        if plugins:
            load_plugins(self._trt, plugins)
        # Mapped, not read: a board has no memory to hold an engine twice.
        with (
            engine.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            self._engine = deserialize(self._trt, self._log, plan, str(engine.path), self._lines)
        # One piece of scratch memory for all contexts: they never run at the same time.
        scratch = self._gpu.allocate(self._engine.device_memory_size_v2)
        profiling = self._times is not None
        for profile in (PREFILL, DECODE, DECODE):
            self._contexts.append(
                Context(
                    *(self._trt, self._engine, profile, scratch),
                    *(self._gpu, self._lines, profiling),
                )
            )
        self._onnx_names = _onnx_names(engine.log) if profiling else {}
        batch = self._batches[2]
        self._ids_host = self._gpu.pinned((batch * self._tokens[2],), np.int32)
        self._ids = self._gpu.allocate(self._ids_host.nbytes)
        self._logits_host = self._gpu.pinned((batch * self._vocabulary,), np.float32)
        self._logits = self._gpu.allocate(self._logits_host.nbytes)
        self._offsets, self._slot_bytes = layout(
            {n: s for n, s in self._shapes(batch).items() if n not in self._growing}, self._dtypes
        )
        self._slots = [self._gpu.allocate(self._slot_bytes) for _ in range(2)]
        if self._growing:
            self._grown_offsets, self._grown_bytes = layout(
                {n: s for n, s in self._shapes(batch).items() if n in self._growing}, self._dtypes
            )
            self._grown = self._gpu.allocate(self._grown_bytes)
            self._position_host = self._gpu.pinned((1,), np.int64)
            self._position = self._gpu.allocate(self._position_host.nbytes)

    @property
    def gpu_bytes(self) -> int | None:
        """GPU memory taken since this was opened; other programs count in."""
        return self._gpu.bytes_taken

    def zero_states(self, batch: int) -> States:
        """Zeros in slot A; states given out before are gone."""
        low, _, high = self._batches
        if not low <= batch <= high:
            raise BundleProblem(
                f"the engine takes batches of {low} to {high}, not {batch}",
                "pack the bundle for a target with another [engine] batch",
            )
        if batch != self._batch:  # graphs are recorded for one shape
            self._drop_graphs()
            self._batch = batch
        self._gpu.zero(self._slots[0], self._slot_bytes)
        if self._growing:
            self._gpu.zero(self._grown, self._grown_bytes)
        self._generation += 1
        return DeviceStates(self, 0, self._generation)

    def load_states(self, held: Mapping[str, np.ndarray]) -> States:
        """Copied into slot A; states given out before are gone."""
        states = self.zero_states(1)
        for name, value in held.items():
            self._gpu.write(self._address(name, 0), np.ascontiguousarray(value))
        return states

    def forward(
        self, ids: np.ndarray, states: States, keep: int = 1, position: int = 0
    ) -> tuple[np.ndarray, States]:
        """Tokens (b, l) int32 -> logits (b, 1, vocab) float32 and states.

        The logits lie in pinned memory, which the next call overwrites.
        """
        assert isinstance(states, DeviceStates) and keep == 1
        slot = states.current_slot()
        batch, length = ids.shape
        low, _, high = self._tokens
        if batch != self._batch or (length != 1 and not low <= length <= high):
            raise BundleProblem(
                f"the engine takes {low} to {high} tokens of {self._batch} sequences at once,"
                f" not {length} of {batch}",
                "pack the bundle for a target with other [engine] shapes",
            )
        context = self._contexts[0 if length > 1 else 1 + slot]
        try:
            self._ids_host[: ids.size] = ids.reshape(-1)
            if self._growing:
                self._position_host[0] = position
            if length > 1:
                self._enqueue(context, slot, length)
            else:
                self._decode(context, slot)
        finally:
            self._gpu.synchronize()  # also after Ctrl-C: nothing may still use the pinned memory
        if self._times is not None:
            self._times.append(context.take_times())
        self._generation += 1
        logits = self._logits_host[: batch * self._vocabulary].reshape(batch, 1, -1)
        return logits, DeviceStates(self, 1 - slot, self._generation)

    def _decode(self, context: Context, slot: int) -> None:
        """One token, by a graph from the second time on."""
        if self._capture and slot in self._ran and slot not in self._graphs:
            try:
                self._graphs[slot] = self._gpu.capture(lambda: self._enqueue(context, slot, 1))
            except RunFailure as failure:
                self._capture = False
                self.notes.append(
                    f"decode runs without CUDA graphs, which is slower: {failure.message}"
                )
        if slot in self._graphs:
            self._graphs[slot].launch()
        else:
            self._enqueue(context, slot, 1)
            self._ran.add(slot)

    def _enqueue(self, context: Context, slot: int, length: int) -> None:
        """Token ids in, engine, logits out, all on the stream."""
        key = (slot, self._batch, length)
        if not context.is_bound(key):
            context.bind(key, self._input_shapes(length), self._addresses(slot))
        count = self._batch * length
        self._gpu.copy_in(self._ids, self._ids_host[:count])
        if self._growing:
            self._gpu.copy_in(self._position, self._position_host)
        context.enqueue()
        self._gpu.copy_out(self._logits_host[: self._batch * self._vocabulary], self._logits)

    def _input_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        return {"input_ids": (self._batch, length), **self._shapes(self._batch)}

    def _addresses(self, slot: int) -> dict[str, int]:
        """States are read from `slot` and written to the other one, or grow where they are."""
        source, target = self._slots[slot], self._slots[1 - slot]
        addresses = {"input_ids": self._ids, "logits": self._logits}
        for name, offset in self._offsets.items():
            addresses[name] = source + offset
            addresses[self._output_of[name]] = target + offset
        if self._growing:
            addresses["position"] = self._position
            for name, offset in self._grown_offsets.items():
                addresses[name] = addresses[self._output_of[name]] = self._grown + offset
        return addresses

    def read_state(self, name: str, slot: int) -> np.ndarray:
        """A copy of one state on the host."""
        shape = self._shapes(self._batch)[name]
        return self._gpu.read(self._address(name, slot), shape, self._dtypes[name])

    def _address(self, name: str, slot: int) -> int:
        """Where a state lies."""
        if name in self._growing:
            return self._grown + self._grown_offsets[name]
        return self._slots[slot] + self._offsets[name]

    @property
    def state_names(self) -> tuple[str, ...]:
        """Graph names, layer by layer."""
        return tuple(self._dtypes)

    def is_current(self, generation: int) -> bool:
        """Whether states of this generation are the last that were given out."""
        return generation == self._generation

    def layer_times(self) -> list[LayerTimes]:
        """Seconds of each layer of the engine; names tell the ONNX nodes where the log knows."""
        assert self._times is not None
        return [
            [(self._onnx_names.get(name, name), seconds) for name, seconds in run]
            for run in self._times
        ]

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._ran.clear()

    def close(self) -> None:
        """Free graphs, then contexts, then the engine, then memory; may be called again."""
        self._drop_graphs()
        self._contexts.clear()
        self._engine = None
        self._gpu.close()


def _plugin_library(bundle: Bundle, store: Path, named: Path | None) -> Path | None:
    """The library named, else that of the newest engine, else the one built in the bundle."""
    if not bundle.quantized:
        return None
    recorded = engines_in(store)[0].log.get("plugins")
    if named is None and recorded and Path(recorded).is_file():
        return Path(recorded)
    library = find_plugins(bundle, named)
    if library is None:
        raise BundleProblem(
            f"the engine of {bundle.name} needs the plugin library, and {recorded} is gone",
            "build it with setup.sh, or name it with --plugins",
        )
    return library


def _onnx_names(log: Mapping[str, Any]) -> dict[str, str]:
    """Layer of the engine -> its name and the ONNX nodes in it, where the build log tells them."""
    names = {}
    for layer in log.get("layers", []):
        if isinstance(layer, Mapping) and layer.get("Metadata"):
            nodes = " + ".join(str(layer["Metadata"]).split("\x1e"))
            names[str(layer["Name"])] = f"{layer['Name']} {nodes}"
    return names
