"""Time to first token and per token of a whole model on this GPU, through the CUDA kernels.

    python benchmarks/bench_model.py --models 2.7b --seq-lens 256 1024 2048 --out model.csv
    python benchmarks/bench_model.py --models 2.7b --sms 8

Weights are random, of a published model's sizes: times do not depend on values. "w8a8" and "w4a8"
are the recipes edge-*; "fp16" is edge-w8a8 with in_proj and out_proj as FP16 products of cuBLAS and
SSD with FP16 operands (`scaling = "none"`): B, C and the inputs of the linears stay INT8, these
cast before each product. Both times include the copy of the logits to the host; shapes are replayed
as CUDA graphs, median of repeats.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from green_context import stream_of_multiprocessors
from torch import Tensor

from ssdi8_edge.local.gpu_backend import GpuBackend
from ssdi8_edge.models.block import Int8Input, Parameters, linear
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.network import QuantizedModel
from ssdi8_edge.ops import kernel_library
from ssdi8_edge.recipes.presets import find_method
from ssdi8_edge.recipes.recipe import QuantConfig

# d_model and layers of state-spaces/mamba2-*.
SIZES = {"130m": (768, 24), "370m": (1024, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
VOCABULARY = 50288
FORMATS = ("w8a8", "w4a8", "fp16")


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def fill(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, device="cuda")


def linear_tensors(name: str, n_in: int, n_out: int, recipe: QuantConfig) -> dict[str, Tensor]:
    tensors = {f"{name}.scale": fill(1 / (74 * n_in**0.5), n_out)}
    tensors[f"{name}.bias"] = fill(0.0, n_out)
    if recipe.linear == "w4":
        groups = n_in // recipe.group_size
        tensors[f"{name}.packed"] = int8(n_out, n_in // 2)
        tensors[f"{name}.group_scale"] = fill(15.0, n_out, groups).to(torch.int8)
    else:
        tensors[f"{name}.weight"] = int8(n_out, n_in)
    return tensors


def layer_tensors(d_model: int, block: Mamba2, recipe: QuantConfig) -> dict[str, Tensor]:
    heads, groups = block.nheads, block.ngroups
    rows = sum(block.parts.values())
    return {
        **linear_tensors("in_proj", d_model, rows, recipe),
        **linear_tensors("out_proj", block.d_inner, d_model, recipe),
        "conv1d.weight": torch.randn(block.conv_dim, block.d_conv, device="cuda"),
        "conv1d.bias": fill(0.0, block.conv_dim),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, device="cuda"),
        "A": -torch.linspace(1.0, 16.0, heads, device="cuda"),
        "D": fill(1.0, heads),
        "gate_norm.weight": fill(1.0, block.d_inner),
        **{name: fill(0.03, groups) for name in ("b_scale", "c_scale")},
        "cb_scale": fill(0.1, groups),
    }


def random_model(size: str, kind: str) -> QuantizedModel:
    d_model, layers = SIZES[size]
    block = Mamba2(d_inner=2 * d_model)
    model = Description(d_model=d_model, vocab_size=VOCABULARY, blocks=(block,) * layers)
    # The same tables for all: what is compared is the linear layers of blocks.
    tables = {"embedding": "fp16", "lm_head": "fp16"}
    recipe = find_method("edge-w4a8" if kind == "w4a8" else "edge-w8a8").choosing(**tables)
    if kind == "fp16":
        recipe = replace(recipe, scaling="none")
    tensors = {
        f"layers.{i}.{name}": tensor
        for i in range(layers)
        for name, tensor in layer_tensors(d_model, block, recipe).items()
    }
    tensors["embedding.weight"] = torch.randn(VOCABULARY, d_model, device="cuda").half()
    tensors["norm_f.weight"] = fill(1.0, d_model)
    if kind == "fp16":
        linears = [name for name in tensors if name.endswith("_proj.weight")]
        tensors |= {name: tensors[name].half() for name in linears}
    return QuantizedModel(model, recipe, tensors, fp16_linear if kind == "fp16" else linear)


def fp16_linear(p: Parameters, name: str, x: Int8Input, recipe: QuantConfig) -> Tensor:
    """For the format "fp16": the products of linear layers, in FP16."""
    return torch.nn.functional.linear(x.q.half(), p[f"{name}.weight"])


def measure(backend: GpuBackend, length: int, steps: int, repeats: int) -> dict[str, float]:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, length), dtype=np.int32)
    one = np.array([[1]], np.int32)

    def first_token() -> tuple[float, Mapping[str, Any]]:
        states = backend.zero_states(1)
        torch.cuda.synchronize()
        started = time.perf_counter()
        _, states = backend.forward(ids, states)
        return time.perf_counter() - started, states

    def per_token(states: Mapping[str, Any]) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            _, states = backend.forward(one, states)
        return (time.perf_counter() - started) / steps

    for _ in range(3):  # eager, captured, replayed
        per_token(first_token()[1])
    results = []
    for _ in range(repeats):
        ttft, states = first_token()
        results.append((ttft, per_token(states)))
    ttft, tpot = (statistics.median(values) * 1e3 for values in zip(*results, strict=True))
    return {"ttft_ms": ttft, "tpot_ms": tpot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["2.7b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--sms",
        type=int,
        help="run on so many multiprocessors; kernels still choose their form by the whole GPU",
    )
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    if not kernel_library.available():
        sys.exit("needs a CUDA device and libssdi8_kernels.so (cmake -S plugins -B plugins/build)")
    if options.sms:
        torch.cuda.set_stream(stream_of_multiprocessors(options.sms))
    gpu = torch.cuda.get_device_name()
    processors = options.sms or torch.cuda.get_device_properties(0).multi_processor_count
    print(f"{gpu}, {processors} multiprocessors")
    rows = []
    for size in options.models:
        for kind in options.formats:
            backend = GpuBackend(random_model(size, kind))
            for length in options.seq_lens:
                row = {"gpu": gpu, "sms": processors, "model": size, "format": kind}
                row |= {"tokens": length}
                row |= measure(backend, length, options.steps, options.repeats)
                row["gpu_gb"] = backend.gpu_bytes / 1e9
                rows.append(row)
                print(
                    f"{size:5} {kind:12} L={length:5}  TTFT {row['ttft_ms']:8.2f} ms"
                    f"  TPOT {row['tpot_ms']:6.3f} ms  {row['gpu_gb']:.2f} GB",
                    flush=True,
                )
            backend.close()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )


if __name__ == "__main__":
    main()
