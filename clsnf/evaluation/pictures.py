"""Pictures of maps for people: heat maps, overlays, contact sheets of results."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Map = NDArray[np.float32]


def heat_map(score_map: Map, low: float, high: float) -> Image:
    """A map (h, w) as colours (h, w, 3) uint8 RGB, `low` darkest and `high` brightest.

    Inferno: readable in grey and by the colour-blind.
    """
    scaled = np.clip((score_map - low) / max(high - low, 1e-6), 0, 1)
    coloured = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(coloured[:, :, ::-1])


def overlay(image: Image, score_map: Map, low: float, threshold: float) -> Image:
    """The image with the heat map laid over it where the map is high, and the outline of what lies
    above the threshold.

    Args:
        image: (h, w, 3) uint8 RGB.
        score_map: (h, w).
        low: map values up to here leave the image as it is.
        threshold: outlined in cyan.
    """
    high = max(threshold * 1.2, low + 1e-6)
    heat = heat_map(score_map, low, high).astype(np.float32)
    opacity = 0.65 * np.clip((score_map - low) / (high - low), 0, 1)[:, :, None]
    blended = (image * (1 - opacity) + heat * opacity).astype(np.uint8)
    return outline(blended, score_map > threshold, (0, 255, 255))


def outline(image: Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image:
    """The image with the mask's outline drawn in; thickness grows with the image."""
    result = np.ascontiguousarray(image.copy())
    contours, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    cv2.drawContours(result, contours, -1, colour, max(1, round(min(image.shape[:2]) / 256)))
    return result


def sheet(rows: Sequence[tuple[str, Sequence[Image]]], cell: int = 200) -> Image:
    """A contact sheet: rows of pictures, each row with its caption above it; pictures are fitted
    into cells of `cell` pixels.
    """
    lines = []
    columns = max(len(pictures) for _, pictures in rows)
    for caption, pictures in rows:
        strip = np.full((22, columns * cell, 3), 255, np.uint8)
        cv2.putText(
            strip, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        cells = [_fitted(p, cell) for p in pictures] + [np.full((cell, cell, 3), 255, np.uint8)] * (
            columns - len(pictures)
        )
        lines += [strip, np.hstack(cells)]
    return np.vstack(lines)


def _fitted(picture: Image, cell: int) -> Image:
    h, w = picture.shape[:2]
    scale = (cell - 4) / max(h, w)
    small = cv2.resize(
        picture, (max(1, round(w * scale)), max(1, round(h * scale))), interpolation=cv2.INTER_AREA
    )
    canvas = np.full((cell, cell, 3), 255, np.uint8)
    top, left = (cell - small.shape[0]) // 2, (cell - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas
