"""What an inference library has to offer, and the choice of one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from runtime.bundle import Bundle, BundleProblem

# Graph name ("conv_state.0", "ssm_state.0", ...) -> array in whatever memory the backend uses;
# np.asarray of it copies to the host.
States = Mapping[str, Any]


class Backend(Protocol):
    """One loaded graph. It serves prefill, continued prefill and decode."""

    description: str  # library, version and device, for people

    def zero_states(self, batch: int) -> States:
        """States that start `batch` sequences."""
        ...

    def forward(self, ids: np.ndarray, states: States, keep: int = 1) -> tuple[np.ndarray, States]:
        """Run tokens `ids` (b, l) int32 after `states`.

        Returns the logits (b, keep, vocab) float32 of the last `keep` positions and the new states.
        `states` may be overwritten by the call: go on with the ones returned.
        """
        ...


def open_backend(bundle: Bundle, name: str, threads: int | None) -> Backend:
    """Load the graph of `bundle` with the runtime `name`; `threads` None leaves it the choice."""
    if name == "onnxruntime":
        try:
            from runtime.onnxruntime_backend import OnnxRuntimeBackend
        except ImportError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while its library loads
                raise error.__cause__ from None
            raise BundleProblem(
                f"onnxruntime cannot be imported ({error})",
                f"install it with: {sys.executable} -m pip install onnxruntime",
            ) from error
        return OnnxRuntimeBackend(bundle, threads)
    raise BundleProblem(
        f"bundle {bundle.name} has no TensorRT engine yet, it will be built on the board",
        "use --backend onnxruntime to run the portable graph on the CPU",
    )
