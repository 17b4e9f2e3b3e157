"""Apply a recipe: FP checkpoint + calibration statistics -> quantized checkpoint.

Layers are read, rewritten, quantized and written one at a time, so that memory does not grow with
depth. The whole recipe, top to bottom: `quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssdi8_edge import int8
from ssdi8_edge.allocator import return_freed_memory
from ssdi8_edge.calibrate import (
    TABLE_ROWS,
    embed,
    fp32_layer,
    in_proj_parts,
    layer_config,
    load_block,
    require_time_step,
)
from ssdi8_edge.checkpoint import EMBEDDING, HEAD, Checkpoint
from ssdi8_edge.fp16_range import IN_FP32, LARGEST, all_finite, to_fp16, watched
from ssdi8_edge.methods import DEFAULT_METHOD, QuantConfig
from ssdi8_edge.model import Mamba2Block, Mamba2Config
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.quantize.clusters import sort_and_cluster
from ssdi8_edge.quantize.correction import MeanDifference
from ssdi8_edge.quantize.linears import InputStatistics, linear_tensors, w8_tensors
from ssdi8_edge.quantize.modules import (
    Int8Input,
    NodeAttributes,
    linear,
    norm,
    run_mixer,
    zero_state,
)
from ssdi8_edge.quantize.scales import activation_scales, of_linear_input
from ssdi8_edge.stream import Spool, batches, open_spool
from ssdi8_edge.transforms import (
    GATE_NORM,
    IN_PROJ,
    NORM,
    OUT_PROJ,
    permute_layer,
    rotate_embedding,
    rotate_head,
    rotate_layer,
    rotate_out_proj_input,
    scale_output,
)

Layer = dict[str, Tensor]


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
    config = quantized_config(checkpoint, recipe, statistics)
    if not recipe.quantized:
        _keep_fp16(checkpoint, config, sink, track)
        return {}
    _quantize_ends(checkpoint, config, recipe, statistics, sink)
    with (
        torch.inference_mode(),
        int8.count_saturation() as saturation,
        watched(recipe.name, lambda name: IN_FP32) as watch,
        _Streams(checkpoint, config, ids, device, scratch) as streams,
    ):
        for i in track(range(config.n_layer), "quantize"):
            prefix = f"layers.{i}."
            saturation.scope, watch.scope = prefix, f"layers.{i}"
            own = {
                k[len(prefix) :]: v.to(device)
                for k, v in statistics.items()
                if k.startswith(prefix)
            }
            source = scale_output(fp32_layer(checkpoint, i, device), config.residual_scale)
            for name, tensor in _quantize_layer(source, own, config, recipe, streams).items():
                sink.add(prefix + name, tensor)
            return_freed_memory()
        return saturation.fractions()


def quantized_config(
    checkpoint: Checkpoint, recipe: QuantConfig, statistics: Mapping[str, Tensor]
) -> Mamba2Config:
    """The sizes of what `quantize` makes, and the unit of its residual stream.

    Some models add values to the stream that FP16 cannot hold on their way there. A power of two
    in the embedding, in out_proj and in the eps of the norms that follow changes nothing but that.
    """
    config = layer_config(checkpoint, recipe)
    if not recipe.quantized:
        return config
    added = [statistics["embedding"]]
    added += [statistics[f"layers.{i}.out"] for i in range(config.n_layer)]
    # Half of the range is left to text with larger values and to errors of quantization.
    excess = torch.stack(added).max().item() / (LARGEST / 2)
    scale = 2.0 ** -math.ceil(math.log2(excess)) if excess > 1 else 1.0
    return dataclasses.replace(config, residual_scale=scale)


def _keep_fp16(checkpoint: Checkpoint, config: Mamba2Config, sink: Sink, track: Track) -> None:
    """The FP16 baseline: linears in FP16, small tensors in FP32, nothing rewritten."""

    def fp16(name: str, weight: Tensor) -> Tensor:
        remedy = f"choose --method {DEFAULT_METHOD}, which scales it."
        # Of the head every method keeps FP16, after a rotation that evens out single values.
        if name == HEAD and not all_finite(weight.half()):
            gamma = checkpoint.tensor("backbone.norm_f.weight").float()
            if not all_finite(rotate_head(weight.float(), gamma).half()):
                remedy = IN_FP32
        return to_fp16(weight, name, remedy)

    def of_end(name: str) -> Tensor:
        return fp16(name, checkpoint.tensor(name))

    sink.add("embedding.weight", of_end("backbone.embedding.weight"))
    sink.add("norm_f.weight", checkpoint.tensor("backbone.norm_f.weight").float())
    if not config.tie_embeddings:
        sink.add("lm_head.weight", of_end("lm_head.weight"))
    for i in track(range(config.n_layer), "quantize"):
        layer = fp32_layer(checkpoint, i, "cpu")
        require_time_step(i, layer["mixer.dt_bias"], config.dt_limit)
        stored = f"backbone.layers.{i}."
        tensors = {
            "norm.weight": layer[NORM],
            "in_proj.weight": fp16(stored + IN_PROJ, layer[IN_PROJ]),
            **_small_tensors(layer),
            "gate_norm.weight": layer[GATE_NORM],
            "out_proj.weight": fp16(stored + OUT_PROJ, layer[OUT_PROJ]),
        }
        for name, tensor in tensors.items():
            sink.add(f"layers.{i}.{name}", tensor)


def _small_tensors(
    layer: Layer, *, int8_params: bool = False, int8_conv: Sequence[int] = ()
) -> Layer:
    """Convolution and per-head parameters, FP32.

    Args:
        int8_params: A_log and D go through INT8.
        int8_conv: the convolution goes through INT8 in parts of so many channels; () leaves it.
    """
    a_log, d = layer["mixer.A_log"], layer["mixer.D"]
    if int8_params:
        a_log, d = (_through_int8(v) for v in (a_log, d))
    conv = {k: layer[f"mixer.{k}"] for k in ("conv1d.weight", "conv1d.bias")}
    if int8_conv:
        conv = {
            k: torch.cat([_through_int8(part) for part in v.split([*int8_conv])])
            for k, v in conv.items()
        }
    return {
        "conv1d.weight": conv["conv1d.weight"].squeeze(1),
        "conv1d.bias": conv["conv1d.bias"],
        "dt_bias": layer["mixer.dt_bias"],
        "A": -a_log.exp(),
        "D": d,
    }


def _through_int8(value: Tensor) -> Tensor:
    scale = int8.scale_from_absmax(value.abs().amax())
    return int8.quantize(value, scale, "half_even").float() * scale


def _quantize_ends(
    checkpoint: Checkpoint,
    config: Mamba2Config,
    recipe: QuantConfig,
    statistics: Mapping[str, Tensor],
    sink: Sink,
) -> None:
    """Embedding (FP16, rotated) and lm_head (rotated, γ_f folded; FP16 or INT8)."""
    norm_f = checkpoint.tensor("backbone.norm_f.weight").float()

    def rotated_embedding(rows: Tensor) -> Tensor:
        return rotate_embedding(rows) * config.residual_scale

    def rotated_head(rows: Tensor) -> Tensor:
        return rotate_head(rows, norm_f)

    sink.add("embedding.weight", _by_rows(checkpoint, EMBEDDING, rotated_embedding))
    head = _by_rows(checkpoint, HEAD, rotated_head)
    if recipe.lm_head == "fp16":
        sink.add("norm_f.weight", torch.ones_like(norm_f))
        sink.add("lm_head.weight", head)
        return
    if recipe.input_scaling == "static":
        sink.add("norm_f.scale", of_linear_input(statistics["norm_f"]))
    head = head.float()
    for name, tensor in w8_tensors(head, head.abs().amax(1)).items():
        sink.add(f"lm_head.{name}", tensor)


def _by_rows(checkpoint: Checkpoint, name: str, rewrite: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a row-wise rewrite to a tall matrix in pieces: FP64 copies of it are not held whole."""
    parts = checkpoint.tensor(name).split(TABLE_ROWS)
    rotated = f"{name}, rotated,"
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
        config: Mamba2Config,
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

        self.fp = spool(config.d_model, torch.float32)
        self.quantized = spool(config.d_model, torch.float32)
        self.target = spool(config.d_model, torch.float32)
        self.out_proj_input = spool(config.d_inner, torch.int8)
        self.out_proj_scale = spool(1, torch.float32)
        self._embedded = embed(checkpoint, ids, config.residual_scale)

    def __enter__(self) -> _Streams:
        for part, rows in self._embedded:
            self.fp[part] = rows
            self.quantized[part] = rows.half().float()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _quantize_layer(
    source: Layer,
    statistics: Mapping[str, Tensor],
    config: Mamba2Config,
    recipe: QuantConfig,
    streams: _Streams,
) -> Layer:
    """Quantize one block and move both streams behind it."""
    order = None
    if recipe.x_granularity == "cluster":
        order = sort_and_cluster(statistics["x_mean"], config.ngroups)
        source = permute_layer(source, order.heads, order.channels)
    rotated = rotate_layer(source)
    parts = in_proj_parts(config)
    scales = activation_scales(statistics, recipe, parts, order)
    storage_only = recipe.ssd == "dequantized"
    p: Layer = {
        **scales,
        **_small_tensors(
            source,
            int8_params=recipe.ssm_params == "int8",
            int8_conv=[parts[k] for k in ("x", "B", "C")] if storage_only else (),
        ),
        "gate_norm.weight": rotated[GATE_NORM],
    }
    weight, hessian = rotated[IN_PROJ], None
    if recipe.gptq or recipe.compensation:
        inputs = _in_proj_inputs(p, config, recipe, streams)
        lacking = weight.double() @ inputs.regression() if recipe.compensation else 0.0
        weight = (weight + recipe.compensation * lacking).float()
        hessian = inputs.hessian if recipe.gptq else None
    p |= linear_tensors("in_proj", weight, recipe, hessian, list(parts.values()))

    weight, hessian = rotate_out_proj_input(rotated[OUT_PROJ]), None
    outputs = _run_mixers(p, load_block(rotated, config), weight, config, recipe, streams)
    if outputs is not None:
        lacking = outputs.regression() if recipe.compensation else 0.0
        weight = (weight + recipe.compensation * lacking).float()
        hessian = outputs.hessian if recipe.gptq else None
    p |= linear_tensors("out_proj", weight, recipe, hessian)

    _advance(p, recipe, streams)
    return p


def _in_proj_inputs(
    p: Mapping[str, Any], config: Mamba2Config, recipe: QuantConfig, streams: _Streams
) -> InputStatistics:
    """in_proj's INT8 input, and by how much the FP model's differs from it."""
    attributes = NodeAttributes(config, recipe)
    inputs = InputStatistics(config.d_model, config.d_model, streams.device)
    for part in streams.parts:
        entering = streams.quantized[part].to(streams.device)
        zero = torch.zeros_like(entering, dtype=torch.float16)
        _, u = norm(p, "u_scale", attributes, zero, entering)
        fp = streams.fp[part].to(streams.device)
        fp_u = fp * torch.rsqrt(fp.square().mean(-1, keepdim=True) + config.residual_eps)
        real = u.real()
        inputs.add(real, fp_u - real)
    return inputs


def _run_mixers(
    p: Mapping[str, Any],
    block: Mamba2Block,
    out_proj: Tensor,
    config: Mamba2Config,
    recipe: QuantConfig,
    streams: _Streams,
) -> InputStatistics | None:
    """Everything up to out_proj, in both models: sets its input and its target.

    Returns:
        That input, and by how much the target differs from what the FP `out_proj` makes of it; None
        if the recipe has no use for them.
    """
    attributes = NodeAttributes(config, recipe)
    device, inputs = streams.device, None
    if recipe.gptq or recipe.compensation:
        inputs = InputStatistics(config.d_inner, config.d_model, device)
    for part in streams.parts:
        entering = streams.quantized[part].to(device)
        state = zero_state(config, recipe, len(entering), device)
        zero = torch.zeros_like(entering, dtype=torch.float16)
        _, r, _ = run_mixer(p, attributes, zero, entering, state)
        streams.out_proj_input[part], streams.out_proj_scale[part] = r
        fp = streams.fp[part].to(device)
        fp_next, _ = block(fp)
        # The output alone, as released, or with it all that the residual has lost so far.
        target = fp_next - (fp if recipe.correction == "out" else entering)
        streams.fp[part] = fp_next
        streams.target[part] = target
        if inputs is not None:
            real = r.real()
            inputs.add(real, target - real @ out_proj.t())
    return inputs


def _advance(p: Layer, recipe: QuantConfig, streams: _Streams) -> None:
    """The mean difference from the target becomes out_proj's bias; the quantized stream goes on."""

    def out(part: slice) -> Tensor:
        stored = (streams.out_proj_input[part], streams.out_proj_scale[part])
        r = Int8Input(*(tensor.to(streams.device) for tensor in stored))
        return linear(p, "out_proj", r, recipe).float()

    if recipe.correction != "none":
        difference = MeanDifference()
        for part in streams.parts:
            difference.add(streams.target[part].to(streams.device) - out(part))
        p["out_proj.bias"] = difference.correction(recipe.correction_strength).to(streams.device)
    for part in streams.parts:
        streams.quantized[part] = streams.quantized[part].to(streams.device) + out(part)
