"""Sizes of models that the CUDA kernels, and with them the TensorRT plugins, have a form for.

The launchers in `plugins/kernels` refuse the same; here a build can say so before it begins.
"""

from __future__ import annotations

from ssdi8_edge.errors import UsageError
from ssdi8_edge.model import Mamba2Config

SIZES = {
    "headdim": (64, 128),
    "d_state": (64, 128, 256),
    "chunk_size": (64, 128, 256),
    "d_conv": (2, 3, 4),
}
WIDTH_STEP, MOST_WIDTH = 32, 8192
MOST_GROUPS = 64


def require_kernels(config: Mamba2Config, place: str, remedy: str) -> None:
    """Refuse a quantized model that has a size without a kernel.

    Its widths must also have a Hadamard rotation, which every engine needs: `hadamard.factors`.

    Args:
        place, remedy: of the message: what has the kernels, and what to do without them.

    Raises:
        UsageError: names the first size that does not fit.
    """

    def require(name: str, fits: bool, kernels: str) -> None:
        if not fits:
            raise UsageError(
                f"the model's {name} is {getattr(config, name)}, but {place} has INT8 kernels "
                f"for {kernels};",
                remedy,
            )

    for name, sizes in SIZES.items():
        require(name, getattr(config, name) in sizes, ", ".join(map(str, sizes)))
    for name in ("d_model", "d_inner"):
        width = getattr(config, name)
        fits = width % WIDTH_STEP == 0 and width <= MOST_WIDTH
        require(name, fits, f"multiples of {WIDTH_STEP} up to {MOST_WIDTH}")
    require("ngroups", config.ngroups <= MOST_GROUPS, f"at most {MOST_GROUPS}")
