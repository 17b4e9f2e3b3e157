"""The least time that a token and a prompt can take: bytes over bandwidth, operations over peak.

Bounds, no forecasts: `ASSUMPTIONS` says what they leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.session import prefill_pieces
from ssdi8_edge.models.description import Description
from ssdi8_edge.plan.memory import Memory, state_bytes
from ssdi8_edge.plan.tensors import bytes_of, table_tensors
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import Board, Target

# Dense INT8 operations of an SM in a clock, by compute capability; a multiplication with its
# addition is two. FP16 has half of it.
INT8_PER_CLOCK = {"8.7": 4096}
ASSUMPTIONS = (
    "the memory's whole bandwidth and the GPU's whole peak, in the fastest power mode",
    "each weight is read once a call, each state read and written once; activations stay in caches",
    "counted operations: linear layers, the recurrence, attention; no norms, gates or rotations",
    "reading and computing overlap completely; starting kernels takes no time",
)


@dataclass(frozen=True)
class Work:
    """What one step moves and computes at least.

    Attributes:
        bytes: between memory and GPU.
        int8_operations, fp16_operations: a multiplication with its addition is two.
        seconds: the least time; None where the target does not say what its board can do.
        limit: what that time is bound by: "memory" or "arithmetic".
    """

    bytes: int
    int8_operations: int
    fp16_operations: int
    seconds: float | None
    limit: str | None

    def to_dict(self) -> Mapping[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bounds:
    """Of a prompt of `prompt_tokens`, and of one token behind it, for `parallel` sequences."""

    prompt_tokens: int
    parallel: int
    prompt: Work
    token: Work

    @property
    def tokens_per_s(self) -> float | None:
        """At most, of all sequences together."""
        return None if self.token.seconds is None else self.parallel / self.token.seconds


class _Model:
    """The sizes that bytes and operations come from."""

    def __init__(
        self, model: Description, recipe: QuantConfig, memory: Memory, parallel: int
    ) -> None:
        self._model, self._recipe, self._parallel = model, recipe, parallel
        tables = table_tensors(model, recipe)
        embedding = [t for name, t in tables.items() if name.startswith("embedding.")]
        self._row = sum(map(bytes_of, embedding)) // model.vocab_size
        self._recurrent, self._grown = state_bytes(model, recipe)
        # A tied head is the embedding, and read as a whole.
        self._weights = memory.blocks + (memory.head or memory.embedding)
        self._linear = sum(
            model.d_model * (sum(block.parts.values()) + block.width) for block in model.blocks
        )

    def bytes(self, tokens: int, before: int) -> int:
        """Of a call of `tokens` behind others."""
        rows = 0
        if self._grown:
            rows = (before + tokens) * self._grown // self._model.context
        each = 2 * self._recurrent + rows + tokens * self._row
        return self._weights + self._parallel * each

    def operations(self, tokens: int, before: int) -> dict[str, int]:
        """Of a call, by type; the head gives logits of its last token."""
        model, recipe = self._model, self._recipe
        inner = sum(block.inner_products(tokens, before) for block in model.blocks)
        blocks = "int8" if recipe.quantized else "fp16"
        head = "fp16" if recipe.lm_head == "fp16" else "int8"
        products = {"int8": 0, "fp16": 0}
        products[blocks] += self._linear * tokens + inner
        products[head] += model.d_model * model.vocab_size
        return {kind: 2 * self._parallel * count for kind, count in products.items()}


def bounds_of(
    model: Description,
    recipe: QuantConfig,
    target: Target,
    memory: Memory,
    prompt_tokens: int,
    parallel: int,
) -> Bounds:
    """Of a model that is `adapted`, with its context; a prompt goes in the runtime's pieces."""
    sizes = _Model(model, recipe, memory, parallel)
    pieces = prefill_pieces(prompt_tokens, target.max_tokens, model.prompt_multiple)
    calls = [(end - start, start) for start, end in pieces]

    def work(calls: list[tuple[int, int]]) -> Work:
        moved = sum(sizes.bytes(*call) for call in calls)
        done = [sizes.operations(*call) for call in calls]
        int8, fp16 = (sum(each[kind] for each in done) for kind in ("int8", "fp16"))
        return _timed(moved, int8, fp16, target.board)

    return Bounds(prompt_tokens, parallel, work(calls), work([(1, prompt_tokens)]))


def _timed(moved: int, int8: int, fp16: int, board: Board | None) -> Work:
    peak = int8_peak(board)
    if board is None or board.bandwidth_gb_s is None or peak is None:
        return Work(moved, int8, fp16, None, None)
    memory, arithmetic = moved / (board.bandwidth_gb_s * 1e9), (int8 + 2 * fp16) / peak
    limit = "memory" if memory >= arithmetic else "arithmetic"
    return Work(moved, int8, fp16, max(memory, arithmetic), limit)


def int8_peak(board: Board | None) -> float | None:
    """Dense INT8 operations a second; None where the target does not say."""
    if board is None or board.gpu_mhz is None:
        return None
    per_clock = INT8_PER_CLOCK.get(board.compute_capability)
    return None if per_clock is None else per_clock * board.sms * board.gpu_mhz * 1e6
