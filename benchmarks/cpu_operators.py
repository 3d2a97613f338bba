"""What the decoder's own operators are worth on this machine's CPU: forward and backward, against
PyTorch's.

    python benchmarks/cpu_operators.py

Prints milliseconds a call (the fastest of several) and the ratio, in float32 and in the type that
training uses here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clsnf.core.device import training_dtype
from clsnf.model.padding import reflect_pad
from clsnf.model.resample import resample

REPEATS = 7


def fastest(call: Callable[[], Tensor]) -> float:
    """Milliseconds of the fastest of several calls with their backward pass."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call().sum().backward()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    table = Table(title=f"forward + backward, {torch.get_num_threads()} threads")
    for column in ("operator", "maps", "type", "PyTorch ms", "ours ms", "ratio"):
        table.add_column(
            column, justify="left" if column in ("operator", "maps", "type") else "right"
        )
    for dtype in dict.fromkeys((torch.float32, training_dtype(torch.device("cpu")))):
        for channels, side in ((16, 128), (32, 64), (64, 32)):
            x = (
                torch.randn(8, channels, side, side, dtype=dtype)
                .to(memory_format=torch.channels_last)
                .requires_grad_()
            )
            size = (2 * side, 2 * side)
            theirs = fastest(
                lambda x=x, size=size: F.interpolate(x, size, mode="bicubic", align_corners=True)
            )
            ours = fastest(lambda x=x, size=size: resample(x, size))
            maps = f"8 x {channels} x {side} x {side}"
            table.add_row(
                "bicubic x2",
                maps,
                str(dtype),
                f"{theirs:.1f}",
                f"{ours:.1f}",
                f"{theirs / ours:.1f}",
            )
            theirs = fastest(lambda x=x: F.pad(x, (1, 1, 1, 1), mode="reflect"))
            ours = fastest(lambda x=x: reflect_pad(x, 1, 1))
            table.add_row(
                "reflect pad 1",
                maps,
                str(dtype),
                f"{theirs:.1f}",
                f"{ours:.1f}",
                f"{theirs / ours:.1f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
