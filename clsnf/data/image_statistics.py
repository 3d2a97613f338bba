"""How a picture looks on the whole: what changes when a lamp ages, a lens loses focus or a camera's
settings change.

Unusual: nothing here says whether a product is good. A server compares the looks of the day's
    pictures with those of the normal images
that a detector was calibrated on, because a detector whose pictures have changed is wrong without
knowing it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from clsnf.core.config import ImageSettings
from clsnf.data.images import place, read_image

# Grey levels of 255: mean; standard deviation; mean difference of neighbours; mean of red less
# green, of blue less green.
STATISTICS = ("brightness", "contrast", "sharpness", "redness", "blueness")
_LEAST_SPREAD = np.array([1.0, 1.0, 0.5, 1.0, 1.0])


def statistics_of(placed: torch.Tensor) -> np.ndarray:
    """(5,) float32, in the order of :data:`STATISTICS`, of a picture on the canvas, (3, H, W) uint8."""
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
    """Mean and standard deviation of each look over some images, at least one.

    The deviation is 1 grey level or more (half of one where differences are averaged): a line whose
    pictures all look alike must not call every breath of change a drift.
    """

    def look(path: str | os.PathLike[str]) -> np.ndarray:
        return statistics_of(place(read_image(path), settings)[0])

    with ThreadPoolExecutor() as pool:
        # (N, 5), each look in order of size: the sums come out the same to the last bit, whatever
        # the order of the images.
        found = np.sort(np.stack(list(pool.map(look, paths))).astype(np.float64), axis=0)
    spreads = np.maximum(found.std(axis=0), _LEAST_SPREAD)
    return {
        name: [float(m), float(s)]
        for name, m, s in zip(STATISTICS, found.mean(axis=0), spreads, strict=True)
    }
