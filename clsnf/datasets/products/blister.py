"""The demo's repeating pattern: a blister pack of tablets, seen through the pockets' clear domes.

Legend: pocket (i, j) = column and row of the pack; (x, y) = picture pixels from the nearest
pocket's centre in the pack's axes. Distances are signed, negative inside a shape. All lengths are
picture pixels.
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
    smooth_noise,
    turned,
)

ROWS = COLUMNS = 4
PITCH = 64.0
POCKET, POCKET_TOP = 26.0, 21.5  # radius of a pocket's foot and of its flat top
TABLET = 18.0
KNURL = 4.6  # pitch of the foil's embossed diamonds
DASH = 7.0  # pitch of the perforation
SCORE = 1.1  # half width of the line across a tablet
THICKNESS = 4.0

FOIL = colour(0.40, 0.41, 0.42)
COATING = colour(0.62, 0.22, 0.17)
CORE = colour(0.74, 0.68, 0.62)  # a tablet's inside, where it broke
BEHIND = colour(0.02, 0.02, 0.022)  # what a torn foil shows


@dataclass(frozen=True)
class Broken:
    """A tablet cut along a chord.

    The part beyond ``keep`` from its centre towards ``angle`` is gone (``gap`` None), or lies
    ``gap`` away.
    """

    keep: float
    angle: float
    gap: float | None


@dataclass(frozen=True)
class Tear:
    """A slit in the foil between pockets: centre, direction, half length and half width."""

    x: float
    y: float
    angle: float
    length: float
    width: float


@dataclass(frozen=True)
class Blister:
    """One pack. Arrays over pockets are (ROWS, COLUMNS)."""

    light: Light
    pack_x: Field
    pack_y: Field
    tablet_x: NDArray[np.float32]
    tablet_y: NDArray[np.float32]
    tablet_turn: NDArray[np.float32]
    tablet_shade: NDArray[np.float32]
    tablet_there: NDArray[np.bool_]
    crumple: Field
    speckle: Field
    gloss: Field
    jags: Field
    broken: tuple[int, int, Broken] | None = None
    tear: Tear | None = None


def sample(rng: np.random.Generator) -> Blister:
    """A good pack: moved by up to 4 pixels and turned by a degree or so.

    Its tablets lie loose in their pockets, and its foil is crumpled anew.
    """
    x, y = grid()
    dx, dy = rng.uniform(-4, 4, 2).astype(np.float32)
    x, y = turned(x - dx, y - dy, rng.normal(0, np.deg2rad(0.8)))
    size = np.float32(np.exp(rng.normal(0, 0.006)))
    slack, towards = (
        rng.uniform(0, 2.2, (ROWS, COLUMNS)),
        rng.uniform(0, 2 * np.pi, (ROWS, COLUMNS)),
    )
    return Blister(
        light=Light.sample(rng),
        pack_x=x / size,
        pack_y=y / size,
        tablet_x=(slack * np.cos(towards)).astype(np.float32),
        tablet_y=(slack * np.sin(towards)).astype(np.float32),
        tablet_turn=rng.uniform(0, np.pi, (ROWS, COLUMNS)).astype(np.float32),
        tablet_shade=np.exp(rng.normal(0, 0.04, (ROWS, COLUMNS))).astype(np.float32),
        tablet_there=np.ones((ROWS, COLUMNS), np.bool_),
        crumple=smooth_noise(rng, 16),
        speckle=grain(rng, 0.5, 0.5),
        gloss=smooth_noise(rng, 60),
        jags=smooth_noise(rng, 4),
    )


def _tablets(
    scene: Blister, x: Field, y: Field, row: NDArray[np.intp], column: NDArray[np.intp]
) -> tuple[Field, Field, Field]:
    """The tablets' coverage in [0, 1], their height in pixels, and where a fracture shows the core.

    The last is in [0, 1].
    """
    x, y = x - scene.tablet_x[row, column], y - scene.tablet_y[row, column]
    core = np.zeros_like(x)
    # Distance to the tablet's remaining pieces; a whole tablet is cut nowhere.
    piece = np.full_like(x, -1)
    if scene.broken is not None:
        broken_row, broken_column, broken = scene.broken
        here = (row == broken_row) & (column == broken_column)
        ax, ay = np.float32(np.cos(broken.angle)), np.float32(np.sin(broken.angle))
        cut = x * ax + y * ay - np.float32(broken.keep) + np.float32(0.9) * scene.jags
        beyond = np.zeros_like(here) if broken.gap is None else here & (cut > broken.gap / 2)
        shift = beyond.astype(np.float32) * np.float32(broken.gap or 0)
        x, y = x - shift * ax, y - shift * ay
        piece = np.where(beyond, np.float32(broken.gap or 0) - cut, np.where(here, cut, piece))
        core = here * ramp(piece, -3.5, -1.5)
    distance = np.sqrt(x * x + y * y)
    covered = (
        inside(np.maximum(distance - np.float32(TABLET), piece)) * scene.tablet_there[row, column]
    )
    turn = scene.tablet_turn[row, column]
    score = np.abs(x * np.sin(turn) - y * np.cos(turn))
    crown = np.float32(1.6) * (1 - (distance / np.float32(TABLET)) ** 2)
    height = (
        np.float32(THICKNESS) * ramp(distance, TABLET + 0.5, TABLET - 3.5)
        + crown
        - np.float32(0.9) * ramp(score, 2 * SCORE, 0)
    )
    return covered, height - np.float32(1.5) * core, core


def _dashes(across: Field, along: Field) -> Field:
    """A dashed line where ``across`` is 0, coverage in [0, 1]."""
    return ramp(np.abs(across), 1.3, 0.5) * ramp(
        np.cos(np.float32(2 * np.pi / DASH) * along), -0.6, -0.1
    )


def _foil(scene: Blister, from_pocket: Field) -> Field:
    """The lit foil as a canvas.

    It is knurled where it is sealed, smooth under the pockets, perforated between them, and torn
    where the scene has a tear.
    """
    across, along = scene.pack_x + scene.pack_y, scene.pack_x - scene.pack_y
    wave = np.float32(2 * np.pi / (KNURL * np.sqrt(2)))
    sealed = ramp(from_pocket, POCKET - 1, POCKET + 1)
    height = (
        sealed * np.float32(0.45) * np.cos(wave * across) * np.cos(wave * along)
        + np.float32(0.55) * scene.crumple
    )
    perforation = (
        np.maximum(_dashes(scene.pack_x, scene.pack_y), _dashes(scene.pack_y, scene.pack_x))
        * sealed
    )
    tear = np.zeros_like(height)
    if scene.tear is not None:
        lip = _tear(scene, scene.tear)
        tear = inside(lip)
        height += np.float32(1.8) * ramp(np.abs(lip), 3.5, 0)
    n = normals(height - np.float32(0.8) * perforation)
    tone = (np.float32(0.25) + np.float32(0.5) * scene.light.diffuse(n)) * (
        1 + np.float32(0.05) * scene.gloss
    )
    tone += np.float32(0.55) * scene.light.gloss(n, 9) + np.float32(0.02) * scene.speckle
    canvas = FOIL * (tone * (1 - np.float32(0.45) * perforation))
    return mix(canvas, BEHIND, tear)


def _tear(scene: Blister, tear: Tear) -> Field:
    """Signed distance to the slit: a lens with jagged lips."""
    x, y = turned(scene.pack_x - np.float32(tear.x), scene.pack_y - np.float32(tear.y), tear.angle)
    open_ = np.float32(tear.width) * (1 - (x / np.float32(tear.length)) ** 2)
    return np.abs(y + np.float32(0.5) * scene.jags) - open_


def render(scene: Blister) -> Field:
    """Foil, tablets and domes, lit, as a canvas (3, S, S)."""
    column = np.clip(
        np.floor(scene.pack_x / np.float32(PITCH)).astype(np.intp) + COLUMNS // 2, 0, COLUMNS - 1
    )
    row = np.clip(
        np.floor(scene.pack_y / np.float32(PITCH)).astype(np.intp) + ROWS // 2, 0, ROWS - 1
    )
    x = scene.pack_x - (column - np.float32(COLUMNS / 2 - 0.5)).astype(np.float32) * np.float32(
        PITCH
    )
    y = scene.pack_y - (row - np.float32(ROWS / 2 - 0.5)).astype(np.float32) * np.float32(PITCH)
    from_pocket = np.sqrt(x * x + y * y)
    canvas = _foil(scene, from_pocket)

    covered, height, core = _tablets(scene, x, y, row, column)
    shade = blur(shifted(covered, *scene.light.shadow_offset(THICKNESS)), 1.5)
    pocket = ramp(from_pocket, POCKET, POCKET - 2)
    canvas *= 1 - np.float32(0.6) * shade * pocket - np.float32(0.12) * pocket
    n = normals(height)
    tone = (np.float32(0.3) + np.float32(0.65) * scene.light.diffuse(n)) * scene.tablet_shade[
        row, column
    ]
    tone *= 1 + np.float32(0.03) * scene.speckle * (1 + 2 * core)
    surface = mix(COATING, CORE, core)
    canvas = mix(canvas, surface * tone + np.float32(0.06) * scene.light.gloss(n, 20), covered)

    dome = normals(
        np.float32(7) * ramp(from_pocket, POCKET, POCKET_TOP) + np.float32(0.12) * scene.crumple
    )
    canvas *= np.float32(0.55) + np.float32(0.45) * dome[2]  # a steep wall swallows light
    return canvas + (np.float32(0.85) * pocket * scene.light.gloss(dome, 90))


def _some_pocket(rng: np.random.Generator) -> tuple[int, int]:
    """Row and column of any pocket."""
    return int(rng.integers(ROWS)), int(rng.integers(COLUMNS))


def missing_tablet(rng: np.random.Generator, scene: Blister) -> Blister:
    """One pocket was not filled."""
    there = scene.tablet_there.copy()
    there[_some_pocket(rng)] = False
    return replace(scene, tablet_there=there)


def broken_tablet(rng: np.random.Generator, scene: Blister) -> Blister:
    """One tablet lost a chip or a half, or lies in its pocket in two pieces."""
    angle = rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.35:
        broken = Broken(rng.uniform(-5, 5), angle, rng.uniform(2.5, 4.5))
    else:
        broken = Broken(rng.uniform(1, 14), angle, None)
    return replace(scene, broken=(*_some_pocket(rng), broken))


def torn_foil(rng: np.random.Generator, scene: Blister) -> Blister:
    """The foil is slit where four pockets meet."""
    x, y = (rng.integers(-1, 2, 2) * PITCH) + rng.uniform(-6, 6, 2)
    tear = Tear(
        float(x), float(y), rng.uniform(0, np.pi), rng.uniform(8, 18), rng.uniform(1.3, 3.0)
    )
    return replace(scene, tear=tear)


PRODUCT = Product(
    sample,
    {"broken_tablet": broken_tablet, "missing_tablet": missing_tablet, "torn_foil": torn_foil},
    render,
)
