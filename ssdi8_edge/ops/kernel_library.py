"""Finds, loads and calls libssdi8_kernels.so; the only file that knows pointers.

`kernel_for` gives a function with the signature of an op's torch reference that runs its CUDA
kernel on torch tensors, on torch's current stream. What a kernel is given, an op says in its own
file; here is what they share. The library is asked for its ABI number and for the sizes of its
parameter structs, so that one built from another header is refused when it is loaded, not when it
computes.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops.kernel_call import WORKSPACE, Call, Kernel
from ssdi8_edge.ops.kernel_header import PLUGIN_FOLDERS, abi_version, parameter_structs

LIBRARY_NAME = "libssdi8_kernels.so"
_BUILD_HINT = "Build it: cmake -S plugins -B plugins/build && cmake --build plugins/build"


# ------------------------------------------------------------------------------------------------
# The library
# ------------------------------------------------------------------------------------------------


def find_library() -> Path | None:
    """The built library in the source tree or beside the installed package."""
    for folder in PLUGIN_FOLDERS:
        if (folder / "build" / LIBRARY_NAME).is_file():
            return folder / "build" / LIBRARY_NAME
    return None


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
    if (version := library.ssdi8_abi_version()) != abi_version():
        raise Ssdi8Error(f"{path} has ABI version {version}, not {abi_version()}.", _BUILD_HINT)
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
    return any(field[0] == WORKSPACE for field in struct._fields_)


@functools.cache
def available() -> bool:
    """Whether kernels can run here: a CUDA device and a built library."""
    return torch.cuda.is_available() and find_library() is not None


# ------------------------------------------------------------------------------------------------
# A call on tensors
# ------------------------------------------------------------------------------------------------

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


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """torch's current stream of `device`, which is the current device inside."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class TensorCall(Call):
    """A call on tensors of one GPU, or of the CPU where kernels are emulated."""

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return next(v.device for v in vars(self).values() if isinstance(v, Tensor))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of torch."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def next_state(self, state: Tensor) -> Tensor:
        """New, or the state itself inside `states_in_place`."""
        return state if _in_place.get() else torch.empty_like(state)

    def whole_number(self, scalar: Tensor) -> int:
        """Waits for the GPU, if the scalar lies there."""
        return int(scalar)

    def launch(self, launcher: str) -> None:
        """Enqueue on torch's current stream, with scratch memory if it wants some.

        Raises:
            Ssdi8Error: the launcher refuses.
        """
        library, struct = load(), parameter_structs()[launcher]
        params = struct()
        for name, value in self.fields(struct).items():
            setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
        with _current_stream(self.device) as stream:
            if _needs_workspace(struct):
                size = getattr(library, f"ssdi8_{launcher}_workspace")(ctypes.byref(params))
                # torch keeps it until the stream has used it.
                scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
                params.workspace = scratch.data_ptr()
            code = getattr(library, f"ssdi8_{launcher}")(ctypes.byref(params), stream)
        if code:
            raise Ssdi8Error(f"CUDA kernel {launcher}: {library.ssdi8_last_error().decode()}")


# ------------------------------------------------------------------------------------------------
# By reference
# ------------------------------------------------------------------------------------------------


def kernel_for(
    kernel: Kernel | None, reference: Callable[..., Any], variant: int = 0
) -> Callable[..., Any] | None:
    """`kernel`, called like `reference`; None if there is none, without a GPU or the library, and
    inside `references_only`. `variant` forces a tile size of the linear kernels, for benchmarks and
    tests."""
    if kernel is None or _references_only.get() or not available():
        return None
    signature = inspect.signature(reference)

    def run(*inputs: Any, **attributes: Any) -> Any:
        bound = signature.bind(*inputs, **attributes)
        bound.apply_defaults()
        return kernel(TensorCall(**bound.arguments, variant=variant))

    return run
