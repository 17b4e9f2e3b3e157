"""libssdi8_kernels.so through ctypes: found, checked, and its launchers called by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.backends.kernels.program import Program
from runtime.bundle import Bundle
from runtime.engine.tensorrt_api import PLUGIN_LIBRARY
from runtime.problems import BundleProblem, RunFailure

LIBRARY = "libssdi8_kernels.so"
SETUP = "build it: bash setup.sh"
C_TYPES: Mapping[str, Any] = {
    "pointer": ctypes.c_void_p,
    "int32": ctypes.c_int32,
    "float": ctypes.c_float,
}


def find_library(bundle: Bundle, named: Path | None) -> Path | None:
    """The one named, else what setup.sh builds in the bundle; the plugins hold the kernels, too.

    Raises:
        BundleProblem: the one named is not there.
    """
    if named is not None:
        if not named.is_file():
            raise BundleProblem(f"there is no kernel library {named}", SETUP)
        return named
    built = (bundle.root / "build" / name for name in (LIBRARY, PLUGIN_LIBRARY))
    return next((path for path in built if path.is_file()), None)


class Kernels:
    """The launchers that a program calls."""

    def __init__(self, path: Path, program: Program) -> None:
        """Raises BundleProblem where the library does not load or is not the program's."""
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._library.ssdi8_abi_version()
        except (OSError, AttributeError) as error:
            raise BundleProblem(f"{path} cannot be loaded ({error})", SETUP) from error
        if version != program.abi:
            raise BundleProblem(
                f"{path} has ABI version {version} and the program was made for {program.abi}",
                "build the library that came with the bundle: bash setup.sh",
            )
        self._library.ssdi8_last_error.restype = ctypes.c_char_p
        self.structs = {kernel: _struct(kernel, f) for kernel, f in program.structs.items()}
        for kernel, struct in self.structs.items():
            self._declare(path, kernel, struct)

    def _declare(self, path: Path, kernel: str, struct: type[ctypes.Structure]) -> None:
        try:
            size = getattr(self._library, f"ssdi8_sizeof_{kernel}")
            launcher = getattr(self._library, f"ssdi8_{kernel}")
        except AttributeError as error:
            raise BundleProblem(f"{path} has no kernel {kernel}", SETUP) from error
        size.restype = ctypes.c_size_t
        if size() != ctypes.sizeof(struct):
            raise BundleProblem(
                f"{path} and the program disagree about the parameters of {kernel}", SETUP
            )
        launcher.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        if hasattr(struct, "workspace"):
            workspace = getattr(self._library, f"ssdi8_{kernel}_workspace")
            workspace.argtypes = (ctypes.c_void_p,)
            workspace.restype = ctypes.c_size_t

    def workspace(self, kernel: str, params: ctypes.Structure) -> int:
        """Bytes of scratch memory that the call takes."""
        if not hasattr(params, "workspace"):
            return 0
        return getattr(self._library, f"ssdi8_{kernel}_workspace")(ctypes.byref(params))

    def prepared(self, kernel: str, params: ctypes.Structure, stream: int) -> Callable[[], None]:
        """The call, which enqueues the kernel on a stream as often as it is called.

        It raises RunFailure where the launcher refuses what it is given.
        """
        launcher = getattr(self._library, f"ssdi8_{kernel}")
        last_error = self._library.ssdi8_last_error
        pointer = ctypes.byref(params)

        def enqueue() -> None:
            if launcher(pointer, stream):
                raise RunFailure(
                    f"the CUDA kernels cannot run this ({last_error().decode(errors='replace')})",
                    "run it with --backend onnxruntime, on the CPU",
                )

        return enqueue


def _struct(kernel: str, fields: Mapping[str, str]) -> type[ctypes.Structure]:
    typed = [(name, C_TYPES[kind]) for name, kind in fields.items()]
    return type(kernel, (ctypes.Structure,), {"_fields_": typed})
