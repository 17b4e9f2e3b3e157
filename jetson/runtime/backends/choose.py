"""The choice of an inference library."""

from __future__ import annotations

import sys
from collections.abc import Callable

from runtime.backends.kernels.library import find_library
from runtime.backends.protocol import Backend, BackendOptions
from runtime.bundle import Bundle
from runtime.engine.store import STORE, engines_in
from runtime.problems import BundleProblem


def _open_onnxruntime(bundle: Bundle, options: BackendOptions) -> Backend:
    try:
        from runtime.backends.onnxruntime import OnnxRuntimeBackend
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while its library loads
            raise error.__cause__ from None
        raise BundleProblem(
            f"onnxruntime cannot be imported ({error})",
            f"install it with: {sys.executable} -m pip install onnxruntime",
        ) from error
    return OnnxRuntimeBackend(bundle, options.threads, options.profiling)


def _open_tensorrt(bundle: Bundle, options: BackendOptions) -> Backend:
    from runtime.backends.tensorrt import TensorRtBackend

    return TensorRtBackend(bundle, options)


def _open_kernels(bundle: Bundle, options: BackendOptions) -> Backend:
    from runtime.backends.kernels.backend import KernelsBackend

    return KernelsBackend(bundle, options)


# Name -> how to open it. A program around this runtime may add its own.
BACKENDS: dict[str, Callable[[Bundle, BackendOptions], Backend]] = {
    "onnxruntime": _open_onnxruntime,
    "tensorrt": _open_tensorrt,
    "kernels": _open_kernels,
}


def choose(bundle: Bundle, options: BackendOptions) -> tuple[str, str]:
    """The first engine of the bundle that is ready here, and a sentence where it is not its first.

    Where none is, the first, which then says what it lacks.
    """
    named = options.engines is not None and "tensorrt" in bundle.engines
    ready = ["tensorrt"] if named else [e for e in bundle.engines if _is_ready(e, bundle, options)]
    first = bundle.engines[0]
    if not ready or ready[0] == first or named:
        return (ready or [first])[0], ""
    lacks = {
        "tensorrt": "no TensorRT engine was built here",
        "kernels": "there is no kernel library here",
    }
    runs = {"tensorrt": "its TensorRT engine runs it", "kernels": "our kernels run it"}
    return ready[0], f"{lacks[first]}, so {runs[ready[0]]}"


def _is_ready(engine: str, bundle: Bundle, options: BackendOptions) -> bool:
    if engine == "tensorrt":
        return bool(engines_in(bundle.root / STORE))
    return engine != "kernels" or find_library(bundle, options.plugins) is not None


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Backend:
    """Load the graph of `bundle` with the runtime `name`, a key of BACKENDS."""
    return BACKENDS[name](bundle, options)
