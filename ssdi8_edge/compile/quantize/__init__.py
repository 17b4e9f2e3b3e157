"""Apply a recipe: FP checkpoint + calibration statistics -> quantized checkpoint.

Layers are read, rewritten, quantized and written one at a time, so that memory does not grow with
depth. The whole recipe, top to bottom: `quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.checkpoints.layout import EMBEDDING, HEAD, NORM_F
from ssdi8_edge.compile.calibrate import TABLE_ROWS, embed, fp32_layer
from ssdi8_edge.compile.quantize.correction import MeanDifference
from ssdi8_edge.compile.quantize.linears import InputStatistics, linear_tensors, w8_tensors
from ssdi8_edge.ground.allocator import return_freed_memory
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.spool import Spool, batches, open_spool
from ssdi8_edge.models.block import IN_PROJ, NORM, OUT_PROJ, Context, Int8Input, Layer, linear, norm
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import load_block
from ssdi8_edge.models.network import run_to_out_proj
from ssdi8_edge.models.observers import of_linear_input
from ssdi8_edge.models.rewrites import (
    rotate_embedding,
    rotate_head,
    rotate_layer,
    rotate_out_proj_input,
    scale_output,
)
from ssdi8_edge.numerics import int8
from ssdi8_edge.numerics.fp16_range import IN_FP32, LARGEST, all_finite, to_fp16, watched
from ssdi8_edge.recipes.presets import DEFAULT_METHOD
from ssdi8_edge.recipes.recipe import QuantConfig

# Error of an embedding row, relative to it, that is no longer small beside that of INT8.
FADED = 1 / 32


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
    _quantize_ends(checkpoint, model, recipe, statistics, sink)
    with (
        torch.inference_mode(),
        int8.count_saturation() as saturation,
        watched(recipe.name, lambda name: IN_FP32) as watch,
        _Streams(checkpoint, model, ids, device, scratch) as streams,
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
            for name, tensor in layer.quantize(source, own).items():
                sink.add(prefix + name, tensor)
            return_freed_memory()
        return saturation.fractions()


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


def _faded(scaled: Tensor, scale: float) -> int:
    """How many rows FP16 keeps well, but not times `scale`, near the lower end of its range."""

    def faded(rows: Tensor) -> Tensor:
        return (rows.half().float() - rows).norm(dim=1) > FADED * rows.norm(dim=1)

    return int((faded(scaled) & ~faded(scaled / scale)).sum())


def _keep_fp16(
    checkpoint: Checkpoint, model: Description, recipe: QuantConfig, sink: Sink, track: Track
) -> None:
    """The FP16 baseline: linears in FP16, small tensors in FP32, nothing rewritten."""

    def fp16(name: str, weight: Tensor) -> Tensor:
        remedy = f"choose --method {DEFAULT_METHOD}, which scales it."
        # Of the head every method keeps FP16, after a rotation that evens out single values.
        if name == HEAD and not all_finite(weight.half()):
            gamma = checkpoint.tensor(NORM_F).float()
            if not all_finite(rotate_head(weight.float(), gamma).half()):
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
        }
        for name, tensor in tensors.items():
            sink.add(f"layers.{i}.{name}", tensor)


def _quantize_ends(
    checkpoint: Checkpoint,
    model: Description,
    recipe: QuantConfig,
    statistics: Mapping[str, Tensor],
    sink: Sink,
) -> None:
    """Embedding (FP16, rotated) and lm_head (rotated, γ_f folded; FP16 or INT8)."""
    norm_f = checkpoint.tensor(NORM_F).float()
    # What a layer adds may outweigh the embedding; where that needs the scale, its rows must last.
    lost, ruled = 0, _unit(statistics["embedding"]) == model.residual_scale < 1

    def rotated_embedding(rows: Tensor) -> Tensor:
        nonlocal lost
        scaled = rotate_embedding(rows) * model.residual_scale
        lost += _faded(scaled, model.residual_scale) if ruled else 0
        return scaled

    def rotated_head(rows: Tensor) -> Tensor:
        return rotate_head(rows, norm_f)

    embedding = _by_rows(checkpoint, EMBEDDING, rotated_embedding)
    if lost:
        raise CheckpointError(
            f"tensor {checkpoint.stored_name(EMBEDDING)} has rows so much longer than others that "
            f"FP16, in which it is kept, loses {lost} of its {len(embedding)} rows beside them",
            f"look at the longest row; {IN_FP32}",
        )
    sink.add(EMBEDDING, embedding)
    head = _by_rows(checkpoint, HEAD, rotated_head)
    if recipe.lm_head == "fp16":
        sink.add(NORM_F, torch.ones_like(norm_f))
        sink.add(HEAD, head)
        return
    if recipe.input_scaling == "static":
        sink.add("norm_f.scale", of_linear_input(statistics["norm_f"]))
    head = head.float()
    for name, tensor in w8_tensors(head, head.abs().amax(1)).items():
        sink.add(f"lm_head.{name}", tensor)


def _by_rows(checkpoint: Checkpoint, name: str, rewrite: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a row-wise rewrite to a tall matrix in pieces: FP64 copies of it are not held whole."""
    parts = checkpoint.tensor(name).split(TABLE_ROWS)
    rotated = f"{checkpoint.stored_name(name)}, rotated,"
    return torch.cat([to_fp16(rewrite(part.float()), rotated, IN_FP32) for part in parts])


class _Streams:
    """What flows between layers, of the FP and of the quantized model, at the layer at hand.

    Attributes:
        fp, quantized: (T, D) FP32, the residual entering the layer.
        target: (T, D) FP32, what out_proj ought to give.
        out_proj_input: (T, E) INT8, and out_proj_scale (T, 1) FP32 of its tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Description,
        ids: Tensor,
        device: str,
        scratch: Path | None,
    ) -> None:
        self.device = device
        self.parts = batches(ids)
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
            self.quantized[part] = rows.half().float()
        return self

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
        self._context = Context(recipe, model.residual_eps, linear)
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
        weight, hessian = rotated[IN_PROJ], None
        if recipe.gptq or recipe.compensation:
            inputs = self._in_proj_inputs(p)
            lacking = weight.double() @ inputs.regression() if recipe.compensation else 0.0
            weight = (weight + recipe.compensation * lacking).float()
            hessian = inputs.hessian if recipe.gptq else None
        p |= linear_tensors("in_proj", weight, recipe, hessian, list(block.parts.values()))

        weight, hessian = rotate_out_proj_input(rotated[OUT_PROJ]), None
        outputs = self._run_to_out_proj(p, rotated, weight)
        if outputs is not None:
            lacking = outputs.regression() if recipe.compensation else 0.0
            weight = (weight + recipe.compensation * lacking).float()
            hessian = outputs.hessian if recipe.gptq else None
        p |= linear_tensors("out_proj", weight, recipe, hessian)

        self._advance(p)
        return p

    def _in_proj_inputs(self, p: Layer) -> InputStatistics:
        """in_proj's INT8 input, and by how much the FP model's differs from it."""
        streams, model = self._streams, self._model
        inputs = InputStatistics(model.d_model, model.d_model, streams.device)
        for part in streams.parts:
            entering = streams.quantized[part].to(streams.device)
            zero = torch.zeros_like(entering, dtype=torch.float16)
            _, u = norm(p, "u_scale", self._context, zero, entering)
            fp = streams.fp[part].to(streams.device)
            fp_u = fp * torch.rsqrt(fp.square().mean(-1, keepdim=True) + model.residual_eps)
            real = u.real()
            inputs.add(real, fp_u - real)
        return inputs

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
        for part in streams.parts:
            entering = streams.quantized[part].to(device)
            states = tuple(spec.zeros(len(entering), device) for spec in block.states(recipe))
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
                inputs.add(real, target - real @ out_proj.t())
        return inputs

    def _advance(self, p: Layer) -> None:
        """The mean difference from the target becomes out_proj's bias; the stream goes on."""
        recipe, streams = self._recipe, self._streams

        def out(part: slice) -> Tensor:
            r = streams.out_proj_input_of(part, self._block.width)
            value: Tensor = linear(p, "out_proj", r, recipe).float()
            return value

        if recipe.correction != "none":
            difference = MeanDifference()
            for part in streams.parts:
                difference.add(streams.target[part].to(streams.device) - out(part))
            bias = difference.correction(recipe.correction_strength)
            p["out_proj.bias"] = bias.to(streams.device)
        for part in streams.parts:
            streams.quantized[part] = streams.quantized[part].to(streams.device) + out(part)
