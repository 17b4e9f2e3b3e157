"""How much memory of the host quantizing takes, told by running its code on sizes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssdi8_edge.ground.spool import TOKENS_PER_BATCH
from ssdi8_edge.models.block import Block, Context, Layer, linear
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import load_block
from ssdi8_edge.models.network import run_to_out_proj
from ssdi8_edge.plan.tensors import block_tensors, bytes_of
from ssdi8_edge.recipes.recipe import QuantConfig

# Python, torch, onnx, a tokenizer and a text.
BASE_BYTES = 300_000_000


class LivePeak(TorchDispatchMode):
    """Inside, counts the bytes of tensors that lie there at once at most; `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (memory := each.untyped_storage()) not in self._seen:
                self._seen.add(memory)
                self._change(memory.nbytes())
                weakref.finalize(memory, self._change, -memory.nbytes())
        return made

    def _change(self, nbytes: int) -> None:
        self._now += nbytes
        self.most = max(self.most, self._now)


# The C library keeps what is freed for what comes next. Tensors of a batch come in all sizes, so
# that the heap grows to this much of what they are at once. Both constants are fitted to four
# models: see benchmarks/README.md.
HEAP = 2.1


@functools.lru_cache(maxsize=256)
def host_peak(model: Description, recipe: QuantConfig) -> int:
    """Bytes of resident memory while a model is quantized on a CPU, at most."""
    adapted = model.adapted(recipe)
    with torch.inference_mode():
        most = max(_block(block, adapted, recipe) for block in {*adapted.blocks})
    return BASE_BYTES + most


def _block(block: Block, model: Description, recipe: QuantConfig) -> int:
    """Bytes at most while one block is quantized, besides `BASE_BYTES`."""
    layer = {
        name: torch.empty(shape, device="meta")
        for name, shape in block.parameters(model.d_model).items()
    }
    held = sum(map(bytes_of, layer.values()))
    if not recipe.quantized:
        return held
    windows = _windows(block, model, recipe, layer)
    return 2 * held + _inputs(block, model, recipe) + int(HEAP * windows)


def _inputs(block: Block, model: Description, recipe: QuantConfig) -> int:
    """What compensation and GPTQ keep of a block while its windows run, in FP64: of in_proj the
    sums and the part of its weight that is compensated, of out_proj the sums."""
    if not (recipe.gptq or recipe.compensation):
        return 0
    rows, width = sum(block.parts.values()), block.width
    squares = 2 * model.d_model**2 + width**2 + width * model.d_model
    return 8 * (squares + (rows * model.d_model if recipe.compensation else 0))


def _windows(block: Block, model: Description, recipe: QuantConfig, layer: Layer) -> int:
    """A batch of windows through the quantized block, and through the one in floating point."""
    tokens = recipe.calibration_tokens
    shape = (max(1, TOKENS_PER_BATCH // tokens), tokens, model.d_model)
    entering = torch.empty(shape, device="meta")
    p = block_tensors(block, model.d_model, recipe)
    states = tuple(
        spec.zeros(shape[0], "meta") for spec in block.with_context(tokens).states(recipe)
    )
    context = Context(recipe, model.d_model, model.residual_eps, linear, torch.tensor(0))
    with LivePeak() as quantized:
        zero = torch.zeros_like(entering, dtype=torch.float16)
        run_to_out_proj(block, p, context, zero, entering, states)
    index = model.blocks.index(block)
    with LivePeak() as floating:
        load_block(model, index, layer)(entering)
    return max(quantized.most, floating.most)
