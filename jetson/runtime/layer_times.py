"""Names of layers -> the model's modules, and their times added up.

A layer is what the inference library times: with TensorRT a node of its engine, often several ONNX
nodes fused; with onnxruntime an ONNX node, those of an op's body included.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.backends.protocol import LayerTimes

OTHER = "other"
_MODEL_LAYER = re.compile(r"(?<![a-z])layers\.(\d+)/")


@dataclass(frozen=True)
class LayerTime:
    """A layer of the library, and its time per run."""

    name: str
    module: str
    model_layer: int | None  # which block it belongs to, where its name says so
    seconds: float


@dataclass(frozen=True)
class ModuleTime:
    """All layers of one module together: their time per run, and its share of the whole.

    `part`: of the model, which the module belongs to, or "".
    """

    module: str
    part: str
    layers: int
    seconds: float
    share: float


@dataclass(frozen=True)
class KindTime:
    """All layers in blocks of one kind together, as far as their names tell the block."""

    kind: str
    layers: int
    seconds: float
    share: float


class Modules:
    """Tells the op that a layer belongs to; `ops` are those of the graph, without prefixes."""

    def __init__(self, ops: Iterable[str]) -> None:
        # Longer names come before those that they begin with.
        names = "|".join(map(re.escape, sorted(ops, key=len, reverse=True)))
        # "layers.3/Ssdi8Linear.1", "SsdScan/MatMul.7__2",
        # "_inlfunc_Ssdi8ChunkState_Ssdi8ChunkState/Pad.3"
        self._op = re.compile(rf"(?<![A-Za-z0-9])(?:Ssdi8)?({names})(?![A-Za-z0-9])")

    def of(self, name: str) -> str:
        """The innermost op of a layer's name, and "A + B" where several are fused."""
        parts = []
        for piece in re.split(r"\s*\+\s*|,\s*", name):
            found = self._op.findall(piece.replace("_", " "))
            if found and found[-1] not in parts:
                parts.append(found[-1])
        return " + ".join(parts) or OTHER


def model_layer_of(name: str) -> int | None:
    """The block, if the name tells of exactly one."""
    found = set(_MODEL_LAYER.findall(name))
    return int(found.pop()) if len(found) == 1 else None


def median_times(runs: Sequence[LayerTimes], modules: Modules) -> list[LayerTime]:
    """Median over runs of the same graph, layer by layer in their order; a name may come twice.

    A layer that was interrupted once by something else does not count.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        seen: dict[str, int] = {}
        for name, value in run:
            nth = seen[name] = seen.get(name, -1) + 1
            seconds.setdefault((name, nth), []).append(value)
    return [
        LayerTime(name, modules.of(name), model_layer_of(name), statistics.median(values))
        for (name, _), values in seconds.items()
    ]


def module_times(layers: Sequence[LayerTime], parts: Mapping[str, str]) -> list[ModuleTime]:
    """Longest first; `parts`: op -> part of the model, or ""."""
    times = _added_up((layer.module, layer.seconds) for layer in layers)
    return [ModuleTime(module, _part(module, parts), *row) for module, row in times.items()]


def kind_times(layers: Sequence[LayerTime], kinds: Sequence[str]) -> list[KindTime]:
    """Longest first; `kinds`: of the blocks.

    Empty where the names tell the block of less than half of the time: what is left says nothing.
    """
    times = _added_up((_kind(layer, kinds), layer.seconds) for layer in layers)
    found = [KindTime(kind, *row) for kind, row in times.items()]
    told = sum(kind.share for kind in found if kind.kind != OTHER)
    return found if told > 0.5 else []


def _part(module: str, parts: Mapping[str, str]) -> str:
    """Of fused ones, that which all belong to."""
    found = {parts.get(op, "") for op in module.split(" + ")}
    return found.pop() if len(found) == 1 else ""


def _kind(layer: LayerTime, kinds: Sequence[str]) -> str:
    index = layer.model_layer
    return OTHER if index is None or index >= len(kinds) else kinds[index]


def _added_up(times: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float, float]]:
    """Name -> how many, seconds, share of the whole; longest first."""
    grouped: dict[str, list[float]] = {}
    for name, seconds in times:
        grouped.setdefault(name, []).append(seconds)
    totals = {name: sum(values) for name, values in grouped.items()}
    whole = sum(totals.values())
    return {
        name: (len(grouped[name]), total, total / whole if whole else 0.0)
        for name, total in sorted(totals.items(), key=lambda item: -item[1])
    }
