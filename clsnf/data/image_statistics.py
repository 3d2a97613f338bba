"""Statistics of an image as a whole: what changes when a lamp ages or a lens loses focus.

They do not say whether a product is good. A server compares the statistics of the day's images with
those of the normal images that a detector was calibrated on: a detector whose images have changed
is wrong without knowing it. Files and HTTP answers call a statistic ``look``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from clsnf.core.config import ImageSettings
from clsnf.data.images import read_placed

# In grey levels, of 0 to 255: the mean; the standard deviation; the mean absolute difference of
# neighbours; the mean of red minus green, and of blue minus green.
STATISTICS = ("brightness", "contrast", "sharpness", "redness", "blueness")
_LEAST_SPREAD = np.array([1.0, 1.0, 0.5, 1.0, 1.0])


def statistics_of(placed: torch.Tensor) -> np.ndarray:
    """The :data:`STATISTICS`, float32 (5,), of an image on the canvas, uint8 (3, H, W)."""
    pixels = placed.float()
    red, green, blue = pixels.mean(dim=(1, 2)).tolist()
    grey = pixels.mean(dim=0)
    steps = (grey[1:] - grey[:-1]).abs().mean() + (grey[:, 1:] - grey[:, :-1]).abs().mean()
    return np.array(
        [float(grey.mean()), float(grey.std()), float(steps) / 2, red - green, blue - green],
        np.float32,
    )


def statistics_of_normals(
    paths: Sequence[str | os.PathLike[str]], settings: ImageSettings
) -> dict[str, list[float]]:
    """The mean and standard deviation of each statistic over some images, at least one.

    The standard deviation is 1 grey level or more, 0.5 for sharpness: where all images look alike,
    the slightest change must not count as drift.

    Args:
        paths: references, see :mod:`clsnf.data.sources`.
        settings: the network's input.

    Returns:
        [mean, standard deviation] by name.

    Raises:
        ImageError: an image can't be read.
    """

    def read(path: str | os.PathLike[str]) -> np.ndarray:
        return statistics_of(read_placed(path, settings)[0])

    with ThreadPoolExecutor() as pool:
        # (N, 5). Each statistic is sorted, so that its sum has the same last bit in any order of
        # the images.
        found = np.sort(np.stack(list(pool.map(read, paths))).astype(np.float64), axis=0)
    spreads = np.maximum(found.std(axis=0), _LEAST_SPREAD)
    moments = zip(STATISTICS, found.mean(axis=0), spreads, strict=True)
    return {name: [float(mean), float(spread)] for name, mean, spread in moments}
