"""Sizes of models that the CUDA kernels, and with them the TensorRT plugins, have a form for.

The launchers in `plugins/kernels` refuse the same; here a build can say so before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssdi8_edge.errors import UsageError

SIZES = {
    "headdim": (64, 128),
    "d_state": (64, 128, 256),
    "chunk_size": (64, 128, 256),
    "d_conv": (2, 3, 4),
}
WIDTH_STEP, MOST_WIDTH = 32, 8192
MOST_GROUPS = 64


def misfit(sizes: Mapping[str, int]) -> str | None:
    """The first size of a quantized model that has no kernel, and those that have; None: all have.

    Its widths must also have a Hadamard rotation, which every engine needs: `hadamard.factors`.

    Args:
        sizes: headdim, d_state, chunk_size, d_conv, d_model, d_inner and ngroups.
    """

    def found(name: str, kernels: str) -> str:
        return f"the model's {name} is {sizes[name]}, but there are INT8 kernels for {kernels}"

    for name, fitting in SIZES.items():
        if sizes[name] not in fitting:
            return found(name, ", ".join(map(str, fitting)))
    for name in ("d_model", "d_inner"):
        if sizes[name] % WIDTH_STEP or sizes[name] > MOST_WIDTH:
            return found(name, f"multiples of {WIDTH_STEP} up to {MOST_WIDTH}")
    if sizes["ngroups"] > MOST_GROUPS:
        return found("ngroups", f"at most {MOST_GROUPS}")
    return None


def require_kernels(sizes: Mapping[str, int], place: str, remedy: str) -> None:
    """Refuse a quantized model that has a size without a kernel.

    Args:
        sizes: as in `misfit`.
        place, remedy: of the message: what would run the kernels, and what to do without them.

    Raises:
        UsageError: names the first size that does not fit.
    """
    if found := misfit(sizes):
        raise UsageError(f"{found} on {place};", remedy)
