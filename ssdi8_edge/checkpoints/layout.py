"""What a layout is: how a kind of checkpoint says its sizes, and what its tensors are of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ssdi8_edge.models.description import Description

EMBEDDING = "embedding.weight"
NORM_F = "norm_f.weight"
HEAD = "lm_head.weight"
CONV_BIAS = "conv1d.bias"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is one of ours, or a part of it.

    Attributes:
        stored: its name in the files, without wrappers and variants; "": zeros, stored nowhere.
        sizes: along the axis on which pieces are joined, of its parts; (): as long as ours.
        factors: what it is multiplied by, in FP32, when it is read: one factor for all of it or one
            for each of `sizes`; (): it stays as it is stored.
    """

    stored: str
    sizes: Shape = ()
    factors: tuple[float, ...] = ()

    def scaled(self, tensor: Tensor, axis: int) -> Tensor:
        """`tensor` times `factors`."""
        if not self.factors:
            return tensor
        if len(self.factors) == 1:
            return tensor.float() * self.factors[0]
        each = torch.tensor(self.factors, dtype=torch.float32)
        along = each.repeat_interleave(torch.tensor(self.sizes))
        return tensor.float() * along.reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])


@dataclass(frozen=True)
class Source:
    """What one tensor of ours is made of.

    `join` says how: rows beneath each other, columns beside each other, or a sum.
    """

    pieces: tuple[Piece, ...]
    join: Literal["rows", "columns", "sum"] = "rows"

    @property
    def axis(self) -> int:
        """On which pieces are joined."""
        return 1 if self.join == "columns" else 0

    @property
    def scaled(self) -> bool:
        """Whether reading it changes values."""
        return any(piece.factors for piece in self.pieces)

    def shapes(self, ours: Shape) -> list[Shape]:
        """Of the pieces, where the tensor of ours has this shape."""
        return [
            (*ours[: self.axis], sum(piece.sizes), *ours[self.axis + 1 :]) if piece.sizes else ours
            for piece in self.pieces
        ]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of ours, of the stored type where all have one."""
        if len(tensors) == 1:
            return tensors[0]
        if len({tensor.dtype for tensor in tensors}) > 1:
            tensors = [tensor.float() for tensor in tensors]
        if self.join == "sum":
            return torch.stack([tensor.float() for tensor in tensors]).sum(0)
        return torch.cat([*tensors], self.axis)


def whole(stored: str, factor: float = 1.0) -> Source:
    """A stored tensor that is one of ours, times a factor."""
    return Source((Piece(stored, factors=() if factor == 1.0 else (factor,)),))


Sources = Mapping[str, Source]  # by our names


@dataclass(frozen=True)
class Layout:
    """One way to store a model.

    Attributes:
        recognises: whether a config.json, as `config.read_config` gives it, is of this layout.
        describe: the model that it describes. Raises CheckpointError where it does not fit.
        sources: what each tensor of that model is made of; the embedding and the head are whole.
        canonical: the name that `sources` has for a name in a file, with wrappers and variants.
        prefixes: one of them is a part of every name of a whole model but the head's, and of none
            of a model that was saved without its head.
        left_out: tensors whose canonical names begin so are not read -> a sentence that says so.
        fallback: asked after all others: it says of what it recognises too broadly what is wrong.
    """

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    describe: Callable[[Mapping[str, Any]], Description]
    sources: Callable[[Mapping[str, Any], Description], Sources]
    canonical: Callable[[str], str]
    prefixes: tuple[str, ...] = ("backbone",)
    left_out: tuple[tuple[str, str], ...] = ()
    fallback: bool = False


def renamed(
    stored_name: Callable[[str], str],
    has_conv_bias: Callable[[Mapping[str, Any]], bool] = lambda config: True,
) -> Callable[[Mapping[str, Any], Description], Sources]:
    """The `sources` of a layout that joins nothing; `stored_name` gives its name for ours."""

    def sources(config: Mapping[str, Any], model: Description) -> Sources:
        absent = () if has_conv_bias(config) else (CONV_BIAS,)
        return {
            name: whole("" if name.endswith(absent) else stored_name(name))
            for name in expected_shapes(model)
        }

    return sources


def expected_shapes(model: Description) -> dict[str, Shape]:
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


# Modules that training puts around a model or a layer; their names stay in what it saves.
WRAPPERS = {
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed
    "_forward_module",  # Fabric
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "model",  # LightningModule, by custom; also what transformers calls a model without its head
}


def unwrapped(stored: str, prefix: str, parts: Sequence[str]) -> str:
    """The name of a stored tensor without what training, or saving a part, did to it.

    What a file of the model without its head begins its names with is one of `parts`; in a file
    of the whole, `prefix` stands before it.
    """
    bare = [part for part in stored.split(".") if part not in WRAPPERS]
    if bare and bare[0] in parts:
        bare.insert(0, prefix)
    return ".".join(bare)
