"""Rows of the op tests, and the inputs and tiny artifacts they are run on.

A row is a base and one change. Inputs are drawn from a fixed seed, so that a failure repeats.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from conftest import make_config, make_model, mamba, state_spaces_config, stored_tensors
from onnx import ModelProto, TensorProto
from safetensors.torch import save_file
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import Checkpoint
from ssdi8_edge.compile.calibrate import calibrate
from ssdi8_edge.compile.quantize import quantize, quantized_description
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.numerics.formats import Gate, Rounding, Scaling
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.recipes.recipe import QuantConfig

# Tiny tensors gain nothing from threads, and threads that wait burn cores that others need.
torch.set_num_threads(1)

CHUNK = 16
ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


# ------------------------------------------------------------------------------------------------
# SSD
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SsdCase:
    """Sizes, attributes and the kind of data of one SSD call.

    data: "normal"; "zero" everything zero; "saturating" scales too small by 30; "extreme" FP16
        values near the end of their range and INT8 at both ends.
    decay: "mixed" heads; "none" A so small that exp(a) rounds to 1; "total" exp(a) is 0.
    """

    length: int = 2 * CHUNK + 3
    batch: int = 1
    heads: int = 4
    headdim: int = 8
    d_state: int = 8
    ngroups: int = 1
    chunk: int = CHUNK
    gate: Gate = "fp32"
    rounding: Rounding = "half_even"
    scaling: Scaling = "dynamic"
    state_dtype: torch.dtype = torch.float16
    dt_min: float = 0.0
    dt_max: float = 3.4e38
    start: bool = True
    data: Literal["normal", "zero", "saturating", "extreme"] = "normal"
    decay: Literal["mixed", "none", "total"] = "mixed"

    @property
    def d_inner(self) -> int:
        return self.heads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def geometry(self) -> dict[str, int]:
        return {
            "nheads": self.heads,
            "headdim": self.headdim,
            "ngroups": self.ngroups,
            "d_state": self.d_state,
        }

    @property
    def time_step(self) -> dict[str, Any]:
        return {
            "nheads": self.heads,
            "dt_column": self.d_inner + self.conv_dim,
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
        }

    @property
    def attributes(self) -> dict[str, Any]:
        """Of Ssdi8SsdScan; the modules take the part they know."""
        return {
            "chunk_size": self.chunk,
            **self.geometry,
            **self.time_step,
            "gate": self.gate,
            "rounding": self.rounding,
            "scaling": self.scaling,
        }


BASE = SsdCase()
RELEASED: dict[str, Any] = {
    "gate": "q0.7",
    "rounding": "half_away",
    "scaling": "static",
}
NONE: dict[str, Any] = {"scaling": "none"}
_CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    **{f"L={n}": {"length": n} for n in (1, 5, CHUNK - 1, CHUNK, CHUNK + 1)},
    "batch=2": {"batch": 2},
    "batch=2 L=1": {"batch": 2, "length": 1},
    "batch=2 L=5": {"batch": 2, "length": 5},
    "ngroups=2": {"ngroups": 2},
    "ngroups=8": {"ngroups": 8, "heads": 8},
    "ngroups=2 L=1": {"ngroups": 2, "length": 1},
    "heads=1": {"heads": 1},
    "headdim=1": {"headdim": 1},
    "headdim=20": {"headdim": 20},
    "d_state=1": {"d_state": 1},
    "d_state=24": {"d_state": 24},
    "chunk=8": {"chunk": 8},
    "many chunks": {"length": 9 * CHUNK},
    "half_away": {"rounding": "half_away"},
    "static": {"scaling": "static"},
    "static batch=2 ngroups=2": {"scaling": "static", "batch": 2, "ngroups": 2},
    "static saturating": {"scaling": "static", "data": "saturating"},
    "static extreme": {"scaling": "static", "data": "extreme"},
    "q0.7": {"gate": "q0.7", "scaling": "static"},
    "none": NONE,
    "none batch=2 ngroups=2": {**NONE, "batch": 2, "ngroups": 2},
    "none L=5": {**NONE, "length": 5},
    "none many chunks": {**NONE, "length": 9 * CHUNK},
    "none no decay": {**NONE, "decay": "none"},
    "none total decay": {**NONE, "decay": "total"},
    "none fp32 state": {**NONE, "state_dtype": torch.float32},
    "released": RELEASED,
    "released batch=2 ngroups=2 L=5": {**RELEASED, "batch": 2, "ngroups": 2, "length": 5},
    "released fp32 state": {**RELEASED, "state_dtype": torch.float32},
    "released many chunks": {**RELEASED, "length": 9 * CHUNK},
    "released no decay": {**RELEASED, "decay": "none"},
    "released saturating": {**RELEASED, "data": "saturating"},
    "fp32 state": {"state_dtype": torch.float32},
    "fp32 state L=1": {"state_dtype": torch.float32, "length": 1},
    "dt limits": {"dt_min": 0.1, "dt_max": 0.5},
    "dt limits L=1": {"dt_min": 0.1, "dt_max": 0.5, "length": 1},
    "zero start": {"start": False},
    "zeros": {"data": "zero", "start": False},
    "saturating": {"data": "saturating"},
    "extreme": {"data": "extreme"},
    "extreme L=1": {"data": "extreme", "length": 1},
    "no decay": {"decay": "none"},
    "total decay": {"decay": "total"},
}
# Inputs that an op takes in some cases only, and in which.
_STATIC_ONLY = ("x_scale", "state_scale")


def takes(case: SsdCase, name: str) -> bool:
    """Whether an SSD op is given the input `name` in this case."""
    return case.scaling == "static" or name not in _STATIC_ONLY


SSD_CASES = {name: dataclasses.replace(BASE, **change) for name, change in _CHANGES.items()}


def ssd_inputs(case: SsdCase, seed: int = 0) -> dict[str, Tensor]:
    """Every input that an SSD op takes, by its name; scales fit the data unless it saturates."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=g) * (high - low) + low

    b, n, h, p = case.batch, case.length, case.heads, case.headdim
    gn = case.ngroups * case.d_state
    columns = case.d_inner + case.conv_dim + h
    x = normal(b, n, case.d_inner).half()
    zxbcdt = (normal(b, n, columns) * 2).half()
    b_q, c_q = (
        torch.randint(-128, 128, (b, n, gn), generator=g, dtype=torch.int8) for _ in range(2)
    )
    A = {
        "mixed": -torch.exp(uniform(-2.0, 2.5, h)),
        "none": -torch.full((h,), 1e-6),
        "total": -torch.full((h,), 1e4),
    }[case.decay]
    state = normal(b, h, p, case.d_state).to(case.state_dtype)
    if not case.start:
        state = torch.zeros_like(state)
    scales = {
        "b_scale": uniform(0.01, 0.03, case.ngroups),
        "c_scale": uniform(0.01, 0.03, case.ngroups),
        "x_scale": uniform(0.01, 0.03, h, p),
        "state_scale": uniform(0.03, 0.1, h, p),
        "cb_scale": uniform(0.05, 0.15, case.ngroups),
    }
    if case.data == "zero":
        x, zxbcdt = torch.zeros_like(x), torch.zeros_like(zxbcdt)
        b_q, c_q = torch.zeros_like(b_q), torch.zeros_like(c_q)
    if case.data == "saturating":
        scales = {k: v if k in ("b_scale", "c_scale") else v / 30 for k, v in scales.items()}
    if case.data == "extreme":
        x = (torch.sign(x.float()) * 6e4).half()
        zxbcdt = (torch.sign(zxbcdt.float()) * 6e4).half()
        b_q, c_q = (torch.where(q < 0, -128, 127).to(torch.int8) for q in (b_q, c_q))
        state = (torch.sign(state.float()) * 6e4).to(case.state_dtype)
        # With steps of 6e4, or B and C of this size, y would leave FP16.
        zxbcdt[..., -h:] = normal(b, n, h).half()
        for name in ("x_scale", "state_scale"):
            scales[name] = torch.full((h, p), 6e4 / 127)
        scales |= {k: torch.full((case.ngroups,), 1e-4) for k in ("b_scale", "c_scale")}
        scales["cb_scale"] = torch.full((case.ngroups,), case.d_state * 127e-8)
    return {
        "x": x,
        "b_q": b_q,
        "c_q": c_q,
        "zxbcdt": zxbcdt,
        "ssm_state": state,
        "dt_bias": normal(h) - 2.0,
        "A": A,
        "D": normal(h) if case.data != "extreme" else torch.zeros(h),
        **scales,
    }


# ------------------------------------------------------------------------------------------------
# onnxruntime
# ------------------------------------------------------------------------------------------------


def session(model: ModelProto | Path) -> ort.InferenceSession:
    """On the CPU, with one thread: tests share the machine."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    # As the runtime does, and for its reason.
    unwanted = ["MatmulTransposeFusion"]
    return ort.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=unwanted
    )


def first_difference(got: np.ndarray, want: np.ndarray) -> str:
    """Where two arrays of one shape first differ, for a message that can be acted on."""
    where = tuple(int(i) for i in np.argwhere(got != want)[0])
    count = int(np.count_nonzero(got != want))
    return f"{count} of {got.size} differ, first at {where}: {got[where]} for {want[where]}"


def fp16_steps(values: np.ndarray) -> np.ndarray:
    """Integers that count FP16 values, so that neighbours differ by 1."""
    assert values.dtype == np.float16
    assert np.isfinite(values).all()
    bits = values.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


# ------------------------------------------------------------------------------------------------
# Tiny checkpoints
# ------------------------------------------------------------------------------------------------


def tiny_recipe(name: str, **changes: Any) -> QuantConfig:
    """A preset at the size of `make_config`: groups of 32 columns."""
    return dataclasses.replace(METHODS[name], **{"group_size": 32, **changes})


def write_checkpoint(
    folder: Path, config: Description | None = None, seed: int = 0
) -> tuple[Checkpoint, FloatModel]:
    """A random model as a state-spaces folder, opened, and the model itself.

    The embedding is scaled up: at its usual 0.02 the norms' epsilon would drown the first layer.
    """
    config = config or make_config()
    model = make_model(config, seed)
    with torch.no_grad():
        model.embedding.weight.mul_(25)
        for layer in model.layers:
            # States that matter within tens of tokens, and outlive a chunk.
            layer.dt_bias.add_(1.0)
            layer.A_log.sub_(3.0)
    tensors = stored_tensors(model)
    if config.tie_embeddings:
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    folder.mkdir(parents=True, exist_ok=True)
    settings = state_spaces_config(config)
    limits = mamba(config).dt_limit
    if limits != (0.0, float("inf")):
        settings["ssm_cfg"] = {**settings["ssm_cfg"], "dt_limit": list(limits)}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder), model


def random_ids(samples: int, tokens: int, vocab: int = 256, seed: int = 0) -> Tensor:
    """Token windows with the skewed frequencies of a text."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(samples, tokens, generator=g).square() * vocab).long()


class TensorSink(dict[str, Tensor]):
    """Quantized tensors in memory."""

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self, f"{name} was written twice"
        self[name] = tensor


@dataclass(frozen=True)
class Quantized:
    """Everything a recipe makes of a checkpoint."""

    config: Description
    recipe: QuantConfig
    ids: Tensor
    statistics: dict[str, Tensor]
    tensors: TensorSink
    saturation: dict[str, float]
    model: QuantizedModel


def apply_recipe(checkpoint: Checkpoint, recipe: QuantConfig, ids: Tensor) -> Quantized:
    """Calibrate and quantize in memory."""
    config = checkpoint.description.adapted(recipe)
    statistics = calibrate(checkpoint, recipe, ids) if recipe.quantized else {}
    sink = TensorSink()
    saturation = quantize(checkpoint, recipe, statistics, ids, sink)
    model = QuantizedModel(quantized_description(checkpoint, recipe, statistics), recipe, sink)
    return Quantized(config, recipe, ids, statistics, sink, saturation, model)


TINY_SAMPLES, TINY_TOKENS = 12, 48


class Tiny:
    """Tiny checkpoints and what recipes make of them, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[int, tuple[Checkpoint, FloatModel]] = {}
        self._made: dict[str, Quantized] = {}
        self.ids = random_ids(TINY_SAMPLES, TINY_TOKENS)

    def source(self, ngroups: int = 1) -> tuple[Checkpoint, FloatModel]:
        if ngroups not in self._sources:
            made = write_checkpoint(self._folder / f"{ngroups}", make_config(ngroups))
            self._sources[ngroups] = made
        return self._sources[ngroups]

    def quantized(self, name: str, ngroups: int = 1, **changes: Any) -> Quantized:
        recipe = tiny_recipe(name, **changes)
        key = f"{ngroups} {recipe}"
        if key not in self._made:
            self._made[key] = apply_recipe(self.source(ngroups)[0], recipe, self.ids)
        return self._made[key]


def layer_of(made: Quantized, index: int = 0) -> dict[str, Tensor]:
    prefix = f"layers.{index}."
    return {k[len(prefix) :]: v for k, v in made.tensors.items() if k.startswith(prefix)}


def statistics_of(made: Quantized, index: int = 0) -> dict[str, Tensor]:
    prefix = f"layers.{index}."
    return {k[len(prefix) :]: v for k, v in made.statistics.items() if k.startswith(prefix)}


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; fails on anything that is not finite."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    return float((got.double() - want.double()).norm() / want.double().norm())
