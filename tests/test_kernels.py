"""CUDA kernels against the torch references, on a GPU or else emulated on the CPU.

Each table is a base row and rows that change one thing. Outputs are allocated full of garbage with
a guard behind them; columns that a kernel must not read hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import kernel_emulator
import pytest
import torch
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error, UsageError
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.numerics.int8 import scale_from_absmax
from ssdi8_edge.ops import OPS, kernel_library
from ssdi8_edge.ops.kernel_limits import require_kernels
from ssdi8_edge.ops.linear import unpack_w4

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        GPU and kernel_library.find_library() is None, reason="libssdi8_kernels.so is not built"
    ),
    pytest.mark.skipif(
        not GPU and kernel_emulator.COMPILER is None,
        reason="no CUDA device, and no g++ to emulate one",
    ),
]

GUARD = 1 << 14  # more than a row of any output
GARBAGE = 0xA5
# Where the reference evaluates exp, a root or a sum in FP64 and the kernel in FP32, a value that
# falls on a rounding boundary may go to the other side: by 1 step, in this fraction of the values
# (measured on an H100: rms_norm 8e-7, gated norm 7e-6, convolution 6e-5).
BOUNDARY_FRACTION = 5e-4
# Of the largest value of a token, for the same reason.
TOKEN_SCALE_TOLERANCE = 4e-6


needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
needs_emulation = pytest.mark.skipif(GPU, reason="shown by the emulation alone")
# Of multiplications, roughly; half a second of one core.
MOST_EMULATED = 70e6
# Of a weight whose every value is looked at.
EXPANDED = 4096 if GPU else 128


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The built library on a GPU, else the emulated one."""
    if GPU:
        yield
        return
    library = kernel_emulator.build(tmp_path_factory.mktemp("emulator"))
    with kernel_emulator.emulated_kernels(library):
        yield


def skip_unless_affordable(work: float) -> None:
    if not GPU and work > MOST_EMULATED:
        pytest.skip("no CUDA device, and too much to emulate")


@pytest.fixture(autouse=True)
def order(request: pytest.FixtureRequest, kernels: None) -> None:
    """Emulated, every test runs the threads of a block in an order of its own."""
    if not GPU:
        kernel_emulator.configure(seed=crc32(request.node.name.encode()))


@contextmanager
def threads_in_order(seed: int) -> Iterator[None]:
    """Emulated, the threads of a block take turns in this order; on a GPU as they come."""
    if not GPU:
        kernel_emulator.configure(seed=seed)
    yield
    if not GPU:
        kernel_emulator.configure()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """`torch.empty` gives garbage with a guard behind it; on leaving, the guards are checked."""
    guards: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros

        def empty(*size: Any, dtype: torch.dtype, device: Any) -> Tensor:
            shape = size[0] if not isinstance(size[0], int) else size
            n = torch.Size(shape if isinstance(shape, tuple) else (shape,)).numel() * dtype.itemsize
            memory = zeros(n + GUARD, dtype=torch.uint8, device=device).fill_(GARBAGE)
            guards.append(memory[n:])
            return memory[:n].view(dtype).view(shape)

        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda t: empty(t.shape, dtype=t.dtype, device=t.device))
        yield
    assert all(bool((guard == GARBAGE).all()) for guard in guards), "written past an output's end"


def steps(values: Tensor) -> Tensor:
    """Integers that count representable values, so that neighbours differ by 1."""
    if values.dtype is not torch.float16:
        return values.to(torch.int64)
    assert not values.isnan().any()
    bits = values.view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_close(got: Tensor, want: Tensor, max_fraction: float = 0.0) -> None:
    """At most 1 representable step apart, and that in at most `max_fraction` of the values.

    FP32: `max_fraction` apart at most, relative to the value.
    """
    assert got.dtype is want.dtype and got.shape == want.shape
    if got.dtype is torch.float32:
        torch.testing.assert_close(got, want, rtol=max_fraction, atol=0.0)
        return
    difference = (steps(got) - steps(want)).abs()
    worst = int(difference.max())
    fraction = float((difference > 0).double().mean())
    allowed = max_fraction + (1 / got.numel() if max_fraction else 0)
    if worst > (1 if max_fraction else 0) or fraction > allowed:
        where = tuple(int(i) for i in torch.nonzero(difference == worst)[0])
        raise AssertionError(
            f"off by {worst} at {where}: {got[where]} for {want[where]}; fraction {fraction:.2e}"
        )


def kernel_of(op: str, variant: int = 0) -> Callable[..., Any]:
    kernel = kernel_library.kernel_for(OPS[op], variant)
    assert kernel is not None
    return kernel


def reference(op: str, *inputs: Tensor, **attributes: Any) -> Any:
    """Without kernels inside: the reference of SsdScan calls ops."""
    with kernel_library.references_only():
        return OPS[op].reference(*inputs, **attributes)


def compare(
    op: str,
    *inputs: Tensor,
    fractions: tuple[float, ...] = (0.0,),
    variant: int = 0,
    **attributes: Any,
) -> Any:
    """Run the op's kernel and its reference; one fraction per output."""
    with guarded_allocations():
        got = kernel_of(op, variant)(*inputs, **attributes)
        synchronize()
    want = reference(op, *inputs, **attributes)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
    for (g, w), fraction in zip(pairs, fractions, strict=True):
        assert_close(g, w, fraction)
    return got


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def random_int8(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator, device=DEVICE, dtype=torch.int8)


# ------------------------------------------------------------------------------------------------
# Residual add and RMSNorm
# ------------------------------------------------------------------------------------------------

NORM_FRACTIONS = (0.0, BOUNDARY_FRACTION, TOKEN_SCALE_TOLERANCE)


def token_scaling(scaling: str, scale: float) -> list[Tensor]:
    """The static scale of all tokens; with scaling "dynamic" there is none."""
    return [torch.tensor([scale], device=DEVICE)] if scaling == "static" else []


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "magnitude", "scale", "rounding"),
    [
        (1, 5, 768, 1.0, 0.03, "half_even"),
        (1, 1, 768, 1.0, 0.03, "half_even"),  # L
        (1, 255, 768, 1.0, 0.03, "half_even"),
        (1, 256, 768, 1.0, 0.03, "half_even"),
        (1, 257, 768, 1.0, 0.03, "half_even"),
        (1, 515, 768, 1.0, 0.03, "half_even"),
        (2, 5, 768, 1.0, 0.03, "half_even"),  # batch
        (1, 5, 8, 1.0, 0.03, "half_even"),  # width
        (1, 5, 1024, 1.0, 0.03, "half_even"),
        (1, 257, 2560, 1.0, 0.03, "half_even"),
        (1, 5, 4104, 1.0, 0.03, "half_even"),
        (1, 5, 8192, 1.0, 0.03, "half_even"),
        (1, 5, 768, 0.0, 0.03, "half_even"),  # magnitude
        (1, 5, 768, 1e4, 0.03, "half_even"),
        (1, 5, 768, 1e-7, 0.03, "half_even"),
        (1, 5, 768, 1.0, 0.001, "half_even"),  # saturates
        (1, 5, 768, 1.0, 0.001, "half_away"),
        (1, 515, 768, 1.0, 0.03, "half_away"),  # rounding
    ],
)
def test_rms_norm(
    generator: torch.Generator,
    batch: int,
    length: int,
    d_model: int,
    magnitude: float,
    scale: float,
    rounding: str,
    scaling: str,
) -> None:
    shape = (batch, length, d_model)
    hidden = (normal(generator, *shape, dtype=torch.float32) * magnitude).half()
    residual = normal(generator, *shape, dtype=torch.float32) * magnitude
    compare(
        "Ssdi8RmsNorm",
        hidden,
        residual,
        *token_scaling(scaling, scale),
        eps=1e-5,
        rounding=rounding,
        scaling=scaling,
        fractions=NORM_FRACTIONS,
    )


# ------------------------------------------------------------------------------------------------
# Linear layers: exact
# ------------------------------------------------------------------------------------------------

LINEAR_ROWS = [
    # batch, length, n_in, n_out
    (1, 5, 768, 3352),
    (1, 1, 768, 3352),  # tokens
    (1, 8, 768, 3352),
    (1, 9, 768, 3352),
    (1, 64, 768, 3352),
    (1, 255, 768, 3352),
    (1, 256, 768, 3352),
    (1, 257, 768, 3352),
    (1, 515, 768, 3352),
    (2, 5, 768, 3352),
    (1, 5, 32, 3352),  # inputs; 32 and 96 end inside a step of 64
    (1, 130, 32, 3352),
    (1, 5, 96, 3352),
    (1, 130, 96, 3352),
    (1, 130, 1536, 3352),
    (1, 5, 768, 1),  # outputs
    (1, 130, 768, 1),
    (1, 5, 768, 17),
    (1, 130, 768, 17),
    (1, 130, 768, 50),
    (1, 1, 2560, 10576),  # 2.7b: in_proj, out_proj
    (1, 515, 2560, 10576),
    (1, 1, 5120, 2560),
    (1, 257, 5120, 2560),
]
VARIANTS = [0, 1, 2, 3, 4]


def linear_work(tokens: int, n_in: int, n_out: int, variant: int) -> int:
    """Multiplications: of eight tokens, or of whole tiles."""
    if variant == 1 or (variant == 0 and tokens <= 8):
        return 8 * n_in * n_out
    return -(-tokens // 128) * 128 * n_in * -(-n_out // 128) * 128


def scale_of_tokens(generator: torch.Generator, x: Tensor) -> Tensor:
    shape = (*x.shape[:-1], 1)
    return torch.rand(shape, generator=generator, device=DEVICE) * 1e-2 + 1e-4


def scale_and_bias(generator: torch.Generator, n_out: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(n_out, generator=generator, device=DEVICE) * 1e-2 + 1e-4
    return scale, normal(generator, n_out, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear(
    generator: torch.Generator, batch: int, length: int, n_in: int, n_out: int, variant: int
) -> None:
    if variant == 1 and batch * length > 8:
        return
    skip_unless_affordable(linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    weight = random_int8(generator, n_out, n_in)
    of_tokens = scale_of_tokens(generator, x)
    compare("Ssdi8Linear", x, of_tokens, weight, *scale_and_bias(generator, n_out), variant=variant)


@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize(
    ("x_value", "weight_value"), [(-128, -128), (-128, 127), (127, 127), (0, 1)]
)
def test_linear_extremes(
    generator: torch.Generator, length: int, x_value: int, weight_value: int
) -> None:
    x = torch.full((1, length, 5120), x_value, dtype=torch.int8, device=DEVICE)
    weight = torch.full((48, 5120), weight_value, dtype=torch.int8, device=DEVICE)
    of_tokens = scale_of_tokens(generator, x)
    scale, bias = scale_and_bias(generator, 48)
    compare("Ssdi8Linear", x, of_tokens, weight, scale, bias)
    compare("Ssdi8Linear", x, of_tokens, weight, scale * 1e4, bias)  # overflows FP16


def ones_of_tokens(x: Tensor) -> Tensor:
    return torch.ones((*x.shape[:-1], 1), device=DEVICE)


def w4_weight(
    generator: torch.Generator, n_out: int, n_in: int, group_size: int, sigma: float
) -> tuple[Tensor, Tensor]:
    factor = torch.rand((n_out, n_in // group_size), generator=generator, device=DEVICE)
    return random_int8(generator, n_out, n_in // 2), ((0.2 + 0.8 * factor) * sigma).half()


def integer_scales(generator: torch.Generator, n_out: int, n_in: int, group_size: int) -> Tensor:
    shape = (n_out, n_in // group_size)
    scales = torch.randint(-15, 16, shape, dtype=torch.int8, device=DEVICE, generator=generator)
    return scales + (scales >= 0)  # from -15 to 16, not 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear_w4(
    generator: torch.Generator,
    batch: int,
    length: int,
    n_in: int,
    n_out: int,
    group_size: int,
    variant: int,
) -> None:
    if (variant == 1 and batch * length > 8) or n_in % group_size:
        return
    if group_size != 128 and n_in >= 1536:
        return  # the small shapes cover the other groups
    # To expand a weight takes the emulation as long as to multiply it.
    skip_unless_affordable(2 * linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    packed, group_scale = w4_weight(generator, n_out, n_in, group_size, 18.1)
    compare(
        "Ssdi8LinearW4",
        x,
        scale_of_tokens(generator, x),
        packed,
        group_scale,
        *scale_and_bias(generator, n_out),
        group_size=group_size,
        variant=variant,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("batch", "length", "n_in", "n_out"), LINEAR_ROWS)
def test_linear_w4_with_integer_scales(
    generator: torch.Generator,
    batch: int,
    length: int,
    n_in: int,
    n_out: int,
    group_size: int,
    variant: int,
) -> None:
    if (variant == 1 and batch * length > 8) or n_in % group_size:
        return
    skip_unless_affordable(linear_work(batch * length, n_in, n_out, variant))
    x = random_int8(generator, batch, length, n_in)
    if length == 1:
        x.fill_(-128)  # the largest sums
    packed = random_int8(generator, n_out, n_in // 2)
    scales = integer_scales(generator, n_out, n_in, group_size)
    scales[0], scales[-1] = 16, -15
    inputs = (x, scale_of_tokens(generator, x), packed, scales, *scale_and_bias(generator, n_out))
    compare("Ssdi8LinearW4", *inputs, group_size=group_size, variant=variant)


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear_w4_expands_every_value_with_integer_scales(
    generator: torch.Generator, group: int, length: int
) -> None:
    packed = random_int8(generator, EXPANDED, 64)
    scales = integer_scales(generator, EXPANDED, 128, group)
    eye = torch.eye(128, dtype=torch.int8, device=DEVICE)[None]
    one, zero = torch.ones(EXPANDED, device=DEVICE), torch.zeros(EXPANDED, device=DEVICE)
    kernel = kernel_of("Ssdi8LinearW4")
    rows = [
        kernel(part, ones_of_tokens(part), packed, scales, one, zero, group_size=group)[0]
        for part in eye.split(length, 1)
    ]
    assert_close(torch.cat(rows).t().to(torch.int8), unpack_w4(packed, scales, group))


@pytest.mark.parametrize("sigma", [1e-6, 0.1, 15.0, 16.0, 18.2, 40.0, 6e4])
@pytest.mark.parametrize("length", [1, 64])
def test_linear_w4_expands_every_value(
    generator: torch.Generator, length: int, sigma: float
) -> None:
    """With the identity as x, the output is the expanded weight itself."""
    n_in = 64
    packed, group_scale = w4_weight(generator, EXPANDED, n_in, 32, sigma)
    eye = torch.eye(n_in, dtype=torch.int8, device=DEVICE)[None]
    one, zero = torch.ones(EXPANDED, device=DEVICE), torch.zeros(EXPANDED, device=DEVICE)
    kernel = kernel_of("Ssdi8LinearW4")
    rows = [
        kernel(part, ones_of_tokens(part), packed, group_scale, one, zero, group_size=32)[0]
        for part in eye.split(length, 1)
    ]
    assert_close(torch.cat(rows).t().to(torch.int8), unpack_w4(packed, group_scale, 32))


# ------------------------------------------------------------------------------------------------
# Convolution
# ------------------------------------------------------------------------------------------------

CONV_FRACTIONS = (BOUNDARY_FRACTION, BOUNDARY_FRACTION, BOUNDARY_FRACTION, 0.0)


def conv_case(
    generator: torch.Generator,
    batch: int,
    length: int,
    d_inner: int,
    ngroups: int,
    d_state: int,
    d_conv: int = 4,
    magnitude: float = 1.0,
    scale: float = 0.02,
    rotation: str = "hadamard",
    heads: int = 8,
) -> tuple[list[Tensor], dict[str, Any]]:
    conv_dim = d_inner + 2 * ngroups * d_state
    zxbcdt = torch.full(
        (batch, length, d_inner + conv_dim + heads), torch.nan, dtype=torch.float16, device=DEVICE
    )
    columns = normal(generator, batch, length, conv_dim) * magnitude
    zxbcdt[..., d_inner : d_inner + conv_dim] = columns
    inputs = [
        zxbcdt,
        normal(generator, batch, d_conv - 1, conv_dim) * magnitude,
        normal(generator, conv_dim, d_conv, dtype=torch.float32) * 0.5,
        normal(generator, conv_dim, dtype=torch.float32) * 0.5,
        torch.rand(ngroups, generator=generator, device=DEVICE) * scale + scale / 2,
        torch.rand(ngroups, generator=generator, device=DEVICE) * scale + scale / 2,
    ]
    attributes = {
        "d_inner": d_inner,
        "conv_dim": conv_dim,
        "d_conv": d_conv,
        "ngroups": ngroups,
        "rotation": rotation,
        "rounding": "half_even",
    }
    return inputs, attributes


@pytest.mark.parametrize(
    "row",
    [
        {},
        *({"length": length} for length in (1, 2, 3, 4, 255, 256, 257, 515)),
        {"batch": 2},
        {"batch": 2, "length": 257},
        {"ngroups": 2},
        {"ngroups": 8},
        {"d_conv": 2},
        {"d_conv": 3},
        {"d_conv": 3, "length": 1},
        {"d_inner": 5120, "length": 257},
        *({"heads": heads, "batch": 2, "length": 70} for heads in (3, 6, 12)),  # rows not aligned
        {"d_inner": 320, "d_state": 64},
        {"d_state": 64, "ngroups": 3, "length": 3},
        {"d_state": 256, "ngroups": 2, "length": 70},
        {"d_state": 256, "d_conv": 3},
        {"rotation": "none"},
        {"rotation": "none", "d_inner": 128, "d_state": 16},
        {"rotation": "none", "d_inner": 5120, "length": 257},
        {"magnitude": 0.0},
        {"magnitude": 100.0},
        {"scale": 1e-4},  # saturates
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_causal_conv1d(generator: torch.Generator, row: dict[str, Any], rounding: str) -> None:
    base = {"batch": 1, "length": 5, "d_inner": 1536, "ngroups": 1, "d_state": 128}
    inputs, attributes = conv_case(generator, **{**base, **row})
    attributes["rounding"] = rounding
    compare("Ssdi8CausalConv1d", *inputs, **attributes, fractions=CONV_FRACTIONS)


def test_causal_conv1d_continues_a_sequence(generator: torch.Generator) -> None:
    """Prefill of 65 tokens and three steps give what 68 tokens at once give, bit for bit."""
    (zxbcdt, state, *rest), attributes = conv_case(generator, 2, 68, 1536, 1, 128)
    whole = kernel_of("Ssdi8CausalConv1d")(zxbcdt, state, *rest, **attributes)
    parts = []
    for piece in zxbcdt.split([65, 1, 1, 1], 1):
        *out, state = kernel_of("Ssdi8CausalConv1d")(piece, state, *rest, **attributes)
        parts.append(out)
    for got, want in zip(zip(*parts, strict=True), whole[:3], strict=True):
        assert torch.equal(torch.cat(got, 1), want)
    assert torch.equal(state, whole[3])


@pytest.mark.parametrize("length", [1, 2, 257])
def test_causal_conv1d_state_in_place(generator: torch.Generator, length: int) -> None:
    inputs, attributes = conv_case(generator, 2, length, 1536, 1, 128)
    want = kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)
    with kernel_library.states_in_place():
        got = kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)
    assert got[3] is inputs[1]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------------
# Gated norm and rotation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {},
        *({"length": length} for length in (1, 255, 256, 257, 515)),
        {"batch": 2},
        {"ngroups": 2},
        {"ngroups": 8},
        # every number of bits left to lane exchange, for each base matrix
        *({"d_inner": 2**k} for k in (3, 4, 5, 6, 7, 8, 10, 11, 12, 13)),
        *({"d_inner": 12 * 2**k} for k in (3, 4, 5, 6, 8, 9)),
        *({"d_inner": 20 * 2**k} for k in (3, 4, 5, 6, 7, 8)),
        {"d_inner": 5120, "length": 257},
        {"d_inner": 5120, "ngroups": 8},
        *({"heads": heads} for heads in (3, 6, 12)),  # rows not aligned
        {"magnitude": 0.0},
        {"magnitude": 100.0},
        {"scale": 1e-3},  # saturates
        {"rounding": "half_away"},
        {"rounding": "half_away", "scale": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("scaling", ["dynamic", "static"])
def test_rms_norm_gated(generator: torch.Generator, row: dict[str, Any], scaling: str) -> None:
    base = {"batch": 1, "length": 5, "d_inner": 1536, "ngroups": 1, "magnitude": 1.0}
    case = {**base, "heads": 64, "scale": 0.03, "rounding": "half_even", **row}
    batch, length, d_inner = case["batch"], case["length"], case["d_inner"]
    y = normal(generator, batch, length, d_inner) * case["magnitude"]
    columns = 2 * d_inner + case["heads"]
    zxbcdt = torch.full((batch, length, columns), torch.nan, dtype=torch.float16, device=DEVICE)
    zxbcdt[..., :d_inner] = normal(generator, batch, length, d_inner) * max(case["magnitude"], 1)
    weight = torch.rand(d_inner, generator=generator, device=DEVICE) + 0.5
    compare(
        "Ssdi8RmsNormGated",
        y,
        zxbcdt,
        weight,
        *token_scaling(scaling, case["scale"]),
        eps=1e-5,
        d_inner=d_inner,
        ngroups=case["ngroups"],
        rounding=case["rounding"],
        scaling=scaling,
        fractions=(BOUNDARY_FRACTION, TOKEN_SCALE_TOLERANCE),
    )


# ------------------------------------------------------------------------------------------------
# SSD
# ------------------------------------------------------------------------------------------------

# exp in FP32 instead of FP64: an INT8 value may fall on the other side of a rounding boundary.
SSD_FRACTION = 1e-3
SSD_BASE = {
    "batch": 1,
    "length": 515,
    "nheads": 4,
    "headdim": 64,
    "ngroups": 1,
    "d_state": 128,
    "chunk_size": 256,
    "gate": "fp32",
    "rounding": "half_even",
    "scaling": "dynamic",
    "state": torch.float32,
    "scale": 1.0,  # of every scale that is an input: below 1 saturates
    "dt_shift": 0.0,
}
STATIC = {"scaling": "static"}
RELEASED = STATIC | {"gate": "q0.7"}
NONE = {"scaling": "none"}
SSD_ROWS: list[dict[str, Any]] = [
    {},
    *({"length": n} for n in (2, 5, 63, 64, 65, 255, 256, 257, 2048)),
    {"batch": 2},
    {"batch": 3, "length": 300, "nheads": 80},
    {"length": 2048, "nheads": 24},
    {"length": 2048, "nheads": 80, "d_state": 64},
    {"length": 700, "nheads": 8, "d_state": 64, "chunk_size": 128},
    *({"ngroups": n, "nheads": 8} for n in (2, 8)),
    {"headdim": 128},
    {"d_state": 64},
    {"d_state": 256},
    {"d_state": 256, "chunk_size": 128, "headdim": 128, "batch": 2},
    {"d_state": 256, "chunk_size": 128, "length": 300},
    *({"chunk_size": n} for n in (64, 128)),
    {"chunk_size": 64, "d_state": 64, "length": 1000},
    {"chunk_size": 64, "d_state": 256, "length": 150},
    STATIC,
    STATIC | {"dt_shift": 6.0},
    STATIC | {"chunk_size": 64, "length": 300},
    STATIC | {"chunk_size": 128, "batch": 2, "headdim": 128},
    STATIC | {"d_state": 256},
    STATIC | {"d_state": 64, "length": 200},
    STATIC | {"scale": 0.1},
    STATIC | {"scale": 0.1, "rounding": "half_away"},
    STATIC | {"length": 2048, "nheads": 40},
    RELEASED,
    RELEASED | {"d_state": 64, "length": 300},
    RELEASED | {"rounding": "half_away", "length": 2048},
    RELEASED | {"scale": 0.1, "state": torch.float16, "d_state": 256},
    {"rounding": "half_away"},
    {"rounding": "half_away", "d_state": 64},
    {"rounding": "half_away", "d_state": 256, "length": 2048, "nheads": 80},
    {"state": torch.float16},
    {"scale": 0.1},  # CB alone
    {"dt_shift": 6.0},  # decays by e^-100 within 64 positions
    {"dt_shift": -12.0},
]
FP16_ROWS: list[dict[str, Any]] = [
    NONE | row
    for row in (
        {},
        *({"length": n} for n in (2, 5, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 2048)),
        {"batch": 2},
        {"batch": 3, "length": 300, "nheads": 80},
        # More heads than an H100 or H200 holds at once: chunks of 128.
        *({"batch": 8, "length": 300, "nheads": 80, "d_state": n} for n in (64, 128, 256)),
        {"length": 2048, "nheads": 80, "d_state": 64},
        *({"ngroups": n, "nheads": 8} for n in (2, 8)),
        {"headdim": 128},
        {"d_state": 64},
        {"d_state": 256, "headdim": 128, "batch": 2},
        *({"chunk_size": n} for n in (64, 128)),
        {"chunk_size": 64, "d_state": 256, "length": 1000},
        {"chunk_size": 128, "d_state": 64, "length": 1000},
        {"state": torch.float16},
        {"dt_shift": 6.0},
        {"dt_shift": -12.0},
    )
]


def ssd_case(generator: torch.Generator, row: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with scales from the absolute maxima of these very tensors."""
    case = SSD_BASE | row
    batch, length, heads, p = (case[k] for k in ("batch", "length", "nheads", "headdim"))
    groups, n = case["ngroups"], case["d_state"]
    skip_unless_affordable(batch * length * heads * p * n)
    dt_column = heads * p + 3
    zxbcdt = normal(generator, batch, length, dt_column + heads + 2)
    zxbcdt[..., :dt_column] = float("nan")
    zxbcdt[..., dt_column + heads :] = float("nan")
    a: dict[str, Any] = {
        "x": normal(generator, batch, length, heads * p),
        "b_q": random_int8(generator, batch, length, groups * n),
        "c_q": random_int8(generator, batch, length, groups * n),
        "zxbcdt": zxbcdt,
        "ssm_state": normal(generator, batch, heads, p, n, dtype=case["state"]),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, device=DEVICE) + case["dt_shift"],
        "A": -torch.linspace(1.0, 16.0, heads, device=DEVICE).flip(0),
        "D": normal(generator, heads, dtype=torch.float32),
        "b_scale": torch.full((groups,), 0.02, device=DEVICE),
        "c_scale": torch.full((groups,), 0.03, device=DEVICE),
    }
    attributes = {k: case[k] for k in OPS["Ssdi8SsdScan"].attributes if k in case} | {
        "dt_column": dt_column,
        "dt_min": 0.0,
        "dt_max": float("inf"),
    }
    case["attributes"] = attributes

    a["cb_scale"] = torch.full((groups,), 0.02 * 0.03 * 74**2 * n**0.5 / 28, device=DEVICE)
    a["cb_scale"] *= case["scale"]
    a |= dict.fromkeys(("x_scale", "state_scale"))
    if case["scaling"] == "static":
        a |= channel_scales(case, a)
    case["inputs"] = a
    return case


def channel_scales(case: dict[str, Any], a: dict[str, Any]) -> dict[str, Any]:
    """The inputs of scaling "static"."""
    attributes, chunk, length = case["attributes"], case["chunk_size"], case["length"]
    dt, decay = reference(
        *("Ssdi8ChunkCumsum", a["zxbcdt"], a["dt_bias"], a["A"]),
        **select("Ssdi8ChunkCumsum", attributes),
    )
    x = a["x"].float().unflatten(2, (case["nheads"], case["headdim"]))
    ends = torch.arange(length, device=DEVICE)
    last = ((ends // chunk + 1) * chunk).clamp_max(length) - 1
    w = torch.exp(decay[..., last] - decay) * dt  # (B, H, L)
    absmax = (w.transpose(1, 2)[..., None] * x).abs().amax((0, 1))
    scales = {"x_scale": scale_from_absmax(absmax) * case["scale"]}
    states = reference(
        *("Ssdi8ChunkState", a["x"], a["b_q"], dt, decay, a["b_scale"]),
        **select("Ssdi8ChunkState", attributes | {"gate": "fp32", "scaling": "dynamic"}),
    )
    absmax = torch.maximum(states.abs().amax((0, 1, 4)), a["ssm_state"].float().abs().amax((0, 3)))
    scales["state_scale"] = scale_from_absmax(1.5 * absmax) * case["scale"]
    return scales


def select(op: str, attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: attributes[k] for k in OPS[op].attributes}


# What an SSD op of its own computes, by the names that the next ones take.
SSD_STAGES = {
    "Ssdi8ChunkCumsum": ("dt", "a"),
    "Ssdi8ChunkState": ("states",),
    "Ssdi8StatePassing": ("passed", "passed_scale", "final"),
}


def ssd_arguments(op: str, values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in OPS[op].inputs]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype is want.dtype
    assert bool(got.isfinite().all()) and bool(want.isfinite().all())
    difference = torch.linalg.vector_norm(got.double() - want.double())
    return float(difference / torch.linalg.vector_norm(want.double()).clamp_min(1e-30))


def run_ssd_kernel(op: str, values: dict[str, Any], attributes: dict[str, Any]) -> Any:
    with guarded_allocations():
        got = kernel_of(op)(*ssd_arguments(op, values), **select(op, attributes))
        synchronize()
    return got


@pytest.mark.parametrize("row", [*SSD_ROWS, *FP16_ROWS], ids=str)
def test_ssd_modules(generator: torch.Generator, row: dict[str, Any]) -> None:
    """Each kernel on the outputs of the references before it."""
    case = ssd_case(generator, row)
    values, attributes = case["inputs"], case["attributes"]

    def wanted(op: str) -> Any:
        return reference(op, *ssd_arguments(op, values), **select(op, attributes))

    got = run_ssd_kernel("Ssdi8ChunkCumsum", values, attributes)
    values["dt"], values["a"] = wanted("Ssdi8ChunkCumsum")
    assert torch.allclose(got[0], values["dt"], rtol=1e-6, atol=0)
    assert torch.allclose(got[1], values["a"], rtol=1e-6, atol=0)

    states = run_ssd_kernel("Ssdi8ChunkState", values, attributes)
    values["states"] = wanted("Ssdi8ChunkState")
    assert_near(states, values["states"])

    passed, scale, final = run_ssd_kernel("Ssdi8StatePassing", values, attributes)
    values["passed"], values["passed_scale"], want_final = wanted("Ssdi8StatePassing")
    assert_near(passed, values["passed"])
    assert scale.shape == values["passed_scale"].shape
    if case["scaling"] != "dynamic":
        assert torch.equal(scale, values["passed_scale"])
    assert torch.allclose(scale, values["passed_scale"], rtol=1e-5, atol=0)
    assert relative_error(final, want_final) < 2e-4

    y = run_ssd_kernel("Ssdi8ChunkScan", values, attributes)
    assert relative_error(y, wanted("Ssdi8ChunkScan")) < 1e-3


def assert_near(got: Tensor, want: Tensor) -> None:
    """INT8 by value, others in norm."""
    if want.dtype is torch.int8:
        assert_close(got, want, SSD_FRACTION)
    else:
        assert relative_error(got, want) < 2e-4


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_ssd_modules_round_ties(rounding: str) -> None:
    """Halves, which random values never are, in every rounding of the modules."""
    n, length = 64, 128
    ones, zeros = torch.ones(1, n, device=DEVICE), torch.zeros(1, 1, length, device=DEVICE)
    halves = torch.arange(-32, 32, device=DEVICE) / 2
    position = torch.arange(n, device=DEVICE)
    x = halves.half().repeat(1, length, 1)
    b_q = torch.zeros(1, length, n, dtype=torch.int8, device=DEVICE)
    c_q = torch.zeros_like(b_q)
    b_q[0, position, position] = 1
    sizes = {"nheads": 1, "headdim": n, "ngroups": 1, "d_state": n, "chunk_size": length}
    choice = {"rounding": rounding, "scaling": "static"}
    one = ones[0, :1]

    states = (x, b_q, zeros + 1, zeros, one, ones, ones)  # Q(x)
    compare("Ssdi8ChunkState", *states, **sizes, **choice, gate="fp32")

    # CB, in steps of 2.
    c_q[0, position, position] = c_q[0, n + position, position] = torch.arange(
        -32, 32, dtype=torch.int8, device=DEVICE
    )
    passed = torch.zeros(1, 1, 1, n, n, dtype=torch.int8, device=DEVICE)
    scan = (x, b_q, c_q, zeros + 1, zeros, passed, torch.ones(1, 1, 1, n, device=DEVICE))
    scales = (zeros[0, 0, :1], one, one, 2 * one)
    compare("Ssdi8ChunkScan", *scan, *scales, **sizes, **choice)

    passing = (torch.zeros(1, 1, 1, n, n, device=DEVICE), zeros, halves.repeat(1, 1, n, 1), ones)
    gate = {"chunk_size": length, "gate": "fp32"}
    compare("Ssdi8StatePassing", *passing, **gate, **choice, fractions=(0.0, 0.0, 0.0))


@pytest.mark.parametrize("row", [*SSD_ROWS, *FP16_ROWS, {"length": 1}], ids=str)
def test_ssd_scan(generator: torch.Generator, row: dict[str, Any]) -> None:
    case = ssd_case(generator, row)
    values, attributes = case["inputs"], case["attributes"]
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    assert relative_error(y, want_y) < 2e-3
    assert relative_error(final, want_final) < 1e-3


@needs_emulation
@pytest.mark.parametrize(
    "row",
    [
        *({"nheads": heads, "d_state": n} for heads in (4, 5) for n in (64, 128, 256)),
        *(NONE | {"nheads": heads, "d_state": n} for heads in (4, 9) for n in (64, 128, 256)),
    ],
    ids=str,
)
def test_ssd_scan_with_more_heads_than_the_chip_holds(
    generator: torch.Generator, row: dict[str, Any]
) -> None:
    """Heads walk the chunks a few at a time; with scaling "none" in chunks of 128."""
    kernel_emulator.configure(processors=1)
    try:
        test_ssd_scan(generator, row | {"length": 300})
    finally:
        kernel_emulator.configure()


@pytest.mark.parametrize("state", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("headdim", "d_state"), [(64, 128), (128, 64), (64, 256)])
def test_ssd_step(
    generator: torch.Generator, batch: int, headdim: int, d_state: int, state: torch.dtype
) -> None:
    """One token: the state to the last rounding, y to FP16."""
    row = {"length": 1, "batch": batch, "headdim": headdim, "d_state": d_state, "state": state}
    case = ssd_case(generator, row | {"nheads": 8, "ngroups": 2})
    values, attributes = case["inputs"], case["attributes"]
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    assert relative_error(y, want_y) < 3e-4
    assert relative_error(final, want_final) < (3e-4 if state is torch.float16 else 1e-6)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1e2])
def test_dynamic_scales_follow_the_values(generator: torch.Generator, magnitude: float) -> None:
    """Nothing, little or much: as accurate as any."""
    case = ssd_case(generator, {"length": 600})
    values, attributes = case["inputs"], case["attributes"]
    values["ssm_state"] *= magnitude
    values["x"] = (values["x"].float() * magnitude).half()
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    if magnitude == 0.0:
        assert not y.any() and not final.any()
    assert relative_error(y, want_y) < 2e-3
    assert relative_error(final, want_final) < 1e-3


@pytest.mark.parametrize(
    ("choice", "noise_y", "noise_state"), [({}, 3e-2, 2e-1), (NONE, 2e-3, 2e-3)], ids=str
)
@pytest.mark.parametrize("length", [1, 256, 700])
def test_ssd_prefill_then_step(
    generator: torch.Generator,
    length: int,
    choice: dict[str, Any],
    noise_y: float,
    noise_state: float,
) -> None:
    """prefill(L) and two steps = prefill(L + 2), within the noise of INT8, or of FP16."""
    case = ssd_case(generator, choice | {"length": length + 2})
    values, attributes = case["inputs"], case["attributes"]
    whole_y, whole_state = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    parts = []
    for start, stop in ((0, length), (length, length + 1), (length + 1, length + 2)):
        part = values | {k: values[k][:, start:stop] for k in ("x", "b_q", "c_q", "zxbcdt")}
        y, values["ssm_state"] = run_ssd_kernel("Ssdi8SsdScan", part, attributes)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole_y) < noise_y
    # The fastest head keeps few tokens, small ones on the scale of the largest of the sequence.
    assert relative_error(values["ssm_state"], whole_state) < noise_state


@pytest.mark.parametrize("choice", [{}, NONE], ids=str)
def test_ssd_scan_in_place_and_repeatable(
    generator: torch.Generator, choice: dict[str, Any]
) -> None:
    """The state may be updated where it lies; runs agree bit by bit."""
    size, runs = ({"length": 2000, "nheads": 80}, 10) if GPU else ({"length": 600}, 4)
    case = ssd_case(generator, choice | size)
    values, attributes = case["inputs"], case["attributes"]
    first = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    for run in range(runs):
        with threads_in_order(run):
            again = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    state = values["ssm_state"].clone()
    with kernel_library.states_in_place():
        in_place = kernel_of("Ssdi8SsdScan")(
            *ssd_arguments("Ssdi8SsdScan", values | {"ssm_state": state}), **attributes
        )
    assert in_place[1] is state
    assert all(torch.equal(a, b) for a, b in zip(in_place, first, strict=True))


def test_ssd_refusals(generator: torch.Generator) -> None:
    for change, match in (
        ({"headdim": 96}, "headdim 96"),
        ({"d_state": 32}, "d_state 32"),
        ({"chunk_size": 512}, "chunk_size 512"),
        (NONE | {"gate": "q0.7"}, r"scaling none with gate Q0\.7"),
    ):
        case = ssd_case(generator, {"length": 8} | change)
        with pytest.raises(Ssdi8Error, match=match):
            run_ssd_kernel("Ssdi8SsdScan", case["inputs"], case["attributes"])
    case = ssd_case(generator, STATIC | {"length": 8})
    for op, scales in (
        ("Ssdi8SsdScan", ("x_scale", "state_scale")),
        ("Ssdi8ChunkState", ("x_scale", "state_scale")),
        ("Ssdi8StatePassing", ("state_scale",)),
    ):
        values, attributes = case["inputs"], case["attributes"]
        if op != "Ssdi8SsdScan":
            values = module_inputs(values, attributes)
        for name in scales:
            with pytest.raises(Ssdi8Error, match=f"scaling static needs {name}"):
                run_ssd_kernel(op, values | {name: None}, attributes)
        with pytest.raises(Ssdi8Error, match=r"scaling dynamic with gate Q0\.7"):
            choice = {"gate": "q0.7", "scaling": "dynamic"}
            states = {"states": values["states"].to(torch.int8)} if "states" in values else {}
            run_ssd_kernel(op, values | states, attributes | choice)


# Each differs in one size from a model that the kernels fit.
LIMITS: list[dict[str, int]] = [
    *({"headdim": n} for n in (32, 64, 128, 256)),
    *({"d_state": n} for n in (32, 64, 128, 256, 512)),
    *({"chunk_size": n} for n in (32, 64, 256, 512)),
    *({"d_conv": n} for n in (1, 2, 4, 5)),
    {"d_model": 48, "headdim": 32},
    {"d_model": 4096, "ngroups": 64},
    {"d_model": 4096, "ngroups": 128},
    {"d_model": 8192},
]


@pytest.mark.parametrize("sizes", LIMITS, ids=str)
def test_limits_are_those_of_the_launchers(
    generator: torch.Generator, sizes: dict[str, int]
) -> None:
    """A build refuses for a board what the kernels of a block would refuse there, and no more."""
    fitting = {"d_model": 128, "d_state": 64, "chunk_size": 64, **sizes}
    width = fitting.pop("d_model")
    inner = 2 * width
    config = Mamba2(d_inner=inner, **fitting)
    hidden, y = normal(generator, 1, 2, width), normal(generator, 1, 2, inner)
    norm = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}

    def conv() -> None:
        shape = (inner, config.ngroups, config.d_state, config.d_conv)
        inputs, attributes = conv_case(generator, 1, 2, *shape)
        kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes)

    def ssd() -> None:
        row = {
            name: getattr(config, name)
            for name in ("nheads", "headdim", "ngroups", "d_state", "chunk_size")
        }
        case = ssd_case(generator, {**row, "length": 2})
        run_ssd_kernel("Ssdi8SsdScan", case["inputs"], case["attributes"])

    def linear(n_in: int) -> None:
        x, weight = random_int8(generator, 1, 2, n_in), random_int8(generator, 8, n_in)
        scale, bias = scale_and_bias(generator, 8)
        kernel_of("Ssdi8Linear")(x, scale_of_tokens(generator, x), weight, scale, bias)

    gated = {**norm, "d_inner": inner, "ngroups": config.ngroups}
    ones = torch.ones(inner, device=DEVICE)
    calls: list[Callable[[], Any]] = [
        lambda: kernel_of("Ssdi8RmsNorm")(hidden, hidden.float(), **norm),
        lambda: linear(width),
        conv,
        ssd,
        lambda: kernel_of("Ssdi8RmsNormGated")(y, y, ones, **gated),
        lambda: linear(inner),
    ]
    refused = 0
    for call in calls:
        try:
            call()
        except Ssdi8Error:
            refused += 1
    if refused:
        with pytest.raises(UsageError, match=r"the model's \w+ is \d+, but .* on a board; go on"):
            require_kernels(config, "a board", "go on.")
    else:
        require_kernels(config, "a board", "go on.")


def module_inputs(values: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """With what the references of the modules compute."""
    values = dict(values)
    for op, names in SSD_STAGES.items():
        made = reference(op, *ssd_arguments(op, values), **select(op, attributes))
        values |= zip(names, made if isinstance(made, tuple) else (made,), strict=True)
    return values


# ------------------------------------------------------------------------------------------------
# Streams, graphs, refusals
# ------------------------------------------------------------------------------------------------


def calls(generator: torch.Generator, length: int) -> dict[str, tuple[Tensor, Callable[[], Any]]]:
    """Per op: the input whose values change, and a call of the kernel."""
    hidden = normal(generator, 1, length, 768)
    residual = normal(generator, 1, length, 768, dtype=torch.float32)
    x, weight = random_int8(generator, 1, length, 768), random_int8(generator, 3352, 768)
    packed, group_scale = w4_weight(generator, 3352, 768, 128, 15.0)
    scale, bias = scale_and_bias(generator, 3352)
    conv_inputs, conv_attributes = conv_case(generator, 1, length, 1536, 1, 128)
    y, z = normal(generator, 1, length, 1536), normal(generator, 1, length, 3352)
    ones = torch.ones(1536, device=DEVICE)
    ssd = ssd_case(generator, {"length": length})
    ssd_inputs = ssd_arguments("Ssdi8SsdScan", ssd["inputs"])
    fp16 = ssd_case(generator, NONE | {"length": length})
    fp16_inputs = ssd_arguments("Ssdi8SsdScan", fp16["inputs"])
    static = ssd_case(generator, STATIC | {"length": length})
    static_inputs = ssd_arguments("Ssdi8SsdScan", static["inputs"])
    of_tokens = scale_of_tokens(generator, x)
    norm = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}
    return {
        "rms_norm": (hidden, lambda: kernel_of("Ssdi8RmsNorm")(hidden, residual, **norm)),
        "linear": (x, lambda: (kernel_of("Ssdi8Linear")(x, of_tokens, weight, scale, bias),)),
        "linear_w4": (
            x,
            lambda: (
                kernel_of("Ssdi8LinearW4")(
                    *(x, of_tokens, packed, group_scale, scale, bias), group_size=128
                ),
            ),
        ),
        "causal_conv1d": (
            conv_inputs[0],
            lambda: kernel_of("Ssdi8CausalConv1d")(*conv_inputs, **conv_attributes),
        ),
        "rms_norm_gated": (
            y,
            lambda: kernel_of("Ssdi8RmsNormGated")(y, z, ones, d_inner=1536, ngroups=1, **norm),
        ),
        "ssd_scan": (
            ssd_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*ssd_inputs, **ssd["attributes"]),
        ),
        "ssd_scan none": (
            fp16_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*fp16_inputs, **fp16["attributes"]),
        ),
        "ssd_scan static": (
            static_inputs[0],
            lambda: kernel_of("Ssdi8SsdScan")(*static_inputs, **static["attributes"]),
        ),
    }


CALLED = [
    "rms_norm",
    "linear",
    "linear_w4",
    "causal_conv1d",
    "rms_norm_gated",
    "ssd_scan",
    "ssd_scan none",
    "ssd_scan static",
]


@needs_emulation
@pytest.mark.parametrize("op", CALLED)
def test_order_of_threads_changes_nothing(generator: torch.Generator, op: str) -> None:
    """As it would where a barrier is missing."""
    _, call = calls(generator, 70)[op]
    first = call()
    for seed in (1, 2):
        with threads_in_order(seed):
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


@needs_gpu
@pytest.mark.parametrize("op", CALLED)
@pytest.mark.parametrize("length", [1, 130])
def test_stream_and_graph(generator: torch.Generator, op: str, length: int) -> None:
    changed, call = calls(generator, length)[op]
    first = [t.clone() for t in call()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(on_stream, first, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    changed.copy_(changed.flip(1) if length > 1 else -changed)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_refusals(generator: torch.Generator) -> None:
    def refused(match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(Ssdi8Error, match=match):
            call()

    x, weight = random_int8(generator, 1, 2, 48), random_int8(generator, 8, 48)
    scale, bias = scale_and_bias(generator, 8)
    one = ones_of_tokens(x)
    refused("multiple of 32", lambda: kernel_of("Ssdi8Linear")(x, one, weight, scale, bias))
    refused("is expected", lambda: kernel_of("Ssdi8Linear")(x, one, weight.half(), scale, bias))
    refused("is expected", lambda: kernel_of("Ssdi8Linear")(x, one[:, 1:], weight, scale, bias))
    group_scale = torch.ones((8, 3), dtype=torch.float16, device=DEVICE)
    refused(
        "group size 16",
        lambda: kernel_of("Ssdi8LinearW4")(
            x, one, weight[:, :24], group_scale, scale, bias, group_size=16
        ),
    )
    norm = {"eps": 1e-5, "rounding": "half_even", "scaling": "dynamic"}
    odd, even = normal(generator, 1, 2, 12), normal(generator, 1, 2, 64)
    refused("d_model 12", lambda: kernel_of("Ssdi8RmsNorm")(odd, odd.float(), **norm))
    y, ones = normal(generator, 1, 2, 56), torch.ones(56, device=DEVICE)
    gated = {**norm, "d_inner": 56, "ngroups": 1}
    refused("d_inner 56", lambda: kernel_of("Ssdi8RmsNormGated")(y, y, ones, **gated))
    ones = torch.ones(64, device=DEVICE)
    gated = {**norm, "d_inner": 64, "ngroups": 1}
    for match, wrong in (
        ("scaling static needs scale", {"scaling": "static"}),
        ("scaling 2 out of range", {"scaling": "none"}),
    ):
        rms = norm | wrong
        refused(match, lambda a=rms: kernel_of("Ssdi8RmsNorm")(even, even.float(), **a))
        rms = gated | wrong
        refused(match, lambda a=rms: kernel_of("Ssdi8RmsNormGated")(even, even, ones, **a))
    inputs, attributes = conv_case(generator, 1, 2, 64, 1, 64, d_conv=5)
    refused("width 5", lambda: kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes))
    inputs, attributes = conv_case(generator, 1, 2, 64, 1, 16)
    refused("rotation of d_state 16", lambda: kernel_of("Ssdi8CausalConv1d")(*inputs, **attributes))
