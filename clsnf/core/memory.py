"""How much memory there is, and tensors that lie on disk where it would not hold them."""

from __future__ import annotations

import math
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


def roomy_empty(shape: Sequence[int], dtype: torch.dtype, budget: int | None = None) -> Tensor:
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
