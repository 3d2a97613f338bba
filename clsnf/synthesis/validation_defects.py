"""The defect families of the validation set, on which hyperparameters are selected.

The generator of training defects shares nothing with this module: no Perlin noise, no textures,
none of its code. So a classifier can't win by having learnt the generator. A family is a function
of one image that leaves its input alone,

    family(image (H, W, 3) uint8, product (H, W) bool, donors, rng)
        -> (image (H, W, 3) uint8, mask (H, W) bool)

The mask is measured, not intended: it holds the pixels that changed by at least ``VISIBLE`` grey
levels, lightly closed. A defect that is too weak to see is drawn again, in the end more strongly.
Away from the mask no pixel changes. Called by :mod:`clsnf.synthesis.validation_set`.

To add a family, write a painter below and one line in ``FAMILIES``. A painter draws with a
:class:`Brush` and returns a window and its new content.
``tests/synthesis/test_validation_defects.py`` then tests the family. Raise ``GENERATOR_VERSION``
with every change to what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from clsnf.core.errors import ImageError
from clsnf.synthesis.brush import (
    Bool,
    Box,
    Brush,
    Float,
    Point,
    UInt8,
    paint,
    reach_of,
    rotate,
    soft,
    stroke,
)

GENERATOR_VERSION = 1
VISIBLE = 8  # grey levels in any channel from which a pixel counts as changed
# Lengths in units, but at least pixels:
FADE = 4.0  # from its mask, within which a defect may still change a pixel
OVERHANG = 1.0  # that a defect may reach beyond the product ...
FREE_OVERHANG = 12.0  # ... and that it may if it bends the outline or lies on top
_CLEAR = 12.0  # mean change over the mask that a defect needs
_ATTEMPTS = 20  # draws; in the last two thirds each is stronger than the one before
_WITHOUT_MASK = "--set defects.object_mask=off"
_THINNEST = 8  # side of a picture; OpenCV can't resize, or reflects for ever, what is thinner
_SMALLEST = 0.00015  # share of the image that a mask must cover

Family = Callable[[UInt8, Bool, Sequence[UInt8], np.random.Generator], tuple[UInt8, Bool]]
Painter = Callable[[Brush, float], tuple[Box, Float]]


def _transplant(
    brush: Brush, strength: float, size: tuple[float, float], angle: float, feather: float
) -> tuple[Box, Float]:
    """Paste a rectangle from elsewhere on the product, or from a donor, with its colours changed.

    ``size`` is (length, width) in pixels, ``angle`` in radians.
    """
    rng, at, origin = brush.rng, brush.place(), brush.place()
    donor = brush.donor() if brush.chance(0.3) else None
    source = brush.image if donor is None else donor
    box, dy, dx = brush.window(at, math.hypot(*size) / 2 + feather + 1)
    along, across = rotate(dy, dx, angle)
    inside = np.minimum(size[0] / 2 - np.abs(along), size[1] / 2 - np.abs(across))
    columns, rows = (along + np.float32(origin[1])), (across + np.float32(origin[0]))
    patch = np.asarray(
        cv2.remap(source, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101),
        np.float32,
    )
    mean = patch.mean(axis=(0, 1), keepdims=True)
    shift = brush.tint(0.3) * float(rng.choice([-1, 1])) * brush.between(4, 50) * strength
    patch = mean + (patch - mean) * float(rng.uniform(0.8, 1.2)) + shift
    ground = brush.ground(box)
    return box, ground + soft(inside, feather)[..., None] * (patch - ground)


def _cutpaste(brush: Brush, strength: float) -> tuple[Box, Float]:
    """CutPaste (Li et al., CVPR 2021): an upright rectangle of aspect 0.3 to 3.3 from elsewhere.

    One in three has soft edges.
    """
    area, aspect = brush.area(), brush.between(0.3, 3.3)
    size = (max(2.0, math.sqrt(area * aspect)), max(2.0, math.sqrt(area / aspect)))
    return _transplant(brush, strength, size, 0.0, 0.3 * min(size) if brush.chance(1 / 3) else 1.0)


def _scar(brush: Brush, strength: float) -> tuple[Box, Float]:
    """CutPaste's scar: a long thin strip at any angle, 5 to 20 times as long as wide."""
    aspect = brush.between(5, 20)
    width = max(1.5, math.sqrt(min(brush.area(), 0.008 * brush.product.size) / aspect))
    return _transplant(brush, strength, (width * aspect, width), brush.angle(), 1.0)


def _warp(brush: Brush, strength: float) -> tuple[Box, Float]:
    """Bent, twisted, swollen or sunken: a smooth displacement without folds, shaded like a dent.

    The displacement is f(r) = (1 - r^2)^2 times a shift, a turn or a zoom. It moves the surface by
    1.5 to 12 units, and by 0.6 of the short radius R at most. The steepest slope of f is 1.54 / R,
    so a shift below 0.65 R has no folds.
    """
    rng, at = brush.rng, brush.place(edge=brush.chance(0.5))
    radius = max(4.0, 1.6 * math.sqrt(brush.area() / math.pi))
    elongation = brush.between(0.6, 1.6)
    box, dy, dx = brush.window(at, radius * max(elongation, 1 / elongation) + 1)
    u, v = rotate(dy, dx, brush.angle())
    r2 = (u / elongation) ** 2 + (v * elongation) ** 2
    falloff = np.clip(1 - r2 / radius**2, 0, None) ** 2
    far = min(
        brush.between(1.5, 12) * max(1.0, brush.unit) * strength,
        0.6 * radius * min(elongation, 1 / elongation),
    )
    sign = float(rng.choice([-1, 1]))
    kind = ("shift", "swirl", "zoom")[int(rng.integers(3))]
    if kind == "shift":
        direction = brush.angle()
        rows, columns = (
            dy - far * math.sin(direction) * falloff,
            dx - far * math.cos(direction) * falloff,
        )
    elif kind == "swirl":
        turn = sign * 3 * far / radius * falloff
        rows, columns = dy * np.cos(turn) - dx * np.sin(turn), dx * np.cos(turn) + dy * np.sin(turn)
    else:
        zoom = 1 - sign * far / radius * falloff
        rows, columns = dy * zoom, dx * zoom
    rows, columns = np.asarray(rows + at[0], np.float32), np.asarray(columns + at[1], np.float32)
    moved = cv2.remap(
        brush.image, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
    ).astype(np.float32)
    if strength > 1 or brush.chance(0.5):
        light = brush.angle()
        product = cv2.remap(brush.product.astype(np.float32), columns, rows, cv2.INTER_LINEAR)
        down, across = np.gradient(falloff, axis=0), np.gradient(falloff, axis=1)
        slope = down * math.sin(light) + across * math.cos(light)
        depth = 0.4 * brush.contrast(at, strength, radius / 2)
        moved += (depth * slope / max(1e-6, float(np.abs(slope).max())) * product)[..., None]
    return box, moved


def _stain(brush: Brush, strength: float) -> tuple[Box, Float]:
    """A soft blotch that darkens (oil, burn, damp) or lies on top as a film (dust, lime).

    Some have a dried rim, or splashes around them.
    """
    rng, at = brush.rng, brush.place()
    radius = math.sqrt(brush.area() / math.pi)
    box, dy, dx = brush.window(at, 2.5 * radius)
    inside = brush.blob(dy, dx, radius, rng.uniform(0.05, 0.3), brush.between(0.5, 2))
    opacity = soft(inside, radius * rng.uniform(0.15, 1.2))
    if brush.chance(0.3):
        opacity = opacity * rng.uniform(0.5, 0.8) + 0.4 * np.exp(
            -(((inside - 0.1 * radius) / (0.1 * radius + 0.7)) ** 2)
        )
    for _ in range(int(rng.integers(1, 5)) if brush.chance(0.3) else 0):
        off = rng.normal(0, 1.2 * radius, 2).astype(np.float32)
        size = radius * brush.between(0.1, 0.35)
        splash = brush.blob(dy - off[0], dx - off[1], size, 0.15)
        opacity = np.maximum(opacity, soft(splash, 0.4 * size))
    opacity = np.clip(opacity, 0, 1)
    ground, level = brush.ground(box), brush.colour(at, radius)
    contrast = brush.contrast(at, strength, radius)
    if contrast < 0:
        factor = np.clip(1 + contrast / max(1.0, float(level.mean())) * brush.tint(0.3), 0.02, 1.2)
        return box, ground * (1 + opacity[..., None] * (factor - 1))
    return box, paint(ground, opacity, level, rng.uniform(0, 0.5), contrast * brush.tint(0.2))


def _scratch(brush: Brush, strength: float) -> tuple[Box, Float]:
    """One to three nearly parallel curved lines, 1 to 4 units wide, some with a burr.

    Their width and pressure change along the line.
    """
    rng, at = brush.rng, brush.place()
    width = max(1.0, brush.between(1, 4) * brush.unit)
    count = int(rng.choice([1, 2, 3], p=[0.65, 0.2, 0.15]))
    length = float(
        np.clip(
            brush.area() / width / count, max(8 * width, 8 * brush.unit + 4), 0.45 * brush.short
        )
    )
    lines = [brush.curve(at, length, 0.06)]
    for _ in range(count - 1):
        lines.append(
            lines[0]
            + rng.normal(0, 5 * brush.unit, 2)
            + rng.normal(0, 0.5 * brush.unit, lines[0].shape[1])
        )
    box, _, _ = brush.window(at, max(reach_of(line, at, 3 * width) for line in lines))
    ground, colour = brush.ground(box), brush.colour(at)
    contrast, cover = brush.contrast(at, strength), float(rng.uniform(0.2, 0.8))
    burr = brush.chance(0.35)
    shift = contrast * brush.tint(0.1)
    for line in lines:
        taper = np.sin(np.linspace(0.05, math.pi - 0.05, len(line))) ** 0.4
        widths = width * brush.profile(len(line), 0.5, 1.2) * taper
        opacity = brush.profile(len(line), 0.35, 1.0) * taper
        if burr:
            edge = stroke(box, line + 0.8 * width, 0.7 * widths, opacity)
            ground = paint(ground, edge, colour, 0.2, -0.5 * shift)
        ground = paint(ground, stroke(box, line, widths, opacity), colour, cover, shift)
    return box, ground


def _fill_in(window: UInt8, unknown: Bool) -> Float:
    """``window`` (h, w, 3) with its ``unknown`` pixels (h, w) filled in from the known ones.

    The filling is smooth; it is computed at 96 pixels or less.
    """
    rows, columns = unknown.shape
    scale = min(1.0, 96 / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    hole = (cv2.resize(unknown.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0).astype(
        np.uint8
    )
    small = np.asarray(cv2.resize(window, size, interpolation=cv2.INTER_AREA), np.uint8)
    filled = cv2.GaussianBlur(cv2.inpaint(small, hole, 3, cv2.INPAINT_TELEA), (0, 0), 1.5)
    return np.asarray(
        cv2.resize(filled, (columns, rows), interpolation=cv2.INTER_LINEAR), np.float32
    )


def _missing(brush: Brush, strength: float) -> tuple[Box, Float]:
    """A piece broken off, its edges lit from one side.

    In its place shows the background, the surface around it, or a dark hollow.
    """
    rng, at = brush.rng, brush.place(edge=brush.chance(0.6))
    radius = math.sqrt(brush.area() / math.pi)
    box, dy, dx = brush.window(at, 2.5 * radius + 6 * brush.unit)
    inside = brush.blob(dy, dx, radius, rng.uniform(0.05, 0.3), brush.between(0.4, 2.5))
    gone, window = soft(inside, 1.5), brush.image[box]
    product = cv2.dilate(brush.product[box].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    background = float((~product).mean()) > 0.1
    if background and brush.chance(0.75):
        fill = _fill_in(window, product | (gone > 0))
    else:
        fill = _fill_in(window, cv2.dilate(gone, np.ones((5, 5))) > 0)
        if brush.chance(0.5):
            fill *= brush.between(0.15, 0.8)  # a hollow
        light, contrast = brush.angle(), brush.contrast(at, strength, radius)
        edge = cv2.GaussianBlur(gone, (0, 0), 1 + 0.1 * radius)
        down, across = np.gradient(edge, axis=0), np.gradient(edge, axis=1)
        lit = down * math.sin(light) + across * math.cos(light)
        lit = rng.uniform(0.2, 0.8) * contrast * lit / max(1e-6, float(np.abs(lit).max()))
        fill += lit[..., None]
    ground = brush.ground(box)
    difference = float(np.average(np.abs(fill - ground).max(axis=-1), weights=gone))
    if strength > 1 or difference < 2 * VISIBLE:  # on a plain surface a gap shows by its tone
        fill += 0.6 * brush.contrast(at, strength, radius) * brush.tint(0.1)
    grain = window.astype(np.float32).mean(axis=-1) - cv2.medianBlur(window, 3).astype(
        np.float32
    ).mean(axis=-1)
    noise = 1.48 * float(np.median(np.abs(grain)))
    fill += rng.normal(0, noise, fill.shape[:2]).astype(np.float32)[..., None]
    return box, ground + gone[..., None] * (fill - ground)


def _particle(
    brush: Brush, content: Float, dy: Float, dx: Float, radius: float, colour: Float, light: float
) -> Float:
    """``content`` with a grain of ``radius`` pixels at offset (0, 0) and its shadow.

    The light comes from the direction ``light``, in radians; the shadow is on the far side.
    """
    inside = brush.blob(dy, dx, radius, brush.rng.uniform(0.05, 0.3), brush.between(0.5, 2))
    reach = 0.35 * radius + 0.5
    far = np.array([[1, 0, -reach * math.cos(light)], [0, 1, -reach * math.sin(light)]])
    shadow = cv2.warpAffine(soft(inside, 1.0), far, (inside.shape[1], inside.shape[0]))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.3 * radius + 0.5)
    content = content * (1 - 0.45 * shadow[..., None])
    height = np.clip(1 - np.hypot(dy, dx) / (1.2 * radius), 0, 1)
    facing = (dy * math.sin(light) + dx * math.cos(light)) / (1.2 * radius)
    grain = brush.rng.normal(0, 0.06, height.shape)
    shade = np.clip(0.9 + 0.35 * facing + 0.2 * height + grain, 0.4, 1.4)
    return content + soft(inside, 1.0)[..., None] * (colour * shade[..., None] - content)


def _contamination(brush: Brush, strength: float) -> tuple[Box, Float]:
    """Something that lies on the product: grains or a fibre, with shading and a soft shadow."""
    rng, at, area, light = brush.rng, brush.place(), brush.area(), brush.angle()
    colour = np.clip(brush.colour(at) + brush.contrast(at, strength) * brush.tint(0.5), 0, 255)
    if brush.chance(0.35):
        width = max(1.0, brush.between(1, 3) * brush.unit)
        length = float(np.clip(area / width, 14 * brush.unit + 4, 0.5 * brush.short))
        line = brush.curve(at, length, 0.35)
        box, _, _ = brush.window(at, reach_of(line, at, 4 * width))
        widths, whole = np.full(len(line), width, np.float32), np.ones(len(line), np.float32)
        away = -1.5 * width * np.array([math.sin(light), math.cos(light)])
        shadow = cv2.GaussianBlur(stroke(box, line + away, widths, whole), (0, 0), 0.6 * width)
        content = brush.ground(box) * (1 - 0.5 * shadow[..., None])
        cover = float(rng.uniform(0.7, 1))
        fibre = stroke(box, line, widths, whole)
        return box, paint(content, fibre, colour, cover, np.zeros(3, np.float32))
    count = min(8, int(rng.geometric(0.4)))
    radius = max(1.2, math.sqrt(area / count / math.pi))
    spread = 1.5 * radius * math.sqrt(count)
    box, dy, dx = brush.window(at, 2.5 * spread + 2 * radius)
    content = brush.ground(box)
    for i in range(count):
        # The first grain has no offset, so that it surely lies on the product.
        off = rng.normal(0, spread, 2).astype(np.float32) * (i > 0)
        size = radius * brush.between(0.6, 1.4)
        content = _particle(brush, content, dy - off[0], dx - off[1], size, colour, light)
    return box, content


def _crack(brush: Brush, strength: float) -> tuple[Box, Float]:
    """A cut (nearly straight, wide in the middle) or a crack (jagged, branching).

    Both have a dark core and a bright lip on one side.
    """
    rng, at = brush.rng, brush.place()
    width = max(1.0, brush.between(0.8, 2.5) * brush.unit)
    length = float(np.clip(brush.area() / width, 10 * brush.unit + 4, 0.4 * brush.short))
    heading = brush.angle()
    start: Point = (at[0] - length / 2 * math.sin(heading), at[1] - length / 2 * math.cos(heading))
    if brush.chance(0.4):
        lines = [brush.curve(at, length, 0.03)]
    else:
        lines = [brush.jagged(start, heading, length)]
        for _ in range(int(rng.integers(0, 3))):
            fork = lines[0][int(rng.integers(1, len(lines[0])))]
            branch = heading + float(rng.choice([-1, 1]) * rng.uniform(0.4, 1.1))
            lines.append(
                brush.jagged((fork[0], fork[1]), branch, length * float(rng.uniform(0.15, 0.4)))
            )
    box, _, _ = brush.window(at, max(reach_of(line, at, 3 * width) for line in lines))
    content, colour = brush.ground(box), brush.colour(at)
    core = -colour * min(1.0, brush.between(0.25, 0.9) * strength)
    lip = abs(brush.contrast(at, strength)) * float(rng.uniform(0.2, 0.7)) * brush.tint(0.1)
    for i, line in enumerate(lines):
        taper = np.sin(np.linspace(0.1, math.pi - 0.1, len(line))) ** 0.7
        widths = width * taper * brush.profile(len(line), 0.6, 1.2) * (1.0 if i == 0 else 0.6)
        opacity = brush.profile(len(line), 0.7, 1.0)
        content = paint(
            content, stroke(box, line - 0.6 * width, 0.8 * widths, 0.8 * opacity), colour, 0.3, lip
        )
        content = paint(content, stroke(box, line, widths, opacity), colour, 0.8, core)
    return box, content


def _visible(before: UInt8, after: UInt8, unit: float) -> Bool:
    """The pixels (h, w) that changed noticeably, closed by about a unit.

    Islands of less than 5 % of the whole, or 3 pixels, are left out.
    """
    changed = (cv2.absdiff(before, after).max(axis=-1) >= VISIBLE).astype(np.uint8)
    side = 2 * max(1, round(unit)) + 1
    closed = cv2.morphologyEx(
        changed, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    )
    _, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    sizes = stats[:, cv2.CC_STAT_AREA]
    keep = sizes >= max(3.0, 0.05 * float(sizes[1:].sum()))
    keep[0] = False
    return np.asarray(keep[labels])


def _near(mask: Bool, fade: float) -> Float:
    """1 on the mask, falling to 0 at ``fade`` pixels from it (h, w)."""
    distance = np.asarray(
        cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE),
        np.float32,
    )
    return np.clip(1 - distance / np.float32(fade), 0, 1)


def _family(painter: Painter, overhang: float = OVERHANG) -> Family:
    """The family of a painter: on the product, visible, with a measured mask."""

    def family(
        image: UInt8, product: Bool, donors: Sequence[UInt8], rng: np.random.Generator
    ) -> tuple[UInt8, Bool]:
        if not product.any():
            raise ImageError(
                "The object mask is empty: a defect needs at least one pixel of product. Turn it "
                f"off: {_WITHOUT_MASK}."
            )
        thinnest = min((image, *donors), key=lambda picture: min(picture.shape[:2]))
        if min(thinnest.shape[:2]) < _THINNEST:
            height, width = thinnest.shape[:2]
            raise ImageError(
                f"A picture has {height}x{width} pixels (height x width), and validation defects "
                f"need {_THINNEST} or more on both sides: use larger images."
            )
        brush = Brush(image, product, donors, rng)
        pixels = max(1.0, brush.unit)
        allowed = np.clip(2 * _near(product, overhang * pixels + 1), 0, 1)
        smallest = max(8, round(_SMALLEST * product.size))
        for attempt in range(_ATTEMPTS):
            box, content = painter(brush, 1.2 ** max(0, attempt - _ATTEMPTS // 3))
            before = image[box]
            drawn = before + allowed[box][..., None] * (content - before)
            after = np.rint(np.clip(drawn, 0, 255)).astype(np.uint8)
            mask = _visible(before, after, brush.unit)
            # What changed too little or too far away to be labelled goes back to what it was,
            # smoothly.
            after = np.rint(
                before + _near(mask, FADE * pixels)[..., None] * (after.astype(np.float32) - before)
            ).astype(np.uint8)
            change = cv2.absdiff(before, after).max(axis=-1)[mask]
            if (
                mask.sum() >= smallest
                and change.mean() >= _CLEAR
                and 2 * (mask & product[box]).sum() >= mask.sum()
            ):
                result, label = image.copy(), np.zeros_like(product)
                result[box], label[box] = after, mask
                return result, label
        pixels_of_product = int(product.sum())
        if product.all():  # without an object mask
            place, remedy = "picture", "use larger images"
        else:
            place, remedy = "object mask", f"use larger images, or {_WITHOUT_MASK}"
        raise ImageError(
            f"No visible {painter.__name__[1:]} fits on the product in {_ATTEMPTS} draws: its "
            f"{place} has {pixels_of_product} pixels, a defect needs {smallest}: {remedy}."
        )

    return family


FAMILIES: dict[str, Family] = {
    "cutpaste": _family(_cutpaste),
    "scar": _family(_scar),
    "warp": _family(_warp, FREE_OVERHANG),
    "stain": _family(_stain),
    "scratch": _family(_scratch),
    "missing": _family(_missing),
    "contamination": _family(_contamination, FREE_OVERHANG),
    "crack": _family(_crack),
}
