"""Memory: how much is free, tensors that do not fit into it, and reuse of freed memory.

numpy and torch are imported only where a tensor is made, because ``clsnf --help`` imports this
module.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHARE = 0.4  # of the free memory, for one tensor or for the images of a category

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process can still allocate, on the machine or in its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            (_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or no Linux
        return free


def memory_budget(sharers: int = 1, free: int | None = None) -> int:
    """Bytes that a process may fill with data that it could also keep on disk.

    Args:
        sharers: number of processes that share the memory.
        free: bytes that are free; None: measure them.
    """
    return int(_SHARE * (free_memory() if free is None else free) / sharers)


def allocate_tensor(shape: Sequence[int], dtype: torch.dtype, budget: int | None = None) -> Tensor:
    """An uninitialised tensor on the CPU, in memory or mapped from a temporary file.

    It is mapped from a file if it takes more than `budget` bytes (None: :func:`memory_budget`). The
    file lies in TMPDIR, has no name and is deleted with the tensor. The system keeps as much of it
    in memory as fits.
    """
    import numpy as np
    import torch

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
    """Let this process reuse freed memory instead of returning it to the system.

    This makes computing on CPUs faster. By default glibc requests each block above 32 MB from the
    system and returns it when it is freed. A training step, or the scoring of a batch of images,
    then waits for a gigabyte of pages that the system first fills with zeros: a quarter of its time
    (``benchmarks/allocator.py``). After this call such blocks come from one heap for all threads,
    and stay there until :func:`release_freed_memory`. With another C library nothing happens.
    """
    if _C_LIBRARY is not None and _IS_GLIBC:
        for parameter, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_ARENA_MAX, 1),
        ):
            _C_LIBRARY.mallopt(parameter, value)


def release_freed_memory() -> None:
    """Return freed memory to the system, for other processes: after a training, hundreds of MB."""
    if _C_LIBRARY is not None and _IS_GLIBC:
        _C_LIBRARY.malloc_trim(0)
