"""A training process keeps the memory it frees, as it does on a GPU.

Every step frees and allocates the same activations and gradients again. glibc returns large freed blocks to the
operating system each time, and every page that is allocated again causes a page fault; with tensors of a megabyte the
faults may cost more than the arithmetic. torch's CUDA allocator keeps what is freed; on the CPU, glibc must be told to.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc's own limit, on 64-bit machines
PAD = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Let this process keep what it frees until it ends; returns whether the C library could be told to.

    Does nothing if the user has set glibc's own variables (MALLOC_TRIM_THRESHOLD_ …) or uses another allocator.
    """
    if any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    settings = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: PAD, M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])  # noqa: C419  (all are to be set)
