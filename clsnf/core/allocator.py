"""What the C library does with memory that was freed: kept for the next step, or handed to the
system. For glibc; others are left alone.
"""

from __future__ import annotations

import ctypes
import os

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None
_IS_GLIBC = _C_LIBRARY is not None and hasattr(_C_LIBRARY, "malloc_trim")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of fetching it from the system anew: for
    whoever computes on CPUs.

    glibc takes blocks above 32 MB from the system one by one and hands them back when they are
    freed. A step of training, or a batch of images that a detector looks at, then waits for a
    gigabyte of pages that the system fills with zeros first: a quarter of its time
    (``benchmarks/allocator.py``). From now on such blocks come from one heap for all threads, and
    stay there until :func:`give_memory_back`.
    """
    if _C_LIBRARY is not None and _IS_GLIBC:
        for parameter, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_ARENA_MAX, 1),
        ):
            _C_LIBRARY.mallopt(parameter, value)


def give_memory_back() -> None:
    """Hand the system what is free: after a training hundreds of MB, which processes beside this
    one may need.
    """
    if _C_LIBRARY is not None and _IS_GLIBC:
        _C_LIBRARY.malloc_trim(0)
