"""Training pictures for the demo's backbone: mosaics of textures, and lit shapes with shadows.

``tools/pretrain_demo_backbone.py`` uses them. Textures alone teach a network that every surface has
a strong pattern. Most products have smooth faces, edges, holes and a shadow, so half of the
pictures show shapes with these on a quiet ground.

Legend: SIDE = pixels of a picture; CELLS = labelled positions in each direction, one for every 8
pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from textures import RULES, draw_texture

Rng = np.random.Generator
Image = NDArray[np.uint8]
Bank = list[tuple[int, Image]]

CLASSES = list(RULES)
SIDE = 112
CELLS = SIDE // 8
TILE = 152  # pixels of a texture, so that it can be turned and scaled before it is cut to SIDE
NO_CLASS = -100  # cross-entropy's "ignore"
CORNERS = 120  # points of a shape's outline


def texture_bank(rng: Rng, each: int) -> Bank:
    """``each`` fresh textures of every class, as (class, RGB picture)."""
    return [
        (k, draw_texture(rng, name, TILE)) for k, name in enumerate(CLASSES) for _ in range(each)
    ]


def picture(rng: Rng, bank: Bank) -> tuple[Image, NDArray[np.int64]]:
    """One picture, RGB (SIDE, SIDE, 3), and the texture class of its cells (CELLS, CELLS).

    The class is NO_CLASS where a cell has none.
    """
    if rng.random() < 0.5:
        return _lit_shapes(rng, bank), np.full((CELLS, CELLS), NO_CLASS)
    return _mosaic(rng, bank)


def small_warp(rng: Rng, image: Image) -> Image:
    """The picture turned, scaled and moved by as little as a product on a line is."""
    matrix = cv2.getRotationMatrix2D(
        (SIDE / 2, SIDE / 2), rng.normal(0, 7), float(np.exp(rng.normal(0, 0.05)))
    )
    matrix[:, 2] += rng.uniform(-5, 5, 2)
    warped = cv2.warpAffine(
        image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(warped, np.uint8)


def _placed(rng: Rng, texture: Image) -> Image:
    """The texture turned, scaled and cut to (SIDE, SIDE, 3)."""
    zoom = float(np.exp(rng.uniform(np.log(0.8), np.log(1.4))))
    matrix = cv2.getRotationMatrix2D((TILE / 2, TILE / 2), rng.uniform(0, 360), zoom)
    matrix[:, 2] += (SIDE - TILE) / 2 + rng.uniform(-8, 8, 2)
    placed = cv2.warpAffine(
        texture, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(placed, np.uint8)


# ---- mosaics ----


def _regions(rng: Rng, count: int) -> Image:
    """Which of ``count`` textures shows where, (SIDE, SIDE).

    The areas have curved borders, or are polygons on a ground.
    """
    if rng.random() < 0.5:
        cells = int(rng.integers(3, 5))
        noise = rng.standard_normal((count, cells, cells), dtype=np.float32)
        return np.argmax(
            [cv2.resize(n, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for n in noise], 0
        ).astype(np.uint8)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    for k in range(1, count):
        x, y = rng.uniform(12, SIDE - 12, 2)
        corners = int(rng.choice([3, 4, 5, 6, 24]))
        turn = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        reach = rng.uniform(12, 34) * (
            rng.uniform(0.6, 1.2, corners) if corners < 24 else np.ones(corners)
        )
        cv2.fillPoly(
            owner,
            [np.stack([x + reach * np.cos(turn), y + reach * np.sin(turn)], 1).astype(np.int32)],
            k,
        )
    return owner


def _mosaic(rng: Rng, bank: Bank) -> tuple[Image, NDArray[np.int64]]:
    """One to three textures side by side."""
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    chosen = [bank[int(k)] for k in rng.integers(0, len(bank), count)]
    owner = _regions(rng, count) if count > 1 else np.zeros((SIDE, SIDE), np.uint8)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for k, (_, texture) in enumerate(chosen):
        image[owner == k] = _placed(rng, texture)[owner == k]
    return image, np.array([k for k, _ in chosen])[owner[4::8, 4::8]]  # the middle of each cell


# ---- lit shapes ----


def _quiet(rng: Rng, texture: Image) -> NDArray[np.float32]:
    """A plain colour with little or nothing of the texture on it, 0 to 255."""
    strength = np.float32(rng.choice([0, rng.uniform(0.05, 0.5)]))
    colour = rng.uniform(20, 230, 3).astype(np.float32)
    return np.clip(colour + strength * (texture.astype(np.float32) - 128), 0, 255)


def _radius(rng: Rng, turn: NDArray[np.float64]) -> NDArray[np.float64]:
    """A closed outline's radius, about 1, at the angles ``turn``.

    It is a disc, a flower, a polygon, a star or a pebble.
    """
    kind = rng.integers(5)
    if kind == 0:
        return np.ones_like(turn)
    if kind == 1:
        return 1 + rng.uniform(0.05, 0.3) * np.cos(rng.integers(3, 13) * turn)
    if kind == 2:
        side = 2 * np.pi / rng.integers(3, 8)
        return np.cos(side / 2) / np.cos(turn % side - side / 2)
    if kind == 3:
        return 1 - rng.uniform(0.1, 0.5) * np.abs(
            2 * (turn * rng.integers(4, 16) / (2 * np.pi) % 1) - 1
        )
    bumps = rng.normal(0, 1, 8)
    return 1 + 0.25 * np.interp(turn, np.linspace(0, 2 * np.pi, 9), np.append(bumps, bumps[0]))


def _shape(rng: Rng, x: float, y: float, size: float) -> Image:
    """A filled outline around (x, y) with up to four holes, 0 or 255, (SIDE, SIDE)."""
    turn = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = size * _radius(rng, turn)
    along, across = radius * np.cos(turn), radius * np.sin(turn) * rng.uniform(0.5, 1)
    angle = rng.uniform(0, 2 * np.pi)
    outline = np.stack(
        [
            x + along * np.cos(angle) - across * np.sin(angle),
            y + along * np.sin(angle) + across * np.cos(angle),
        ],
        1,
    )
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 255)
    for _ in range(int(rng.integers(0, 5))):
        dx, dy = rng.normal(0, 0.4 * size, 2)
        cv2.circle(mask, (int(x + dx), int(y + dy)), int(rng.uniform(2, 0.3 * size)), 0, -1)
    return mask


def _lit_shapes(rng: Rng, bank: Bank) -> Image:
    """One to three shapes with bevelled edges and shadows on a quiet ground.

    Some have rings turned into them.
    """
    ground, face = (_placed(rng, bank[int(k)][1]) for k in rng.integers(0, len(bank), 2))
    image = _quiet(rng, ground)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(0.2 * SIDE, 0.8 * SIDE, 2)
        mask = _shape(rng, x, y, rng.uniform(14, 46))
        cover = cv2.GaussianBlur(mask, (0, 0), 0.6).astype(np.float32)[..., None] / 255
        shadow = (
            cv2.GaussianBlur(
                np.roll(mask, rng.integers(-5, 6, 2), (0, 1)), (0, 0), rng.uniform(1, 4)
            ).astype(np.float32)[..., None]
            / 255
        )
        image *= 1 - np.float32(rng.uniform(0, 0.7)) * shadow * (1 - cover)

        height = np.minimum(
            cv2.distanceTransform(mask, cv2.DIST_L2, 3), np.float32(rng.uniform(1.5, 6))
        )
        if rng.random() < 0.5:
            rings = np.cos(np.hypot(columns - x, rows - y) * (2 * np.pi / rng.uniform(3, 20))) > 0
            height = height + np.float32(rng.uniform(0.5, 2)) * rings.astype(np.float32)
        height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 0.8)
        lamp = rng.uniform(0, 2 * np.pi)
        slope = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=np.cos(lamp) / 8) + cv2.Sobel(
            height, cv2.CV_32F, 0, 1, scale=np.sin(lamp) / 8
        )
        light = 1 + np.clip(slope * rng.uniform(0.3, 1.2), -0.8, 0.9)[..., None]
        image += cover * (np.clip(_quiet(rng, face) * light, 0, 255) - image)
    return np.clip(image, 0, 255).astype(np.uint8)
