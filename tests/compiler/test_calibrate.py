"""What is read and observed before anything is quantized: text windows, statistics, scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import (
    TINY_TOKENS,
    TensorSink,
    Tiny,
    layer_of,
    random_ids,
    statistics_of,
    tiny_recipe,
)
from conftest import mamba
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER
from ssdi8_edge.compile.calibrate import calibrate, fp32_layer
from ssdi8_edge.compile.quantize import quantize
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.spool import TOKENS_PER_BATCH, DeviceSpool, FileSpool, batches
from ssdi8_edge.ground.windows import read_tokens
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2.calibration import PERCENTILE, PERCENTILE_MOMENTUM
from ssdi8_edge.models.kinds.mamba2.clusters import sort_and_cluster
from ssdi8_edge.numerics import hadamard
from ssdi8_edge.numerics.histogram import FRACTIONS, MagnitudeHistogram


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


# ------------------------------------------------------------------------------------------------
# Files and streams
# ------------------------------------------------------------------------------------------------


def test_spool_keeps_its_samples() -> None:
    """Written in any order and overwritten, read in other pieces; FP16 values go in as FP32."""
    values = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0))
    spool = FileSpool((7, 3, 5), torch.float32)
    spool[4:7] = values[4:7].transpose(1, 2).contiguous().transpose(1, 2)  # strided
    spool[0:4] = torch.zeros(4, 3, 5)
    spool[0:4] = values[0:4]
    assert torch.equal(spool[0:7], values)
    assert torch.equal(spool[2:5], values[2:5])
    spool[2:3] = values[2:3].half()
    assert torch.equal(spool[2:3], values[2:3].half().float())
    spool.close()
    with pytest.raises(ValueError, match="closed"):
        _ = spool[0:1]


def test_spool_of_int8_and_its_independence() -> None:
    """What was read may be written to without changing the spool."""
    spool = FileSpool((2, 4), torch.int8)
    spool[0:2] = torch.tensor([[-128, 127, 0, 1], [2, 3, 4, 5]], dtype=torch.int8)
    read = spool[0:2]
    assert read.dtype is torch.int8
    read.zero_()
    assert spool[0:1].tolist() == [[-128, 127, 0, 1]]
    spool.close()


def test_spool_in_device_memory() -> None:
    """The same for what lies where it is computed, and gone when left."""
    with DeviceSpool((2, 4), torch.int8, "cpu") as spool:
        spool[0:1] = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
        spool[1:2] = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
        assert spool[0:2].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert spool[0:1].dtype is torch.int8
    with pytest.raises(AssertionError):
        _ = spool[0:1]


@pytest.mark.parametrize(
    ("samples", "tokens", "sizes"),
    [(5, 1024, [2, 2, 1]), (3, 5000, [1, 1, 1]), (4, 10, [4]), (1, 2048, [1])],
)
def test_batches(samples: int, tokens: int, sizes: list[int]) -> None:
    """All samples once, in order, at most TOKENS_PER_BATCH tokens unless one sample is longer."""
    parts = batches(torch.zeros(samples, tokens))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(samples))


TOKENIZER = DEMO_FOLDER / "tokenizer.json"


def encode(text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(TOKENIZER)).encode(text, add_special_tokens=False).ids
    return ids


def test_read_tokens(tmp_path: Path) -> None:
    """Windows in the order of the text; the rest that fills no window is left out."""
    text = "It was the best of times, it was the worst of times.\n" * 10
    path = tmp_path / "text.txt"
    path.write_text(text)
    ids = encode(text)
    windows = read_tokens(path, TOKENIZER, 20, 100)
    assert windows.dtype is torch.int64
    assert windows.shape == (len(ids) // 20, 20)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert torch.equal(read_tokens(path, TOKENIZER, 20, 2), windows[:2])


def test_read_tokens_of_more_than_one_block(tmp_path: Path) -> None:
    """Three times the block: as if tokenized at once, and reading stops when it has enough."""
    lines = [f"Line {i} of a book, with ünïcödé and a number {i * i}.\n" for i in range(5000)]
    path = tmp_path / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    assert path.stat().st_size > 3 << 16
    ids = encode("".join(lines))
    windows = read_tokens(path, TOKENIZER, 512, 1 << 40)
    assert windows.shape[0] == len(ids) // 512
    assert windows.flatten().tolist() == ids[: windows.numel()]
    with path.open("ab") as file:
        file.write(b"\xff\xfe")  # beyond what two windows need
    assert torch.equal(read_tokens(path, TOKENIZER, 512, 2), windows[:2])


def test_read_tokens_of_a_short_text(tmp_path: Path) -> None:
    """Shorter than a window: one shorter sample. Shorter than 16 tokens: refused."""
    path = tmp_path / "text.txt"
    text = "a b c d e f g h i j k l m n o p q r s t"
    path.write_text(text)
    assert read_tokens(path, TOKENIZER, 2048, 32).tolist() == [encode(text)]
    for short in ("only a few words", ""):
        path.write_text(short)
        with pytest.raises(UsageError, match=r"holds \d+ tokens; .* at least 16"):
            read_tokens(path, TOKENIZER, 2048, 32)


def test_read_tokens_refuses(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no UTF-8: each named with its remedy."""
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc \xff\xfe\x00 def" * 100)
    with pytest.raises(UsageError, match=r"binary\.txt is not UTF-8 text"):
        read_tokens(binary, TOKENIZER, 16, 1)
    with pytest.raises(UsageError, match=r"cannot read .*absent\.txt: No such file"):
        read_tokens(tmp_path / "absent.txt", TOKENIZER, 16, 1)
    with pytest.raises(UsageError, match="Is a directory"):
        read_tokens(tmp_path, TOKENIZER, 16, 1)


# ------------------------------------------------------------------------------------------------
# Histograms
# ------------------------------------------------------------------------------------------------


def squared_error(values: Tensor, end: float) -> float:
    """Of an INT8 quantizer with that range, exactly."""
    step = end / 127
    return float(((values / step).round().clamp(-128, 127) * step - values).square().sum())


@pytest.mark.parametrize("kind", ["normal", "silu", "uniform", "outliers", "tiny"])
def test_best_range(kind: str) -> None:
    """The range that the histogram chooses costs hardly more than the best of those it tried."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 100_000, generator=g, dtype=torch.float64)
    values = {
        "normal": values,
        "silu": torch.nn.functional.silu(3 * values),
        "uniform": torch.rand(2, 100_000, generator=g, dtype=torch.float64) - 0.5,
        "outliers": values.pow(5),
        "tiny": values * 1e-5,
    }[kind]
    values[1] *= 7.0
    absmax = values.abs().amax(1)
    histogram = MagnitudeHistogram(2, values.device)
    for part in values.split(30_000, 1):
        histogram.add(part)
    chosen = histogram.best_range(absmax)
    for group in range(2):
        errors = [squared_error(values[group], float(absmax[group]) * f) for f in FRACTIONS]
        assert squared_error(values[group], float(chosen[group])) < 1.01 * min(errors)
    if kind == "uniform":
        assert torch.equal(chosen, absmax)
    elif kind == "normal":
        assert bool((chosen < 0.95 * absmax).all())


def test_best_range_of_zeros() -> None:
    """Nothing to represent: the range is the (zero) maximum, and not NaN."""
    histogram = MagnitudeHistogram(1, torch.device("cpu"))
    histogram.add(torch.zeros(1, 50))
    assert histogram.best_range(torch.zeros(1)).tolist() == [0.0]


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.9995])
def test_quantile(fraction: float) -> None:
    """To about half the width of a bin, 1.1 %, and the gap between two values."""
    values = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)).double()
    histogram = MagnitudeHistogram(1, values.device)
    histogram.add(values)
    want = values.abs().quantile(fraction, interpolation="higher").float()
    torch.testing.assert_close(histogram.quantile(fraction)[0], want, rtol=0.02, atol=0)


# ------------------------------------------------------------------------------------------------
# Calibration
# ------------------------------------------------------------------------------------------------


def direct_statistics(model: FloatModel, ids: Tensor) -> dict[str, Tensor]:
    """The statistics from the unrotated FP model: one call per layer, FP64, token by token."""
    config = mamba(model.description)
    chunk, found = config.chunk_size, {}
    residual = model.embedding(ids).float()
    for i, block in enumerate(model.layers):
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = value.double()

        wide = residual.double()
        u = wide / (wide.square().mean(-1, keepdim=True) + model.description.norm_eps).sqrt()
        residual, _ = block(residual, None, observe)
        x, dt, b, c = (seen[k] for k in ("x", "dt", "B", "C"))
        rate = -block.A_log.double().exp()
        heads = config.nheads // config.ngroups
        b_h, c_h = b.repeat_interleave(heads, 2), c.repeat_interleave(heads, 2)
        shape = (config.nheads, config.headdim)
        top: dict[str, Tensor] = {
            "u": hadamard.transform(u).abs().amax(),
            "B": b.abs().amax((0, 1, 3)),
            "C": c.abs().amax((0, 1, 3)),
            "B_rotated": hadamard.rotate(b).abs().amax((0, 1, 3)),
            "C_rotated": hadamard.rotate(c).abs().amax((0, 1, 3)),
            "r": hadamard.transform(seen["r"]).abs().amax(),
            "x": x.abs().amax((0, 1)),
            "x_mean": x.abs().mean(1).amax(0),
            "y": seen["y"].abs().amax(),
            "out": hadamard.transform(seen["out"]).abs().amax(),
        }
        percentiles = [row.abs().quantile(PERCENTILE, interpolation="higher") for row in x]
        moving = percentiles[0]
        for percentile in percentiles:
            moving = moving + PERCENTILE_MOMENTUM * (percentile - moving)
        top["x_percentile"] = moving
        wide_u, in_proj = u * block.norm.weight.double(), block.in_proj.weight.double()
        z, projected_x, projected_b, projected_c, dt_raw = (wide_u @ in_proj.t()).split(
            [config.d_inner] * 2 + [config.ngroups * config.d_state] * 2 + [config.nheads], -1
        )
        for name, value in zip(
            ("z", "x", "B", "C", "dt"),
            (z, projected_x, projected_b, projected_c, dt_raw),
            strict=True,
        ):
            top[f"in_proj.{name}"] = value.abs().amax()
        of_states = ("chunk_state", "passed_state")
        for name in ("x_scaled", *of_states, *(f"{k}_rotated" for k in of_states)):
            top[name] = torch.zeros(shape, dtype=torch.float64)
        for name in ("CB", "CB_full"):
            top[name] = torch.zeros(config.nheads, dtype=torch.float64)

        def raise_to(name: str, value: Tensor, top: dict[str, Tensor] = top) -> None:
            top[name] = torch.maximum(top[name], value)

        def see_state(name: str, state: Tensor) -> None:
            raise_to(name, state.abs().amax(-1))
            raise_to(f"{name}_rotated", hadamard.rotate(state).abs().amax(-1))

        for row in range(len(ids)):
            carried = torch.zeros(*shape, config.d_state, dtype=torch.float64)
            for start in range(0, ids.shape[1], chunk):
                stop = min(start + chunk, ids.shape[1])
                see_state("passed_state", carried)
                local = torch.zeros_like(carried)
                for k in range(start, stop):
                    decay = torch.exp(dt[row, k] * rate)[:, None, None]
                    new = torch.einsum("hp,hn->hpn", dt[row, k, :, None] * x[row, k], b_h[row, k])
                    local, carried = decay * local + new, decay * carried + new
                    left = (dt[row, k + 1 : stop] * rate).sum(0)
                    weight = torch.exp(left) * dt[row, k]
                    raise_to("x_scaled", (weight[:, None] * x[row, k]).abs())
                    for m in range(start, stop):
                        product = (c_h[row, m] * b_h[row, k]).sum(-1).abs()
                        raise_to("CB_full", product)
                        if k <= m:
                            raise_to("CB", product)
                see_state("chunk_state", local)
            see_state("passed_state", carried)
        for name in ("CB", "CB_full"):
            top[name] = top[name].unflatten(0, (config.ngroups, -1)).amax(1)
        found |= {f"layers.{i}.{k}": v for k, v in top.items()}
    wide = residual.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + model.description.norm_eps).sqrt()
    found["norm_f"] = hadamard.transform(normed).abs().amax()
    found["embedding"] = model.embedding.weight.double().norm(dim=1).amax()
    return found


@pytest.mark.parametrize("ngroups", [1, 2])
def test_statistics_by_hand(tiny: Tiny, ngroups: int) -> None:
    """Every statistic, short last chunk included; 1e-4 relative: FP32 sums in a rotated basis.

    Ranges of least error lie below the maxima; what they cost is tested on histograms alone.
    """
    checkpoint, model = tiny.source(ngroups)
    ids = random_ids(3, 37, seed=3)
    got = calibrate(checkpoint, tiny_recipe("edge-w8a8"), ids)
    with torch.inference_mode():
        want = direct_statistics(model, ids)
    ranges = {k for k in got if k.endswith("_mse")}
    assert got.keys() - ranges == want.keys()
    assert len(ranges) == 6 * len(model.layers)
    for name in ranges:
        assert bool((got[name] <= got[name.removesuffix("_mse")]).all())
        assert bool((got[name] > 0.1 * got[name.removesuffix("_mse")]).all())
    for name, value in want.items():
        assert got[name].dtype is torch.float32
        torch.testing.assert_close(
            *(got[name].double(), value),
            rtol=0.012 if name.endswith("percentile") else 1e-4,  # a bin of a histogram
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_statistics_are_running_maxima(tiny: Tiny) -> None:
    """Windows in one call or in two, of more than one batch: the maximum of both."""
    checkpoint, _ = tiny.source()
    recipe = tiny_recipe("edge-w8a8")
    ids = random_ids(2 * TOKENS_PER_BATCH // TINY_TOKENS, TINY_TOKENS, seed=4)
    assert len(batches(ids)) > 1
    whole = calibrate(checkpoint, recipe, ids)
    half = len(ids) // 2
    parts = [calibrate(checkpoint, recipe, part) for part in (ids[:half], ids[half:])]
    for name, value in whole.items():
        if not name.endswith(("_mse", "percentile")):
            torch.testing.assert_close(torch.maximum(*(p[name] for p in parts)), value)


# ------------------------------------------------------------------------------------------------
# Scales
# ------------------------------------------------------------------------------------------------


def doctored(tiny: Tiny, name: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics that are all different, and the tensors of the first layer made with them."""
    made = tiny.quantized(name, 2, **changes)
    names = sorted({k.split(".", 2)[-1] for k in made.statistics})
    factors = {name: 1.0 + 0.05 * i for i, name in enumerate(names)}
    # Else they would always exceed the local states.
    factors["passed_state"] = factors["passed_state_rotated"] = 1.0
    statistics = {k: v * factors[k.split(".", 2)[-1]] for k, v in made.statistics.items()}
    sink = TensorSink()
    quantize(tiny.source(2)[0], made.recipe, statistics, made.ids, sink)
    changed = dataclasses.replace(made, statistics=statistics, tensors=sink)
    return layer_of(changed), statistics_of(changed)


# Method, changes of its recipe, scale -> the statistic that it is made of: where there are two, the
# larger. Ours takes ranges of least error; the release local states and the full square of CB.
STATISTIC_OF: list[tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = [
    (
        "edge-w8a8",
        {},
        {"b": ("B_rotated_mse",), "c": ("C_rotated_mse",), "cb": ("CB",)},
    ),
    (
        "edge-w8a8",
        {"scaling": "static", "input_scaling": "static", "clip": "absmax"},
        {
            "u": ("u",),
            "r": ("r",),
            "b": ("B_rotated",),
            "c": ("C_rotated",),
            "cb": ("CB",),
            "x": ("x_scaled",),
            "state": ("chunk_state_rotated", "passed_state_rotated"),
        },
    ),
    (
        "ssdi8-w8a8",
        {},
        {
            "u": ("u",),
            "r": ("r",),
            "b": ("B",),
            "c": ("C",),
            "cb": ("CB_full",),
            "x": ("x_scaled",),
            "state": ("chunk_state",),
        },
    ),
]


@pytest.mark.parametrize(("method", "changes", "sources"), STATISTIC_OF)
def test_activation_scales(
    tiny: Tiny, method: str, changes: dict[str, Any], sources: dict[str, tuple[str, ...]]
) -> None:
    """Which statistic becomes which scale, and that there are no more scales."""
    p, s = doctored(tiny, method, **changes)
    assert {k for k in p if k.endswith("_scale") and "." not in k} == {
        f"{k}_scale" for k in sources
    }
    for name, statistics in sources.items():
        absmax = torch.stack([s[each] for each in statistics]).amax(0)
        assert all(len(statistics) == 1 or not torch.equal(absmax, s[k]) for k in statistics)
        assert torch.equal(p[f"{name}_scale"].flatten(), (absmax / 127).flatten()), name


def test_storage_only_activation_scales(tiny: Tiny) -> None:
    """Five scales of in_proj's output, one of x from a percentile, and those of B and C."""
    p, s = doctored(tiny, "quamba-w8a8")
    sizes = {"z": 128, "x": 128, "B": 32, "C": 32, "dt": 8}
    want = torch.cat([s[f"in_proj.{k}"].expand(n) for k, n in sizes.items()]) / 127
    assert torch.equal(p["in_proj_scale"], want)
    assert torch.equal(p["x_scale"], (s["x_percentile"] / 127).expand(128))
    assert torch.equal(p["b_scale"], (s["B"].amax() / 127).expand(2))


def test_clustered_activation_scales(tiny: Tiny) -> None:
    """Each channel of the reordered x gets the largest of its cluster, 16 in each SSD group."""
    p, s = doctored(tiny, "quamba2-w8a8")
    order = sort_and_cluster(s["x_mean"], 2)
    moved = s["x"][order.heads[:, None], order.channels]
    for cluster in order.clusters.unique():
        inside = order.clusters == cluster
        got = p["x_scale"].reshape(inside.shape)[inside]
        assert torch.equal(got, (moved[inside].amax() / 127).expand(len(got)))
    assert torch.equal(p["b_scale"], s["B"] / 127)


def test_the_weight_of_the_gated_norm_is_the_checkpoints(tiny: Tiny) -> None:
    p, _ = doctored(tiny, "ssdi8-w8a8")
    gamma = fp32_layer(tiny.source(2)[0], 0, "cpu")["gate_norm.weight"]
    assert torch.equal(p["gate_norm.weight"], gamma)


@pytest.mark.parametrize("which", ["bc", "x"])
def test_one_scale_per_tensor(tiny: Tiny, which: str) -> None:
    """Granularity "tensor" repeats the largest in the same shape, and in its own family only."""
    fine = layer_of(tiny.quantized("edge-w8a8", 2, scaling="static"))
    changes = {"scaling": "static", f"{which}_granularity": "tensor"}
    coarse = layer_of(tiny.quantized("edge-w8a8", 2, **changes))
    families = {"bc": ["b", "c", "cb"], "x": ["x", "state"]}
    for family, names in families.items():
        for name in names:
            got, was = coarse[f"{name}_scale"], fine[f"{name}_scale"]
            assert got.shape == was.shape
            collapsed = was.amax().expand(was.shape)
            assert not torch.equal(was, collapsed)
            assert torch.equal(got, collapsed if family == which else was), name
