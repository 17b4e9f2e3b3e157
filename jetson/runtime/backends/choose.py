"""The choice of an inference library."""

from __future__ import annotations

import sys
from collections.abc import Callable

from runtime.backends.protocol import Backend, BackendOptions
from runtime.bundle import Bundle
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


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Backend:
    """Load the graph of `bundle` with the runtime `name`, a key of BACKENDS."""
    return BACKENDS[name](bundle, options)
