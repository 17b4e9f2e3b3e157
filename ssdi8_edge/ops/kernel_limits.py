"""Sizes of models that the CUDA kernels, and with them the TensorRT plugins, have a form for.

The launchers in `plugins/kernels` refuse the same; here a build can say so before it begins.
"""

from __future__ import annotations

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.models.reference import Mamba2Config

SIZES = {
    "headdim": (64, 128),
    "d_state": (64, 128, 256),
    "chunk_size": (64, 128, 256),
    "d_conv": (2, 3, 4),
}
WIDTH_STEP, MOST_WIDTH = 32, 8192
MOST_GROUPS = 64


def misfit(config: Mamba2Config) -> str | None:
    """The first size of a quantized model that has no kernel, and those that have; None: all have.

    Its widths must also have a Hadamard rotation, which every engine needs: `hadamard.factors`.
    """

    def found(name: str, kernels: str) -> str:
        size = getattr(config, name)
        return f"the model's {name} is {size}, but there are INT8 kernels for {kernels}"

    for name, sizes in SIZES.items():
        if getattr(config, name) not in sizes:
            return found(name, ", ".join(map(str, sizes)))
    for name in ("d_model", "d_inner"):
        width = getattr(config, name)
        if width % WIDTH_STEP or width > MOST_WIDTH:
            return found(name, f"multiples of {WIDTH_STEP} up to {MOST_WIDTH}")
    if config.ngroups > MOST_GROUPS:
        return found("ngroups", f"at most {MOST_GROUPS}")
    return None


def require_kernels(config: Mamba2Config, place: str, remedy: str) -> None:
    """Refuse a quantized model that has a size without a kernel.

    Args:
        place, remedy: of the message: what would run the kernels, and what to do without them.

    Raises:
        UsageError: names the first size that does not fit.
    """
    if found := misfit(config):
        raise UsageError(f"{found} on {place};", remedy)
