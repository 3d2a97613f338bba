"""From an image's bytes to the network's canvas; runs in workers of the reading pool.

The limits come first, by the image's header. Then the same reader and the same preprocessing as in
training.
"""

from __future__ import annotations

import numpy as np
import torch

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ImageError
from clsnf.data.image_statistics import statistics_of
from clsnf.data.images import Placement, announced_size, decode_image, decode_placed, place
from clsnf.serving.body_forms import Item
from clsnf.serving.errors import BadRequest

# Sides of an image in pixels: a smaller image shows no product, and OpenCV draws no larger one.
SHORTEST, LONGEST = 16, 32_000


def place_item(
    data: memoryview, item: Item, settings: ImageSettings, max_megapixels: int
) -> tuple[torch.Tensor, Placement, np.ndarray]:
    """An image of a body on the canvas.

    Returns:
        (3, H, W) uint8; where it lies there; its statistics (5,), see
        :func:`clsnf.data.image_statistics.statistics_of`.

    Raises:
        BadRequest: not an image, half an image, or one of absurd dimensions, with the reason.
    """
    try:
        if item.shape is None:
            content = bytes(data[item.start : item.stop])
            check_sides(announced_size(content, item.name), item.name, max_megapixels)
            placed, placement = decode_placed(content, item.name, settings)
        else:
            check_sides(item.shape[:2], item.name, max_megapixels)
            placed, placement = place(decode_item(data, item), settings)
    except ImageError as error:
        raise BadRequest(str(error)) from error
    except MemoryError as error:
        raise BadRequest(f"{item.name} needs more memory than there is: scale it down.") from error
    return placed.contiguous(), placement, statistics_of(placed)


def decode_item(data: memoryview, item: Item) -> np.ndarray:
    """(h, w, 3) uint8 RGB. Raises ImageError."""
    content = data[item.start : item.stop]
    if item.shape is None:
        return decode_image(bytes(content), item.name)
    pixels = np.frombuffer(content, np.uint8).reshape(item.shape)
    return np.repeat(pixels, 3, axis=2) if item.shape[2] == 1 else pixels


def check_sides(size: tuple[int, int], name: str, max_megapixels: int) -> None:
    """Refuse (height, width) that no picture of a product has. Raises BadRequest."""
    height, width = size
    if min(size) < SHORTEST or max(size) > LONGEST:
        raise BadRequest(
            f"{name} has {width}x{height} pixels: each side must have {SHORTEST} to {LONGEST}."
        )
    if height * width > max_megapixels * 1_000_000:
        raise BadRequest(
            f"{name} announces {width}x{height} pixels, more than the {max_megapixels} megapixels "
            "that are read: scale it down."
        )
