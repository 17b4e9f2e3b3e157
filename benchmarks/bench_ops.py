"""Times the CUDA kernels on the shapes of real models and writes one CSV row per case.

    python benchmarks/bench_ops.py --models 2.7b --ops linear linear_w4 --check --out ops.csv

A case is captured in a CUDA graph that runs over several sets of inputs, together larger than the
L2 cache, so that each launch finds its data in device memory as it would inside a model. The time
is that of a replay over its launches: the median, and the 10th and 90th percentile of the replays.
GB/s counts each tensor once; it is set against a large device-to-device copy, TOP/s against a large
`torch._int_mm`, both measured in the same run. `copy_us` is a copy that moves as many bytes as the
case, timed in the same way: the launch and the latency of a small case are in both. `library_us` is
`torch._int_mm` (cuBLASLt) on the same operands, without the scale, bias and FP16 output that the
kernel includes. `layer` "fp16" of an SSD op is its own counterpart with FP16 operands.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import mamba_peer
from green_context import stream_of_multiprocessors

from ssdi8_edge.ops import OPS, kernel_library

REPLAYS = 15
CHUNK = 256
MAX_SETS = 24


@dataclass(frozen=True)
class Sizes:
    """The widths of a Mamba-2 model with headdim 64, d_state 128 and one group."""

    d_model: int
    batch: int = 1  # of the SSD ops; the others see tokens only

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 256

    @property
    def d_in_proj(self) -> int:
        return self.d_inner + self.conv_dim + self.d_inner // 64

    @property
    def nheads(self) -> int:
        return self.d_inner // 64


MODELS = {"130m": Sizes(768), "1.3b": Sizes(2048), "2.7b": Sizes(2560)}


@dataclass(frozen=True)
class Case:
    """One shape of one op: `inputs` draws a fresh set, all tensors of which are read once."""

    op: str  # in ops.OPS
    label: str
    inputs: Callable[[], tuple[Tensor, ...]]
    attributes: dict[str, Any]
    read_bytes: int = 0  # where the kernel reads only part of its inputs
    operations: int = 0
    library: Callable[..., Any] | None = None  # called like the op


def half(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16)


def single(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8)


def linear_shapes(s: Sizes) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs)."""
    return {"in_proj": (s.d_model, s.d_in_proj), "out_proj": (s.d_inner, s.d_model)}


def token_scales(tokens: int) -> Tensor:
    return single(1, tokens, 1).abs() * 0.01


def int_mm(x: Tensor, token_scale: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return torch._int_mm(x[0], weight.t())


def rms_norm_cases(s: Sizes, tokens: int) -> Iterable[Case]:
    shape = (1, tokens, s.d_model)
    attributes = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}
    yield Case("Ssdi8RmsNorm", "", lambda: (half(*shape), single(*shape)), attributes)


def linear_cases(s: Sizes, tokens: int) -> Iterable[Case]:
    for name, (n_in, n_out) in linear_shapes(s).items():
        yield Case(
            "Ssdi8Linear",
            name,
            lambda n_in=n_in, n_out=n_out: (
                int8(1, tokens, n_in),
                token_scales(tokens),
                int8(n_out, n_in),
                single(n_out).abs() * 0.01,
                single(n_out),
            ),
            {},
            operations=2 * tokens * n_in * n_out,
            library=int_mm if tokens > 16 else None,
        )


def linear_w4_cases(s: Sizes, tokens: int) -> Iterable[Case]:
    """As `edge-w4a8` has it, with integer scales of groups of 128, and with FP16 ones."""
    kinds = (("", torch.int8, 32), ("/128", torch.int8, 128), ("/h", torch.float16, 128))
    for name, (n_in, n_out) in linear_shapes(s).items():
        for label, kind, group in kinds:
            yield Case(
                "Ssdi8LinearW4",
                name + label,
                lambda n_in=n_in, n_out=n_out, kind=kind, group=group: (
                    int8(1, tokens, n_in),
                    token_scales(tokens),
                    int8(n_out, n_in // 2),
                    torch.randint(1, 17, (n_out, n_in // group), device="cuda").to(kind),
                    single(n_out).abs() * 0.01,
                    single(n_out),
                ),
                {"group_size": group},
                operations=2 * tokens * n_in * n_out,
            )


def causal_conv1d_cases(s: Sizes, tokens: int) -> Iterable[Case]:
    yield Case(
        "Ssdi8CausalConv1d",
        "",
        lambda: (
            half(1, tokens, s.d_in_proj),
            half(1, 3, s.conv_dim),
            single(s.conv_dim, 4),
            single(s.conv_dim),
            torch.full((1,), 0.02, device="cuda"),
            torch.full((1,), 0.02, device="cuda"),
        ),
        {
            "d_inner": s.d_inner,
            "conv_dim": s.conv_dim,
            "d_conv": 4,
            "ngroups": 1,
            "rotation": "hadamard",
            "rounding": "half_even",
        },
        read_bytes=(tokens + 3) * s.conv_dim * 2 + s.conv_dim * 20,
    )


def rms_norm_gated_cases(s: Sizes, tokens: int) -> Iterable[Case]:
    yield Case(
        "Ssdi8RmsNormGated",
        "",
        lambda: (half(1, tokens, s.d_inner), half(1, tokens, s.d_in_proj), single(s.d_inner)),
        {
            "eps": 1e-5,
            "d_inner": s.d_inner,
            "ngroups": 1,
            "rounding": "half_even",
            "scaling": "dynamic",
        },
        read_bytes=tokens * s.d_inner * 4 + s.d_inner * 4,
    )


def ssd_values(s: Sizes, tokens: int) -> dict[str, Tensor]:
    """Inputs of the SSD ops by name, of plausible size; states and dt are those of the kernels."""
    b, h, column = s.batch, s.nheads, s.d_inner + s.conv_dim
    values = {
        "x": half(b, tokens, s.d_inner),
        "b_q": int8(b, tokens, 128),
        "c_q": int8(b, tokens, 128),
        "zxbcdt": half(b, tokens, column + h),
        "ssm_state": half(b, h, 64, 128),
        "dt_bias": torch.linspace(-5.0, -2.0, h, device="cuda"),
        "A": -torch.linspace(16.0, 1.0, h, device="cuda"),
        "D": single(h),
    }
    for name, scale in (("b_scale", 0.02), ("c_scale", 0.02), ("cb_scale", 1.0)):
        values[name] = torch.full((1,), scale, device="cuda")
    return values


def ssd_operations(s: Sizes, tokens: int) -> int:
    """Multiplications and additions of the products in SSD, causal halves alone: the chunk states,
    C times the states, CB times x for each head, and CB for the group."""
    p, n, positions = 64, 128, (min(CHUNK, tokens) + 1) / 2
    return int(2 * s.batch * tokens * (s.nheads * p * (2 * n + positions) + n * positions))


def ssd_inputs(op: str) -> list[str]:
    """The scales that come last are inputs of scaling "static" only."""
    return [name for name in OPS[op].inputs if name not in ("x_scale", "state_scale")]


def ssd_attributes(s: Sizes, op: str, scaling: str) -> dict[str, Any]:
    attributes = {
        "chunk_size": CHUNK,
        "nheads": s.nheads,
        "headdim": 64,
        "ngroups": 1,
        "d_state": 128,
        "dt_column": s.d_inner + s.conv_dim,
        "dt_min": 0.0,
        "dt_max": float("inf"),
        "gate": "fp32",
        "rounding": "half_even",
        "scaling": scaling,
    }
    return {k: attributes[k] for k in OPS[op].attributes}


def ssd_module_values(s: Sizes, tokens: int, scaling: str) -> dict[str, Tensor]:
    """`ssd_values` and what the modules before compute from them."""
    values = ssd_values(s, tokens)

    def run_op(op: str) -> Any:
        kernel = OPS[op].runnable_kernel()
        assert kernel is not None
        return kernel(*(values[name] for name in ssd_inputs(op)), **ssd_attributes(s, op, scaling))

    values["dt"], values["a"] = run_op("Ssdi8ChunkCumsum")
    values["states"] = run_op("Ssdi8ChunkState")
    values["passed"], values["passed_scale"], _ = run_op("Ssdi8StatePassing")
    return values


def ssd_cases(op: str, modules: bool) -> Callable[[Sizes, int], Iterable[Case]]:
    """`modules`: the op reads what other SSD ops compute. dt is H columns of its tensor."""

    def cases(s: Sizes, tokens: int) -> Iterable[Case]:
        names = ssd_inputs(op)

        def make(scaling: str) -> dict[str, Tensor]:
            return ssd_module_values(s, tokens, scaling) if modules else ssd_values(s, tokens)

        # Also with FP16 operands, what INT8 has to beat; the recurrence of one token has none.
        choices = "scaling" in OPS[op].attributes and (modules or tokens > 1)
        for scaling in ("dynamic", "none") if choices else ("dynamic",):
            values = make(scaling)
            read = size(
                values[name]
                for name in names
                if name != "zxbcdt" and (name, scaling) != ("passed_scale", "none")
            )
            if "zxbcdt" in names:
                read += 2 * s.batch * tokens * s.nheads
            yield Case(
                op,
                "fp16" if scaling == "none" else "",
                lambda scaling=scaling: tuple(map(make(scaling).__getitem__, names)),
                ssd_attributes(s, op, scaling),
                read_bytes=read,
                operations=ssd_operations(s, tokens) if op == "Ssdi8SsdScan" else 0,
            )

    return cases


CASES: dict[str, Callable[[Sizes, int], Iterable[Case]]] = {
    "rms_norm": rms_norm_cases,
    "linear": linear_cases,
    "linear_w4": linear_w4_cases,
    "causal_conv1d": causal_conv1d_cases,
    "rms_norm_gated": rms_norm_gated_cases,
    "chunk_cumsum": ssd_cases("Ssdi8ChunkCumsum", modules=False),
    "chunk_state": ssd_cases("Ssdi8ChunkState", modules=True),
    "state_passing": ssd_cases("Ssdi8StatePassing", modules=True),
    "chunk_scan": ssd_cases("Ssdi8ChunkScan", modules=True),
    "ssd_scan": ssd_cases("Ssdi8SsdScan", modules=False),
}
PEERS = Path(__file__).parent / "h100" / "peers.csv"


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def size(values: Iterable[Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in values)


def replay_times(call: Callable[..., Any], sets: list[tuple[Tensor, ...]]) -> list[float]:
    """Microseconds per call, one value per replay of a graph that calls once per set."""
    call(*sets[0])
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # Work captured on the stream of some multiprocessors stays on them.
    own = None if stream == torch.cuda.default_stream() else stream
    with torch.cuda.graph(graph, stream=own):
        for inputs in sets:
            call(*inputs)
    times = []
    for _ in range(REPLAYS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(sets))
    return times[2:]


def peer_times() -> dict[tuple[str, ...], dict[str, float]]:
    """(multiprocessors, op, model, batch, tokens) -> microseconds of each peer."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    with PEERS.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[k] for k in ("sms", "op", "model", "batch", "tokens"))
            times.setdefault(key, {})[row["peer"]] = float(row["us"])
    return times


def ceilings() -> tuple[float, float]:
    """Bytes/s of a large copy (read plus write), INT8 operations/s of a large `torch._int_mm`."""
    source = torch.ones(2**27, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # The copy engine's way and a kernel's way; which is faster depends on the chip.
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    copy = min(statistics.median(replay_times(c, [()] * 4)) for c in copies)
    n = 8192
    operands = [(int8(n, n), int8(n, n)) for _ in range(2)]
    product = statistics.median(replay_times(lambda a, b: torch._int_mm(a, b.t()), operands))
    return 2 * size([source]) / copy * 1e6, 2 * n**3 / product * 1e6


def check(case: Case, inputs: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> str:
    """Fraction of values that differ from the reference, and the largest INT8 difference."""
    with kernel_library.references_only():
        want = tensors(OPS[case.op].reference(*inputs, **case.attributes))
    differing = sum(int((g != w).sum()) for g, w in zip(got, want, strict=True))
    worst = [
        int((g.int() - w.int()).abs().max())
        for g, w in zip(got, want, strict=True)
        if g.dtype is torch.int8
    ]
    return f"{differing / sum(g.numel() for g in got):.1e}/{max(worst, default=0)}"


def mamba_time(case: Case, sets: list[tuple[Tensor, ...]]) -> float | None:
    """Microseconds of state-spaces/mamba on the same inputs in FP16; None if it has no such op."""
    names = OPS[case.op].inputs  # the last ones may be left out
    peers = [
        mamba_peer.peer_of(case.op, dict(zip(names, inputs, strict=False)), case.attributes)
        for inputs in sets
    ]
    if peers[0] is None:
        return None
    return statistics.median(replay_times(peers[0][0], [peer[1] for peer in peers if peer]))


def run(case: Case, variant: int, checked: bool, with_mamba: bool) -> dict[str, Any]:
    kernel = OPS[case.op].runnable_kernel(variant)
    assert kernel is not None
    attributes = case.attributes
    first = case.inputs()
    outputs = tensors(kernel(*first, **attributes))
    moved = (case.read_bytes or size(first)) + size(outputs)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    n_sets = min(max(2 * cache // moved + 1, 4), MAX_SETS)
    sets = [first, *(case.inputs() for _ in range(n_sets - 1))]
    times = sorted(replay_times(lambda *i: kernel(*i, **attributes), sets))
    median = statistics.median(times)
    pairs = [
        tuple(torch.ones(moved // 8 + 1, device="cuda") for _ in range(2)) for _ in range(n_sets)
    ]
    row = {
        "us": median,
        "p10_us": times[len(times) // 10],
        "p90_us": times[-1 - len(times) // 10],
        "gb_s": moved / median / 1e3,
        "top_s": case.operations / median / 1e6,
        "copy_us": statistics.median(replay_times(lambda a, b: b.copy_(a), pairs)),
        "library_us": "",
        "mamba_us": "",
        "check": check(case, first, outputs) if checked else "",
    }
    if with_mamba and (mamba := mamba_time(case, sets)):
        row["mamba_us"] = mamba
    if case.library is not None:
        row["library_us"] = statistics.median(replay_times(case.library, sets))
    return row


def describe(row: dict[str, Any], beside: dict[str, Any] | None) -> str:
    """`beside` is the row before, of the same shape with INT8 operands."""
    library = f"{row['us'] / row['library_us']:5.2f}x library" if row["library_us"] else ""
    if row["mamba_us"]:
        library = f"{row['mamba_us'] / row['us']:5.2f}x mamba in this run"
    if beside is not None:
        library += f", {row['us'] / beside['us']:.2f}x the time of INT8"
    return (
        f"{row['op']:15}{row['model']:5}{row['layer']:11}{row['tokens']:5} v{row['variant']}"
        f"{row['us']:9.1f} us {row['gb_s']:6.0f} GB/s {row['copy_us'] / row['us']:4.0%} of a copy "
        f"{row['top_s']:5.0f} TOP/s {row['of_int_mm']:4.0%} {library} {row['check']} {row['peers']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 256, 512, 1024, 2048])
    parser.add_argument(
        "--variants", nargs="+", type=int, default=[0], help="force tiles of the linear kernels"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences, for the SSD ops")
    parser.add_argument(
        "--sms",
        type=int,
        help="run on so many multiprocessors; kernels still choose their form by the whole GPU",
    )
    parser.add_argument("--mamba", type=Path, help="source tree of state-spaces/mamba, to time too")
    parser.add_argument("--check", action="store_true", help="compare with the torch reference")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    if not kernel_library.available():
        sys.exit("needs a CUDA device and libssdi8_kernels.so (cmake -S plugins -B plugins/build)")

    if options.mamba:
        mamba_peer.load(options.mamba)
    if options.sms:
        torch.cuda.set_stream(stream_of_multiprocessors(options.sms))
    processors = options.sms or torch.cuda.get_device_properties(0).multi_processor_count
    peers = peer_times() if "H100" in torch.cuda.get_device_name() else {}
    copy_rate, product_rate = ceilings()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: copy {copy_rate / 1e9:.0f} GB/s, int_mm {product_rate / 1e12:.0f} TOP/s")
    rows = []
    for model in options.models:
        for op in options.ops:
            for tokens in options.tokens:
                for case in CASES[op](replace(MODELS[model], batch=options.batch), tokens):
                    variants = options.variants if op.startswith("linear") else [0]
                    for variant in variants:
                        if variant == 1 and tokens > 8:
                            continue
                        result = run(case, variant, options.check, options.mamba is not None)
                        key = (str(processors), op, model, str(options.batch), str(tokens))
                        times = peers.get(key, {})
                        row = {
                            "gpu": gpu,
                            "op": op,
                            "model": model,
                            "layer": case.label,
                            "tokens": tokens,
                            "variant": variant,
                            "batch": options.batch,
                            "sms": processors,
                            **result,
                            "peers": " ".join(
                                f"{peer} {us / result['us']:.2f}x" for peer, us in times.items()
                            ),
                            "of_copy": result["gb_s"] * 1e9 / copy_rate,
                            "of_int_mm": result["top_s"] * 1e12 / product_rate,
                        }
                        beside = rows[-1] if case.label == "fp16" else None
                        rows.append(row)
                        print(describe(row, beside), flush=True)
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
