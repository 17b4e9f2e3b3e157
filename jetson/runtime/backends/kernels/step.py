"""All calls for one shape, bound to addresses: run one by one, or as a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

from runtime.backends.kernels.arena import Lifetime
from runtime.backends.kernels.library import Kernels
from runtime.backends.kernels.program import Launch, Program, Shape
from runtime.engine.driver import Device
from runtime.engine.libcuda import Graph

Work = Callable[[], None]


def lifetimes(
    program: Program, kernels: Kernels, shape: Shape, elsewhere: frozenset[str]
) -> dict[str, Lifetime]:
    """What the calls of a program make and are given, by name, and the scratch memory of each call.

    Args:
        elsewhere: tensors that need no place: they are states.
    """
    last_use: dict[str, int] = {}
    for i, launch in enumerate(program.launches):
        last_use |= dict.fromkeys(launch.tensors.values(), i)
    last_use[program.outputs["logits"]] = len(program.launches)
    found = {
        name: Lifetime(tensor.nbytes(shape), -1, last_use[name])
        for name, tensor in program.inputs.items()
        if name in last_use and name not in elsewhere
    }
    for i, launch in enumerate(program.launches):
        for name in launch.outputs:
            if name not in elsewhere:
                nbytes = program.values[name].nbytes(shape)
                found[name] = Lifetime(nbytes, i, last_use.get(name, i))
        scratch = kernels.workspace(launch.kernel, _sized(kernels, launch, shape))
        if scratch:
            found[scratch_of(launch)] = Lifetime(scratch, i, i)
    return found


def scratch_of(launch: Launch) -> str:
    """The name of its scratch memory among tensors."""
    return f"{launch.name}.workspace"


def _sized(kernels: Kernels, launch: Launch, shape: Shape) -> ctypes.Structure:
    """Its parameters without any address."""
    params = kernels.structs[launch.kernel]()
    for field, number in launch.numbers.items():
        setattr(params, field, number)
    for field, size in launch.sizes.items():
        setattr(params, field, shape.value(size))
    return params


class Step:
    """The calls of one shape that read one slot of states."""

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        gpu: Device,
        shape: Shape,
        addresses: Mapping[str, int],
    ) -> None:
        self._gpu = gpu
        self._graph: Graph | None = None
        self._ran = False
        self._calls: list[Work] = []
        for launch in program.launches:
            params = _sized(kernels, launch, shape)
            for field, name in launch.tensors.items():
                setattr(params, field, addresses[name])
            if scratch_of(launch) in addresses:
                params.workspace = addresses[scratch_of(launch)]
            self._calls.append(kernels.prepared(launch.kernel, params, gpu.stream))

    @property
    def can_be_recorded(self) -> bool:
        """It ran once, when kernels are loaded, and is no graph yet."""
        return self._ran and self._graph is None

    def record(self, before: Work, after: Work) -> None:
        """Make a graph of `before`, the calls and `after`, which `run` takes from now on.

        Raises:
            RunFailure: the work cannot be recorded.
        """
        self._graph = self._gpu.capture(lambda: self._enqueue(before, after))

    def run(self, before: Work, after: Work) -> None:
        """Put `before`, the calls and `after` on the stream.

        Raises:
            RunFailure: a launcher refuses.
        """
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue(before, after)
            self._ran = True

    def run_timed(self, before: Work, after: Work) -> None:
        """The same with event i before call i, and one behind the last."""
        before()
        for i, call in enumerate(self._calls):
            self._gpu.record(i)
            call()
        self._gpu.record(len(self._calls))
        after()

    def _enqueue(self, before: Work, after: Work) -> None:
        before()
        for call in self._calls:
            call()
        after()

    def free(self) -> None:
        """Drop the graph."""
        if self._graph is not None:
            self._graph.free()
            self._graph = None
