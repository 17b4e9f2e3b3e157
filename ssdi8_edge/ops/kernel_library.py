"""Finds and loads libssdi8_kernels.so; the only file that knows pointers.

`kernel_for` gives a function with the signature of the op's torch reference that runs the CUDA
kernel on torch tensors, on torch's current stream. The structs mirror `plugins/kernels/kernels.h`;
a mirror that has drifted is refused when the library is loaded, not when it computes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.errors import Ssdi8Error
from ssdi8_edge.formats import Gate, Rounding

ABI_VERSION = 1
LIBRARY_NAME = "libssdi8_kernels.so"
ROUNDINGS: dict[str, int] = {"half_even": 0, "half_away": 1}
GATES: dict[str, int] = {"fp32": 0, "q0.7": 1}

_PACKAGE = Path(__file__).resolve().parents[1]
_SEARCH_FOLDERS = (
    _PACKAGE.parent / "plugins" / "build",
    _PACKAGE / "share" / "plugins" / "build",
    _PACKAGE,
)
_BUILD_HINT = "Build it: cmake -S plugins -B plugins/build && cmake --build plugins/build"


# ------------------------------------------------------------------------------------------------
# Parameter structs, in the order of kernels.h
# ------------------------------------------------------------------------------------------------


class RmsNormParams(ctypes.Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("residual", c_void_p),
        ("residual_out", c_void_p),
        ("quantized", c_void_p),
        ("tokens", c_int32),
        ("d_model", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("rounding", c_int32),
    )


class LinearParams(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("variant", c_int32),
    )


class LinearW4Params(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("packed", c_void_p),
        ("group_scale", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("group_size", c_int32),
        ("variant", c_int32),
    )


class CausalConv1dParams(ctypes.Structure):
    _fields_ = (
        ("zxbcdt", c_void_p),
        ("conv_state", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("b_scale", c_void_p),
        ("c_scale", c_void_p),
        ("x", c_void_p),
        ("b_q", c_void_p),
        ("c_q", c_void_p),
        ("conv_state_out", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("row_stride", c_int32),
        ("d_inner", c_int32),
        ("conv_dim", c_int32),
        ("d_conv", c_int32),
        ("ngroups", c_int32),
        ("rounding", c_int32),
    )


class RmsNormGatedParams(ctypes.Structure):
    _fields_ = (
        ("y", c_void_p),
        ("zxbcdt", c_void_p),
        ("weight", c_void_p),
        ("quantized", c_void_p),
        ("tokens", c_int32),
        ("d_inner", c_int32),
        ("row_stride", c_int32),
        ("ngroups", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("rounding", c_int32),
    )


class ChunkCumsumParams(ctypes.Structure):
    _fields_ = (
        ("zxbcdt", c_void_p),
        ("dt_bias", c_void_p),
        ("a_rate", c_void_p),
        ("dt", c_void_p),
        ("a", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("row_stride", c_int32),
        ("dt_column", c_int32),
        ("nheads", c_int32),
        ("chunk_size", c_int32),
        ("dt_min", c_float),
        ("dt_max", c_float),
    )


class ChunkStateParams(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("b_q", c_void_p),
        ("dt", c_void_p),
        ("a", c_void_p),
        ("x_scale", c_void_p),
        ("b_scale", c_void_p),
        ("state_scale", c_void_p),
        ("states", c_void_p),
        ("workspace", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("nheads", c_int32),
        ("headdim", c_int32),
        ("ngroups", c_int32),
        ("d_state", c_int32),
        ("chunk_size", c_int32),
        ("gate", c_int32),
        ("rounding", c_int32),
    )


class StatePassingParams(ctypes.Structure):
    _fields_ = (
        ("states", c_void_p),
        ("a", c_void_p),
        ("ssm_state", c_void_p),
        ("state_scale", c_void_p),
        ("passed", c_void_p),
        ("ssm_state_out", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("nheads", c_int32),
        ("headdim", c_int32),
        ("d_state", c_int32),
        ("chunk_size", c_int32),
        ("gate", c_int32),
        ("rounding", c_int32),
        ("state_fp32", c_int32),
    )


class ChunkScanParams(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("b_q", c_void_p),
        ("c_q", c_void_p),
        ("dt", c_void_p),
        ("a", c_void_p),
        ("passed", c_void_p),
        ("d_skip", c_void_p),
        ("b_scale", c_void_p),
        ("c_scale", c_void_p),
        ("state_scale", c_void_p),
        ("cb_scale", c_void_p),
        ("x_tile_scale", c_void_p),
        ("y", c_void_p),
        ("workspace", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("nheads", c_int32),
        ("headdim", c_int32),
        ("ngroups", c_int32),
        ("d_state", c_int32),
        ("chunk_size", c_int32),
        ("scan_tile", c_int32),
        ("rounding", c_int32),
    )


class SsdScanParams(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("b_q", c_void_p),
        ("c_q", c_void_p),
        ("zxbcdt", c_void_p),
        ("ssm_state", c_void_p),
        ("dt_bias", c_void_p),
        ("a_rate", c_void_p),
        ("d_skip", c_void_p),
        ("b_scale", c_void_p),
        ("c_scale", c_void_p),
        ("x_scale", c_void_p),
        ("state_scale", c_void_p),
        ("cb_scale", c_void_p),
        ("x_tile_scale", c_void_p),
        ("y", c_void_p),
        ("ssm_state_out", c_void_p),
        ("workspace", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("nheads", c_int32),
        ("headdim", c_int32),
        ("ngroups", c_int32),
        ("d_state", c_int32),
        ("chunk_size", c_int32),
        ("scan_tile", c_int32),
        ("row_stride", c_int32),
        ("dt_column", c_int32),
        ("gate", c_int32),
        ("rounding", c_int32),
        ("state_fp32", c_int32),
        ("dt_min", c_float),
        ("dt_max", c_float),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "rms_norm": RmsNormParams,
    "linear": LinearParams,
    "linear_w4": LinearW4Params,
    "causal_conv1d": CausalConv1dParams,
    "rms_norm_gated": RmsNormGatedParams,
    "chunk_cumsum": ChunkCumsumParams,
    "chunk_state": ChunkStateParams,
    "state_passing": StatePassingParams,
    "chunk_scan": ChunkScanParams,
    "ssd_scan": SsdScanParams,
}
# Launchers that take scratch memory from the caller: each has ssdi8_<op>_workspace.
WITH_WORKSPACE = ("chunk_state", "chunk_scan", "ssd_scan")


# ------------------------------------------------------------------------------------------------
# The library
# ------------------------------------------------------------------------------------------------


def find_library() -> Path | None:
    """The built library in the source tree or beside the installed package."""
    for folder in _SEARCH_FOLDERS:
        if (folder / LIBRARY_NAME).is_file():
            return folder / LIBRARY_NAME
    return None


@functools.cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """Load the library from `path`, or from where the build leaves it, and check its ABI."""
    path = path or find_library()
    if path is None:
        raise Ssdi8Error(f"{LIBRARY_NAME} is not built.", _BUILD_HINT)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Ssdi8Error(f"{path} cannot be loaded: {error}.", _BUILD_HINT) from error
    library.ssdi8_last_error.restype = ctypes.c_char_p
    if (version := library.ssdi8_abi_version()) != ABI_VERSION:
        raise Ssdi8Error(f"{path} has ABI version {version}, not {ABI_VERSION}.", _BUILD_HINT)
    for op, struct in STRUCTS.items():
        if not hasattr(library, f"ssdi8_{op}"):
            raise Ssdi8Error(f"{path} has no kernel {op}.", _BUILD_HINT)
        size = getattr(library, f"ssdi8_sizeof_{op}")
        size.restype = ctypes.c_size_t
        if size() != ctypes.sizeof(struct):
            raise Ssdi8Error(
                f"{path}: parameters of {op} have {size()} bytes, {ctypes.sizeof(struct)} here.",
                _BUILD_HINT,
            )
        launcher = getattr(library, f"ssdi8_{op}")
        launcher.argtypes = (ctypes.POINTER(struct), c_void_p)
        launcher.restype = ctypes.c_int
        if op in WITH_WORKSPACE:
            workspace = getattr(library, f"ssdi8_{op}_workspace")
            workspace.argtypes = (ctypes.POINTER(struct),)
            workspace.restype = ctypes.c_size_t
    return library


@functools.cache
def available() -> bool:
    """Whether kernels can run here: a CUDA device and a built library."""
    return torch.cuda.is_available() and find_library() is not None


def launch(op: str, params: ctypes.Structure, device: torch.device) -> None:
    """Enqueue `op` on torch's current stream of `device`."""
    library = load()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(library, f"ssdi8_{op}")(ctypes.byref(params), stream)
    if code:
        raise Ssdi8Error(f"CUDA kernel {op}: {library.ssdi8_last_error().decode()}")


def workspace(op: str, params: ctypes.Structure, device: torch.device) -> Tensor:
    """Scratch memory for `op`; torch keeps it alive until the stream has used it."""
    size = getattr(load(), f"ssdi8_{op}_workspace")(ctypes.byref(params))
    return torch.empty(size, dtype=torch.uint8, device=device)


def dense(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """`x` contiguous, after checking what a pointer cannot tell: type and shape."""
    if x.dtype is not dtype or tuple(x.shape) != shape:
        raise Ssdi8Error(
            f"CUDA kernel: {x.dtype} {tuple(x.shape)} where {dtype} {shape} is expected."
        )
    return x.contiguous()


# ------------------------------------------------------------------------------------------------
# Norms, linear layers, convolution: signatures of the references in ops/<stem>.py
# ------------------------------------------------------------------------------------------------


def rms_norm(
    hidden: Tensor, residual: Tensor, *, scale: float, eps: float, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    shape = tuple(residual.shape)
    hidden, residual = dense(hidden, torch.float16, *shape), dense(residual, torch.float32, *shape)
    residual_out = torch.empty_like(residual)
    quantized = torch.empty(shape, dtype=torch.int8, device=residual.device)
    params = RmsNormParams(
        hidden=hidden.data_ptr(),
        residual=residual.data_ptr(),
        residual_out=residual_out.data_ptr(),
        quantized=quantized.data_ptr(),
        tokens=residual[..., 0].numel(),
        d_model=shape[-1],
        scale=scale,
        eps=eps,
        rounding=ROUNDINGS[rounding],
    )
    launch("rms_norm", params, residual.device)
    return residual_out, quantized


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, variant: int = 0) -> Tensor:
    """`variant` forces a tile size; for benchmarks and tests."""
    n_out, n_in = weight.shape
    x = dense(x, torch.int8, *x.shape[:-1], n_in)
    weight = dense(weight, torch.int8, n_out, n_in)
    scale = dense(scale, torch.float32, n_out)
    bias = dense(bias, torch.float32, n_out)
    y = torch.empty((*x.shape[:-1], n_out), dtype=torch.float16, device=x.device)
    params = LinearParams(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        scale=scale.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        tokens=x[..., 0].numel(),
        in_features=n_in,
        out_features=n_out,
        variant=variant,
    )
    launch("linear", params, x.device)
    return y


def linear_w4(
    x: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    group_size: int,
    variant: int = 0,
) -> Tensor:
    """`variant` as in `linear`."""
    n_out, n_in = packed.shape[0], 2 * packed.shape[1]
    x = dense(x, torch.int8, *x.shape[:-1], n_in)
    packed = dense(packed, torch.int8, n_out, n_in // 2)
    group_scale = dense(group_scale, torch.float16, n_out, n_in // group_size)
    scale = dense(scale, torch.float32, n_out)
    bias = dense(bias, torch.float32, n_out)
    y = torch.empty((*x.shape[:-1], n_out), dtype=torch.float16, device=x.device)
    params = LinearW4Params(
        x=x.data_ptr(),
        packed=packed.data_ptr(),
        group_scale=group_scale.data_ptr(),
        scale=scale.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        tokens=x[..., 0].numel(),
        in_features=n_in,
        out_features=n_out,
        group_size=group_size,
        variant=variant,
    )
    launch("linear_w4", params, x.device)
    return y


def causal_conv1d(
    zxbcdt: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    *,
    d_inner: int,
    conv_dim: int,
    d_conv: int,
    ngroups: int,
    rounding: Rounding,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, row = zxbcdt.shape
    device = zxbcdt.device
    zxbcdt = dense(zxbcdt, torch.float16, batch, length, row)
    conv_state = dense(conv_state, torch.float16, batch, d_conv - 1, conv_dim)
    weight = dense(weight, torch.float32, conv_dim, d_conv)
    bias = dense(bias, torch.float32, conv_dim)
    b_scale = dense(b_scale, torch.float32, ngroups)
    c_scale = dense(c_scale, torch.float32, ngroups)
    gn = (conv_dim - d_inner) // 2
    x = torch.empty((batch, length, d_inner), dtype=torch.float16, device=device)
    b_q = torch.empty((batch, length, gn), dtype=torch.int8, device=device)
    c_q = torch.empty_like(b_q)
    state = torch.empty_like(conv_state)
    params = CausalConv1dParams(
        zxbcdt=zxbcdt.data_ptr(),
        conv_state=conv_state.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        b_scale=b_scale.data_ptr(),
        c_scale=c_scale.data_ptr(),
        x=x.data_ptr(),
        b_q=b_q.data_ptr(),
        c_q=c_q.data_ptr(),
        conv_state_out=state.data_ptr(),
        batch=batch,
        length=length,
        row_stride=row,
        d_inner=d_inner,
        conv_dim=conv_dim,
        d_conv=d_conv,
        ngroups=ngroups,
        rounding=ROUNDINGS[rounding],
    )
    launch("causal_conv1d", params, device)
    return x, b_q, c_q, state


def rms_norm_gated(
    y: Tensor,
    zxbcdt: Tensor,
    weight: Tensor,
    *,
    scale: float,
    eps: float,
    d_inner: int,
    ngroups: int,
    rounding: Rounding,
) -> Tensor:
    row = zxbcdt.shape[-1]
    y = dense(y, torch.float16, *zxbcdt.shape[:-1], d_inner)
    zxbcdt = dense(zxbcdt, torch.float16, *y.shape[:-1], row)
    weight = dense(weight, torch.float32, d_inner)
    quantized = torch.empty(y.shape, dtype=torch.int8, device=y.device)
    params = RmsNormGatedParams(
        y=y.data_ptr(),
        zxbcdt=zxbcdt.data_ptr(),
        weight=weight.data_ptr(),
        quantized=quantized.data_ptr(),
        tokens=y[..., 0].numel(),
        d_inner=d_inner,
        row_stride=row,
        ngroups=ngroups,
        scale=scale,
        eps=eps,
        rounding=ROUNDINGS[rounding],
    )
    launch("rms_norm_gated", params, y.device)
    return quantized


# ------------------------------------------------------------------------------------------------
# SSD: signatures of the references in ops/<stem>.py
# ------------------------------------------------------------------------------------------------


def chunk_cumsum(
    zxbcdt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    dt_column: int,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    batch, length, row = zxbcdt.shape
    zxbcdt = dense(zxbcdt, torch.float16, batch, length, row)
    dt_bias, A = (dense(v, torch.float32, nheads) for v in (dt_bias, A))
    dt = torch.empty((batch, nheads, length), dtype=torch.float32, device=zxbcdt.device)
    a = torch.empty_like(dt)
    params = ChunkCumsumParams(
        zxbcdt=zxbcdt.data_ptr(),
        dt_bias=dt_bias.data_ptr(),
        a_rate=A.data_ptr(),
        dt=dt.data_ptr(),
        a=a.data_ptr(),
        batch=batch,
        length=length,
        row_stride=row,
        dt_column=dt_column,
        nheads=nheads,
        chunk_size=chunk_size,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    launch("chunk_cumsum", params, zxbcdt.device)
    return dt, a


def chunk_state(
    x: Tensor,
    b_q: Tensor,
    dt: Tensor,
    a: Tensor,
    x_scale: Tensor,
    b_scale: Tensor,
    state_scale: Tensor,
    *,
    chunk_size: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    gate: Gate,
    rounding: Rounding,
) -> Tensor:
    batch, length = x.shape[:2]
    x = dense(x, torch.float16, batch, length, nheads * headdim)
    b_q = dense(b_q, torch.int8, batch, length, ngroups * d_state)
    dt, a = (dense(v, torch.float32, batch, nheads, length) for v in (dt, a))
    x_scale, state_scale = (
        dense(v, torch.float32, nheads, headdim) for v in (x_scale, state_scale)
    )
    b_scale = dense(b_scale, torch.float32, ngroups)
    chunks = -(-length // chunk_size)
    states = torch.empty(
        (batch, chunks, nheads, headdim, d_state),
        dtype=torch.float32 if gate == "fp32" else torch.int8,
        device=x.device,
    )
    params = ChunkStateParams(
        x=x.data_ptr(),
        b_q=b_q.data_ptr(),
        dt=dt.data_ptr(),
        a=a.data_ptr(),
        x_scale=x_scale.data_ptr(),
        b_scale=b_scale.data_ptr(),
        state_scale=state_scale.data_ptr(),
        states=states.data_ptr(),
        batch=batch,
        length=length,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        chunk_size=chunk_size,
        gate=GATES[gate],
        rounding=ROUNDINGS[rounding],
    )
    scratch = workspace("chunk_state", params, x.device)
    params.workspace = scratch.data_ptr()
    launch("chunk_state", params, x.device)
    return states


def state_passing(
    states: Tensor,
    a: Tensor,
    ssm_state: Tensor,
    state_scale: Tensor,
    *,
    chunk_size: int,
    gate: Gate,
    rounding: Rounding,
) -> tuple[Tensor, Tensor]:
    batch, chunks, nheads, headdim, d_state = states.shape
    states = dense(states, torch.float32 if gate == "fp32" else torch.int8, *states.shape)
    a = dense(a, torch.float32, batch, nheads, a.shape[2])
    if -(-a.shape[2] // chunk_size) != chunks:
        raise Ssdi8Error(f"CUDA kernel: {a.shape[2]} tokens are not {chunks} chunks.")
    ssm_state = _dense_state(ssm_state, batch, nheads, headdim, d_state)
    state_scale = dense(state_scale, torch.float32, nheads, headdim)
    passed = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    final = torch.empty_like(ssm_state)
    params = StatePassingParams(
        states=states.data_ptr(),
        a=a.data_ptr(),
        ssm_state=ssm_state.data_ptr(),
        state_scale=state_scale.data_ptr(),
        passed=passed.data_ptr(),
        ssm_state_out=final.data_ptr(),
        batch=batch,
        length=a.shape[2],
        nheads=nheads,
        headdim=headdim,
        d_state=d_state,
        chunk_size=chunk_size,
        gate=GATES[gate],
        rounding=ROUNDINGS[rounding],
        state_fp32=int(ssm_state.dtype is torch.float32),
    )
    launch("state_passing", params, states.device)
    return passed, final


def chunk_scan(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    dt: Tensor,
    a: Tensor,
    passed: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    state_scale: Tensor,
    cb_scale: Tensor,
    x_tile_scale: Tensor | None = None,
    *,
    chunk_size: int,
    scan_tile: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    rounding: Rounding,
) -> Tensor:
    batch, length = x.shape[:2]
    chunks = -(-length // chunk_size)
    x = dense(x, torch.float16, batch, length, nheads * headdim)
    b_q, c_q = (dense(v, torch.int8, batch, length, ngroups * d_state) for v in (b_q, c_q))
    dt, a = (dense(v, torch.float32, batch, nheads, length) for v in (dt, a))
    passed = dense(passed, torch.int8, batch, chunks, nheads, headdim, d_state)
    D = dense(D, torch.float32, nheads)
    b_scale, c_scale, cb_scale = (
        dense(v, torch.float32, ngroups) for v in (b_scale, c_scale, cb_scale)
    )
    state_scale = dense(state_scale, torch.float32, nheads, headdim)
    if x_tile_scale is not None:
        x_tile_scale = dense(x_tile_scale, torch.float32, nheads, headdim)
    y = torch.empty_like(x)
    params = ChunkScanParams(
        x=x.data_ptr(),
        b_q=b_q.data_ptr(),
        c_q=c_q.data_ptr(),
        dt=dt.data_ptr(),
        a=a.data_ptr(),
        passed=passed.data_ptr(),
        d_skip=D.data_ptr(),
        b_scale=b_scale.data_ptr(),
        c_scale=c_scale.data_ptr(),
        state_scale=state_scale.data_ptr(),
        cb_scale=cb_scale.data_ptr(),
        x_tile_scale=None if x_tile_scale is None else x_tile_scale.data_ptr(),
        y=y.data_ptr(),
        batch=batch,
        length=length,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        chunk_size=chunk_size,
        scan_tile=scan_tile,
        rounding=ROUNDINGS[rounding],
    )
    scratch = workspace("chunk_scan", params, x.device)
    params.workspace = scratch.data_ptr()
    launch("chunk_scan", params, x.device)
    return y


def ssd_scan(
    x: Tensor,
    b_q: Tensor,
    c_q: Tensor,
    zxbcdt: Tensor,
    ssm_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    b_scale: Tensor,
    c_scale: Tensor,
    x_scale: Tensor,
    state_scale: Tensor,
    cb_scale: Tensor,
    x_tile_scale: Tensor | None = None,
    *,
    chunk_size: int,
    scan_tile: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    d_state: int,
    dt_column: int,
    dt_min: float,
    dt_max: float,
    gate: Gate,
    rounding: Rounding,
) -> tuple[Tensor, Tensor]:
    batch, length = x.shape[:2]
    x = dense(x, torch.float16, batch, length, nheads * headdim)
    b_q, c_q = (dense(v, torch.int8, batch, length, ngroups * d_state) for v in (b_q, c_q))
    zxbcdt = dense(zxbcdt, torch.float16, batch, length, zxbcdt.shape[2])
    ssm_state = _dense_state(ssm_state, batch, nheads, headdim, d_state)
    dt_bias, A, D = (dense(v, torch.float32, nheads) for v in (dt_bias, A, D))
    b_scale, c_scale, cb_scale = (
        dense(v, torch.float32, ngroups) for v in (b_scale, c_scale, cb_scale)
    )
    x_scale, state_scale = (
        dense(v, torch.float32, nheads, headdim) for v in (x_scale, state_scale)
    )
    if x_tile_scale is not None:
        x_tile_scale = dense(x_tile_scale, torch.float32, nheads, headdim)
    y = torch.empty_like(x)
    final = torch.empty_like(ssm_state)
    params = SsdScanParams(
        x=x.data_ptr(),
        b_q=b_q.data_ptr(),
        c_q=c_q.data_ptr(),
        zxbcdt=zxbcdt.data_ptr(),
        ssm_state=ssm_state.data_ptr(),
        dt_bias=dt_bias.data_ptr(),
        a_rate=A.data_ptr(),
        d_skip=D.data_ptr(),
        b_scale=b_scale.data_ptr(),
        c_scale=c_scale.data_ptr(),
        x_scale=x_scale.data_ptr(),
        state_scale=state_scale.data_ptr(),
        cb_scale=cb_scale.data_ptr(),
        x_tile_scale=None if x_tile_scale is None else x_tile_scale.data_ptr(),
        y=y.data_ptr(),
        ssm_state_out=final.data_ptr(),
        batch=batch,
        length=length,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        chunk_size=chunk_size,
        scan_tile=scan_tile,
        row_stride=zxbcdt.shape[2],
        dt_column=dt_column,
        gate=GATES[gate],
        rounding=ROUNDINGS[rounding],
        state_fp32=int(ssm_state.dtype is torch.float32),
        dt_min=dt_min,
        dt_max=dt_max,
    )
    scratch = workspace("ssd_scan", params, x.device)
    params.workspace = scratch.data_ptr()
    launch("ssd_scan", params, x.device)
    return y, final


def _dense_state(state: Tensor, *shape: int) -> Tensor:
    dtype = torch.float32 if state.dtype is torch.float32 else torch.float16
    return dense(state, dtype, *shape)


# ------------------------------------------------------------------------------------------------
# By op name
# ------------------------------------------------------------------------------------------------

_KERNELS: dict[str, Callable[..., Any]] = {
    "Ssdi8RmsNorm": rms_norm,
    "Ssdi8Linear": linear,
    "Ssdi8LinearW4": linear_w4,
    "Ssdi8CausalConv1d": causal_conv1d,
    "Ssdi8RmsNormGated": rms_norm_gated,
    "Ssdi8ChunkCumsum": chunk_cumsum,
    "Ssdi8ChunkState": chunk_state,
    "Ssdi8StatePassing": state_passing,
    "Ssdi8ChunkScan": chunk_scan,
    "Ssdi8SsdScan": ssd_scan,
}


def kernel_for(op_name: str) -> Callable[..., Any] | None:
    """The kernel of an op, called like its reference; None without one, a GPU or the library."""
    return _KERNELS.get(op_name) if available() else None
