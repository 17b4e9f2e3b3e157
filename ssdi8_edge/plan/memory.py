"""What a model takes on a board, part by part, and what a board has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.engine.builder import BASE_BYTES, estimate_memory
from runtime.memory import SLOTS
from ssdi8_edge.checkpoints.layout import EMBEDDING
from ssdi8_edge.models.description import Description
from ssdi8_edge.plan.flow import activation_bytes
from ssdi8_edge.plan.tensors import bytes_of, quantized_tensors
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import Target

MIB = 2**20
# Of the tensors of a quantized checkpoint, those of the embedding, and of a head that is not tied.
EMBEDDINGS = (EMBEDDING, "embedding.")
HEADS = "lm_head."
NAMES = {
    "blocks": "weights of the blocks",
    "embedding": "embedding",
    "head": "lm_head",
    "states": "recurrent states",
    "cache": "keys and values",
    "activations": "activations of a prompt",
    "runtime": "CUDA, TensorRT and Python",
}


@dataclass(frozen=True)
class Memory:
    """Bytes while a model runs.

    Attributes:
        blocks: weights of the blocks and the last norm.
        embedding: its table; a tied head of the FP16 baseline is part of it.
        head: of an lm_head that is stored by itself.
        states: recurrent states of all sequences, twice: a call reads one and writes the other.
        cache: keys and values of the whole context, of all sequences.
        activations: between the ops of the longest call, by their lives: what no allocator that
            uses memory again has to pass; TensorRT and kernels may ask for scratch memory besides.
        runtime: CUDA, TensorRT and Python; 0 without TensorRT.
        engine_build: the peak while the engine is built, by the rule that build_engine.py has; 0
            without TensorRT. It comes instead of the rest, not on top.
    """

    blocks: int
    embedding: int
    head: int
    states: int
    cache: int
    activations: int
    runtime: int
    engine_build: int

    @property
    def weights(self) -> int:
        """The data of model.safetensors."""
        return self.blocks + self.embedding + self.head

    @property
    def parts(self) -> dict[str, int]:
        """Name -> bytes of what lies there while the model runs, together `total`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def total(self) -> int:
        """While the model runs."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes most, in words."""
        return NAMES[max(NAMES, key=lambda name: self.parts[name])]

    def to_dict(self) -> dict[str, int]:
        """All in bytes."""
        return {**asdict(self), "weights": self.weights, "total": self.total}


def memory_of(model: Description, recipe: QuantConfig, target: Target, parallel: int) -> Memory:
    """What a model that is `adapted`, with its context, takes on a target.

    Args:
        parallel: sequences at once, each with states and a cache of its own.
    """
    sizes = {name: bytes_of(each) for name, each in quantized_tensors(model, recipe).items()}
    embedding = sum(n for name, n in sizes.items() if name.startswith(EMBEDDINGS))
    head = sum(n for name, n in sizes.items() if name.startswith(HEADS))
    weights = sum(sizes.values())
    recurrent, grown = state_bytes(model, recipe)
    on_gpu = target.on_gpu
    cache = parallel * grown
    longest = min(target.max_tokens, model.context) if grown else target.max_tokens
    build = estimate_memory(weights, target.engine.workspace_mb * MIB, cache)
    return Memory(
        blocks=weights - embedding - head,
        embedding=embedding,
        head=head,
        states=SLOTS * parallel * recurrent,
        # onnxruntime gives a new tensor of the whole context with every call.
        cache=cache if on_gpu else SLOTS * cache,
        activations=activation_bytes(model, recipe, parallel, longest),
        runtime=BASE_BYTES if on_gpu else 0,
        engine_build=build if "tensorrt" in target.engines else 0,
    )


def state_bytes(model: Description, recipe: QuantConfig) -> tuple[int, int]:
    """Of one sequence: states that are replaced, and those that grow, for the whole context."""
    found = {"replace": 0, "append": 0}
    for _, spec in model.states(recipe):
        found[spec.update] += bytes_of(spec.zeros(1, "meta"))
    return found["replace"], found["append"]


@dataclass(frozen=True)
class Room:
    """Memory that a machine has for a model.

    Attributes:
        free: bytes; None where nobody knows.
        source: where that comes from.
    """

    free: int | None
    source: str

    def to_dict(self) -> Mapping[str, Any]:
        """For JSON."""
        return asdict(self)


def room_of(target: Target) -> Room:
    """As the target's file says."""
    free = target.board.free_mib if target.board else None
    if free is None:
        return Room(None, f"target {target.name} says nothing of free memory")
    return Room(free * MIB, f"profile of {target.name}")


def room_on(available_mb: float | None, host: str) -> Room:
    """Of a board that was asked for its MemAvailable."""
    free = None if available_mb is None else int(available_mb * 1e6)
    return Room(free, f"{host} says so" if free is not None else f"{host} does not say")
