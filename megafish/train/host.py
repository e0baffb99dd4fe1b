"""Memory of this machine: how much is free, and how the process's allocator keeps what it freed."""

from __future__ import annotations

import ctypes
import platform

import psutil

# From glibc's malloc.h, and the most that it takes for the first.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD = 32 * 2**20
_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, up to 2 GiB at the heap's end, for the next allocation; False without glibc.

    A step on a CPU allocates and frees the same activations as the step before. By default glibc returns them to the
    kernel at each step, which then fills the pages with zeros again, one fault at a time: 5 to 15 % of a step
    (benchmarks/train_throughput.py). The peak of the memory stays as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def available_memory() -> int:
    """Bytes of memory that this machine can still give without swapping."""
    return psutil.virtual_memory().available
