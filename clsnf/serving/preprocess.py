"""From a request's bytes to pictures on the network's canvas.

The limits come first, by the image's header. Then the same reader and the same preprocessing as in
training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ImageError
from clsnf.data.image_statistics import statistics_of
from clsnf.data.images import Placement, announced_size, decode_image, decode_placed, place
from clsnf.serving.errors import BadRequest

# Sides of an image in pixels: a smaller image shows no product, and OpenCV draws no larger one.
SHORTEST, LONGEST = 16, 32_000


@dataclass(frozen=True)
class Picture:
    """A picture that is ready for the network.

    Attributes:
        name: for messages and answers.
        placed: (3, H, W) uint8 on the canvas.
        placement: where it lies there.
        statistics: (5,), see :func:`clsnf.data.image_statistics.statistics_of`.
        source: what it came as, a file's bytes or (h, w, 3) uint8. An overlay decodes it again:
            the decoded pictures of all requests that wait could fill the memory.
    """

    name: str
    placed: torch.Tensor
    placement: Placement
    statistics: np.ndarray
    source: bytes | np.ndarray

    def image(self) -> np.ndarray:
        """(h, w, 3) uint8."""
        return (
            decode_image(self.source, self.name) if isinstance(self.source, bytes) else self.source
        )


def picture_from_file(
    data: bytes, name: str, settings: ImageSettings, max_megapixels: int
) -> Picture:
    """The picture of a file's bytes.

    Raises:
        BadRequest: not an image, half an image, or one of absurd dimensions, with the reason.
    """
    try:
        check_sides(announced_size(data, name), name, max_megapixels)
        return _picture(*decode_placed(data, name, settings), data, name)
    except ImageError as error:
        raise BadRequest(str(error)) from error
    except MemoryError as error:
        raise BadRequest(f"{name} needs more memory than there is: scale it down.") from error


def picture_from_array(image: np.ndarray, name: str, settings: ImageSettings) -> Picture:
    """The picture of an RGB array (h, w, 3) uint8, whose sides the caller has checked."""
    return _picture(*place(image, settings), image, name)


def _picture(
    placed: torch.Tensor, placement: Placement, source: bytes | np.ndarray, name: str
) -> Picture:
    return Picture(name, placed, placement, statistics_of(placed), source)


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
