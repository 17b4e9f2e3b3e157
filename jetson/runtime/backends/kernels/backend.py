"""Runs the program of a bundle on the GPU by our kernels; needs no TensorRT, no pycuda, no build.

Weights go from the mapped file to the GPU. What calls make lies in one arena, planned for the
shape (sequences, tokens, positions that get logits) of the call. States that are replaced live
twice, A and B: a call reads one and writes the other, so that one that is interrupted leaves what
it read intact. States that grow live once: a call writes its own rows, and is repeated at its
position.

A shape that comes a second time, from the same slot, is recorded in a CUDA graph: the copy of the
tokens to the GPU, all calls, and the copy of the logits into page-locked memory. So decode is two
graphs, A to B and B to A, and so is a length of prompt that repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.device_states import DeviceStates, layout
from runtime.backends.kernels.arena import BLOCK, Plan, plan
from runtime.backends.kernels.library import LIBRARY, SETUP, Kernels, find_library
from runtime.backends.kernels.program import Shape, read_program
from runtime.backends.kernels.step import Step, Work, lifetimes
from runtime.backends.kernels.weights import Weights
from runtime.backends.protocol import BackendOptions, LayerTimes, States
from runtime.bundle import Bundle
from runtime.console import size
from runtime.engine import libcuda
from runtime.engine.driver import Device
from runtime.files import WEIGHTS
from runtime.problems import BundleProblem, MemoryRanOut, RunFailure

LEAST_CAPABILITY = (8, 0)  # Ampere
MOST_STEPS = 8  # shapes and slots that are kept ready, the last ones
ON_CPU = "run it with --backend onnxruntime, on the CPU"


class KernelsBackend:
    """A program with its weights and states; see `Backend` for the meaning of the methods."""

    runtime = "kernels"
    engine: Mapping[str, Any] | None = None
    max_keep: int | None = None
    sequences: int | None = 1

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        """Raises BundleProblem where library, GPU or memory do not do."""
        self._program = read_program(bundle)
        library = _library(bundle, options.plugins)
        self._kernels = Kernels(library, self._program)
        facts = libcuda.this_gpu()
        _require_ampere(facts)
        self.notes: list[str] = [options.reason] if options.reason else []
        self._interface = bundle.model
        self._dtypes = bundle.state_dtypes()
        self._steps: dict[tuple[Shape, int], Step] = {}
        self._plans: dict[Shape, Plan] = {}
        self._arena: list[tuple[int, int]] = []  # (address, bytes) of each block
        self._memory_of_states: list[int] = []
        self._batch = self._generation = 0
        self._capture = not options.profiling
        self._times: list[LayerTimes] | None = [] if options.profiling else None
        self._gpu = Device()
        try:
            self._load(bundle)
        except BaseException:
            self.close()
            raise
        self.versions: Mapping[str, str] = {
            "numpy": np.__version__,
            "kernels": f"ABI {self._program.abi}",
            "cuda": facts.cuda,
        }
        self.description = f"our CUDA kernels on {facts.name}, {facts.sms} SMs"

    def _load(self, bundle: Bundle) -> None:
        """Everything but what depends on a batch; the first is planned as one sequence."""
        states = self._interface.states.values()
        outputs = (self._program.outputs[state.output] for state in states)
        self._in_states = frozenset([*(state.name for state in states), *outputs])
        weights = Weights(bundle.path(WEIGHTS), self._program.weights)
        largest = Shape(1, bundle.max_tokens, 1)
        arena = self._plan(largest)
        replaced = self._interface.state_bytes() - self._interface.cache_bytes()
        needed = sum(weights.blocks) + arena.nbytes + self._interface.state_bytes() + replaced
        if needed > self._gpu.free_bytes:
            raise MemoryRanOut(
                f"{bundle.name} takes {size(needed)} of GPU memory, of which {size(arena.nbytes)}"
                f" for {largest.tokens} tokens at once, and {size(self._gpu.free_bytes)} are free",
                "end other programs, or pack the bundle for a target with fewer tokens",
            )
        blocks = [self._gpu.allocate(nbytes) for nbytes in weights.blocks]
        weights.load(blocks, self._gpu.upload)
        self._weights = {n: blocks[p.block] + p.offset for n, p in weights.places.items()}
        self._ids_host = self._gpu.pinned(largest.tokens, np.int32)
        self._position_host = self._gpu.pinned(1, np.int64)
        self._logits_host = self._gpu.pinned(self._interface.vocab_size, np.float32)
        self._fit(largest)

    # --- memory -----------------------------------------------------------------------------------

    def _plan(self, shape: Shape) -> Plan:
        if shape not in self._plans:
            living = lifetimes(self._program, self._kernels, shape, self._in_states)
            while len(self._plans) >= MOST_STEPS:
                del self._plans[next(iter(self._plans))]
            self._plans[shape] = plan(living)
        return self._plans[shape]

    def _fit(self, shape: Shape) -> Plan:
        """The plan of a shape, for which the arena and the host's memory are large enough now."""
        wanted = self._plan(shape)
        have = [nbytes for _, nbytes in self._arena]
        have += [0] * (len(wanted.blocks) - len(have))
        if any(there < nbytes for there, nbytes in zip(have, wanted.blocks, strict=False)):
            self._drop_steps()
            while self._arena:
                self._gpu.release(self._arena.pop()[0])
            for nbytes in wanted.blocks:
                self._arena.append((self._gpu.allocate(nbytes), nbytes))
        if self._ids_host.size < shape.batch * shape.tokens:
            self._drop_steps()
            self._ids_host = self._gpu.pinned(shape.batch * shape.tokens, np.int32)
        logits = shape.batch * shape.keep * self._interface.vocab_size
        if self._logits_host.size < logits:
            self._drop_steps()
            self._logits_host = self._gpu.pinned(logits, np.float32)
        return wanted

    def _take_states(self, batch: int) -> None:
        """Memory for the states of so many sequences, in place of what there was."""
        self._drop_steps()
        while self._memory_of_states:
            self._gpu.release(self._memory_of_states.pop())
        shapes, states = self._interface.state_shapes(batch), self._interface.states
        replaced = {name: s for name, s in shapes.items() if not states[name].grows}
        grown = {name: s for name, s in shapes.items() if states[name].grows}
        self._offsets, self._slot_bytes = layout(replaced, self._dtypes)
        self._grown_offsets, self._grown_bytes = layout(grown, self._dtypes)
        for nbytes in (self._slot_bytes, self._slot_bytes, self._grown_bytes):
            self._memory_of_states.append(self._gpu.allocate(nbytes))
        self._batch = batch

    def _state_addresses(self, slot: int) -> dict[str, int]:
        """States are read from `slot` and written to the other one, or grow where they are."""
        source, target = self._memory_of_states[slot], self._memory_of_states[1 - slot]
        addresses = {}
        for name, state in self._interface.states.items():
            output = self._program.outputs[state.output]
            if state.grows:
                at = self._memory_of_states[2] + self._grown_offsets[name]
                addresses[name] = addresses[output] = at
            else:
                addresses[name] = source + self._offsets[name]
                addresses[output] = target + self._offsets[name]
        return addresses

    def _arena_address(self, offset: int) -> int:
        return self._arena[offset // BLOCK][0] + offset % BLOCK

    # --- running ----------------------------------------------------------------------------------

    def zero_states(self, batch: int) -> States:
        """Zeros in slot A; states given out before are gone."""
        if batch != self._batch:
            self._take_states(batch)
        self._gpu.zero(self._memory_of_states[0], max(1, self._slot_bytes))
        self._gpu.zero(self._memory_of_states[2], max(1, self._grown_bytes))
        self._generation += 1
        return DeviceStates(self, 0, self._generation)

    def load_states(self, held: Mapping[str, np.ndarray]) -> States:
        """Copied into slot A; states given out before are gone."""
        states = self.zero_states(1)
        self._gpu.synchronize()
        addresses = self._state_addresses(0)
        for name, value in held.items():
            self._gpu.upload(addresses[name], np.ascontiguousarray(value))
        return states

    def forward(
        self, ids: np.ndarray, states: States, keep: int = 1, position: int = 0
    ) -> tuple[np.ndarray, States]:
        """Tokens (b, l) int32 -> logits (b, keep, vocab) float32 and states.

        The logits lie in pinned memory, which the next call overwrites.
        """
        assert isinstance(states, DeviceStates)
        slot, vocabulary = states.current_slot(), self._interface.vocab_size
        batch, length = ids.shape
        shape = Shape(batch, length, keep)
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise BundleProblem(
                f"there is a token that is not from 0 to {vocabulary - 1}, as the model's are",
                "give tokens of its own tokenizer",
            )
        step, offsets = self._step(shape, slot), self._plan(shape).offsets
        logits = self._logits_host[: batch * keep * vocabulary]

        def copy_in() -> None:
            tokens = self._ids_host[: ids.size]
            self._gpu.copy_in(self._arena_address(offsets["input_ids"]), tokens)
            if "position" in offsets:
                self._gpu.copy_in(self._arena_address(offsets["position"]), self._position_host)

        def copy_out() -> None:
            made = self._program.outputs["logits"]
            self._gpu.copy_out(logits, self._arena_address(offsets[made]))

        try:
            self._ids_host[: ids.size] = ids.reshape(-1)
            self._position_host[0] = position
            if self._times is not None:
                step.run_timed(copy_in, copy_out)
            else:
                self._run(step, copy_in, copy_out)
        finally:
            self._gpu.synchronize()  # also after Ctrl-C: nothing may still use the pinned memory
        if self._times is not None:
            self._times.append(self._passed())
        self._generation += 1
        next_states = DeviceStates(self, 1 - slot, self._generation)
        return logits.reshape(batch, keep, vocabulary), next_states

    def _step(self, shape: Shape, slot: int) -> Step:
        """The calls of this shape that read this slot."""
        planned = self._fit(shape)
        key = (shape, slot)
        if key not in self._steps:
            while len(self._steps) >= MOST_STEPS:
                self._steps.pop(next(iter(self._steps))).free()
            placed = {n: self._arena_address(offset) for n, offset in planned.offsets.items()}
            addresses = self._weights | placed | self._state_addresses(slot)
            self._steps[key] = Step(self._program, self._kernels, self._gpu, shape, addresses)
        return self._steps[key]

    def _run(self, step: Step, before: Work, after: Work) -> None:
        """As a graph where that is possible."""
        if self._capture and step.can_be_recorded:
            try:
                step.record(before, after)
            except RunFailure as failure:
                self._capture = False
                self.notes.append(
                    f"the calls run without CUDA graphs, which is slower: {failure.message}"
                )
        step.run(before, after)

    def _passed(self) -> LayerTimes:
        """Of the run that just ended: the seconds of each call."""
        return [
            (launch.name, self._gpu.seconds_between(i, i + 1))
            for i, launch in enumerate(self._program.launches)
        ]

    # --- what callers see -------------------------------------------------------------------------

    @property
    def gpu_bytes(self) -> int | None:
        """GPU memory taken since this was opened; other programs count in."""
        return self._gpu.bytes_taken

    @property
    def state_names(self) -> tuple[str, ...]:
        """Graph names, layer by layer."""
        return tuple(self._dtypes)

    def is_current(self, generation: int) -> bool:
        """Whether states of this generation are the last that were given out."""
        return generation == self._generation

    def read_state(self, name: str, slot: int) -> np.ndarray:
        """A copy of one state on the host."""
        address = self._state_addresses(slot)[name]
        shape = self._interface.state_shapes(self._batch)[name]
        return self._gpu.read(address, shape, self._dtypes[name])

    def layer_times(self) -> list[LayerTimes]:
        """Seconds of each call, by events on the stream."""
        assert self._times is not None
        return self._times

    def _drop_steps(self) -> None:
        for step in self._steps.values():
            step.free()
        self._steps.clear()

    def close(self) -> None:
        """Free graphs, then memory; may be called again."""
        self._drop_steps()
        self._gpu.close()


def _library(bundle: Bundle, named: Path | None) -> Path:
    found = find_library(bundle, named)
    if found is None:
        raise BundleProblem(f"{bundle.name} has no {LIBRARY} yet", f"{SETUP}, or {ON_CPU}")
    return found


def _require_ampere(facts: libcuda.Gpu) -> None:
    if tuple(map(int, facts.compute_capability.split("."))) < LEAST_CAPABILITY:
        raise BundleProblem(
            f"the {facts.name} has compute capability {facts.compute_capability}, and the kernels"
            " need 8.0 (Ampere) or newer",
            ON_CPU,
        )
