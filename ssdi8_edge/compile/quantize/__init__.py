"""Apply a recipe: FP checkpoint + calibration statistics -> quantized checkpoint.

Layers are read, rewritten, quantized and written one at a time, so that memory does not grow with
depth. The whole recipe, top to bottom: `quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import EMBEDDING, HEAD, NORM_F
from ssdi8_edge.compile.calibrate import embed, fp32_layer
from ssdi8_edge.compile.quantize.correction import MeanDifference
from ssdi8_edge.compile.quantize.gptq import Hessian
from ssdi8_edge.compile.quantize.linears import InputStatistics, linear_tensors
from ssdi8_edge.compile.quantize.tables import (
    embedded,
    embedding_tensors,
    fits_fp16,
    fp16_head,
    quantized_head,
)
from ssdi8_edge.ground.allocator import return_freed_memory
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.spool import Spool, batches, open_spool
from ssdi8_edge.models.block import (
    IN_BIAS,
    IN_PROJ,
    NORM,
    OUT_BIAS,
    OUT_PROJ,
    Context,
    Int8Input,
    Layer,
    linear,
    norm,
)
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import load_block
from ssdi8_edge.models.network import run_to_out_proj
from ssdi8_edge.models.observers import of_linear_input
from ssdi8_edge.models.rewrites import (
    rotate_layer,
    rotate_out_proj_input,
    scale_output,
)
from ssdi8_edge.numerics import int8
from ssdi8_edge.numerics.fp16_range import IN_FP32, LARGEST, all_finite, to_fp16, watched
from ssdi8_edge.recipes.presets import DEFAULT_METHOD
from ssdi8_edge.recipes.recipe import QuantConfig


class Sink(Protocol):
    """Where finished tensors go: a file, or a dictionary in tests."""

    def add(self, name: str, tensor: Tensor) -> None: ...


def quantize(
    checkpoint: Checkpoint,
    recipe: QuantConfig,
    statistics: Mapping[str, Tensor],
    ids: Tensor,
    sink: Sink,
    track: Track = silent,
    device: str = "cpu",
    scratch: Path | None = None,
) -> dict[str, float]:
    """Quantize `checkpoint` by `recipe` and hand every tensor to `sink`.

    Args:
        statistics: from `calibrate`; empty for a recipe that quantizes nothing.
        ids: (S, T) calibration windows, for GPTQ and the mean correction.
        scratch: a folder on the disk that holds the streams between layers.

    Returns:
        Saturation fractions on the calibration windows, `layers.{i}.<site>` -> [0, 1].

    Raises:
        CheckpointError: a tensor that is kept in FP16 holds what FP16 cannot.
    """
    model = quantized_description(checkpoint, recipe, statistics)
    if not recipe.quantized:
        _keep_fp16(checkpoint, model, recipe, sink, track)
        return {}
    # What a layer adds may outweigh the embedding; where that needs the scale, its rows must last.
    ruled = _unit(statistics["embedding"]) == model.residual_scale < 1
    _store(embedding_tensors(checkpoint, recipe, model.residual_scale, ruled), sink)
    with (
        torch.inference_mode(),
        int8.count_saturation() as saturation,
        watched(recipe.name, lambda name: IN_FP32) as watch,
        _Streams(checkpoint, model, recipe, ids, device, scratch) as streams,
    ):
        for i in track(range(model.n_layer), "quantize"):
            prefix = f"layers.{i}."
            saturation.scope, watch.scope = prefix, f"layers.{i}"
            own = {
                k[len(prefix) :]: v.to(device)
                for k, v in statistics.items()
                if k.startswith(prefix)
            }
            layer = _Layer(model, i, recipe, streams)
            source = scale_output(fp32_layer(checkpoint, i, device), model.residual_scale)
            _store(layer.quantize(source, own), sink, prefix)
            return_freed_memory()
        saturation.scope, watch.scope = "head.", "head"
        _quantize_head(checkpoint, model, recipe, statistics, streams, sink, track)
        return saturation.fractions()


def _store(tensors: Layer, sink: Sink, prefix: str = "") -> None:
    """A function, so that no variable keeps the last of them while the next layer is made."""
    for name, tensor in tensors.items():
        sink.add(prefix + name, tensor)


def quantized_description(
    checkpoint: Checkpoint, recipe: QuantConfig, statistics: Mapping[str, Tensor]
) -> Description:
    """The model that `quantize` makes, with the unit of its residual stream.

    Some models add values to the stream that FP16 cannot hold on their way there. A power of two
    in the embedding, in out_proj and in the eps of the norms that follow changes nothing but that.
    """
    model = checkpoint.description.adapted(recipe)
    if not recipe.quantized:
        return model
    added = [statistics["embedding"]]
    added += [statistics[f"layers.{i}.out"] for i in range(model.n_layer)]
    return dataclasses.replace(model, residual_scale=_unit(torch.stack(added).max()))


def _unit(largest: Tensor) -> float:
    """The power of two that brings a value of the residual stream into FP16, at most 1."""
    # Half of the range is left to text with larger values and to errors of quantization.
    excess = largest.item() / (LARGEST / 2)
    return 2.0 ** -math.ceil(math.log2(excess)) if excess > 1 else 1.0


def _keep_fp16(
    checkpoint: Checkpoint, model: Description, recipe: QuantConfig, sink: Sink, track: Track
) -> None:
    """The FP16 baseline: linears in FP16, small tensors in FP32, nothing rewritten."""

    def fp16(name: str, weight: Tensor) -> Tensor:
        remedy = f"choose --method {DEFAULT_METHOD}, which scales it."
        # Of the head every method keeps FP16, after a rotation that evens out single values.
        if name == HEAD and not all_finite(weight.half()) and not fits_fp16(checkpoint):
            remedy = IN_FP32
        return to_fp16(weight, checkpoint.stored_name(name), remedy)

    sink.add(EMBEDDING, fp16(EMBEDDING, checkpoint.tensor(EMBEDDING)))
    sink.add(NORM_F, checkpoint.tensor(NORM_F).float())
    if not model.tie_embeddings:
        sink.add(HEAD, fp16(HEAD, checkpoint.tensor(HEAD)))
    for i in track(range(model.n_layer), "quantize"):
        layer = fp32_layer(checkpoint, i, "cpu")
        model.blocks[i].require_computable(i, layer)
        tensors = {
            NORM: layer[NORM],
            IN_PROJ: fp16(f"layers.{i}.{IN_PROJ}", layer[IN_PROJ]),
            **model.blocks[i].own_tensors(layer, recipe),
            OUT_PROJ: fp16(f"layers.{i}.{OUT_PROJ}", layer[OUT_PROJ]),
            **{name: layer[name] for name in (IN_BIAS, OUT_BIAS) if name in layer},
        }
        for name, tensor in tensors.items():
            sink.add(f"layers.{i}.{name}", tensor)


def _quantize_head(
    checkpoint: Checkpoint,
    model: Description,
    recipe: QuantConfig,
    statistics: Mapping[str, Tensor],
    streams: _Streams,
    sink: Sink,
    track: Track,
) -> None:
    """lm_head (rotated, γ_f folded): FP16, or INT8 for the stream behind the last block."""
    if recipe.lm_head == "fp16":
        sink.add(NORM_F, torch.ones(model.d_model))
        head = fp16_head(checkpoint)
    else:
        p = {}
        if recipe.input_scaling == "static":
            p["norm_f.scale"] = of_linear_input(statistics["norm_f"])
            sink.add("norm_f.scale", p["norm_f.scale"])
        inputs = None
        if recipe.gptq or recipe.compensation:
            on_device = {k: v.to(streams.device) for k, v in p.items()}
            inputs = streams.normed(on_device, "norm_f.scale", _context(model, recipe))
        head = quantized_head(checkpoint, recipe, inputs, streams.device, track)
    _store(head, sink)


def _context(model: Description, recipe: QuantConfig) -> Context:
    return Context(recipe, model.d_model, model.residual_eps, linear, torch.tensor(0))


class _Streams:
    """What flows between layers, of the FP and of the quantized model, at the layer at hand.

    Attributes:
        tokens: of a window.
        fp, quantized: (T, D) FP32, the residual entering the layer.
        target: (T, D) FP32, what out_proj ought to give.
        out_proj_input: (T, E) INT8, and out_proj_scale (T, 1) FP32 of its tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Description,
        recipe: QuantConfig,
        ids: Tensor,
        device: str,
        scratch: Path | None,
    ) -> None:
        self.device = device
        self._model, self._recipe = model, recipe
        self.parts = batches(ids)
        self.tokens = ids.shape[1]
        self._stack = ExitStack()

        def spool(width: int, dtype: torch.dtype) -> Spool:
            shape = (len(ids), ids.shape[1], width)
            return self._stack.enter_context(open_spool(shape, dtype, device, scratch))

        self.fp = spool(model.d_model, torch.float32)
        self.quantized = spool(model.d_model, torch.float32)
        self.target = spool(model.d_model, torch.float32)
        # A block with fewer columns uses the first ones.
        self.widest = max(block.width for block in model.blocks)
        self.out_proj_input = spool(self.widest, torch.int8)
        self.out_proj_scale = spool(1, torch.float32)
        self._embedded = embed(checkpoint, ids, model.residual_scale)

    def store_out_proj_input(self, part: slice, r: Int8Input) -> None:
        """`out_proj_input` and `out_proj_scale` of these samples."""
        missing = self.widest - r.q.shape[-1]
        self.out_proj_input[part] = F.pad(r.q, (0, missing)) if missing else r.q
        self.out_proj_scale[part] = r.token_scale

    def out_proj_input_of(self, part: slice, width: int) -> Int8Input:
        """What `store_out_proj_input` stored, on the device."""
        q = self.out_proj_input[part][..., :width]
        return Int8Input(q.to(self.device), self.out_proj_scale[part].to(self.device))

    def __enter__(self) -> _Streams:
        for part, rows in self._embedded:
            self.fp[part] = rows
            self.quantized[part] = embedded(rows, self._recipe)
        return self

    def normed(self, p: Layer, scale: str, context: Context) -> InputStatistics:
        """Of the linear layer behind the norm that reads the streams: its INT8 input, and by how
        much the FP model's differs from it. `scale` names the input's static scale in `p`."""
        model = self._model
        inputs = InputStatistics(model.d_model, model.d_model, self.device)
        for part in self.parts:
            entering = self.quantized[part].to(self.device)
            zero = torch.zeros_like(entering, dtype=torch.float16)
            _, u = norm(p, scale, context, zero, entering)
            fp = self.fp[part].to(self.device)
            fp_u = fp * torch.rsqrt(fp.square().mean(-1, keepdim=True) + model.residual_eps)
            real = u.real()
            inputs.add(real, fp_u - real)
        return inputs

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Layer:
    """One block on its way to INT8, between the streams before and behind it."""

    def __init__(
        self, model: Description, index: int, recipe: QuantConfig, streams: _Streams
    ) -> None:
        self._model = model
        self._index = index
        self._block = model.blocks[index]
        self._recipe = recipe
        self._context = _context(model, recipe)
        self._streams = streams

    def quantize(self, source: Layer, statistics: Mapping[str, Tensor]) -> Layer:
        """Quantize the block and move both streams behind it."""
        recipe, block = self._recipe, self._block
        source, order = block.reordered(source, statistics, recipe)
        rotated = rotate_layer(source)
        p: Layer = {
            **block.scales(statistics, recipe, order),
            **block.own_tensors(source, recipe),
        }
        weight = rotated[IN_PROJ]
        hessian: Tensor | Hessian | None = None
        if recipe.gptq or recipe.compensation:
            inputs = self._streams.normed(p, "u_scale", self._context)
            lacking = weight.double() @ inputs.regression() if recipe.compensation else 0.0
            weight = (weight + recipe.compensation * lacking).float()
            hessian = inputs.hessian if recipe.gptq else None
        p |= linear_tensors("in_proj", weight, recipe, hessian, list(block.parts.values()))
        p |= {k: v for k, v in rotated.items() if k == IN_BIAS}

        weight, hessian = rotate_out_proj_input(rotated[OUT_PROJ], block.rotation), None
        outputs = self._run_to_out_proj(p, rotated, weight)
        if outputs is not None:
            lacking = outputs.regression() if recipe.compensation else 0.0
            weight = (weight + recipe.compensation * lacking).float()
            # Of a wide block each is gigabytes, and so is the heap that the steps before have left.
            del lacking
            return_freed_memory()
            hessian = Hessian(outputs.hessian, recipe.descent) if recipe.gptq else None
            del outputs
        p |= linear_tensors("out_proj", weight, recipe, hessian)
        p |= {k: v for k, v in rotated.items() if k == OUT_BIAS}

        self._advance(p, rotated.get(OUT_BIAS))
        return p

    def _run_to_out_proj(
        self, p: Layer, rotated: Layer, out_proj: Tensor
    ) -> InputStatistics | None:
        """Everything up to out_proj, in both models: sets its input and its target.

        Returns:
            That input, and by how much the target differs from what the FP `out_proj` makes of it;
            None if the recipe has no use for them.
        """
        recipe, streams, block = self._recipe, self._streams, self._block
        device, inputs = streams.device, None
        if recipe.gptq or recipe.compensation:
            inputs = InputStatistics(block.width, self._model.d_model, device)
        fp_block = load_block(self._model, self._index, rotated)
        carried = block.with_context(streams.tokens).states(recipe)
        for part in streams.parts:
            entering = streams.quantized[part].to(device)
            states = tuple(spec.zeros(len(entering), device) for spec in carried)
            zero = torch.zeros_like(entering, dtype=torch.float16)
            _, r, _ = run_to_out_proj(block, p, self._context, zero, entering, states)
            streams.store_out_proj_input(part, r)
            fp = streams.fp[part].to(device)
            fp_next, _ = fp_block(fp)
            # The output alone, as released, or with it all that the residual has lost so far.
            target = fp_next - (fp if recipe.correction == "out" else entering)
            streams.fp[part] = fp_next
            streams.target[part] = target
            if inputs is not None:
                real = r.real()
                fixed = rotated.get(OUT_BIAS, 0.0)
                inputs.add(real, target - fixed - real @ out_proj.t())
        return inputs

    def _advance(self, p: Layer, bias: Tensor | None) -> None:
        """The mean difference from the target is added to out_proj's bias; the stream goes on."""
        recipe, streams = self._recipe, self._streams

        def out(part: slice) -> Tensor:
            r = streams.out_proj_input_of(part, self._block.width)
            columns = self._block.width
            value: Tensor = linear(p, "out_proj", r, recipe.for_columns(columns)).float()
            return value

        if recipe.correction != "none":
            difference = MeanDifference()
            for part in streams.parts:
                difference.add(streams.target[part].to(streams.device) - out(part))
            correction = difference.correction(recipe.correction_strength)
            correction = correction.to(streams.device)
            p[OUT_BIAS] = correction if bias is None else bias + correction
        for part in streams.parts:
            streams.quantized[part] = streams.quantized[part].to(streams.device) + out(part)
