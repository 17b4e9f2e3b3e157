"""What running a bundle takes of memory at least, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.bundle import Bundle
from runtime.console import size
from runtime.files import WEIGHTS
from runtime.machine import available_memory, swap_free
from runtime.problems import BundleProblem

# Copies of a recurrent state: a call reads one and writes the other.
SLOTS = 2


def least_memory(bundle: Bundle, batch: int = 1) -> dict[str, int]:
    """Bytes of each part; activations and the inference library come on top."""
    model = bundle.model
    caches = model.cache_bytes()
    return {
        "its weights": bundle.files[WEIGHTS]["bytes"] if WEIGHTS in bundle.files else 0,
        "its recurrent states": SLOTS * batch * (model.state_bytes() - caches),
        "its keys and values": batch * caches,
    }


def misfit(parts: Mapping[str, int], free: int) -> str | None:
    """What is too large, in words that follow the name of a bundle; None where there is room."""
    needed = sum(parts.values())
    if needed <= free:
        return None
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"takes {size(needed)} at least while it runs, most of it {largest}"
        f" ({size(parts[largest])}), and {size(free)} are free"
    )


def require_memory(bundle: Bundle) -> None:
    """Before a bundle is loaded.

    Raises:
        BundleProblem: it cannot fit into the memory and swap that this machine has now.
    """
    available = available_memory()
    if available is None:
        return
    said = misfit(least_memory(bundle), available + swap_free())
    if said:
        raise BundleProblem(
            f"bundle {bundle.name} {said}",
            "end other programs, pack it with a shorter --context or by --method edge-w4a8, or try"
            " all the same with --force",
        )
