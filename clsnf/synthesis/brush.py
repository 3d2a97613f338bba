"""What a validation defect is drawn with: places, sizes, contrasts, colours, shapes and strokes.

Sizes are areas, drawn log-uniformly as shares of the image. Contrasts are drawn from "just visible
on this surface" upwards, so that small faint defects are as frequent as large plain ones.
Everything is computed in a window around the defect, never on the whole image. Called by
:mod:`clsnf.synthesis.validation_defects` alone.

Lengths are pixels of the given image. ``unit`` is 1/256 of its short side; it carries a length from
a 256-pixel image to any other. Points are (row, column).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Float = NDArray[np.floating[Any]]
UInt8 = NDArray[np.uint8]
Box = tuple[slice, slice]
Point = tuple[float, float]

AREA = (0.0003, 0.04)  # a defect's share of the image
MAX_OBJECT_SHARE = 0.2  # the most of a small product that a defect covers
CONTRAST = (14.0, 110.0)  # grey levels between a defect and its ground, faint to strong
# Strokes are drawn this many times larger and averaged down: widths in steps of a quarter pixel.
_SUPERSAMPLE = 4


class Brush:
    """Random places, sizes, contrasts and colours for a defect on one image.

    Args:
        image: uint8 (H, W, 3).
        product: bool (H, W), where the defect may lie; at least one pixel.
        donors: other images of the product.
        rng: the source of all randomness.
    """

    def __init__(
        self, image: UInt8, product: Bool, donors: Sequence[UInt8], rng: np.random.Generator
    ) -> None:
        self.image, self.product, self.donors, self.rng = image, product, donors, rng
        self.height, self.width = product.shape
        self.short = min(product.shape)
        self.unit = self.short / 256

    @cached_property
    def grey(self) -> bool:
        """Whether the camera sees no colour, so that defects have none either."""
        sample = self.image[:: max(1, self.height // 256), :: max(1, self.width // 256)]
        return bool(np.percentile(np.ptp(sample, axis=-1), 99) <= 4)

    @cached_property
    def _places(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.product)

    @cached_property
    def _edge_places(self) -> NDArray[np.intp]:
        """Pixels of the product beside its background; empty if the product fills the image."""
        inner = cv2.erode(self.product.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1)
        return np.flatnonzero(self.product & (inner == 0))

    def place(self, edge: bool = False) -> Point:
        """A random pixel of the product; with ``edge``, one on its outline if it has any.

        It is one of a few candidates. The chance of a candidate is proportional to the standard
        deviation around it, so that defects gather where the product has structure: object masks
        hold shadows, too. Without an object mask there are more candidates and the chance goes with
        the variance, to keep most defects off a plain background.
        """
        places = self._edge_places if edge and len(self._edge_places) else self._places
        count, power = (16, 2) if len(self._places) == self.product.size else (4, 1)
        rows, columns = np.divmod(self.rng.choice(places, count), self.width)
        points = [(float(row), float(column)) for row, column in zip(rows, columns, strict=True)]
        windows = (self.window(point, 8 * self.unit)[0] for point in points)
        structure = np.array([1 + self.image[window].std() for window in windows]) ** power
        return points[int(self.rng.choice(count, p=structure / structure.sum()))]

    def area(self) -> float:
        """Pixels, log-uniform over ``AREA``, at least 12 and at most a fifth of the product."""
        whole = self.height * self.width
        low = max(12.0, AREA[0] * whole)
        high = max(low, min(AREA[1] * whole, MAX_OBJECT_SHARE * len(self._places)))
        return self.between(low, high)

    def between(self, low: float, high: float) -> float:
        """A log-uniform number from ``low`` to ``high``."""
        return low * math.exp(self.rng.uniform() * math.log(high / low))

    def chance(self, share: float) -> bool:
        """True with the probability ``share``."""
        return bool(self.rng.uniform() < share)

    def angle(self) -> float:
        """Radians, uniform over the full circle."""
        return float(self.rng.uniform(0, 2 * math.pi))

    def window(self, at: Point, reach: float) -> tuple[Box, Float, Float]:
        """The window of +-``reach`` around ``at``, cut to the image.

        Returns:
            the window, and the offsets of its rows (h, 1) and columns (1, w) from ``at``.
        """
        row, column, reach = round(at[0]), round(at[1]), math.ceil(reach)
        top, bottom = max(0, row - reach), min(self.height, row + reach + 1)
        left, right = max(0, column - reach), min(self.width, column + reach + 1)
        dy = (np.arange(top, bottom, dtype=np.float32) - np.float32(at[0]))[:, None]
        dx = (np.arange(left, right, dtype=np.float32) - np.float32(at[1]))[None, :]
        return (slice(top, bottom), slice(left, right)), dy, dx

    def ground(self, box: Box) -> Float:
        """A copy of the image inside the window, float32 (h, w, 3) in grey levels."""
        return self.image[box].astype(np.float32)

    def colour(self, at: Point, reach: float = 0.0) -> Float:
        """Median colour (3,) of the product around a point."""
        box, _, _ = self.window(at, max(2 * self.unit, reach, 2))
        pixels = self.image[box][self.product[box]]
        if not len(pixels):
            pixels = self.image[box].reshape(-1, 3)
        return np.median(pixels, axis=0).astype(np.float32)

    def contrast(self, at: Point, strength: float, reach: float = 0.0) -> float:
        """Signed grey levels, log-uniform over ``CONTRAST`` times ``strength``.

        The lower end rises to half the standard deviation of the surroundings, because fainter
        defects drown in the product's own structure. The sign follows the range that is left: on
        black rubber most things look bright. The size stays within that range.
        """
        box, _, _ = self.window(at, max(4 * self.unit, reach, 3))
        surroundings = self.image[box].mean(axis=-1)
        level = float(self.colour(at, reach).mean())
        low = min(max(CONTRAST[0], 0.5 * float(surroundings.std())), CONTRAST[1])
        size = self.between(low, CONTRAST[1]) * strength
        bright = self.chance((255 - level) / 255)
        if (255 - level if bright else level) < low:
            bright = level < 127.5
        return min(size, 255 - level) if bright else -min(size, level)

    def tint(self, amount: float) -> Float:
        """Factors (3,) within +-``amount`` around 1; exactly 1 where the camera sees no colour."""
        if self.grey:
            return np.ones(3, np.float32)
        return self.rng.uniform(1 - amount, 1 + amount, 3).astype(np.float32)

    def profile(self, count: int, low: float, high: float) -> Float:
        """A smooth random curve of ``count`` values in [low, high], such as a scratch's opacity."""
        knots = self.rng.uniform(low, high, 6)
        return np.interp(np.linspace(0, 5, count), np.arange(6), knots).astype(np.float32)

    def donor(self) -> UInt8 | None:
        """Another image of the product, scaled to this one's size; None if there is none."""
        if not len(self.donors):
            return None
        other = self.donors[int(self.rng.integers(len(self.donors)))]
        if other.shape == self.image.shape:
            return other
        scaled = cv2.resize(other, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return np.asarray(scaled, np.uint8)

    def blob(
        self, dy: Float, dx: Float, radius: float, roughness: float, elongation: float = 1.0
    ) -> Float:
        """Pixels to the outline of an irregular blob around offset (0, 0), positive inside, (h, w).

        The outline is a circle of ``radius`` times 1 + a sum of harmonics 2 to 11 of falling size,
        stretched by ``elongation`` along a random axis at about the same area.
        """
        u, v = rotate(dy, dx, self.angle())
        stretch = math.sqrt(elongation)
        u, v = u / stretch, v * stretch
        turn, outline = np.arctan2(v, u), np.ones_like(u + v)
        for k in range(2, 12):
            size = roughness * float(self.rng.normal()) * 1.5 / k**1.6
            outline += size * np.cos(k * turn + self.angle())
        return np.asarray(radius * np.clip(outline, 0.3, 2.0) - np.hypot(u, v), np.float32)

    def curve(self, at: Point, length: float, bend: float) -> NDArray[np.float64]:
        """A cubic Bezier curve near ``at``: points (N, 2), at most about 3 units apart."""
        heading = self.angle()
        along = np.array([math.sin(heading), math.cos(heading)])
        across = np.array([math.cos(heading), -math.sin(heading)])
        side = self.rng.normal(0, bend, 4)
        stations = np.array([-0.5, -0.17, 0.17, 0.5])
        offsets = stations[:, None] * along + side[:, None] * across
        control = np.array(at) + length * offsets  # (4, 2)
        t = np.linspace(0, 1, max(12, int(length / (3 * self.unit))))[:, None]
        bernstein = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
        return np.asarray(np.hstack(bernstein) @ control)  # (N, 4) @ (4, 2)

    def jagged(self, start: Point, heading: float, length: float) -> NDArray[np.float64]:
        """A broken line from ``start``, points (N, 2), that keeps its heading on the whole.

        Its steps are about 5 units long; it turns sharply at each of them.
        """
        steps = max(4, round(length / (5 * self.unit)))
        turns = heading + self.rng.normal(0, 0.6, steps)
        sizes = length / steps * self.rng.uniform(0.5, 1.5, steps)
        moves = sizes[:, None] * np.stack([np.sin(turns), np.cos(turns)], axis=1)
        return np.vstack([np.array(start), np.array(start) + np.cumsum(moves, axis=0)])


def rotate(dy: Float, dx: Float, angle: float) -> tuple[Float, Float]:
    """Coordinates (along, across) in a frame turned by ``angle`` radians, (h, w) each."""
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return dx * c + dy * s, dy * c - dx * s


def soft(inside: Float, feather: float) -> Float:
    """Opacity in [0, 1] from the pixels to an outline, positive inside.

    It is a smooth step across the outline, ``feather`` pixels wide, at least 1.
    """
    t = np.clip(inside / max(1.0, feather) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def stroke(box: Box, points: NDArray[np.float64], widths: Float, opacity: Float) -> Float:
    """Opacity (h, w) in [0, 1] of a line through ``points`` (N, 2).

    ``widths`` (pixels) and ``opacity`` give a value for each point.
    """
    rows, columns = box[0].stop - box[0].start, box[1].stop - box[1].start
    layer = np.zeros((rows * _SUPERSAMPLE, columns * _SUPERSAMPLE), np.uint8)
    corner = np.array([box[0].start, box[1].start])
    # OpenCV wants (x, y).
    spots = np.rint((points - corner + 0.5) * _SUPERSAMPLE).astype(int)[:, ::-1].tolist()
    for i in range(len(spots) - 1):
        thickness = max(1, round(float(widths[i]) * _SUPERSAMPLE))
        cv2.line(layer, spots[i], spots[i + 1], round(255 * float(opacity[i])), thickness)
    small = cv2.resize(layer, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / 255


def reach_of(points: NDArray[np.float64], at: Point, width: float) -> float:
    """How far a window must reach around ``at`` to hold a line of this width, in pixels."""
    return float(np.abs(points - np.array(at)).max()) + width + 2


def paint(ground: Float, opacity: Float, colour: Float, cover: float, shift: Float) -> Float:
    """``ground`` (h, w, 3) changed by ``shift`` (3,) where ``opacity`` (h, w) is 1.

    ``cover`` 0 keeps the ground's texture below; 1 hides it behind the flat ``colour`` (3,) +
    ``shift``.
    """
    return ground + opacity[..., None] * (shift + cover * (colour - ground))
