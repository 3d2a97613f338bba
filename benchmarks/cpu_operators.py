"""The decoder's own operators compared with PyTorch's on this CPU, forward and backward.

    python benchmarks/cpu_operators.py

Prints milliseconds per call (the fastest of several) and the ratio, in float32 and in the type that
training uses on this CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

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
        is_text = column in ("operator", "maps", "type")
        table.add_column(column, justify="left" if is_text else "right")
    for dtype in dict.fromkeys((torch.float32, training_dtype(torch.device("cpu")))):
        for channels, side in ((16, 128), (32, 64), (64, 32)):
            x = torch.randn(8, channels, side, side, dtype=dtype)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            size = (2 * side, 2 * side)
            bicubic = partial(F.interpolate, x, size, mode="bicubic", align_corners=True)
            pad = partial(F.pad, x, (1, 1, 1, 1), mode="reflect")
            for name, theirs, ours in (
                ("bicubic x2", fastest(bicubic), fastest(partial(resample, x, size))),
                ("reflect pad 1", fastest(pad), fastest(partial(reflect_pad, x, 1, 1))),
            ):
                numbers = [f"{value:.1f}" for value in (theirs, ours, theirs / ours)]
                table.add_row(name, f"8 x {channels} x {side} x {side}", str(dtype), *numbers)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
