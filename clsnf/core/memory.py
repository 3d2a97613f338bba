"""Memory: how much is free, tensors larger than that, and what happens to memory that was freed."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

_SHARE = 0.4  # of the free memory: one tensor may take so much, or a category's images

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process can still have: of the machine, or of the container that it runs in."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            (_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or another kind of system
        return free


def memory_budget(sharers: int = 1, free: int | None = None) -> int:
    """Bytes that one of several processes side by side may fill with something that could lie
    elsewhere, of what is free.
    """
    return int(_SHARE * (free_memory() if free is None else free) / sharers)


def allocate_tensor(shape: Sequence[int], dtype: torch.dtype, budget: int | None = None) -> Tensor:
    """An uninitialised tensor on the CPU: in memory, or, where it takes more than `budget` bytes,
    in a file without a name.

    The file lies where temporary files do (TMPDIR) and goes away with the tensor. The system keeps
    as much of it in memory as there is.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= (memory_budget() if budget is None else budget):
        return torch.empty(tuple(shape), dtype=dtype)
    with tempfile.TemporaryFile(prefix="clsnf-") as file:
        file.truncate(size)
        mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(tuple(shape))


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
    stay there until :func:`release_freed_memory`.
    """
    if _C_LIBRARY is not None and _IS_GLIBC:
        for parameter, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_ARENA_MAX, 1),
        ):
            _C_LIBRARY.mallopt(parameter, value)


def release_freed_memory() -> None:
    """Hand the system what is free: after a training hundreds of MB, which processes beside this
    one may need.
    """
    if _C_LIBRARY is not None and _IS_GLIBC:
        _C_LIBRARY.malloc_trim(0)
