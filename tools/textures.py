"""Textures drawn by code, to pretrain the demo's backbone on: 77 classes of endless variation.

``tools/scenes.py`` uses them. A class is a rule, not a picture: every draw has its own colours,
scale, angle, warp, relief and light. None of the rules draws a demo product.

A rule is a function (rng, u, v) -> field. Legend: (u, v) = coordinates of every pixel in periods of
the pattern, already turned, scaled and warped, each float32 (S, S); a field is float32 (S, S) in
about [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Rng = np.random.Generator
Rule = Callable[[Rng, Field, Field], Field]

TAU = np.float32(2 * np.pi)
TABLE = 1009  # a prime, so that hashed cells do not repeat in rows


# ---- helpers ----


def _saw(t: Field) -> Field:
    """Distance from the middle of its period, in [-0.5, 0.5]."""
    return t - np.floor(t) - np.float32(0.5)


def _step(value: Field, at: float, soft: float = 0.08) -> Field:
    """0 below ``at``, 1 above, softened."""
    return np.clip((value - np.float32(at)) / np.float32(soft) + np.float32(0.5), 0, 1)


def _per_cell(rng: Rng, i: Field, j: Field) -> Field:
    """A random number in [0, 1] for every integer cell (i, j)."""
    table = rng.random(TABLE, dtype=np.float32)
    return table[(i.astype(np.int64) * 37 + j.astype(np.int64) * 101) % TABLE]


def _noise(rng: Rng, side: int, cell: float, cell_v: float | None = None) -> Field:
    """Smooth noise of standard deviation about 1 that changes over ``cell`` pixels.

    ``cell_v`` is the same downwards, if it differs.
    """
    shape = [int(np.ceil(side / c)) + 3 for c in (cell_v or cell, cell)]
    return cv2.resize(
        rng.standard_normal(shape, dtype=np.float32), (side, side), interpolation=cv2.INTER_CUBIC
    )


def _octaves(
    rng: Rng, side: int, cell: float, gain: float, fold: Callable[[Field], Field] = lambda f: f
) -> Field:
    """Noise summed over octaves from ``cell`` pixels down to 2.

    Each octave is ``gain`` times as strong as the one before.
    """
    total, weight = np.zeros((side, side), np.float32), 1.0
    while cell >= 2:
        total += np.float32(weight) * fold(_noise(rng, side, cell))
        cell, weight = cell / 2, weight * gain
    return total


def _unit(field: Field) -> Field:
    """Stretched to about [0, 1]."""
    low, high = np.quantile(field[::4, ::4], (0.02, 0.98))
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _cell_pixels(u: Field, v: Field) -> float:
    """About how many pixels one period takes."""
    return float(np.clip(1 / max(np.hypot(u[0, 1] - u[0, 0], v[0, 1] - v[0, 0]), 1e-3), 4, 48))


# ---- stripes and waves ----


def _stripes(rng: Rng, u: Field, v: Field, *, profile: str) -> Field:
    t = _saw(u)
    if profile == "sine":
        return np.cos(TAU * t) * np.float32(0.5) + np.float32(0.5)
    if profile == "square":
        return _step(np.abs(t), rng.uniform(0.2, 0.3))
    if profile == "thin":
        return _step(np.abs(t), rng.uniform(0.05, 0.1))
    if profile == "double":
        return _step(np.abs(np.abs(t) - np.float32(0.16)), 0.06)
    if profile == "ramp":
        return t + np.float32(0.5)
    return _per_cell(rng, np.floor(u), np.zeros_like(u))  # "bar code"


def _waves(rng: Rng, u: Field, v: Field, *, shape: str) -> Field:
    amplitude = np.float32(rng.uniform(0.5, 1.0))
    if shape == "sine":
        return _step(np.abs(_saw(v + amplitude * np.sin(TAU * u / 3))), 0.25)
    if shape == "chevron":
        return _step(np.abs(_saw(v + 2 * amplitude * np.abs(_saw(u / 2)))), 0.25)
    return _saw(v + amplitude * np.sqrt(np.maximum(0, 1 - 4 * _saw(u) ** 2))) + np.float32(
        0.5
    )  # "scallop"


# ---- grids and tilings ----


def _lines(rng: Rng, u: Field, v: Field, *, directions: int) -> Field:
    angles = np.arange(directions) * np.pi / directions
    gaps = [np.abs(_saw(u * np.float32(np.cos(a)) + v * np.float32(np.sin(a)))) for a in angles]
    return _step(np.float32(0.5) - np.maximum.reduce(gaps), rng.uniform(0.05, 0.12))


def _tiles(rng: Rng, u: Field, v: Field, *, kind: str) -> Field:
    if kind == "checker":
        return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    if kind == "brick":
        row = np.floor(v)
        u = u / 2 + (row % 2) / 2
    elif kind == "random":
        return _per_cell(rng, np.floor(u), np.floor(v))
    elif kind == "diamond":
        u, v = u + v / 2, u - v / 2
    elif kind == "basket":
        turned = (np.floor(u / 2) + np.floor(v / 2)) % 2 == 0
        return _step(np.abs(_saw(np.where(turned, u, v) * np.float32(1.5))), 0.3)
    elif kind == "parquet":
        turned = (np.floor(u) + np.floor(v)) % 2 == 0
        return np.where(turned, _saw(u), _saw(v)) + np.float32(0.5)
    elif kind == "hexagon":
        return _lattice_distance(u, v, hexagonal=True)[0] * np.float32(1.4)
    edge = np.maximum(np.abs(_saw(u)), np.abs(_saw(v)))
    return _step(edge, 0.42) * np.float32(0.6) + np.float32(0.4) * _per_cell(
        rng, np.floor(u), np.floor(v)
    )


def _truchet(rng: Rng, u: Field, v: Field, *, arcs: bool) -> Field:
    flip = _per_cell(rng, np.floor(u), np.floor(v)) > 0.5
    a, b = np.where(flip, _saw(u), -_saw(u)), _saw(v)
    if not arcs:
        return _step(np.abs(a - b), 0.15)
    near = np.minimum(
        np.hypot(a - np.float32(0.5), b - np.float32(0.5)),
        np.hypot(a + np.float32(0.5), b + np.float32(0.5)),
    )
    return _step(np.abs(near - np.float32(0.5)), 0.12)


def _weave(rng: Rng, u: Field, v: Field, *, over: int) -> Field:
    up = ((np.floor(u / over) + np.floor(v / over)) % 2) == 0
    across = np.where(up, _saw(u), _saw(v))
    return (
        np.float32(0.25)
        + np.float32(0.5) * up
        + np.float32(0.3) * np.cos(TAU * across / 2) * np.where(up, 1, -1).astype(np.float32)
    )


# ---- lattices of shapes ----


def _lattice_distance(u: Field, v: Field, *, hexagonal: bool) -> tuple[Field, Field, Field]:
    """Distance to the nearest lattice point and the offset (du, dv) from it."""
    if not hexagonal:
        return np.hypot(_saw(u), _saw(v)), _saw(u), _saw(v)
    height = np.float32(np.sqrt(3))
    first, second = (
        (_saw(u), _saw(v / height) * height),
        (_saw(u + np.float32(0.5)), _saw(v / height + np.float32(0.5)) * height),
    )
    nearer = np.hypot(*first) < np.hypot(*second)
    du, dv = np.where(nearer, first[0], second[0]), np.where(nearer, first[1], second[1])
    return np.hypot(du, dv), du, dv


def _lattice(rng: Rng, u: Field, v: Field, *, motif: str, hexagonal: bool = False) -> Field:
    r, du, dv = _lattice_distance(u, v, hexagonal=hexagonal)
    size = rng.uniform(0.24, 0.36)
    if motif == "disc":
        return _step(r, size)
    if motif == "ring":
        return _step(np.abs(r - np.float32(size)), 0.07)
    if motif == "cross":
        arm = np.minimum(np.abs(du), np.abs(dv))
        return np.maximum(_step(arm, 0.08), _step(r, size + 0.08))
    if motif == "square":
        return _step(np.maximum(np.abs(du), np.abs(dv)), size)
    if motif == "triangle":
        return _step(
            np.maximum(np.abs(du) * np.float32(0.87) + dv * np.float32(0.5), -dv), size * 0.7
        )
    if motif == "star":
        return _step(r * (1 + np.float32(0.35) * np.cos(5 * np.arctan2(dv, du))), size)
    if motif == "flower":
        return _step(r * (1 + np.float32(0.3) * np.cos(6 * np.arctan2(dv, du))), size) * np.float32(
            0.7
        ) + np.float32(0.3) * _step(r, 0.1)
    return np.clip(1 - r / np.float32(0.5), 0, 1) ** np.float32(0.7)  # "dome"


def _scales(rng: Rng, u: Field, v: Field) -> Field:
    """Overlapping discs, row over row."""
    field = np.zeros_like(u)
    for row in range(3, -1, -1):
        shifted = v + np.float32(row / 4)
        odd = np.float32(0.5) * ((np.floor(shifted) * 4 - row) % 2)
        r = np.hypot(
            _saw(u + odd), (shifted - np.floor(shifted) - np.float32(0.5)) * np.float32(1.2)
        )
        field = np.where(r < 0.48, np.float32(0.25) + r * np.float32(1.5), field)
    return field


# ---- cells around random points ----


def _cells(rng: Rng, u: Field, v: Field, *, show: str) -> Field:
    near = np.full((2, *u.shape), np.float32(9))
    owner = np.zeros_like(u)
    jitter = np.float32(rng.uniform(0.6, 1.0))
    table = rng.random((TABLE, 3), dtype=np.float32)
    iu, iv = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            key = ((iu + di) * 37 + (iv + dj) * 101) % TABLE
            px, py = table[key, 0], table[key, 1]
            dx = (
                (iu + di).astype(np.float32) + np.float32(0.5) + jitter * (px - np.float32(0.5)) - u
            )
            dy = (
                (iv + dj).astype(np.float32) + np.float32(0.5) + jitter * (py - np.float32(0.5)) - v
            )
            d = np.abs(dx) + np.abs(dy) if show == "city" else np.hypot(dx, dy)
            closer = d < near[0]
            near[1] = np.where(closer, near[0], np.minimum(near[1], d))
            owner = np.where(closer, table[key, 2], owner)
            near[0] = np.where(closer, d, near[0])
    if show == "flat":
        return owner
    if show in ("cobble", "city"):
        return np.clip(near[0], 0, 1)
    gap = near[1] - near[0]
    if show == "crack":
        return _step(gap, 0.06)
    if show == "foam":
        return np.clip(gap * 2, 0, 1) ** np.float32(0.5)
    if show == "bead":
        return _step(near[0], 0.25) * np.float32(0.8) + np.float32(0.2) * owner
    return np.clip(owner * np.float32(0.6) + np.float32(0.4) * _step(gap, 0.1), 0, 1)  # "mosaic"


# ---- noise ----


def _clouds(rng: Rng, u: Field, v: Field, *, kind: str) -> Field:
    side, cell = len(u), _cell_pixels(u, v) * 1.5
    if kind == "grain":
        return _unit(_noise(rng, side, 1.2))
    if kind == "blur":
        return _unit(_noise(rng, side, cell))
    if kind == "rough":
        return _unit(_octaves(rng, side, cell, 0.75))
    if kind == "cloud":
        return _unit(_octaves(rng, side, 2 * cell, 0.5))
    if kind == "billow":
        return _unit(_octaves(rng, side, cell, 0.55, np.abs))
    if kind == "ridge":
        return _unit(-_octaves(rng, side, 2 * cell, 0.5, np.abs))
    if kind == "camouflage":
        return np.round(_unit(_octaves(rng, side, cell, 0.4)) * 3) / 3
    if kind == "patch":
        return _step(_octaves(rng, side, cell, 0.5), rng.uniform(-0.3, 0.3), 0.2)
    fine, coarse = (
        cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), s)
        for s in (cell / 8, cell / 5)
    )
    band = fine / fine.std() - coarse / coarse.std()
    return _unit(band) if kind == "spots" else _step(band, 0, 0.25)  # "labyrinth"


def _veins(rng: Rng, u: Field, v: Field, *, kind: str) -> Field:
    side, cell = len(u), _cell_pixels(u, v)
    push = _octaves(rng, side, 2 * cell, 0.5)
    if kind == "marble":
        return np.abs(np.sin(TAU * (u / 3 + np.float32(0.22) * push)))
    if kind == "wood":
        return _saw(
            u + np.float32(0.15) * push + np.float32(0.5) * _noise(rng, side, 60, 15)
        ) + np.float32(0.5)
    return np.sqrt(np.clip(_saw(np.float32(0.6) * push) + np.float32(0.5), 0, 1))  # "contour"


def _brushed(rng: Rng, u: Field, v: Field, *, crossed: bool) -> Field:
    table = rng.standard_normal((2, TABLE), dtype=np.float32)
    length = np.float32(rng.uniform(8, 20))

    def strokes(across: Field, along: Field, values: NDArray[np.float32]) -> Field:
        line = np.floor(across * 6)
        return values[
            ((line * 37 + np.floor(along / length * 3 + line % 5)) % TABLE).astype(np.int64)
        ]

    field = strokes(u, v, table[0])
    return _unit(np.maximum(field, strokes(v, u, table[1])) if crossed else field)


# ---- scattered shapes ----


def _scatter(rng: Rng, u: Field, v: Field, *, shape: str) -> Field:
    """Shapes at random places, later ones on top."""
    side, cell = len(u), _cell_pixels(u, v)
    image = np.full((side, side), rng.integers(0, 60), np.uint8)
    count = int(np.clip((side / cell) ** 2 * 1.6, 12, 320))
    aligned = rng.random() < 0.5
    base = rng.uniform(0, 360)
    for place in rng.uniform(0, side, (count, 2)):
        x, y = place
        centre, size, tone = (
            (int(x), int(y)),
            cell * rng.uniform(0.25, 0.6),
            int(rng.integers(80, 256)),
        )
        angle = base + rng.normal(0, 8) if aligned else rng.uniform(0, 360)
        axis = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))]) * size
        if shape == "disc":
            cv2.circle(image, centre, int(size) + 1, tone, -1, cv2.LINE_AA)
        elif shape == "ring":
            cv2.circle(image, centre, int(size) + 2, tone, 2, cv2.LINE_AA)
        elif shape == "ellipse":
            cv2.ellipse(
                image,
                centre,
                (int(size * 1.6) + 1, int(size * 0.5) + 1),
                angle,
                0,
                360,
                tone,
                -1,
                cv2.LINE_AA,
            )
        elif shape == "arc":
            cv2.ellipse(
                image,
                centre,
                (int(size * 1.4) + 2, int(size * 1.4) + 2),
                angle,
                0,
                150,
                tone,
                2,
                cv2.LINE_AA,
            )
        elif shape == "fibre":
            cv2.line(
                image,
                tuple(np.int32(place - 2 * axis)),
                tuple(np.int32(place + 2 * axis)),
                tone,
                1,
                cv2.LINE_AA,
            )
        elif shape == "rod":
            cv2.line(
                image,
                tuple(np.int32(place - axis)),
                tuple(np.int32(place + axis)),
                tone,
                3,
                cv2.LINE_AA,
            )
        elif shape == "letter":
            cv2.putText(
                image,
                chr(rng.integers(65, 91)),
                centre,
                cv2.FONT_HERSHEY_SIMPLEX,
                size / 14,
                tone,
                2,
                cv2.LINE_AA,
            )
        else:
            corners = {"triangle": 3, "rectangle": 4}.get(shape, 7)
            turn = np.deg2rad(angle) + np.arange(corners) * 2 * np.pi / corners
            reach = size * (rng.uniform(0.5, 1.4, corners) if shape == "shard" else 1.2)
            points = np.stack([x + reach * np.cos(turn), y + reach * np.sin(turn)], 1)
            cv2.fillPoly(image, [points.astype(np.int32)], tone, cv2.LINE_AA)
    return image.astype(np.float32) / 255


# ---- around a centre ----


def _radial(rng: Rng, u: Field, v: Field, *, kind: str) -> Field:
    mu, mv = np.float32(u.mean() + rng.normal()), np.float32(v.mean() + rng.normal())
    r, turn = np.hypot(u - mu, v - mv), np.arctan2(v - mv, u - mu) / TAU
    arms = int(rng.integers(5, 14))
    if kind == "rings":
        return _step(np.abs(_saw(r)), 0.25)
    if kind == "spokes":
        return _step(np.abs(_saw(turn * arms)), 0.25)
    if kind == "spiral":
        return _step(np.abs(_saw(r + turn * int(rng.integers(1, 4)))), 0.25)
    if kind == "web":
        return np.minimum(_step(np.abs(_saw(r)), 0.08), _step(np.abs(_saw(turn * arms)) * r, 0.12))
    return ((np.floor(r) + np.floor(turn * 2 * arms)) % 2).astype(np.float32)  # "dartboard"


# ---- smooth surfaces ----


def _smooth(rng: Rng, u: Field, v: Field, *, kind: str) -> Field:
    side = len(u)
    if kind == "plain":
        return np.full_like(u, 0.5) + np.float32(0.01) * _noise(rng, side, 3)
    if kind == "slope":
        return _unit(u)
    return _unit(-np.hypot(u - np.float32(u.mean()), v - np.float32(v.mean())))  # "glow"


def _variants(
    name: str, rule: Callable[..., Field], option: str, values: list, **fixed: object
) -> dict[str, Rule]:
    return {f"{name}_{value}": partial(rule, **{option: value}, **fixed) for value in values}


RULES: dict[str, Rule] = {
    **_variants(
        "stripes", _stripes, "profile", ["sine", "square", "thin", "double", "ramp", "barcode"]
    ),
    **_variants("waves", _waves, "shape", ["sine", "chevron", "scallop"]),
    **_variants("lines", _lines, "directions", [2, 3]),
    **_variants(
        "tiles",
        _tiles,
        "kind",
        ["checker", "brick", "random", "diamond", "basket", "parquet", "hexagon", "square"],
    ),
    **_variants("truchet", _truchet, "arcs", [False, True]),
    **_variants("weave", _weave, "over", [1, 2]),
    **_variants(
        "lattice",
        _lattice,
        "motif",
        ["disc", "ring", "cross", "square", "triangle", "star", "flower", "dome"],
    ),
    **_variants(
        "hexlattice",
        _lattice,
        "motif",
        ["disc", "ring", "triangle", "star", "dome"],
        hexagonal=True,
    ),
    "scales": _scales,
    **_variants(
        "cells", _cells, "show", ["flat", "cobble", "city", "crack", "foam", "bead", "mosaic"]
    ),
    **_variants(
        "clouds",
        _clouds,
        "kind",
        [
            "grain",
            "blur",
            "rough",
            "cloud",
            "billow",
            "ridge",
            "camouflage",
            "patch",
            "spots",
            "labyrinth",
        ],
    ),
    **_variants("veins", _veins, "kind", ["marble", "wood", "contour"]),
    **_variants("brushed", _brushed, "crossed", [False, True]),
    **_variants(
        "scatter",
        _scatter,
        "shape",
        [
            "disc",
            "ring",
            "ellipse",
            "arc",
            "fibre",
            "rod",
            "letter",
            "triangle",
            "rectangle",
            "shard",
        ],
    ),
    **_variants("radial", _radial, "kind", ["rings", "spokes", "spiral", "web", "dartboard"]),
    **_variants("smooth", _smooth, "kind", ["plain", "slope", "glow"]),
}


def _coloured(rng: Rng, field: Field) -> Field:
    """The field through a random ramp of three to five colours, (S, S, 3) in [0, 1]."""
    stops = int(rng.integers(2, 6))
    hue = rng.uniform(0, 1, 3)
    grey = rng.uniform(0, 1, (stops, 1))
    colours = np.clip(
        grey + rng.uniform(0, 0.5) * (rng.uniform(-1, 1, (stops, 3)) + hue - 0.5), 0, 1
    )
    if np.ptp(colours.mean(1)) < 0.25:  # keep the pattern visible
        colours[0], colours[-1] = colours[0] * 0.4, 0.6 + colours[-1] * 0.4
    at = np.linspace(0, 1, stops)
    ramp = np.stack(
        [np.interp(np.linspace(0, 1, 256), at, colours[:, c]) for c in range(3)], 1
    ).astype(np.float32)
    return ramp[(np.clip(field, 0, 1) * 255).astype(np.uint8)]


def _lit(rng: Rng, colour: Field, field: Field) -> Field:
    """The field taken as a relief, lit from a random side."""
    height = cv2.GaussianBlur(field, (0, 0), rng.uniform(0.6, 1.5)) * np.float32(rng.uniform(2, 8))
    angle = rng.uniform(0, 2 * np.pi)
    slope = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=np.cos(angle) / 8) + cv2.Sobel(
        height, cv2.CV_32F, 0, 1, scale=np.sin(angle) / 8
    )
    shade = 1 / (1 + np.exp(-2 * slope)) * 2
    gloss = np.float32(rng.uniform(0, 0.5)) * np.clip(slope - np.float32(0.3), 0, 1)
    return np.clip(colour * shade[..., None] + gloss[..., None], 0, 1)


def draw_texture(rng: Rng, name: str, side: int) -> NDArray[np.uint8]:
    """A picture of the class, RGB (side, side, 3).

    Its colours, scale, angle, warp, relief and light are random.
    """
    axis = np.arange(side, dtype=np.float32) - np.float32(side / 2)
    x, y = np.meshgrid(axis, axis)
    bend = np.float32(rng.choice([0, rng.uniform(0.5, 3)]))
    x, y = x + bend * _noise(rng, side, 40), y + bend * _noise(rng, side, 40)
    angle, period = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(9), np.log(30)))
    c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    u, v = c * x + s * y, (c * y - s * x) * np.float32(np.exp(rng.normal(0, 0.12)))
    field = RULES[name](
        rng, u + np.float32(rng.uniform(40, 60)), v + np.float32(rng.uniform(40, 60))
    ).astype(np.float32)
    colour = _coloured(rng, field if rng.random() < 0.5 else 1 - field)
    if rng.random() < 0.5:
        colour = _lit(rng, colour, field)
    return (np.clip(colour, 0, 1) * 255).astype(np.uint8)
