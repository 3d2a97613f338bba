"""Primitives to draw lit, photographed surfaces: noise fields, relief shading, edges, a camera.

The demo products in ``clsnf/datasets/products/`` use them. Products are drawn in linear light on a
canvas that is ``OVERSAMPLING`` times finer than the picture. The unit of its coordinates is one
pixel of the *picture*, so a product's numbers do not depend on the oversampling. A defect's mask is
not drawn: it is where the damaged product looks different from the same product undamaged, before
the camera adds its noise (:func:`changed_pixels`).

Legend: S = canvas side, P = picture side = S / OVERSAMPLING. A field is float32 (S, S). A canvas is
float32 (3, S, S), linear RGB in [0, 1], channels first because numpy is several times faster that
way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

PICTURE_SIDE = 256
OVERSAMPLING = 2
CANVAS_SIDE = PICTURE_SIDE * OVERSAMPLING
# The smallest visible change of a display value, where 1 is white: about three times the camera's
# noise.
VISIBLE_CHANGE = 0.035
SMALLEST_DEFECT = 30  # pixels; a draw that hides its own defect is drawn again
GAMMA = 2.2


@dataclass(frozen=True)
class Product:
    """A product that can be drawn.

    Attributes:
        sample: draws the scene of a good product; a scene is the product's own dataclass.
        damage: for the name of each defect type, a function (rng, scene) -> damaged scene.
        render: shows a scene as a canvas. It must be a pure function of the scene, because the mask
            compares two of its canvases.
        bridge: width in pixels of the gaps that the mask closes between the visible parts of one
            defect.
    """

    sample: Callable[[np.random.Generator], Any]
    damage: Mapping[str, Callable[[np.random.Generator, Any], Any]]
    render: Callable[[Any], Field]
    bridge: int = 5

    def picture(
        self, rng: np.random.Generator, defect: str | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Draw one picture, good (``defect`` None) or with a defect of that type.

        Returns:
            the photograph, uint8 RGB (P, P, 3), and the mask of the pixels that the defect changed,
            bool (P, P).
        """
        scene = self.sample(rng)
        good = self.render(scene)
        if defect is None:
            return photograph(rng, good), np.zeros((PICTURE_SIDE, PICTURE_SIDE), np.bool_)
        while True:
            bad = self.render(self.damage[defect](rng, scene))
            mask = changed_pixels(good, bad, self.bridge)
            if mask.sum() >= SMALLEST_DEFECT:
                return photograph(rng, bad), mask


def grid() -> tuple[Field, Field]:
    """Coordinates x (to the right) and y (down) of the canvas's pixel centres, (S, S) each.

    They are in picture pixels, and 0 at the centre.
    """
    axis = ((np.arange(CANVAS_SIDE) + 0.5) / OVERSAMPLING - PICTURE_SIDE / 2).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def turned(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """The coordinates of the same points in axes turned by ``angle`` radians."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def smooth_noise(rng: np.random.Generator, cell: float) -> Field:
    """A random field (S, S) that changes over ``cell`` picture pixels.

    Its mean is about 0, its standard deviation about 1.
    """
    n = int(np.ceil(PICTURE_SIDE / cell)) + 3
    coarse = rng.standard_normal((n, n), dtype=np.float32)
    return cv2.resize(
        coarse, (CANVAS_SIDE, CANVAS_SIDE), interpolation=cv2.INTER_CUBIC
    ) * np.float32(1.3)


def grain(rng: np.random.Generator, across: float, along: float) -> Field:
    """Fine noise (S, S) of standard deviation about 1, such as fibres and brush marks.

    It is blurred by ``across`` picture pixels in x and ``along`` in y.
    """
    # Uniform noise; the blur makes its distribution bell-shaped.
    noise = rng.random((CANVAS_SIDE, CANVAS_SIDE), dtype=np.float32) - np.float32(0.5)
    sigma_x, sigma_y = (max(0.3, OVERSAMPLING * v) for v in (across, along))
    blurred = cv2.GaussianBlur(
        noise, (0, 0), sigmaX=sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REFLECT
    )
    return blurred / np.float32(blurred.std())


def ramp(value: Field, start: float, end: float) -> Field:
    """Smoothstep: 0 up to ``start``, 1 from ``end`` on, 3t^2 - 2t^3 between.

    It falls instead of rising if ``start`` > ``end``.
    """
    t = np.clip((value - np.float32(start)) / np.float32(end - start), 0, 1)
    return t * t * (3 - 2 * t)


def inside(distance: Field, softness: float = 0.5) -> Field:
    """Coverage in [0, 1] of a shape from its signed distance in picture pixels, negative inside."""
    return np.clip(0.5 - distance / np.float32(2 * softness), 0, 1)


def colour(red: float, green: float, blue: float) -> Field:
    """A colour in linear light, (3, 1, 1), which numpy broadcasts to a canvas."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1)


def mix(below: Field, above: Field, alpha: Field) -> Field:
    """Lay a canvas (or a colour) over another with opacity ``alpha`` (S, S)."""
    return below + alpha * (above - below)


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur by ``sigma`` picture pixels."""
    return np.asarray(
        cv2.GaussianBlur(field, (0, 0), sigma * OVERSAMPLING, borderType=cv2.BORDER_REFLECT),
        np.float32,
    )


def slopes(field: Field) -> tuple[Field, Field]:
    """The field's derivatives in x and y, each (S, S), per picture pixel."""
    scale = OVERSAMPLING / 8  # Sobel's 3x3 weights sum to 8 per pixel of step
    dx = cv2.Sobel(field, cv2.CV_32F, 1, 0, ksize=3, scale=scale, borderType=cv2.BORDER_REFLECT)
    dy = cv2.Sobel(field, cv2.CV_32F, 0, 1, ksize=3, scale=scale, borderType=cv2.BORDER_REFLECT)
    return np.asarray(dx, np.float32), np.asarray(dy, np.float32)


def normals(height: Field) -> tuple[Field, Field, Field]:
    """Unit normals (nx, ny, nz), each (S, S), of a height field in picture pixels."""
    dx, dy = slopes(height)
    nz = np.reciprocal(np.sqrt(1 + dx * dx + dy * dy))
    return -dx * nz, -dy * nz, nz


@dataclass(frozen=True)
class Light:
    """One lamp far away.

    Attributes:
        azimuth: its direction in the picture plane, in radians.
        elevation: its height, in radians.
    """

    azimuth: float
    elevation: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Light:
        """A lamp at the upper left, as on one inspection station, with small differences."""
        return cls(
            azimuth=np.deg2rad(-125 + rng.normal(0, 5)),
            elevation=np.deg2rad(52 + rng.normal(0, 2.5)),
        )

    @property
    def direction(self) -> tuple[float, float, float]:
        """Unit vector from the surface to the lamp."""
        flat = np.cos(self.elevation)
        return (
            float(flat * np.cos(self.azimuth)),
            float(flat * np.sin(self.azimuth)),
            float(np.sin(self.elevation)),
        )

    def diffuse(self, n: tuple[Field, Field, Field]) -> Field:
        """Lambert's cosine, relative to a flat surface (there 1)."""
        lx, ly, lz = self.direction
        return np.maximum(n[0] * lx + n[1] * ly + n[2] * lz, 0) / np.float32(lz)

    def gloss(self, n: tuple[Field, Field, Field], exponent: float) -> Field:
        """Blinn's highlight in [0, 1]: (n . h)^exponent.

        h lies halfway between the lamp and the camera above.
        """
        lx, ly, lz = self.direction
        half = np.array([lx, ly, lz + 1], np.float32)
        half /= np.linalg.norm(half)
        return np.maximum(n[0] * half[0] + n[1] * half[1] + n[2] * half[2], 0) ** np.float32(
            exponent
        )

    def shadow_offset(self, height: float) -> tuple[float, float]:
        """Where the shadow of a point falls, (dx, dy); it is ``height`` pixels above the table."""
        length = height / np.tan(self.elevation)
        return float(-length * np.cos(self.azimuth)), float(-length * np.sin(self.azimuth))


def shifted(field: Field, dx: float, dy: float) -> Field:
    """The field moved by (dx, dy) picture pixels."""
    matrix = np.array([[1, 0, dx * OVERSAMPLING], [0, 1, dy * OVERSAMPLING]], np.float64)
    moved = cv2.warpAffine(
        field, matrix, field.shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(moved, np.float32)


def shrunk(canvas: Field) -> Field:
    """The canvas (3, S, S) at the picture's size, (P, P, 3), by averaging areas."""
    return cv2.resize(
        cv2.merge(list(canvas)), (PICTURE_SIDE, PICTURE_SIDE), interpolation=cv2.INTER_AREA
    )


def changed_pixels(good: Field, bad: Field, bridge: int) -> NDArray[np.bool_]:
    """Where two canvases differ by more than VISIBLE_CHANGE, bool (P, P).

    Specks are left out, and gaps below ``bridge`` pixels are closed.
    """
    seen = [np.clip(shrunk(c), 0, 1) ** np.float32(1 / GAMMA) for c in (good, bad)]
    change = np.abs(seen[0] - seen[1]).max(axis=2)
    mask = (change > VISIBLE_CHANGE).astype(np.uint8)
    mask = cv2.morphologyEx(
        mask, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    )
    closed = [
        cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones(size, np.uint8))
        for size in ((1, bridge), (bridge, 1))
    ]
    return np.maximum(*closed).astype(np.bool_)


def photograph(rng: np.random.Generator, canvas: Field) -> NDArray[np.uint8]:
    """What the station's camera makes of a canvas: uint8 RGB (P, P, 3).

    Each picture has its own exposure, white balance, fall-off of the light across the field, focus,
    and shot and read noise.
    """
    image = cv2.GaussianBlur(
        shrunk(canvas), (0, 0), rng.uniform(0.35, 0.6), borderType=cv2.BORDER_REFLECT
    )
    axis = np.linspace(-1, 1, PICTURE_SIDE, dtype=np.float32)
    tilt_x, tilt_y = rng.normal(0, 0.035, 2)
    falloff = (1 + np.float32(tilt_x) * axis) * (1 + np.float32(tilt_y) * axis)[:, None]
    falloff = falloff * (1 - np.float32(rng.uniform(0.02, 0.07)) * (axis**2 + axis[:, None] ** 2))
    balance = np.exp(rng.normal(0, 0.04) + rng.normal(0, 0.012, 3)).astype(np.float32)
    image = np.clip(image * falloff[..., None] * balance, 0, 1)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + noise * np.sqrt(np.float32(2e-5) + np.float32(4e-4) * image)
    display = np.clip(image, 0, 1) ** np.float32(1 / GAMMA)
    return (display * 255 + np.float32(0.5)).astype(np.uint8)
