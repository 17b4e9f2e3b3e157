"""Sizes of models that the CUDA kernels, and with them the TensorRT plugins, have a form for.

The launchers in `plugins/kernels` refuse the same; here a build can say so before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssdi8_edge.ground.errors import UsageError

SIZES = {
    "headdim": (32, 64, 80, 128),
    "d_state": (64, 128, 256),
    "chunk_size": (64, 128, 256),
    "d_conv": (2, 3, 4),
    "head_dim": (64, 80, 96, 128),
}
# Of widths that are normalized with the residual stream, and of those that become out_proj's input.
WIDTH_STEP, MOST_WIDTH, MOST_INNER_WIDTH = 32, 8192, 16384
MOST_GROUPS = 64


def size_misfit(sizes: Mapping[str, int]) -> str | None:
    """The first of `sizes` that has no INT8 kernel, and those that have; None: all have."""
    for name, size in sizes.items():
        if name in SIZES and size not in SIZES[name]:
            return _found(name, size, ", ".join(map(str, SIZES[name])))
    if sizes.get("ngroups", 1) > MOST_GROUPS:
        return _found("ngroups", sizes["ngroups"], f"at most {MOST_GROUPS}")
    return None


def width_misfit(name: str, width: int, most: int = MOST_WIDTH) -> str | None:
    """The same of a width that is normalized."""
    if width % WIDTH_STEP or width > most:
        return _found(name, width, f"multiples of {WIDTH_STEP} up to {most}")
    return None


def inner_width_misfit(name: str, width: int) -> str | None:
    """The same of a width that is rotated, in blocks or whole, and quantized for out_proj."""
    return width_misfit(name, width, MOST_INNER_WIDTH)


def _found(name: str, size: int, kernels: str) -> str:
    return f"the model's {name} is {size}, but there are INT8 kernels for {kernels}"


def require_kernels(found: str | None, place: str, remedy: str) -> None:
    """Refuse a quantized model that has a size without a kernel.

    Args:
        found: the misfit.
        place, remedy: of the message: what would run the kernels, and what to do without them.

    Raises:
        UsageError: there is one.
    """
    if found:
        raise UsageError(f"{found} on {place};", remedy)
