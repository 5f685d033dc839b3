"""The C library's allocator, told to keep the memory that a training step gives back."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
PAD = 64 << 20  # bytes


@cache
def keep_memory() -> bool:
    """Make `malloc` keep freed memory for the next step, for as long as this process lives.

    A step on a CPU takes and gives back the same tensors again and again. From 128 KiB on glibc
    asks the system for each of them anew, which clears every page: as much time as a third of the
    arithmetic. Returns whether it could be done: on Linux with glibc alone. What the environment
    already says of `malloc` (MALLOC_..., GLIBC_TUNABLES, another allocator) stays as it is.
    """
    chosen = any(key.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for key in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: PAD}
    taken = [mallopt(key, value) == 1 for key, value in wanted.items()]
    return all(taken)
