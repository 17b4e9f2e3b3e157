"""What a model is: its width, its vocabulary and its blocks. Manifests hold it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import Block, StateSpec, least_common_multiple, require_sizes
from ssdi8_edge.models.kinds import kind_named
from ssdi8_edge.ops.kernel_limits import width_misfit
from ssdi8_edge.recipes.recipe import QuantConfig


@dataclass(frozen=True)
class Description:
    """A language model.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        blocks: in their order.
        norm_eps: of the norms before the blocks and of the last one.
        residual_scale: a power of two, the unit that the residual stream is kept in: what is added
            to it is stored times this, and the norms that read it take eps times its square, which
            computes the same.

    Raises CheckpointError when the sizes do not fit together.
    """

    d_model: int
    vocab_size: int
    blocks: tuple[Block, ...]
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        require_sizes(self, "d_model", "vocab_size")
        if not self.blocks:
            raise CheckpointError("n_layer must be a positive integer, not 0.")
        if not 0.0 < self.norm_eps < math.inf:
            raise CheckpointError(f"norm_eps must be positive, not {self.norm_eps!r}.")

    @property
    def n_layer(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def residual_eps(self) -> float:
        """Of the norms that read the residual stream."""
        return self.norm_eps * self.residual_scale**2

    @property
    def prompt_multiple(self) -> int:
        """Tokens; a prompt that is cut at multiples of it gives the same bits as in one piece."""
        return least_common_multiple(self.blocks)

    def misfit(self) -> str | None:
        """The first size that has no INT8 kernel, and those that have; None: all have."""
        found = (block.misfit() for block in self.blocks)
        return next(filter(None, found), None) or width_misfit("d_model", self.d_model)

    def adapted(self, recipe: QuantConfig) -> Description:
        """The model as the recipe wants it."""
        blocks = tuple(block.adapted(recipe) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks)

    @property
    def context(self) -> int:
        """Tokens that its states have room for; 0: none of them grows, or no build has set it."""
        return max(block.context for block in self.blocks)

    def grows(self, recipe: QuantConfig) -> bool:
        """Whether it has states that grow, so that a call needs the number of tokens before it."""
        return any(spec.update == "append" for _, spec in self.states(recipe))

    def with_context(self, tokens: int) -> Description:
        """The model with room for `tokens` in the states that grow."""
        blocks = tuple(block.with_context(tokens) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks)

    def states(self, recipe: QuantConfig) -> Iterator[tuple[str, StateSpec]]:
        """Graph name and kind of every state, in the order of the data."""
        for i, block in enumerate(self.blocks):
            for spec in block.states(recipe):
                yield f"{spec.name}.{i}", spec

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; equal blocks that follow each other stand there once, with a count."""
        runs = [(block, len(list(same))) for block, same in itertools.groupby(self.blocks)]
        return {
            "d_model": self.d_model,
            "vocab_size": self.vocab_size,
            "norm_eps": self.norm_eps,
            "tie_embeddings": self.tie_embeddings,
            "residual_scale": self.residual_scale,
            "blocks": [{"count": count, **block.to_dict()} for block, count in runs],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Description:
        """Inverse of `to_dict`. Raises CheckpointError on an unknown or missing field."""
        try:
            values = {**fields}
            blocks: list[Block] = []
            for run in values.pop("blocks"):
                count, sizes = run["count"], {k: v for k, v in run.items() if k != "count"}
                blocks += [kind_named(sizes["kind"]).from_dict(sizes)] * count
            return cls(blocks=tuple(blocks), **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The model configuration does not fit: {error!r}.", "quantize again."
            ) from error
