"""The machine code that makes defects on a CPU gives the very bits of the tensor operations, which
other devices use.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.synthesis import kernels, perlin
from clsnf.synthesis.augment import (
    RECOLOURED,
    SHARPENED,
    UNIFORMS_A_SAMPLE,
    count_levels,
    draw_colour_changes,
)
from clsnf.synthesis.fill import SourceView, fill, fill_by_tensors
from clsnf.synthesis.keyed_random import hash_keys, random_bytes, random_uniforms
from clsnf.synthesis.perlin import lattice_side, perlin_noise, perlin_regions, regions_by_tensors

SIZES = st.sampled_from([(64, 64), (31, 70), (1, 9), (17, 1)])
# torch fuses multiplications and additions, and so do the kernels, where the processor has an
# instruction for it
FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"

Arguments = tuple[tuple[int, int], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def perlin_arguments(size: tuple[int, int], count: int, power: int, seed: int) -> Arguments:
    keys, side = hash_keys(seed, np.arange(count)), lattice_side(power)
    u = torch.from_numpy(random_uniforms(keys, 1, 5))
    lattice = torch.from_numpy(random_bytes(keys, 0, side * side))
    return (
        size,
        lattice,
        ((power + 1) * u[:, :2]).floor().exp2(),
        math.pi * (u[:, 2] - 0.5),
        side * u[:, 3:5],
    )


@given(SIZES, st.integers(0, 6), st.integers(0, 1000), st.floats(-0.9, 0.9))
@settings(max_examples=40, deadline=None)
def test_regions_are_those_of_the_tensors(size, power, seed, threshold):
    arguments = perlin_arguments(size, 8, power, seed)
    differing = perlin_regions(*arguments, threshold) != regions_by_tensors(*arguments, threshold)
    if FUSES:
        assert not differing.any()
    assert ((perlin_noise(*arguments) - threshold)[differing].abs() < 1e-5).all()


@pytest.mark.skipif(not FUSES, reason="torch's last bits are others here")
@given(st.integers(0, 5), st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_threshold_that_is_one_pixels_very_noise_leaves_that_pixel_out_and_takes_the_next_larger(
    power, seed, place
):
    arguments = perlin_arguments((40, 40), 4, power, seed)
    noise = perlin_noise(*arguments)
    threshold = float(noise.flatten()[int(place * noise.numel())])
    assert torch.equal(perlin_regions(*arguments, threshold), noise > threshold)
    just_below = float(np.nextafter(np.float32(threshold), np.float32(-2)))
    assert torch.equal(perlin_regions(*arguments, just_below), noise >= threshold)


def test_tensors_evaluate_no_more_pixels_at_once_than_they_may(monkeypatch):
    arguments = perlin_arguments((16, 16), 7, 3, 1)
    at_once = regions_by_tensors(*arguments, 0.5)
    monkeypatch.setattr(perlin, "_PIXELS_AT_ONCE", 3 * 256)
    asked: list[int] = []

    def noted(size: tuple[int, int], lattice: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        asked.append(len(lattice))
        return perlin_noise(size, lattice, *rest)

    monkeypatch.setattr(perlin, "perlin_noise", noted)
    assert torch.equal(regions_by_tensors(*arguments, 0.5), at_once)
    assert asked == [3, 3, 1]


@given(SIZES, st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.data())
@settings(max_examples=60, deadline=None)
def test_filled_images_are_those_of_the_tensors(size, seed, density, data):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(0, 256, (5, 3, *size), generator=generator, dtype=torch.uint8)
    images = torch.rand((6, 3, *size), generator=generator)
    regions = torch.rand((6, *size), generator=generator) < density
    samples = np.array(data.draw(st.lists(st.integers(0, 5), unique=True)), np.int64)
    n = len(samples)
    source = torch.randint(0, 5, (n,), generator=generator)
    shift = torch.randint(0, 2 * max(size), (n, 2), generator=generator)
    transposed = torch.rand(n, generator=generator) < 0.5
    counts = count_levels(bank)[source.numpy()]
    changes = draw_colour_changes(
        random_uniforms(hash_keys(seed, np.arange(n)), 1, UNIFORMS_A_SAMPLE), counts, bank.device
    )
    opacity = 0.2 + 0.8 * torch.rand(n, generator=generator)
    view = SourceView.of(bank, source, transposed, shift)
    expected = images.clone()
    fill_by_tensors(expected, regions, samples, view, changes, opacity)
    fill(images, regions, samples, view, changes, opacity)
    assert torch.equal(images, expected)


def test_the_fillings_that_are_compared_are_of_all_kinds():
    counts = np.ones((200, 3, 256), np.int64)
    changes = draw_colour_changes(
        random_uniforms(hash_keys(0, np.arange(200)), 1, UNIFORMS_A_SAMPLE),
        counts,
        torch.device("cpu"),
    )
    assert set(changes.kinds) == {0, SHARPENED, RECOLOURED, SHARPENED | RECOLOURED}


def test_a_function_is_compiled_even_where_nothing_can_be_kept():
    space: dict[str, object] = {}
    exec(
        "def twice(x):\n    return 2 * x", space
    )  # a function that lies in no file has no place beside it
    twice = space["twice"]
    assert callable(twice)
    assert kernels._compiled()(twice)(21) == 42
