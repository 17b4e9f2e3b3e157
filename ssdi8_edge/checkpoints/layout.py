"""What a layout is: how a kind of checkpoint says its sizes and names its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ssdi8_edge.models.description import Description

EMBEDDING = "embedding.weight"
NORM_F = "norm_f.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """One way to store a model.

    Attributes:
        recognises: whether a config.json, as `config.read_config` gives it, is of this layout.
        describe: the model that it describes. Raises CheckpointError where it does not fit.
        stored_name: the name of a tensor of ours in its files, without wrappers and variants.
        canonical: that name for a name that a file has, with wrappers and variants.
        fallback: asked after all others: it says of what it recognises too broadly what is wrong.
    """

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    describe: Callable[[Mapping[str, Any]], Description]
    stored_name: Callable[[str], str]
    canonical: Callable[[str], str]
    fallback: bool = False


def expected_shapes(model: Description) -> dict[str, tuple[int, ...]]:
    """Our name and the shape of every tensor of a model, in the order of the data."""
    vocabulary = (model.vocab_size, model.d_model)
    return {
        EMBEDDING: vocabulary,
        **{
            f"layers.{i}.{name}": shape
            for i, block in enumerate(model.blocks)
            for name, shape in block.parameters(model.d_model).items()
        },
        NORM_F: (model.d_model,),
        HEAD: vocabulary,
    }
