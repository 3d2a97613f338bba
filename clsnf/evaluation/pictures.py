"""Pictures for people: heat maps, overlays, contact sheets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

_BAND = 64  # rows
Image = NDArray[np.uint8]
Map = NDArray[np.float32]


def heat_map(score_map: Map, low: float, high: float) -> Image:
    """A map (h, w) in colours, (h, w, 3) uint8 RGB.

    The colour map is Inferno. It can be read in grey, and by people who are colour-blind.

    Args:
        score_map: (h, w).
        low, high: map values of the darkest and of the brightest colour.
    """
    coloured = np.empty((*score_map.shape, 3), np.uint8)
    for rows in _bands(score_map.shape[0]):
        scaled = np.clip((score_map[rows] - low) / max(high - low, 1e-6), 0, 1)
        levels = (scaled * 255).astype(np.uint8)
        coloured[rows] = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[:, :, ::-1]
    return coloured


def overlay(image: Image, score_map: Map, low: float, threshold: float) -> Image:
    """An image under its heat map, with an outline around what is above the threshold.

    Args:
        image: (h, w, 3) uint8 RGB.
        score_map: (h, w).
        low: where the map is not above this value, the image stays as it is.
        threshold: map values above it are outlined in cyan.
    """
    high = max(threshold * 1.2, low + 1e-6)
    blended = np.empty(image.shape, np.uint8)
    for rows in _bands(image.shape[0]):
        heat = heat_map(score_map[rows], low, high).astype(np.float32)
        opacity = 0.65 * np.clip((score_map[rows] - low) / (high - low), 0, 1)[:, :, None]
        blended[rows] = (image[rows] * (1 - opacity) + heat * opacity).astype(np.uint8)
    return _with_outline(blended, score_map > threshold, (0, 255, 255))


def _bands(height: int) -> Iterator[slice]:
    """Rows of an image, some at a time: a photograph in floating point would take gigabytes."""
    for start in range(0, height, _BAND):
        yield slice(start, start + _BAND)


def outline(image: Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image:
    """A copy of an image with the outline of a mask; lines are thicker on larger images."""
    return _with_outline(np.ascontiguousarray(image.copy()), mask, colour)


def _with_outline(image: Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image:
    """An image with the outline of a mask drawn onto it."""
    contours, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    cv2.drawContours(image, contours, -1, colour, max(1, round(min(image.shape[:2]) / 256)))
    return image


def sheet(rows: Sequence[tuple[str, Sequence[Image]]], cell: int = 200) -> Image:
    """A contact sheet, uint8 RGB: rows of pictures, each with a caption above it.

    Args:
        rows: captions with their pictures.
        cell: width and height of the square that each picture is fitted into, in pixels.
    """
    lines = []
    columns = max(len(pictures) for _, pictures in rows)
    for caption, pictures in rows:
        strip = np.full((22, columns * cell, 3), 255, np.uint8)
        cv2.putText(
            strip, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        empty = np.full((cell, cell, 3), 255, np.uint8)
        cells = [_fit(picture, cell) for picture in pictures]
        cells += [empty] * (columns - len(pictures))
        lines += [strip, np.hstack(cells)]
    return np.vstack(lines)


def _fit(picture: Image, cell: int) -> Image:
    """A picture in the middle of a white square of `cell` pixels."""
    h, w = picture.shape[:2]
    scale = (cell - 4) / max(h, w)
    small = cv2.resize(
        picture, (max(1, round(w * scale)), max(1, round(h * scale))), interpolation=cv2.INTER_AREA
    )
    square = np.full((cell, cell, 3), 255, np.uint8)
    top, left = (cell - small.shape[0]) // 2, (cell - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square
