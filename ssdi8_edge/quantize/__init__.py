"""Apply a recipe: FP checkpoint + calibration statistics -> quantized checkpoint.

Layers are read, rewritten, quantized and written one at a time, so that memory does not grow with
depth. The whole recipe, top to bottom: `quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssdi8_edge import int8
from ssdi8_edge.calibrate import embed, fp32_layer, layer_config, load_block
from ssdi8_edge.checkpoint import Checkpoint
from ssdi8_edge.methods import QuantConfig
from ssdi8_edge.model import Mamba2Config
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.quantize.correction import MeanDifference
from ssdi8_edge.quantize.gptq import quantize_w4
from ssdi8_edge.quantize.modules import (
    NodeAttributes,
    linear,
    run_mixer,
    zero_state,
)
from ssdi8_edge.stream import Spool, batches
from ssdi8_edge.transforms import (
    GATE_NORM,
    IN_PROJ,
    NORM,
    OUT_PROJ,
    rotate_embedding,
    rotate_head,
    rotate_layer,
    rotate_out_proj_input,
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
    """
    config = layer_config(checkpoint, recipe)
    if not recipe.quantized:
        _keep_fp16(checkpoint, config, sink, track)
        return {}
    _quantize_ends(checkpoint, recipe, statistics, sink)
    with (
        torch.inference_mode(),
        int8.count_saturation() as saturation,
        _Streams(checkpoint, config, ids, device, scratch) as streams,
    ):
        for i in track(range(config.n_layer), "quantize"):
            prefix = f"layers.{i}."
            saturation.scope = prefix
            own = {
                k[len(prefix) :]: v.to(device)
                for k, v in statistics.items()
                if k.startswith(prefix)
            }
            source = fp32_layer(checkpoint, i, device)
            for name, tensor in _quantize_layer(source, own, config, recipe, streams).items():
                sink.add(prefix + name, tensor)
        return saturation.fractions()


def _keep_fp16(checkpoint: Checkpoint, config: Mamba2Config, sink: Sink, track: Track) -> None:
    """The FP16 baseline: linears in FP16, small tensors in FP32, nothing rewritten."""
    sink.add("embedding.weight", checkpoint.tensor("backbone.embedding.weight").half())
    sink.add("norm_f.weight", checkpoint.tensor("backbone.norm_f.weight").float())
    if not config.tie_embeddings:
        sink.add("lm_head.weight", checkpoint.tensor("lm_head.weight").half())
    for i in track(range(config.n_layer), "quantize"):
        layer = fp32_layer(checkpoint, i, "cpu")
        tensors = {
            "norm.weight": layer[NORM],
            "in_proj.weight": layer[IN_PROJ].half(),
            **_small_tensors(layer, "fp32"),
            "gate_norm.weight": layer[GATE_NORM],
            "out_proj.weight": layer[OUT_PROJ].half(),
        }
        for name, tensor in tensors.items():
            sink.add(f"layers.{i}.{name}", tensor)


def _small_tensors(layer: Layer, ssm_params: str) -> Layer:
    """Convolution and per-head parameters, FP32."""
    a_log, d = layer["mixer.A_log"], layer["mixer.D"]
    if ssm_params == "int8":
        a_log, d = (_through_int8(v) for v in (a_log, d))
    return {
        "conv1d.weight": layer["mixer.conv1d.weight"].squeeze(1),
        "conv1d.bias": layer["mixer.conv1d.bias"],
        "dt_bias": layer["mixer.dt_bias"],
        "A": -a_log.exp(),
        "D": d,
    }


def _through_int8(value: Tensor) -> Tensor:
    scale = int8.scale_from_absmax(value.abs().amax())
    return int8.quantize(value, scale, "half_even").float() * scale


def _quantize_ends(
    checkpoint: Checkpoint, recipe: QuantConfig, statistics: Mapping[str, Tensor], sink: Sink
) -> None:
    """Embedding (FP16, rotated) and lm_head (rotated, γ_f folded; FP16 or INT8)."""
    table = checkpoint.tensor("backbone.embedding.weight")
    norm_f = checkpoint.tensor("backbone.norm_f.weight").float()
    sink.add("embedding.weight", _by_rows(table, rotate_embedding).half())
    head = _by_rows(checkpoint.tensor("lm_head.weight"), lambda rows: rotate_head(rows, norm_f))
    if recipe.lm_head == "fp16":
        sink.add("norm_f.weight", torch.ones_like(norm_f))
        sink.add("lm_head.weight", head.half())
        return
    input_scale = int8.scale_from_absmax(statistics["norm_f"], 1e-6)
    sink.add("norm_f.scale", input_scale)
    for name, tensor in _w8(head, input_scale, per_row=True).items():
        sink.add(f"lm_head.{name}", tensor)


def _by_rows(weight: Tensor, rewrite: Any, rows: int = 8192) -> Tensor:
    """Apply a row-wise rewrite to a tall matrix in pieces: FP64 copies of it are not held whole."""
    return torch.cat([rewrite(part.float()).half() for part in weight.split(rows)])


def _w8(weight: Tensor, input_scale: Tensor, *, per_row: bool) -> Layer:
    """INT8 weight, its scale times the input's, and a zero bias."""
    weight = weight.float()
    absmax = weight.abs().amax(1) if per_row else weight.abs().amax().expand(len(weight))
    scale = int8.scale_from_absmax(absmax)
    return {
        "weight": int8.quantize(weight, scale[:, None], "half_even"),
        "scale": scale * input_scale,
        "bias": weight.new_zeros(len(weight)),
    }


def _linear_tensors(
    name: str, weight: Tensor, input_scale: Tensor, recipe: QuantConfig, hessian: Tensor | None
) -> Layer:
    """The tensors of one INT8 linear, under the names that `modules.linear` reads."""
    if recipe.linear == "w4":
        integers = recipe.group_scales == "integer"
        w4 = quantize_w4(weight, recipe.group_size, hessian, integer_scales=integers)
        tensors = {
            "packed": w4.packed,
            "group_scale": w4.group_scale,
            "scale": w4.row_scale * input_scale,
            "bias": weight.new_zeros(len(weight)),
        }
    else:
        tensors = _w8(weight, input_scale, per_row=recipe.linear == "w8_row")
    return {f"{name}.{k}": v for k, v in tensors.items()}


def _scales(statistics: Mapping[str, Tensor], recipe: QuantConfig) -> Layer:
    """Activation scales of a layer from its absolute maxima (method §2.1, §3.2)."""

    def collapse(value: Tensor, granularity: str) -> Tensor:
        return value.amax().expand(value.shape).clone() if granularity == "tensor" else value

    def of_group(name: str) -> Tensor:
        return int8.scale_from_absmax(collapse(statistics[name], recipe.bc_granularity))

    def of_head(value: Tensor) -> Tensor:
        return int8.scale_from_absmax(collapse(value, recipe.x_granularity))

    states = statistics["chunk_state"]
    if recipe.state_observer == "passed":
        states = torch.maximum(states, statistics["passed_state"])
    released = recipe.state_observer == "local"
    relative = "_peak" if recipe.decay_scale == "peak" else ""
    scales = {
        "u_scale": int8.scale_from_absmax(statistics["u"], 1e-6),
        "b_scale": of_group("B"),
        "c_scale": of_group("C"),
        # The release observes the full square of CB, also where k > m.
        "cb_scale": of_group("CB_full" if released else "CB"),
        "x_scale": of_head(statistics[f"x_scaled{relative}"]),
        "state_scale": of_head(states),
        "r_scale": int8.scale_from_absmax(
            statistics["r_folded" if recipe.fold_gate_norm else "r"], 1e-6
        ),
    }
    if recipe.scan2 == "int8_offdiag":
        scales["x_tile_scale"] = of_head(statistics[f"x_tile{relative}"])
    return scales


class _Streams:
    """Residual streams of the FP and of the quantized model, entering the layer at hand."""

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
        self.tokens = ids.shape[1]
        self._stack = ExitStack()

        def spool(width: int, dtype: type) -> Spool:
            shape = (self.tokens, width)
            return self._stack.enter_context(Spool(len(ids), shape, np.dtype(dtype), scratch))

        self.fp = spool(config.d_model, np.float32)
        self.quantized = spool(config.d_model, np.float32)
        self.out_proj_input = spool(config.d_inner, np.int8)
        self._embedded = embed(checkpoint, ids)

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
    rotated = rotate_layer(source, fold_gate_norm=recipe.fold_gate_norm)
    scales = _scales(statistics, recipe)
    p: dict[str, Any] = {
        **scales,
        **_small_tensors(source, recipe.ssm_params),
        "gate_norm.weight": rotated[GATE_NORM],
        "u_scale": scales["u_scale"].item(),
        "r_scale": scales["r_scale"].item(),
    }
    hessian = _in_proj_hessian(p, config, streams) if recipe.gptq else None
    p |= _linear_tensors("in_proj", rotated[IN_PROJ], scales["u_scale"], recipe, hessian)

    attributes = NodeAttributes(config, recipe)
    device = streams.device
    hessian = torch.zeros(config.d_inner, config.d_inner, device=device) if recipe.gptq else None
    for part in streams.parts:
        entering = streams.quantized[part].to(device)
        state = zero_state(config, recipe, len(entering), device)
        zero = torch.zeros_like(entering, dtype=torch.float16)
        _, r, _ = run_mixer(p, attributes, zero, entering, state)
        streams.out_proj_input[part] = r
        if hessian is not None:
            flat = r.flatten(0, 1).float()
            hessian += flat.t() @ flat
    weight = rotate_out_proj_input(rotated[OUT_PROJ])
    p |= _linear_tensors("out_proj", weight, scales["r_scale"], recipe, hessian)

    _advance(p, load_block(rotated, config), recipe, streams)
    return {k: v if isinstance(v, Tensor) else scales[k] for k, v in p.items()}


def _in_proj_hessian(p: Mapping[str, Any], config: Mamba2Config, streams: _Streams) -> Tensor:
    """Σ u uᵀ of in_proj's INT8 input; a common factor does not change GPTQ."""
    hessian = torch.zeros(config.d_model, config.d_model, device=streams.device)
    for part in streams.parts:
        entering = streams.quantized[part].to(streams.device)
        zero = torch.zeros_like(entering, dtype=torch.float16)
        scale, eps = p["u_scale"], config.norm_eps
        _, u = RMS_NORM.reference(zero, entering, scale=scale, eps=eps, rounding="half_even")
        flat = u.flatten(0, 1).float()
        hessian += flat.t() @ flat
    return hessian


def _advance(p: dict[str, Any], block: Any, recipe: QuantConfig, streams: _Streams) -> None:
    """Both streams through the block; the difference of their means becomes out_proj's bias."""
    difference = MeanDifference()
    for part in streams.parts:
        fp = streams.fp[part].to(streams.device)
        fp_next, _ = block(fp)
        streams.fp[part] = fp_next
        if recipe.correction == "none":
            continue
        entering, out = _out_proj(p, recipe, streams, part)
        # The output alone, as released, or with it all that the residual has lost so far.
        base = fp if recipe.correction == "out" else entering
        difference.add((fp_next - base) - out)
    if recipe.correction != "none":
        p["out_proj.bias"] = difference.correction(recipe.correction_strength).to(streams.device)
    for part in streams.parts:
        entering, out = _out_proj(p, recipe, streams, part)
        streams.quantized[part] = entering + out


def _out_proj(
    p: Mapping[str, Any], recipe: QuantConfig, streams: _Streams, part: slice
) -> tuple[Tensor, Tensor]:
    """The quantized residual entering the block, and what the block adds to it as it will run."""
    r = streams.out_proj_input[part].to(streams.device)
    return streams.quantized[part].to(streams.device), linear(p, "out_proj", r, recipe).float()
