"""A part of a large GPU that stands in for a small one."""

from __future__ import annotations

from typing import Any

import torch


def stream_of_multiprocessors(count: int) -> torch.cuda.Stream:
    """A stream on `count` multiprocessors (CUDA green context), as many as a small board has."""
    from cuda.bindings import driver

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0] != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"green context: {result[0]}")
        return result[1] if len(result) == 2 else result[1:]

    torch.cuda.synchronize()
    device = checked(driver.cuDeviceGet(0))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = checked(driver.cuDeviceGetDevResource(device, kind))
    groups = checked(driver.cuDevSmResourceSplitByCount(1, whole, 0, count))[0]
    description = checked(driver.cuDevResourceGenerateDesc(groups, 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = checked(driver.cuGreenCtxCreate(description, device, flags))
    non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    return torch.cuda.ExternalStream(
        int(checked(driver.cuGreenCtxStreamCreate(context, non_blocking, 0)))
    )
