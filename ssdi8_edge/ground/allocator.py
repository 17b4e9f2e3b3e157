"""The C library's memory, for loops over large tensors. Elsewhere than in glibc nothing happens.

glibc takes each large block from the system anew, and the kernel clears its pages one by one: up to
half the time of a reference on a CPU. Kept blocks cost nothing but come in all sizes, so that the
heap grows with the number of windows, unless what is free goes back now and then.
"""

from __future__ import annotations

import contextlib
import ctypes

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """From now on this process uses freed blocks of up to 1 GiB again."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """What is free now goes back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
