"""The demo's object: a turned brass gear on a slate-blue mat, never quite at the same place.

Legend: (x, y) = picture pixels from the gear's centre in axes turned with it; (r, theta) = the same
in polar coordinates. Distances are signed, negative inside a shape. All lengths are picture pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clsnf.datasets.drawing import (
    Field,
    Light,
    Product,
    blur,
    colour,
    grain,
    grid,
    inside,
    mix,
    normals,
    ramp,
    shifted,
    slopes,
    smooth_noise,
    turned,
)

TEETH = 18
TIP, ROOT = 88.0, 76.0  # radius at the teeth's tips and between the teeth
RIM = 67.0  # the recessed web reaches from HUB to RIM
HOLES = 5
HOLE_RING, HOLE = 48.5, 11.5  # radius of the circle that the holes stand on, and their own
HUB, BORE = 29.0, 14.0
KEYWAY = 4.0  # half its width
THICKNESS = 7.0
JAGS = 256  # samples of the jagged profile, two a pixel

BRASS = colour(0.50, 0.36, 0.15)
MAT = colour(0.070, 0.095, 0.125)


@dataclass(frozen=True)
class Broken:
    """A tooth that broke off at radius ``left``.

    The fracture rises by ``slope`` pixels per tooth width.
    """

    tooth: int
    left: float
    slope: float


@dataclass(frozen=True)
class Plugged:
    """A hole that was drilled through only to a radius of ``open``."""

    hole: int
    open: float


@dataclass(frozen=True)
class Burr:
    """Metal pushed over the edge of a hole, or of the outline (``hole`` None).

    It is at ``angle`` +- ``spread`` radians and reaches ``reach`` pixels far.
    """

    angle: float
    spread: float
    reach: float
    hole: int | None


@dataclass(frozen=True)
class Gear:
    """One gear on the mat; a good one has no ``defect``."""

    light: Light
    angle: float
    x: Field
    y: Field
    mat: Field
    turning: NDArray[np.float32]
    tarnish: Field
    speckle: Field
    jags: NDArray[np.float32]
    defect: Broken | Plugged | Burr | None = None


def sample(rng: np.random.Generator) -> Gear:
    """A good gear, within 6 pixels of the centre and turned by up to 10 degrees.

    It has its own turning marks and tarnish.
    """
    x, y = grid()
    dx, dy = rng.uniform(-6, 6, 2).astype(np.float32)
    size = np.float32(np.exp(rng.normal(0, 0.006)))
    angle = np.deg2rad(rng.uniform(-10, 10))
    x, y = turned((x - dx) / size, (y - dy) / size, angle)
    jags = np.convolve(rng.standard_normal(JAGS + 4), [0.2, 0.5, 0.8, 0.5, 0.2], "valid").astype(
        np.float32
    )
    return Gear(
        light=Light.sample(rng),
        angle=angle,
        x=x,
        y=y,
        mat=1 + np.float32(0.10) * grain(rng, 0.7, 0.7) + np.float32(0.05) * smooth_noise(rng, 45),
        turning=rng.standard_normal(256, dtype=np.float32),
        tarnish=smooth_noise(rng, 26),
        speckle=grain(rng, 0.4, 0.4),
        jags=jags,
    )


def _jagged(scene: Gear, along: Field) -> Field:
    """The scene's jagged profile ``along`` pixels down an edge, about 0 +- 1."""
    return scene.jags[(along * np.float32(2)).astype(np.intp) % JAGS]


def _push(scene: Gear, burr: Burr, angle: Field, radius: float) -> Field:
    """How far a burr pushes an edge, in pixels, at ``angle`` radians around a circle."""
    away = np.angle(np.exp(1j * (angle - burr.angle))).astype(np.float32)
    jagged = 1 + np.float32(0.3) * _jagged(scene, away * np.float32(radius))
    return np.float32(burr.reach) * ramp(np.abs(away), burr.spread, 0) * jagged


def _outline(scene: Gear, r: Field, theta: Field) -> tuple[Field, Field]:
    """Signed distance to the toothed outline, and where fresh metal shows on it, in [0, 1]."""
    phase = theta * np.float32(TEETH / (2 * np.pi))
    tooth = np.floor(phase)
    across = phase - tooth - np.float32(0.5)
    radius = np.float32(ROOT) + np.float32(TIP - ROOT) * ramp(np.abs(across), 0.36, 0.19)
    fresh = np.zeros_like(r)
    if isinstance(scene.defect, Broken):
        left = (
            np.float32(scene.defect.left)
            + np.float32(scene.defect.slope) * across
            + np.float32(0.7) * _jagged(scene, theta * r)
        )
        radius = np.where((tooth % TEETH == scene.defect.tooth) & (left < radius), left, radius)
        fresh = (tooth % TEETH == scene.defect.tooth) * ramp(
            r, scene.defect.left - 5, scene.defect.left - 2
        )
    elif isinstance(scene.defect, Burr) and scene.defect.hole is None:
        push = _push(scene, scene.defect, theta, TIP)
        fresh = ramp(push, 0.2, 1.0) * ramp(r - radius, -1.5, 0)
        radius = radius + push
    gap = r - radius
    dx, dy = slopes(gap)
    steepness = np.sqrt(dx * dx + dy * dy)
    return gap / np.clip(steepness, 1, None), fresh


def _holes(scene: Gear, theta: Field, r: Field) -> tuple[Field, Field, Field]:
    """Signed distance to the nearest hole, where fresh metal shows at it, and where it is plugged.

    The last two are in [0, 1].
    """
    sector = np.float32(2 * np.pi / HOLES)
    hole = np.floor(theta / sector)
    local = theta - (hole + np.float32(0.5)) * sector
    along, across = r * np.cos(local) - np.float32(HOLE_RING), r * np.sin(local)
    from_centre = np.sqrt(along * along + across * across)
    radius, fresh, plug = np.full_like(r, HOLE), np.zeros_like(r), np.zeros_like(r)
    if isinstance(scene.defect, Plugged):
        here = hole % HOLES == scene.defect.hole
        radius = np.where(here, np.float32(scene.defect.open), radius)
        plug = here * inside(from_centre - np.float32(HOLE), 1.0)
    elif isinstance(scene.defect, Burr) and scene.defect.hole is not None:
        push = _push(scene, scene.defect, np.arctan2(across, along), HOLE) * (
            hole % HOLES == scene.defect.hole
        )
        fresh = ramp(push, 0.2, 1.0) * ramp(from_centre - radius, 1.0, -0.5)
        radius = radius - push
    return from_centre - radius, fresh, plug


def render(scene: Gear) -> Field:
    """The lit gear on its mat with its shadow, as a canvas (3, S, S)."""
    r = np.sqrt(scene.x**2 + scene.y**2)
    theta = np.arctan2(scene.y, scene.x) + np.float32(np.pi)
    outline, fresh_outline = _outline(scene, r, theta)
    holes, fresh_hole, plug = _holes(scene, theta, r)
    keyway = np.maximum(
        np.abs(scene.y) - np.float32(KEYWAY),
        np.abs(scene.x - np.float32(BORE / 2 + 2)) - np.float32(BORE / 2 + 2),
    )
    opening = np.minimum(np.minimum(r - np.float32(BORE), keyway), holes)
    edge = np.maximum(outline, -opening)
    body = inside(edge)
    fresh = np.maximum(fresh_outline, fresh_hole)

    bevel = np.clip(-edge / np.float32(2.2), 0, 1)
    height = np.float32(2.2) * (1 - (1 - bevel) ** 2)
    height += np.float32(2.5) * (ramp(r, HUB + 2, HUB) + ramp(r, RIM - 1, RIM + 1))
    height -= plug * (np.float32(2.0) - np.float32(0.35) * scene.speckle)
    height += fresh * (np.float32(0.8) + np.float32(0.25) * scene.speckle)
    n = normals(height)

    # Turning leaves rings; a lamp makes rings shine along the two radii that point to and away from
    # it.
    toward = np.cos(theta + np.float32(scene.angle - scene.light.azimuth)) ** 2
    turning = scene.turning[np.minimum((r * 2).astype(np.intp), len(scene.turning) - 1)]
    shine = (
        toward
        * toward
        * (np.float32(0.95) + np.float32(0.12) * turning)
        * n[2] ** 6
        * (1 - np.maximum(plug, fresh) * np.float32(0.9))
    )
    tone = np.float32(0.22) + np.float32(0.36) * scene.light.diffuse(n) + shine
    tone *= (
        1
        + np.float32(0.05) * scene.tarnish
        + np.float32(0.03) * scene.speckle
        + np.float32(0.03) * turning
    )
    tone *= 1 - np.float32(0.30) * plug
    metal = BRASS * tone + (np.float32(0.35) * scene.light.gloss(n, 40) * (1 - plug))

    shade = blur(shifted(body, *scene.light.shadow_offset(THICKNESS)), 1.6)
    mat = MAT * (
        scene.mat * (1 - np.float32(0.72) * np.maximum(shade, np.float32(0.5) * blur(body, 5)))
    )
    return mix(mat, metal, body)


def broken_tooth(rng: np.random.Generator, scene: Gear) -> Gear:
    """One tooth lost between a corner of its tip and all of it."""
    broken = Broken(int(rng.integers(TEETH)), rng.uniform(ROOT - 4, TIP - 6), rng.uniform(-14, 14))
    return replace(scene, defect=broken)


def plugged_hole(rng: np.random.Generator, scene: Gear) -> Gear:
    """One hole was not drilled through, or only with too small a drill."""
    return replace(
        scene, defect=Plugged(int(rng.integers(HOLES)), rng.choice([0.0, rng.uniform(4, 9)]))
    )


def burr(rng: np.random.Generator, scene: Gear) -> Gear:
    """The tool pushed metal over an edge: into a hole, or out over the teeth."""
    if rng.random() < 0.5:
        edge = Burr(
            rng.uniform(-np.pi, np.pi),
            rng.uniform(0.7, 1.5),
            rng.uniform(4, 8),
            int(rng.integers(HOLES)),
        )
    else:
        edge = Burr(rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.22), rng.uniform(5, 9), None)
    return replace(scene, defect=edge)


PRODUCT = Product(
    sample, {"broken_tooth": broken_tooth, "burr": burr, "plugged_hole": plugged_hole}, render
)
