"""The one step from the levels of an image file to the numbers that networks work with."""

from __future__ import annotations

import torch
from torch import Tensor


def to_floats(images: Tensor) -> Tensor:
    """Scale levels from 0 to 255 to float32 in [0, 1]: a new, contiguous tensor of the same shape.

    Args:
        images: uint8, any shape, usually (B, 3, H, W); of any memory format.
    """
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
