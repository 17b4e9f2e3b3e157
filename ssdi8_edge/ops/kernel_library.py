"""Finds and loads libssdi8_kernels.so; the only file that knows pointers.

`kernel_for` gives a function with the signature of the op's torch reference that runs the CUDA
kernel on torch tensors, on torch's current stream. The parameter structs are read from the
library's own header, `kernels.h`; the library is asked for their sizes, so that one built from
another header is refused when it is loaded, not when it computes.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops.op import Op

ABI_VERSION = 7
LIBRARY_NAME = "libssdi8_kernels.so"

_PACKAGE = Path(__file__).resolve().parents[1]
# In a source tree and in an installed package.
_PLUGIN_FOLDERS = (_PACKAGE.parent / "plugins", _PACKAGE / "share" / "plugins")
_BUILD_HINT = "Build it: cmake -S plugins -B plugins/build && cmake --build plugins/build"

# Choices that an op names and the C ABI numbers: the enums of kernels.h.
_NUMBERS: Mapping[str, Mapping[str, int]] = {
    "rotation": {"none": 0, "hadamard": 1},
    "rounding": {"half_even": 0, "half_away": 1},
    "gate": {"fp32": 0, "q0.7": 1},
    "scaling": {"static": 0, "dynamic": 1, "none": 2},
}
# Fields of a struct whose names differ from the reference's arguments.
_ARGUMENT_OF_FIELD = {"d_skip": "D", "a_rate": "A"}
_C_TYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}


# ------------------------------------------------------------------------------------------------
# The library
# ------------------------------------------------------------------------------------------------


def find_library() -> Path | None:
    """The built library in the source tree or beside the installed package."""
    for folder in _PLUGIN_FOLDERS:
        if (folder / "build" / LIBRARY_NAME).is_file():
            return folder / "build" / LIBRARY_NAME
    return None


@functools.cache
def parameter_structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of `kernels.h`, by launcher: "rms_norm" -> the mirror of Ssdi8RmsNormParams."""
    header = next(f / "kernels" / "kernels.h" for f in _PLUGIN_FOLDERS if f.is_dir())
    text = re.sub(r"//[^\n]*", "", header.read_text())
    bodies = {name: body for body, name in re.findall(r"struct \w+ \{([^}]*)\} (\w+);", text)}
    structs = {}
    for launcher, name in re.findall(r"int ssdi8_(\w+)\(const (\w+)\* params, void\*", text):
        fields = [
            (field, ctypes.c_void_p if "*" in kind else _C_TYPES[kind.strip()])
            for kind, field in re.findall(r"([\w ]+\*?) (\w+);", bodies[name])
        ]
        structs[launcher] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


@functools.cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """Load the library from `path`, or from where the build leaves it, and check its ABI.

    Raises:
        Ssdi8Error: it is not built, cannot be loaded, or was built from another header.
    """
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
    for op, struct in parameter_structs().items():
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
        launcher.argtypes = (ctypes.POINTER(struct), ctypes.c_void_p)
        launcher.restype = ctypes.c_int
        if _needs_workspace(struct):
            workspace = getattr(library, f"ssdi8_{op}_workspace")
            workspace.argtypes = (ctypes.POINTER(struct),)
            workspace.restype = ctypes.c_size_t
    return library


def _needs_workspace(struct: type[ctypes.Structure]) -> bool:
    return any(field[0] == "workspace" for field in struct._fields_)


@functools.cache
def available() -> bool:
    """Whether kernels can run here: a CUDA device and a built library."""
    return torch.cuda.is_available() and find_library() is not None


# ------------------------------------------------------------------------------------------------
# A call: the arguments of the reference by name, to which sizes and outputs are added
# ------------------------------------------------------------------------------------------------

Call = SimpleNamespace


def _require(call: Call, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
    """Check what a pointer cannot tell, type and shape, and make the named tensors contiguous."""
    for name, shape in shapes.items():
        tensor = getattr(call, name)
        if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
            raise Ssdi8Error(
                f"CUDA kernel: {name} is {tensor.dtype} {tuple(tensor.shape)},"
                f" {dtype} {shape} is expected."
            )
        setattr(call, name, tensor.contiguous())


_references_only: ContextVar[bool] = ContextVar("references_only", default=False)


@contextmanager
def references_only() -> Iterator[None]:
    """Inside, ops on a GPU run their torch references: exact, and counting what saturates."""
    token = _references_only.set(True)
    try:
        yield
    finally:
        _references_only.reset(token)


_in_place: ContextVar[bool] = ContextVar("states_in_place", default=False)


@contextmanager
def states_in_place() -> Iterator[None]:
    """Inside, a kernel writes conv_state' and ssm_state' over the states it was given."""
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def _next_state(state: Tensor) -> Tensor:
    return state if _in_place.get() else torch.empty_like(state)


def _require_state(call: Call, *shape: int) -> None:
    """The SSM state, in either type."""
    call.state_fp32 = int(call.ssm_state.dtype is torch.float32)
    _require(call, torch.float32 if call.state_fp32 else torch.float16, ssm_state=shape)
    call.ssm_state_out = _next_state(call.ssm_state)


def _field_value(call: Call, field: str) -> Any:
    value = getattr(call, _ARGUMENT_OF_FIELD.get(field, field))
    if isinstance(value, Tensor):
        return value.data_ptr()
    return _NUMBERS[field][value] if field in _NUMBERS else value


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """torch's current stream of `device`, which is the current device inside."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _launch(op: str, call: Call, device: torch.device) -> None:
    """Enqueue `op` on torch's current stream of `device`, with scratch memory if it wants some."""
    library, struct = load(), parameter_structs()[op]
    call.workspace = None
    params = struct(**{field[0]: _field_value(call, field[0]) for field in struct._fields_})
    with _current_stream(device) as stream:
        if _needs_workspace(struct):
            size = getattr(library, f"ssdi8_{op}_workspace")(ctypes.byref(params))
            # torch keeps it until the stream has used it.
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            params.workspace = scratch.data_ptr()
        code = getattr(library, f"ssdi8_{op}")(ctypes.byref(params), stream)
    if code:
        raise Ssdi8Error(f"CUDA kernel {op}: {library.ssdi8_last_error().decode()}")


# ------------------------------------------------------------------------------------------------
# Norms, linear layers, convolution
# ------------------------------------------------------------------------------------------------


def _token_scale(call: Call, rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the scales of tokens go; checks the one that static scaling takes for all."""
    if call.scale is not None:
        _require(call, torch.float32, scale=(1,))
    return torch.empty((*rows, 1), dtype=torch.float32, device=device)


def _rms_norm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(call.residual.shape)
    _require(call, torch.float16, hidden=shape)
    _require(call, torch.float32, residual=shape)
    call.residual_out = torch.empty_like(call.residual)
    call.quantized = torch.empty(shape, dtype=torch.int8, device=call.residual.device)
    call.token_scale = _token_scale(call, shape[:-1], call.residual.device)
    call.tokens, call.d_model = call.residual[..., 0].numel(), shape[-1]
    _launch("rms_norm", call, call.residual.device)
    return call.residual_out, call.quantized, call.token_scale


def _linear(call: Call) -> Tensor:
    out, width = call.weight.shape
    _require(call, torch.int8, weight=(out, width))
    return _any_linear("linear", call, out, width)


def _linear_w4(call: Call) -> Tensor:
    out, width = call.packed.shape[0], 2 * call.packed.shape[1]
    _require(call, torch.int8, packed=(out, width // 2))
    call.integer_scales = int(call.group_scale.dtype is torch.int8)
    kind = torch.int8 if call.integer_scales else torch.float16
    _require(call, kind, group_scale=(out, width // call.group_size))
    return _any_linear("linear_w4", call, out, width)


def _any_linear(op: str, call: Call, out: int, width: int) -> Tensor:
    *rows, _ = call.x.shape
    _require(call, torch.int8, x=(*rows, width))
    _require(call, torch.float32, token_scale=(*rows, 1), scale=(out,), bias=(out,))
    call.y = torch.empty((*rows, out), dtype=torch.float16, device=call.x.device)
    call.tokens, call.in_features, call.out_features = call.x[..., 0].numel(), width, out
    _launch(op, call, call.x.device)
    return call.y


def _causal_conv1d(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, row = call.zxbcdt.shape
    device = call.zxbcdt.device
    conv_state = (batch, call.d_conv - 1, call.conv_dim)
    _require(call, torch.float16, zxbcdt=(batch, length, row), conv_state=conv_state)
    _require(call, torch.float32, weight=(call.conv_dim, call.d_conv), bias=(call.conv_dim,))
    _require(call, torch.float32, b_scale=(call.ngroups,), c_scale=(call.ngroups,))
    call.x = torch.empty((batch, length, call.d_inner), dtype=torch.float16, device=device)
    columns = (call.conv_dim - call.d_inner) // 2
    call.b_q = torch.empty((batch, length, columns), dtype=torch.int8, device=device)
    call.c_q = torch.empty_like(call.b_q)
    call.conv_state_out = _next_state(call.conv_state)
    call.batch, call.length, call.row_stride = batch, length, row
    _launch("causal_conv1d", call, device)
    return call.x, call.b_q, call.c_q, call.conv_state_out


def _rms_norm_gated(call: Call) -> tuple[Tensor, Tensor]:
    *rows, row = call.zxbcdt.shape
    _require(call, torch.float16, y=(*rows, call.d_inner), zxbcdt=(*rows, row))
    _require(call, torch.float32, weight=(call.d_inner,))
    call.quantized = torch.empty(call.y.shape, dtype=torch.int8, device=call.y.device)
    call.token_scale = _token_scale(call, tuple(rows), call.y.device)
    call.tokens, call.row_stride = call.y[..., 0].numel(), row
    _launch("rms_norm_gated", call, call.y.device)
    return call.quantized, call.token_scale


def _fp16_linear(call: Call) -> Tensor:
    """cuBLAS: the reference widens the weight to FP32 at every call."""
    return torch.nn.functional.linear(call.x, call.weight)


# ------------------------------------------------------------------------------------------------
# SSD
# ------------------------------------------------------------------------------------------------


def _chunk_cumsum(call: Call) -> tuple[Tensor, Tensor]:
    call.batch, call.length, call.row_stride = call.zxbcdt.shape
    _require(call, torch.float16, zxbcdt=(call.batch, call.length, call.row_stride))
    _require(call, torch.float32, dt_bias=(call.nheads,), A=(call.nheads,))
    shape = (call.batch, call.nheads, call.length)
    call.dt = torch.empty(shape, dtype=torch.float32, device=call.zxbcdt.device)
    call.a = torch.empty_like(call.dt)
    _launch("chunk_cumsum", call, call.zxbcdt.device)
    return call.dt, call.a


def _require_tokens(call: Call, *int8: str) -> None:
    """x (B, L, H·P) FP16 and the named (B, L, G·N) INT8 tensors."""
    call.batch, call.length = call.x.shape[:2]
    tokens = (call.batch, call.length)
    _require(call, torch.float16, x=(*tokens, call.nheads * call.headdim))
    columns = (*tokens, call.ngroups * call.d_state)
    _require(call, torch.int8, **{name: columns for name in int8})


def _require_decay(call: Call) -> None:
    decay = (call.batch, call.nheads, call.length)
    _require(call, torch.float32, dt=decay, a=decay)


_GROUP_SCALES = ("b_scale", "c_scale", "cb_scale")


def _require_scales(call: Call, per_group: tuple[str, ...], per_channel: tuple[str, ...]) -> None:
    """Those of channels are there with scaling "static" only."""
    channels = (call.nheads, call.headdim)
    _require(call, torch.float32, **{name: (call.ngroups,) for name in per_group})
    present = [name for name in per_channel if getattr(call, name) is not None]
    _require(call, torch.float32, **{name: channels for name in present})


def _chunks(call: Call) -> int:
    return -(-call.length // call.chunk_size)


def _state_type(call: Call) -> torch.dtype:
    if call.scaling == "none":
        return torch.float16
    return torch.float32 if call.gate == "fp32" else torch.int8


def _passed_type(call: Call) -> torch.dtype:
    return torch.float16 if call.scaling == "none" else torch.int8


def _chunk_state(call: Call) -> Tensor:
    _require_tokens(call, "b_q")
    _require_decay(call)
    _require_scales(call, ("b_scale",), ("x_scale", "state_scale"))
    call.states = torch.empty(
        (call.batch, _chunks(call), call.nheads, call.headdim, call.d_state),
        dtype=_state_type(call),
        device=call.x.device,
    )
    _launch("chunk_state", call, call.x.device)
    return call.states


def _state_passing(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    call.batch, chunks, call.nheads, call.headdim, call.d_state = shape = tuple(call.states.shape)
    call.length = call.a.shape[2]
    if _chunks(call) != chunks:
        raise Ssdi8Error(f"CUDA kernel: {call.length} tokens are not {chunks} chunks.")
    _require(call, _state_type(call), states=shape)
    _require(call, torch.float32, a=(call.batch, call.nheads, call.length))
    _require_scales(call, (), ("state_scale",))
    _require_state(call, call.batch, *shape[2:])
    call.passed = torch.empty(shape, dtype=_passed_type(call), device=call.states.device)
    call.passed_scale = torch.empty(shape[:-1], dtype=torch.float32, device=call.states.device)
    _launch("state_passing", call, call.states.device)
    return call.passed, call.passed_scale, call.ssm_state_out


def _chunk_scan(call: Call) -> Tensor:
    _require_tokens(call, "b_q", "c_q")
    _require_decay(call)
    _require(call, torch.float32, D=(call.nheads,))
    rows = (call.batch, _chunks(call), call.nheads, call.headdim)
    _require(call, _passed_type(call), passed=(*rows, call.d_state))
    _require(call, torch.float32, passed_scale=rows)
    _require_scales(call, _GROUP_SCALES, ())
    call.y = torch.empty_like(call.x)
    _launch("chunk_scan", call, call.x.device)
    return call.y


def _ssd_scan(call: Call) -> tuple[Tensor, Tensor]:
    _require_tokens(call, "b_q", "c_q")
    call.row_stride = call.zxbcdt.shape[2]
    _require(call, torch.float16, zxbcdt=(call.batch, call.length, call.row_stride))
    _require(call, torch.float32, **{name: (call.nheads,) for name in ("dt_bias", "A", "D")})
    _require_scales(call, _GROUP_SCALES, ("x_scale", "state_scale"))
    _require_state(call, call.batch, call.nheads, call.headdim, call.d_state)
    call.y = torch.empty_like(call.x)
    _launch("ssd_scan", call, call.x.device)
    return call.y, call.ssm_state_out


# ------------------------------------------------------------------------------------------------
# By op name
# ------------------------------------------------------------------------------------------------

_KERNELS: Mapping[str, Callable[[Call], Any]] = {
    "Ssdi8RmsNorm": _rms_norm,
    "Ssdi8Linear": _linear,
    "Ssdi8LinearW4": _linear_w4,
    "Ssdi8CausalConv1d": _causal_conv1d,
    "Ssdi8RmsNormGated": _rms_norm_gated,
    "Ssdi8ChunkCumsum": _chunk_cumsum,
    "Ssdi8ChunkState": _chunk_state,
    "Ssdi8StatePassing": _state_passing,
    "Ssdi8ChunkScan": _chunk_scan,
    "Ssdi8SsdScan": _ssd_scan,
    "Linear": _fp16_linear,
}


def kernel_for(op: Op, variant: int = 0) -> Callable[..., Any] | None:
    """The kernel of `op`, called like its reference; None if it has none, without a GPU or the
    library, and inside `references_only`. `variant` forces a tile size of the linear kernels, for
    benchmarks and tests."""
    run = _KERNELS.get(op.name)
    if run is None or _references_only.get() or not available():
        return None
    signature = inspect.signature(op.reference)

    def kernel(*inputs: Any, **attributes: Any) -> Any:
        bound = signature.bind(*inputs, **attributes)
        bound.apply_defaults()
        return run(Call(**bound.arguments, variant=variant))

    return kernel
