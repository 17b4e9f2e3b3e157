"""Calibration: a text file goes through the FP model, layer by layer, under observers.

Source: docs/method.md §6. Statistics are running absolute maxima of the model in the rotated basis,
and of some tensors the range of least squared error; the scales are made from them when a recipe is
applied. One layer is in memory at a time, and on a CPU the residual stream between layers lies in a
temporary file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ssdi8_edge import hadamard
from ssdi8_edge.allocator import return_freed_memory
from ssdi8_edge.checkpoint import EMBEDDING, Checkpoint
from ssdi8_edge.errors import CheckpointError
from ssdi8_edge.fp16_range import IN_FP32, LARGEST
from ssdi8_edge.hadamard import rotate, transform
from ssdi8_edge.histogram import MagnitudeHistogram
from ssdi8_edge.methods import QuantConfig
from ssdi8_edge.model import Mamba2Block, Mamba2Config
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.stream import batches, open_spool
from ssdi8_edge.transforms import rotate_embedding, rotate_layer


def layer_config(checkpoint: Checkpoint, recipe: QuantConfig) -> Mamba2Config:
    """The model's sizes with the recipe's chunk size."""
    config = Mamba2Config(**checkpoint.config)
    if recipe.chunk_size is not None:
        config = dataclasses.replace(config, chunk_size=recipe.chunk_size)
    return config


def load_block(layer: dict[str, Tensor], config: Mamba2Config) -> Mamba2Block:
    """A block that shares the given FP32 tensors."""
    with torch.device("meta"):
        block = Mamba2Block(config)
    block.load_state_dict(layer, assign=True)
    return block.eval().requires_grad_(False)


def fp32_layer(checkpoint: Checkpoint, index: int, device: str) -> dict[str, Tensor]:
    return {k: tensor.to(device).float() for k, tensor in checkpoint.layer(index).items()}


def embed(
    checkpoint: Checkpoint, ids: Tensor, scale: float = 1.0
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the rotated embedding times `scale`, batch by batch, without rotating all of it."""
    table = checkpoint.tensor(EMBEDDING)
    for part in batches(ids):
        yield part, rotate_embedding(table[ids[part]].float()) * scale


# Goes into the key of the statistics: raised when what is observed changes, so that those of an
# earlier state of this file are made again.
STATISTICS = 6

# Of the embedding, handled at once.
TABLE_ROWS = 8192

# Of |x| for the recipes that clip it so: docs/method.md §6.2 (19).
PERCENTILE = 0.9995
PERCENTILE_MOMENTUM = 0.01


class Observers:
    """Running absolute maxima and histograms of one layer; shapes as the scales they become."""

    def __init__(self, config: Mamba2Config) -> None:
        self._config = config
        self._rotates = hadamard.exists(config.d_state)
        self._seen: dict[str, Tensor] = {}
        self._histograms: dict[str, MagnitudeHistogram] = {}
        self.absmax: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        """The `observe` callback of `Mamba2Block`."""
        if name == "u":
            self._whole("u", value)
        elif name in ("B", "C"):
            self._by_group(name, value.movedim(2, 0))
            if self._rotates:
                self._by_group(f"{name}_rotated", rotate(value.movedim(2, 0)).float())
            self._seen[name] = value
        elif name == "x":
            self._seen["x"] = value
            self._channels(value)
        elif name == "dt":
            self._seen["dt"] = value
        elif name in ("chunk_state", "passed_state"):
            self._update(name, value.abs().amax((0, 1, 4)))
            if self._rotates:
                self._update(f"{name}_rotated", rotate(value).abs().amax((0, 1, 4)))
        elif name == "y":
            self._update("y", value.abs().amax())
            self._chunk_tensors()
        elif name == "r":
            self._whole("r", transform(value))
        elif name == "out":
            self._update("out", value.abs().amax())

    def statistics(self) -> dict[str, Tensor]:
        """All that was seen: maxima, and as `<name>_mse` the ranges of least squared error."""
        best = {
            f"{name}_mse": histogram.best_range(self.absmax[name].reshape(-1))
            for name, histogram in self._histograms.items()
        }
        best = {k: v.reshape(self.absmax[k.removesuffix("_mse")].shape) for k, v in best.items()}
        return {**self.absmax, **best}

    def see_in_proj(self, output: Tensor) -> None:
        """Maxima of the five parts of in_proj's output."""
        config = self._config
        sizes = in_proj_parts(config)
        for name, part in zip(sizes, output.split(list(sizes.values()), -1), strict=True):
            self._update(f"in_proj.{name}", part.abs().amax())

    def _channels(self, x: Tensor) -> None:
        """What recipes that keep x in INT8 ask of it, x (B, L, H, P)."""
        self._update("x", x.abs().amax((0, 1)))
        self._update("x_mean", x.abs().mean(1).amax(0))
        for sample in x:
            histogram = MagnitudeHistogram(1, x.device)
            histogram.add(sample.reshape(1, -1))
            now = histogram.quantile(PERCENTILE)[0]
            old = self.absmax.get("x_percentile", now)
            self.absmax["x_percentile"] = old + PERCENTILE_MOMENTUM * (now - old)

    def _whole(self, name: str, value: Tensor) -> None:
        """A tensor with one scale."""
        self._update(name, value.abs().amax())
        self._count(name, value.reshape(1, -1))

    def _by_group(self, name: str, value: Tensor) -> None:
        """A tensor (G, …) with a scale per group."""
        value = value.flatten(1)
        self._update(name, value.abs().amax(1))
        self._count(name, value)

    def _count(self, name: str, value: Tensor) -> None:
        if name not in self._histograms:
            self._histograms[name] = MagnitudeHistogram(len(value), value.device)
        self._histograms[name].add(value)

    def _update(self, name: str, value: Tensor) -> None:
        value = value.float()
        old = self.absmax.get(name)
        self.absmax[name] = value if old is None else torch.maximum(old, value)

    def observe_decay(self, a_rate: Tensor) -> None:
        """A (H), which the block keeps to itself."""
        self._seen["A"] = a_rate

    def _chunk_tensors(self) -> None:
        """w·x and CB, per chunk, from the tensors seen in this call."""
        config, seen = self._config, self._seen
        x, dt, b, c = seen["x"], seen["dt"], seen["B"], seen["C"]
        chunk = config.chunk_size
        for start in range(0, x.shape[1], chunk):
            part = slice(start, start + chunk)
            x_k, dt_k = x[:, part], dt[:, part]
            a = (dt_k * seen["A"]).cumsum(1)  # (B, K, H)
            w = torch.exp(a[:, -1:] - a) * dt_k
            self._update("x_scaled", (x_k * w[..., None]).abs().amax((0, 1)))
            cb = torch.einsum("bmgn,bkgn->bgmk", c[:, part], b[:, part])
            self._update("CB_full", cb.abs().amax((0, 2, 3)))
            self._update("CB", cb.tril().abs().amax((0, 2, 3)))


def in_proj_parts(config: Mamba2Config) -> dict[str, int]:
    """The rows of in_proj, in order."""
    gn = config.ngroups * config.d_state
    return {"z": config.d_inner, "x": config.d_inner, "B": gn, "C": gn, "dt": config.nheads}


def calibrate(
    checkpoint: Checkpoint,
    recipe: QuantConfig,
    ids: Tensor,
    track: Track = silent,
    device: str = "cpu",
    scratch: Path | None = None,
) -> dict[str, Tensor]:
    """Statistics of every layer on the token windows `ids` (S, T).

    `scratch` is a folder on the disk that holds the residual stream meanwhile.

    Returns:
        `layers.{i}.<name>` -> FP32 absolute maximum: u, r: (); B, C, CB, CB_full: (G);
        x, x_scaled, chunk_state, passed_state: (H, P); in_proj.z, .x, .B, .C, .dt: (), its
        output; y, out: (), outputs of SSD and of the rotated out_proj. `<name>_rotated` of B, C and
        the states, where d_state has a Hadamard matrix: after `hadamard.rotate`. `<name>_mse` of u,
        r, B, C and both rotated: the range of least squared error. x_mean: (H, P), the largest mean
        of |x| over a window; x_percentile: (), a moving average of the windows' percentiles.
        `norm_f`: (), the rotated input of lm_head. `embedding`: (), the largest norm of a row,
        which no rotated value exceeds.

    Raises:
        CheckpointError: the model computes something that is not a number, or that FP16 cannot hold
            where every method needs it to.
    """
    config = layer_config(checkpoint, recipe)
    shape = (*ids.shape, config.d_model)
    statistics: dict[str, Tensor] = {}
    with (
        torch.inference_mode(),
        open_spool(shape, torch.float32, device, scratch) as stream,
    ):
        table = checkpoint.tensor(EMBEDDING)
        norms = [rows.float().norm(dim=1).amax() for rows in table.split(TABLE_ROWS)]
        statistics["embedding"] = torch.stack(norms).amax()
        if not statistics["embedding"].isfinite():
            raise CheckpointError(
                f"rows of the tensor {EMBEDDING} of {checkpoint.folder} are longer than FP32 holds",
                "the checkpoint is damaged, fetch it again.",
            )
        for part, rows in embed(checkpoint, ids):
            stream[part] = rows
        for i in track(range(config.n_layer), "calibrate"):
            layer = fp32_layer(checkpoint, i, device)
            observers = Observers(config)
            observers.observe_decay(-layer["mixer.A_log"].exp())
            block = load_block(rotate_layer(layer), config)
            block.mixer.in_proj.register_forward_hook(
                lambda _, __, output, see=observers.see_in_proj: see(output)
            )
            for part in batches(ids):
                residual, _ = block(stream[part].to(device), None, observers)
                stream[part] = residual
            seen = observers.statistics()
            statistics |= {f"layers.{i}.{k}": v.cpu() for k, v in seen.items()}
            _require_numbers(checkpoint, i, observers.absmax)
            _require_fp16_range(checkpoint, i, recipe, observers.absmax)
            raw = observers.absmax["in_proj.dt"].amax().cpu()
            require_time_step(i, layer["mixer.dt_bias"].cpu() + raw, config.dt_limit)
            return_freed_memory()
        norm_f = torch.zeros((), device=device)
        for part in batches(ids):
            rows = stream[part].to(device)
            rms = (rows.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            norm_f = torch.maximum(norm_f, (rows / rms).abs().amax())
    statistics["norm_f"] = norm_f.cpu()
    return statistics


def _require_numbers(checkpoint: Checkpoint, index: int, absmax: dict[str, Tensor]) -> None:
    for name, value in absmax.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"layers.{index} of {checkpoint.folder} computes {name} that is not a number",
                "the checkpoint is damaged, fetch it again.",
            )


def require_time_step(index: int, largest: Tensor, dt_limit: tuple[float, float]) -> None:
    """Refuse a head whose time step nothing bounds and whose exponential FP64 cannot hold.

    The ONNX function of softplus takes it; trained heads stay below 10.

    Args:
        largest: (H) dt_raw + dt_bias, or dt_bias alone.

    Raises:
        CheckpointError: there is one.
    """
    head = int(largest.argmax())
    if largest[head] > LARGEST_EXPONENT and math.isinf(dt_limit[1]):
        raise CheckpointError(
            f"layers.{index}: head {head} takes softplus of {largest[head].item():.4g}, the sum of "
            f"dt and mixer.dt_bias, and a graph can do so up to {LARGEST_EXPONENT:g}",
            IN_FP32,
        )


# What exp of FP64 holds is below e^709.8.
LARGEST_EXPONENT = 700.0
# What the ops of every quantized method pass on in FP16, as statistics name it.
KEPT_IN_FP16 = {
    **{f"in_proj.{part}": f"the {part} that in_proj gives" for part in ("z", "x", "B", "C", "dt")},
    "x": "x behind the convolution",
    "y": "y, the output of SSD,",
}


def _require_fp16_range(
    checkpoint: Checkpoint, index: int, recipe: QuantConfig, absmax: dict[str, Tensor]
) -> None:
    state = {"passed_state": "the SSM state"} if recipe.state_dtype == "fp16" else {}
    for name, words in (KEPT_IN_FP16 | state).items():
        largest = absmax[name].amax().item()
        if largest > LARGEST:
            raise CheckpointError(
                f"layers.{index} of {checkpoint.folder}: {words} reaches {largest:.3g} on the "
                f"calibration text, and FP16, in which every method keeps it, ends at {LARGEST:g}",
                IN_FP32,
            )
