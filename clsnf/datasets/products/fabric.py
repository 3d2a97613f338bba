"""The demo's texture: a 2/2 twill, indigo warp over ecru weft, woven thread by thread.

Legend: (u, v) = position in threads, across the warp and across the weft; thread i of the warp runs
along v at u = i + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clsnf.datasets.drawing import (
    PICTURE_SIDE,
    Field,
    Light,
    Product,
    colour,
    grain,
    grid,
    normals,
    ramp,
    smooth_noise,
    turned,
)

THREADS = 64  # of each kind that a scene describes; the picture shows about half of them
PITCH = 7.2  # picture pixels from thread to thread
WARP_COLOUR = colour(0.085, 0.135, 0.27)
WEFT_COLOUR = colour(0.50, 0.47, 0.40)
GROUND_COLOUR = colour(0.012, 0.012, 0.014)


@dataclass(frozen=True)
class Yarns:
    """The parallel threads of one kind: each array (THREADS,)."""

    shift: NDArray[np.float32]  # off its place, in pitches
    width: NDArray[np.float32]  # in pitches
    shade: NDArray[np.float32]  # brightness, about 1
    gap_start: NDArray[np.float32]  # the thread is absent from gap_start ..
    gap_end: NDArray[np.float32]  # .. to gap_end, in threads along itself; empty where start > end
    float_start: NDArray[np.float32]  # between these it lies on top of the cloth
    float_end: NDArray[np.float32]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Yarns:
        def each(mean: float, deviation: float) -> NDArray[np.float32]:
            return rng.normal(mean, deviation, THREADS).astype(np.float32)

        nowhere = np.full(THREADS, 1e6, np.float32)
        return cls(
            each(0, 0.025), each(0.97, 0.03), each(1, 0.05), nowhere, -nowhere, nowhere, -nowhere
        )


@dataclass(frozen=True)
class Fabric:
    """One piece of cloth under the camera."""

    light: Light
    u: Field
    v: Field
    warp: Yarns
    weft: Yarns
    warp_fibres: Field
    weft_fibres: Field
    dye: Field


def sample(rng: np.random.Generator) -> Fabric:
    """A good piece of cloth, with yarns that differ.

    It is turned by a degree or two, and stretched and dyed unevenly.
    """
    x, y = grid()
    x, y = turned(x, y, rng.normal(0, np.deg2rad(1.0)))
    pitch = PITCH * np.exp(rng.normal(0, 0.006))
    u = (
        x / np.float32(pitch)
        + np.float32(THREADS / 2 + rng.uniform(-2, 2))
        + np.float32(0.11) * smooth_noise(rng, 70)
    )
    v = (
        y / np.float32(pitch)
        + np.float32(THREADS / 2 + rng.uniform(-2, 2))
        + np.float32(0.11) * smooth_noise(rng, 70)
    )
    return Fabric(
        light=Light.sample(rng),
        u=u,
        v=v,
        warp=Yarns.sample(rng),
        weft=Yarns.sample(rng),
        warp_fibres=grain(rng, 0.3, 1.6),
        weft_fibres=grain(rng, 1.6, 0.3),
        dye=1 + np.float32(0.04) * smooth_noise(rng, 45),
    )


def _lay(
    across: Field, along: Field, yarns: Yarns
) -> tuple[Field, Field, Field, NDArray[np.bool_]]:
    """The thread at each pixel: its number, its roundness, its brightness, and whether it floats.

    The roundness is in [0, 1]; 0 means that there is no thread.
    """
    index = np.clip(across.astype(np.intp), 0, THREADS - 1)
    number = index.astype(np.float32)
    offset = across - number - np.float32(0.5) - yarns.shift[index]
    cut = (along > yarns.gap_start[index]) & (along < yarns.gap_end[index])
    round_ = np.sqrt(np.maximum(1 - (2 * offset / yarns.width[index]) ** 2, 0)) * ~cut
    floats = (along > yarns.float_start[index]) & (along < yarns.float_end[index])
    return number, round_, yarns.shade[index], floats


def render(scene: Fabric) -> Field:
    """Weave the threads over and under each other, light them, and return the canvas (3, S, S)."""
    i, warp_round, warp_shade, _ = _lay(scene.u, scene.v, scene.warp)
    j, weft_round, weft_shade, floats = _lay(scene.v, scene.u, scene.weft)
    # At a crossing both cosines have the same argument, so one thread is up by what the other is
    # down: over two, under two.
    quarter, half = np.float32(np.pi / 2), np.float32(0.5)
    warp_level = np.cos(quarter * (scene.v - half - i) + quarter / 2)
    weft_level = -np.cos(quarter * (j - scene.u + half) + quarter / 2)
    weft_level = np.where(floats, 1 + np.float32(0.2) * weft_level, weft_level)
    warp_height = np.where(warp_round > 0, warp_level + warp_round, np.float32(-2.5))
    weft_height = np.where(weft_round > 0, weft_level + weft_round, np.float32(-2.5))
    warp_up = warp_height > weft_height
    height = np.maximum(warp_height, weft_height)

    twist = np.where(warp_up, scene.v * 3 + scene.u * 2, scene.u * 3 + scene.v * 2)
    fibres = np.where(warp_up, scene.warp_fibres, scene.weft_fibres)
    tone = np.where(warp_up, warp_shade * scene.dye, weft_shade) * (1 + np.float32(0.10) * fibres)
    tone *= 1 + np.float32(0.07) * np.sin(np.float32(2 * np.pi) * twist)
    # Deep places see less light.
    tone *= np.float32(0.35) + np.float32(0.65) * ramp(height, -1.6, 1.6)
    n = normals(height * np.float32(1.4))
    tone *= np.float32(0.35) + np.float32(0.65) * scene.light.diffuse(n)
    canvas = np.where(warp_up, WARP_COLOUR, WEFT_COLOUR) * tone + np.float32(
        0.03
    ) * scene.light.gloss(n, 12)
    return np.where((height > -2), canvas, GROUND_COLOUR)


def _place(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A point (u, v) of the picture, at least ``margin`` picture pixels from its border."""
    reach = (PICTURE_SIDE / 2 - margin) / PITCH
    u, v = rng.uniform(-reach, reach, 2) + THREADS / 2
    return float(u), float(v)


def _with_gaps(
    yarns: Yarns, threads: NDArray[np.intp], start: NDArray[np.float64], end: NDArray[np.float64]
) -> Yarns:
    gap_start, gap_end = yarns.gap_start.copy(), yarns.gap_end.copy()
    gap_start[threads], gap_end[threads] = start, end
    return replace(yarns, gap_start=gap_start, gap_end=gap_end)


def missing_thread(rng: np.random.Generator, scene: Fabric) -> Fabric:
    """One thread, or two side by side, broke on the loom and is missing over a part."""
    u, v = _place(rng, 30)
    half = rng.uniform(4, 16)
    count = 1 + int(rng.random() < 0.4)
    if rng.random() < 0.5:
        return replace(
            scene,
            weft=_with_gaps(
                scene.weft,
                int(v) + np.arange(count),
                np.full(count, u - half),
                np.full(count, u + half),
            ),
        )
    return replace(
        scene,
        warp=_with_gaps(
            scene.warp,
            int(u) + np.arange(count),
            np.full(count, v - half),
            np.full(count, v + half),
        ),
    )


def hole(rng: np.random.Generator, scene: Fabric) -> Fabric:
    """Threads of both kinds are cut inside an ellipse; each end frays back by its own length."""
    u, v = _place(rng, 40)
    radius_u, radius_v = rng.uniform(1.1, 3.0, 2)

    def cut(yarns: Yarns, centre: float, radius: float, along: float, reach: float) -> Yarns:
        threads = np.arange(int(np.floor(centre - radius)), int(np.ceil(centre + radius)))
        half = reach * np.sqrt(np.maximum(1 - ((threads + 0.5 - centre) / radius) ** 2, 0))
        start, end = (
            along - half + rng.normal(0, 0.35, len(threads)),
            along + half + rng.normal(0, 0.35, len(threads)),
        )
        return _with_gaps(yarns, threads, start, end)

    return replace(
        scene,
        warp=cut(scene.warp, u, radius_u, v, radius_v),
        weft=cut(scene.weft, v, radius_v, u, radius_u),
    )


def misweave(rng: np.random.Generator, scene: Fabric) -> Fabric:
    """Two to four weft threads were not caught by the warp and float on top of the cloth."""
    u, v = _place(rng, 30)
    half = rng.uniform(2.5, 6.5)
    threads = int(v) + np.arange(rng.integers(2, 5))
    float_start, float_end = scene.weft.float_start.copy(), scene.weft.float_end.copy()
    float_start[threads] = u - half + rng.normal(0, 0.5, len(threads))
    float_end[threads] = u + half + rng.normal(0, 0.5, len(threads))
    return replace(scene, weft=replace(scene.weft, float_start=float_start, float_end=float_end))


PRODUCT = Product(
    sample,
    {"hole": hole, "missing_thread": missing_thread, "misweave": misweave},
    render,
    bridge=19,
)
