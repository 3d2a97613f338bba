"""Perlin noise against a plain evaluation, and what its regions must be for training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.synthesis.keyed_random import hash_keys, random_bytes, random_uniforms
from clsnf.synthesis.perlin import lattice_side, perlin_noise, perlin_regions

SIDE = lattice_side(3)


def lattices(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random_bytes(hash_keys(seed, np.arange(count)), 0, SIDE * SIDE))


def doubles(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def plain_noise(size, lattice, frequency, angle, phase, pixel):
    """One pixel's noise by the book, with exact gradients."""
    y, x = (at - (side - 1) / 2 for at, side in zip(pixel, size, strict=True))
    row = (math.cos(angle) * y + math.sin(angle) * x) * frequency[0] / size[0] + phase[0]
    column = (-math.sin(angle) * y + math.cos(angle) * x) * frequency[1] / size[1] + phase[1]
    top, left = math.floor(row), math.floor(column)
    total = 0.0
    for down in (0, 1):
        for right in (0, 1):
            direction = (
                (int(lattice[((top + down) * SIDE + left + right) % (SIDE * SIDE)]) + 0.5)
                * 2
                * math.pi
                / 256
            )
            dot = math.cos(direction) * (column - left - right) + math.sin(direction) * (
                row - top - down
            )
            for offset, far in ((row - top, down), (column - left, right)):
                weight = 6 * offset**5 - 15 * offset**4 + 10 * offset**3
                dot *= weight if far else 1 - weight
            total += dot
    return math.sqrt(2) * total


@given(
    st.sampled_from([(8, 8), (5, 12), (16, 7)]),
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    st.floats(-math.pi / 2, math.pi / 2),
    st.tuples(st.floats(0, SIDE), st.floats(0, SIDE)),
)
@settings(max_examples=30, deadline=None)
def test_noise_is_the_blend_of_four_gradients_at_the_turned_pixel(size, frequency, angle, phase):
    lattice = lattices(1)
    noise = perlin_noise(
        size,
        lattice,
        doubles(frequency),
        torch.tensor([angle], dtype=torch.float64),
        doubles(phase),
    )
    for pixel in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):
        expected = plain_noise(size, lattice[0], frequency, angle, phase, pixel)
        assert float(noise[0][pixel]) == pytest.approx(
            expected, abs=0.012
        )  # gradients are good to 1/256


def test_noise_has_no_jump_where_the_lattice_repeats():
    phase = doubles((SIDE - 0.5, SIDE - 0.5), (0.0, SIDE / 2))
    noise = perlin_noise(
        (256, 256),
        lattices(2),
        doubles((8, 8), (8, 1)),
        torch.tensor([0.4, 1.2], dtype=torch.float64),
        phase,
    )
    assert noise.diff(dim=1).abs().max() < 0.15
    assert noise.diff(dim=2).abs().max() < 0.15


def test_regions_have_draems_area_everywhere_in_the_image():
    count = 600
    u = torch.from_numpy(random_uniforms(hash_keys(2, np.arange(count)), 1, 5))
    frequency = (4 * u[:, :2]).floor().exp2()
    regions = perlin_regions(
        (64, 64), lattices(count), frequency, math.pi * (u[:, 2] - 0.5), SIDE * u[:, 3:5], 0.5
    ).float()
    assert 0.045 < regions.mean() < 0.065  # DRAEM's axis-aligned noise: 0.053
    assert (regions.flatten(1).sum(1) == 0).float().mean() < 0.2
    by_place = regions.mean(0).view(4, 16, 4, 16).mean((1, 3))
    assert by_place.min() > 0.035  # corners and centre too
    assert by_place.max() < 0.075
