"""Which device torch computes on."""

from __future__ import annotations

import torch

from ssdi8_edge.ground.errors import UsageError


def require_device(device: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        UsageError: it is neither "cpu" nor an NVIDIA GPU that torch can use.
    """
    name, _, index = device.partition(":")
    if name not in ("cpu", "cuda") or (index and not (name == "cuda" and index.isdecimal())):
        raise UsageError(f"unknown device {device!r};", "give cpu, cuda or cuda:INDEX.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} finds no CUDA GPU here;",
            "install a CUDA build of torch on a machine with an NVIDIA GPU, or give --device cpu.",
        )
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no {device}: torch counts {torch.cuda.device_count()} CUDA GPUs;",
            "give a smaller index.",
        )
