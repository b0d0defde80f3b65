"""Memory that a training process has freed stays with it, as it does on a GPU.

A step frees and takes up the same activations and gradients again and again. glibc gives large freed blocks back to
the operating system each time, and each page that is taken up again is a fault: with tensors of a megabyte the faults
may cost more than the arithmetic. torch's allocator on CUDA keeps what is freed; on the CPU glibc must be told to.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc's own limit, on 64-bit machines
PAD = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the rest of its life; says whether the C library can do so.

    Does nothing where the user has set glibc's own variables (MALLOC_TRIM_THRESHOLD_ …) or uses another allocator.
    """
    if any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    settings = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: PAD, M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])  # noqa: C419  (each is to be set)
