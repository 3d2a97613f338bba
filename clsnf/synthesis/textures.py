"""Textures that training defects are filled from: photographs of a folder, or drawn by code.

Textures are uint8 (T, 3, H, W) of the network's input size. The drawn ones vary structure, colour
and scale at once, so that a few dozen serve a machine without any data set. Texture i of a seed is
the same whatever the count. To add a style, write one function and one line in :data:`STYLES`.
Called by the training stages and by commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.core.errors import DataError
from clsnf.core.hashing import content_key, sha256_file
from clsnf.data.images import IMAGE_SUFFIXES, read_image

Field = NDArray[np.floating[Any]]  # (H, W)

# ---- from a folder ----


def _image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def texture_files_key(folder: Path) -> str:
    """A hash of the relative names and sizes of the images below a folder.

    It tells one collection from another without reading the images.
    """
    sizes = [(path.relative_to(folder), path.stat().st_size) for path in _image_files(folder)]
    return content_key([[path.as_posix(), size] for path, size in sizes])


def texture_contents_key(folder: Path, limit: int) -> str:
    """A hash of the contents of the images that :func:`load_textures` takes, in their order.

    Names and places of the files are no part of it.

    Raises:
        DataError: the folder has no images.
        OSError: an image can't be read.
    """
    return content_key([sha256_file(path) for path in _chosen_files(folder, limit)])


def _chosen_files(folder: Path, limit: int) -> list[Path]:
    """At most `limit` images below a folder, evenly spread over the sorted paths."""
    paths = _image_files(folder)
    if not paths:
        what = "has no images" if folder.is_dir() else "is no folder"
        raise DataError(
            f"The texture folder {folder} {what}: give one with {', '.join(IMAGE_SUFFIXES)} files "
            "in it or below it, or leave it out to use drawn textures."
        )
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(limit, len(paths))).round().astype(int))
    return [paths[index] for index in chosen]


def load_textures(folder: str | Path, size: tuple[int, int], limit: int) -> Tensor:
    """At most ``limit`` images from anywhere below ``folder``, uint8 (T, 3, H, W).

    The folder may have DTD's layout or any other. If there are more images, they are taken evenly
    spread over the sorted paths, so that each subfolder gives its share. Each is scaled to cover
    ``size`` = (H, W), and its middle is cut out: a texture's shapes are not squeezed. The result
    takes T * 3 * H * W bytes.

    Raises:
        DataError: the folder has no images.
        ImageError: an image can't be read.
    """
    paths = _chosen_files(Path(folder), limit)
    textures = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    for into, path in zip(textures, paths, strict=True):
        into.copy_(torch.from_numpy(_covering(read_image(path), size)).permute(2, 0, 1))
    return textures


def _covering(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of an image (h, w, 3), scaled so that it just covers ``size``."""
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    scaled = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    image = np.asarray(
        cv2.resize(image, scaled, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR),
        np.uint8,
    )
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


# ---- drawn ----


def draw_textures(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Draw ``count`` textures by code, uint8 (count, 3, H, W).

    Texture i has style i modulo the number of styles.
    """
    styles = list(STYLES.values())
    textures = torch.empty(count, 3, *size, dtype=torch.uint8)
    for index, into in enumerate(textures):
        rng = np.random.default_rng([seed, index])
        field = styles[index % len(styles)](rng, size)
        into.copy_(torch.from_numpy(_coloured(rng, field)).permute(2, 0, 1))
    return textures


def _coloured(rng: np.random.Generator, field: Field) -> NDArray[np.uint8]:
    """A field as a picture, uint8 (H, W, 3): random palette, uneven light and a camera's grain."""
    low, high = np.percentile(field, (0.5, 99.5))
    place = np.clip((field - low) / max(high - low, 1e-6), 0, 1)
    picture = _palette(rng)[np.rint(255 * place).astype(np.uint8)]
    light = 1 + rng.uniform(0, 0.2) * _fractal(rng, field.shape, cells=2, octaves=1)
    grain = rng.uniform(0, 0.03) * rng.standard_normal(field.shape, dtype=np.float32)
    picture = picture * light[..., None] + grain[..., None]
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _palette(rng: np.random.Generator) -> Field:
    """Colours (256, 3) in [0, 1] through two to five random ones.

    They go from grey to vivid, and are light and dark enough to show a structure.
    """
    stops = int(rng.integers(2, 6))
    hue = (rng.uniform(0, 360) + rng.choice([15.0, 60.0, 180.0]) * rng.standard_normal(stops)) % 360
    saturation = rng.choice([0.05, 0.35, 0.8]) * rng.uniform(0.5, 1.2, stops)
    value = rng.permutation(np.linspace(rng.uniform(0.05, 0.35), rng.uniform(0.65, 1.0), stops))
    hsv = np.stack([hue, np.clip(saturation, 0, 1), value], axis=1).astype(np.float32)
    colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    at = np.linspace(0, 1, 256)
    return np.stack(
        [np.interp(at, np.linspace(0, 1, stops), channel) for channel in colours.T], axis=1
    ).astype(np.float32)


def _fractal(rng: np.random.Generator, size: tuple[int, ...], cells: float, octaves: int) -> Field:
    """Noise (H, W) of mean 0 and standard deviation about 1.

    Its coarsest octave has ``cells`` bumps along the short side.
    """
    total = np.zeros(size, np.float32)
    for octave in range(octaves):
        shape = [max(2, round(cells * 2**octave * side / min(size))) + 3 for side in size]
        coarse = rng.standard_normal(shape, dtype=np.float32)
        total += 0.5**octave * cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return total


def _turned_grid(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Field, Field]:
    """Two coordinates (H, W), in short sides, in axes turned by a random angle."""
    y, x = (np.arange(side, dtype=np.float32) / min(size) for side in size)
    angle = rng.uniform(0, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x[None] + sin * y[:, None], cos * y[:, None] - sin * x[None]


def _warped_grid(
    rng: np.random.Generator, size: tuple[int, int], most: float
) -> tuple[Field, Field]:
    """A turned grid, bent by smooth noise of up to about ``most`` short sides."""
    u, v = _turned_grid(rng, size)
    strength = rng.uniform(0, most)
    return u + strength * _fractal(rng, size, 3, 2), v + strength * _fractal(rng, size, 3, 2)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _nearest_points(
    rng: np.random.Generator, size: tuple[int, int], cells: float
) -> tuple[Field, Field, NDArray[np.intp]]:
    """Distances to the nearest and second nearest of random points, and which is nearest, (H, W).

    The distances are in cells. One point lies in each square of a jittered grid, so that a pixel's
    two nearest are found in the squares around it.
    """
    u, v = (cells * axis for axis in _warped_grid(rng, size, 0.03))
    u, v = u - u.min() + 2, v - v.min() + 2  # two squares of margin all around
    grid = (int(v.max()) + 4, int(u.max()) + 4)
    jitter = rng.uniform(0.05, 0.95, (2, *grid)).astype(np.float32)
    row, column = v.astype(np.intp), u.astype(np.intp)
    v, u = v % 1, u % 1
    first = np.full(size, np.inf, np.float32)
    second = first.copy()
    which = np.zeros(size, np.intp)
    for down in range(-2, 3):
        for right in range(-2, 3):
            r, c = row + down, column + right
            distance = np.hypot(jitter[0, r, c] + down - v, jitter[1, r, c] + right - u)
            closer = distance < first
            second = np.where(closer, first, np.minimum(second, distance))
            which = np.where(closer, r * grid[1] + c, which)
            first = np.where(closer, distance, first)
    return first, second, which


def clouds(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Fractal noise, soft to rough."""
    return _fractal(rng, size, _log_uniform(rng, 2, 12), int(rng.integers(3, 7)))


def marble(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Veins: a wave of a strongly bent coordinate."""
    u, _ = _warped_grid(rng, size, 0.05)
    bend = rng.uniform(0.3, 1.5) * _fractal(rng, size, 2, 5)
    return np.abs(np.sin(np.pi * (_log_uniform(rng, 2, 8) * u + bend))) ** rng.uniform(0.3, 1.5)


def wood(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Rings around a far centre, with fibres along them."""
    u, v = _warped_grid(rng, size, 0.05)
    radius = np.hypot(u * 0.25 + rng.uniform(-0.5, 0.5), v + rng.uniform(0, 1.5))
    return (_log_uniform(rng, 6, 25) * radius) % 1 + 0.4 * brushed(rng, size)


def stripes(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Waves, sharp or soft, of one or two widths."""
    u, _ = _warped_grid(rng, size, 0.04)
    wave = np.sin(2 * np.pi * _log_uniform(rng, 4, 40) * u) + rng.uniform(0, 1) * np.sin(
        2 * np.pi * _log_uniform(rng, 2, 20) * u
    )
    return np.tanh(_log_uniform(rng, 0.5, 8) * (wave + rng.uniform(-0.6, 0.6)))


def checks(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Fields of two shades and their seams, square to oblong."""
    u, v = _warped_grid(rng, size, 0.02)
    across, down = _log_uniform(rng, 3, 24) * u, _log_uniform(rng, 3, 24) * v
    odd = (np.floor(across) + np.floor(down)) % 2
    seam = np.minimum(np.abs(across - np.rint(across)), np.abs(down - np.rint(down))) < rng.uniform(
        0, 0.12
    )
    return odd + 0.7 * seam + 0.15 * _fractal(rng, size, 6, 4)


def spots(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Round dots of differing shade on a mottled ground."""
    nearest, _, which = _nearest_points(rng, size, _log_uniform(rng, 4, 24))
    shade = rng.uniform(0.6, 1.4, int(which.max()) + 1).astype(np.float32)[which]
    edge = np.clip((rng.uniform(0.2, 0.45) - nearest) * _log_uniform(rng, 4, 30), 0, 1)
    return edge * shade + 0.2 * _fractal(rng, size, 4, 4)


def cells(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """A mosaic: Voronoi cells, each of its own shade, with joints."""
    nearest, second, which = _nearest_points(rng, size, _log_uniform(rng, 3, 16))
    shade = rng.uniform(0, 1, int(which.max()) + 1).astype(np.float32)[which]
    joint = second - nearest < rng.uniform(0, 0.15)
    return np.where(joint, np.float32(1.3 if rng.random() < 0.5 else -0.3), shade) + 0.1 * _fractal(
        rng, size, 8, 3
    )


def pebbles(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Rounded bumps, lit from one side."""
    nearest, second, _ = _nearest_points(rng, size, _log_uniform(rng, 4, 20))
    height = np.sqrt(np.clip(second - nearest, 0, 1))
    lit = cv2.Sobel(
        cv2.GaussianBlur(height, (0, 0), 1), cv2.CV_32F, *((1, 0) if rng.random() < 0.5 else (0, 1))
    )
    return height + rng.uniform(-1.5, 1.5) * lit


def cracks(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Thin lines between large plates of a rough ground."""
    nearest, second, _ = _nearest_points(rng, size, _log_uniform(rng, 2, 9))
    ragged = second - nearest + 0.06 * _fractal(rng, size, 16, 4)
    line = np.clip(ragged / rng.uniform(0.04, 0.15), 0, 1)
    return line + 0.25 * _fractal(rng, size, 4, 5)


def weave(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Threads over and under each other."""
    u, v = (_log_uniform(rng, 8, 32) * axis for axis in _warped_grid(rng, size, 0.01))
    over = (np.floor(u) + np.floor(v)) % 2 == 0
    warp, weft = np.abs(np.sin(np.pi * u)), rng.uniform(0.5, 1) * np.abs(np.sin(np.pi * v))
    return np.where(over, warp, weft) ** rng.uniform(0.4, 1.2) + 0.1 * _fractal(rng, size, 12, 3)


def brushed(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Noise drawn out along one axis, as on brushed metal."""
    along, across = _log_uniform(rng, 8, 60), _log_uniform(rng, 0.3, 1.5)
    sigmas = (along, across) if rng.random() < 0.5 else (across, along)
    unit = min(size) / 256
    noise = rng.standard_normal(size, dtype=np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), sigmaX=sigmas[0] * unit, sigmaY=sigmas[1] * unit)
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)


def grains(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Coarse speckle over slow changes, as on stone or cast metal."""
    fine = _fractal(rng, size, _log_uniform(rng, 20, 70), 2)
    return np.sign(fine) * np.abs(fine) ** rng.uniform(0.6, 3) + rng.uniform(0, 1) * _fractal(
        rng, size, 3, 3
    )


STYLES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Field]] = {
    "clouds": clouds,
    "marble": marble,
    "wood": wood,
    "stripes": stripes,
    "checks": checks,
    "spots": spots,
    "cells": cells,
    "pebbles": pebbles,
    "cracks": cracks,
    "weave": weave,
    "brushed": brushed,
    "grains": grains,
}
