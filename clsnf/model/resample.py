"""Upsampling of maps by a fixed linear operator.

Unusual: bicubic and bilinear resampling are written as two small matrix products, one along each
    axis. The result is that of
``torch.nn.functional.interpolate`` (the matrices are made by it), but on CPUs the backward pass of
bicubic interpolation, the most expensive single operation of a naive decoder, becomes several times
faster (``benchmarks/cpu_operators.py``).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=256)
def _matrix(
    size_in: int, size_out: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(size_out, size_in) matrix that resamples one axis with aligned corners."""
    # A normal tensor whatever the caller's mode: one made under inference_mode could not be used in
    # training later on.
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(size_in).view(size_in, 1, size_in, 1)
        columns = F.interpolate(
            identity, size=(size_out, 1), mode=mode, align_corners=True
        )  # (size_in, 1, size_out, 1)
        return columns.view(size_in, size_out).t().contiguous().to(device=device, dtype=dtype)


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
