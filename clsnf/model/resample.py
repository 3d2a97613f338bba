"""Bicubic and bilinear resampling of maps, as two small matrix products, one along each axis.

The result is that of ``torch.nn.functional.interpolate``, which makes the matrices. On CPUs the
backward pass becomes several times faster (``benchmarks/cpu_operators.py``). In bicubic upsampling
it would otherwise be the most expensive operation of the decoder.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=256)
def _matrix(
    size_in: int, size_out: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrix (size_out, size_in) that resamples one axis with aligned corners.

    ``_matrix.cache_clear()`` empties the cache.
    """

    def make() -> Tensor:
        identity = torch.eye(size_in).view(size_in, 1, size_in, 1)
        columns = F.interpolate(identity, size=(size_out, 1), mode=mode, align_corners=True)
        # (size_in, 1, size_out, 1) -> (size_out, size_in)
        matrix = columns.view(size_in, size_out).t().contiguous()
        return matrix.to(device=device, dtype=dtype)

    # A thread has modes of its own. In the caller's, under inference_mode, the matrix could not
    # serve training later, and under torch.export it would hold a tracer instead of numbers.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def resample(x: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resample maps to another size, corners aligned.

    Args:
        x: (B, C, h, w), any float type.
        size: (H, W) of the result.
        mode: ``bicubic`` or ``bilinear``.

    Returns:
        (B, C, H, W) in the type of an autocast region, else in x's own.
    """
    b, c, h, w = x.shape
    if (h, w) == tuple(size):
        return x
    dtype = (
        torch.get_autocast_dtype(x.device.type)
        if torch.is_autocast_enabled(x.device.type)
        else x.dtype
    )
    rows = _matrix(h, size[0], mode, dtype, x.device)
    columns = _matrix(w, size[1], mode, dtype, x.device)
    y = x.to(dtype).reshape(b * c * h, w) @ columns.t()  # (B C h, W): one large product
    y = torch.bmm(rows.expand(b * c, -1, -1), y.view(b * c, h, size[1]))  # (B C, H, W)
    return y.view(b, c, size[0], size[1])
