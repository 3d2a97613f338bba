"""Training defects: what a key decides, where a defect may be, what it is filled from, and the
colour changes it goes through.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from clsnf.core.config import DefectSettings
from clsnf.core.errors import DataError
from clsnf.synthesis.augment import (
    CHANGE_NAMES,
    LEVEL_CHANGES,
    RECOLOURED,
    SHARPENED,
    UNIFORMS_A_SAMPLE,
    ColourChanges,
    count_levels,
    draw_colour_changes,
)
from clsnf.synthesis.fill import SourceView, changed_colours
from clsnf.synthesis.keyed_random import random_uniforms
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectBatch, DefectMaker, sample_key

SIZE = (64, 96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def textures() -> torch.Tensor:
    return draw_textures(12, SIZE, seed=3)


@pytest.fixture(scope="module")
def normals() -> torch.Tensor:
    return draw_textures(6, SIZE, seed=4)


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.from_numpy(sample_key(0, epoch, np.arange(count)))


def make_many(
    maker: DefectMaker, images: torch.Tensor, count: int, masks: torch.Tensor | None = None
) -> DefectBatch:
    at = torch.arange(count) % len(images)
    return maker.make(images[at], None if masks is None else masks[at], keys(count))


# ---- keys ----


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4),
    st.integers(0, 3),
    st.integers(1, 2**63 - 1),
)
def test_a_key_depends_on_seed_epoch_image_and_repeat(parts, changed, step):
    other = list(parts)
    other[changed] = (other[changed] + step + 2**63) % 2**64 - 2**63
    assert sample_key(*parts).dtype == np.int64
    assert sample_key(*parts) == sample_key(*parts)
    assert sample_key(*parts) != sample_key(*other)


def test_keys_of_a_whole_run_are_all_different():
    runs = [
        sample_key(seed, epoch, np.arange(300)[:, None], np.arange(5))
        for seed in range(3)
        for epoch in range(20)
    ]
    assert len(np.unique(runs)) == 3 * 20 * 300 * 5


def test_random_numbers_are_uniform_and_independent_between_keys_and_streams():
    u = random_uniforms(sample_key(0, 0, np.arange(400)), 1, 50)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.allclose(np.histogram(u, 10, (0, 1))[0] / u.size, 0.1, atol=0.006)
    others = (
        random_uniforms(sample_key(0, 0, np.arange(400)), 2, 50),
        random_uniforms(sample_key(0, 1, np.arange(400)), 1, 50),
        u[::-1],
    )
    assert all(abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.03 for other in others)


def test_a_key_gives_the_same_defect_in_any_batch_and_order(textures, normals):
    maker = DefectMaker(DefectSettings(), textures, normals)
    whole = make_many(maker, normals, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    images, all_keys = normals[order % 6], keys(24)[order]
    for part in (slice(0, 1), slice(1, 8), slice(8, 24)):
        batch = maker.make(images[part], None, all_keys[part])
        assert torch.equal(batch.regions, whole.regions[order[part]])
        assert torch.equal(batch.images, whole.images[order[part]])


def test_another_epoch_gives_other_defects(textures, normals):
    maker = DefectMaker(DefectSettings(), textures, normals)
    first, second = (maker.make(normals, None, keys(6, epoch)) for epoch in (0, 1))
    assert not torch.equal(first.regions, second.regions)


# ---- where ----


def test_only_the_region_changes_and_values_stay_in_range(textures, normals):
    batch = make_many(DefectMaker(DefectSettings(), textures, normals), normals, 48)
    assert torch.equal(batch.clean, normals[torch.arange(48) % 6].float() / 255)
    outside = ~batch.regions[:, None].expand_as(batch.images)
    assert torch.equal(batch.images[outside], batch.clean[outside])
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    areas = batch.regions.flatten(1).sum(1)
    changed = (batch.images != batch.clean).flatten(1).any(1)
    assert torch.equal(changed, areas > 0)
    assert batch.images.dtype == batch.clean.dtype == torch.float32


@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_can_be_from_region_pixels_again_from_what_is_inside_its_regions(
    whole, textures, normals
):
    masks = None if whole else torch.zeros(6, *SIZE, dtype=torch.bool)
    batch = DefectMaker(DefectSettings(), textures, normals).make(normals, masks, keys(6))
    inside = batch.region_pixels()
    assert inside.shape == (3, int(batch.regions.sum()))
    again = DefectBatch.from_region_pixels(normals, batch.regions, inside)
    assert all(
        torch.equal(getattr(again, name), getattr(batch, name))
        for name in ("images", "regions", "clean")
    )


def test_defects_lie_on_the_object_and_an_empty_region_leaves_the_image(textures, normals):
    masks = torch.zeros(6, *SIZE, dtype=torch.bool)
    masks[:3, 20:40, 30:70] = True  # three images without any object
    batch = make_many(DefectMaker(DefectSettings(), textures, normals), normals, 24, masks)
    assert not (batch.regions & ~masks[torch.arange(24) % 6]).any()
    empty = batch.regions.flatten(1).sum(1) == 0
    assert empty[torch.arange(24) % 6 >= 3].all()
    assert torch.equal(batch.images[empty], batch.clean[empty])
    assert not empty.all()


def test_images_in_any_memory_layout_are_taken(textures, normals):
    maker = DefectMaker(
        DefectSettings(), textures.contiguous(memory_format=torch.channels_last), normals
    )
    scattered = normals.contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        maker.make(scattered, None, keys(6)).images, maker.make(normals, None, keys(6)).images
    )


# ---- from what ----


def test_opacity_goes_from_the_least_to_full(textures):
    black, white = (torch.full((40, 3, *SIZE), value, dtype=torch.uint8) for value in (0, 255))
    maker = DefectMaker(DefectSettings(max_transparency=0.6), textures, white[:1])
    on_black, on_white = (maker.make(images, None, keys(40)) for images in (black, white))
    # (1 - b) s + b g: what the ground's step from 0 to 1 leaves of itself is b
    shown = (on_white.images - on_black.images).mean(1)[on_black.regions]
    assert shown.min() >= -1e-6
    assert shown.max() <= 0.6 + 1e-6
    assert shown.max() > 0.5
    opaque = DefectMaker(DefectSettings(max_transparency=0), textures, white[:1])
    on_black, on_white = (opaque.make(images, None, keys(40)) for images in (black, white))
    where = on_black.regions[:, None].expand_as(black)
    assert torch.allclose(on_black.images[where], on_white.images[where], atol=1e-6)


def varied(batch: DefectBatch) -> list[bool]:
    """For each region of some size: are there different colours in it?"""
    pairs = zip(batch.images, batch.regions, strict=True)
    return [
        len(image[:, region].unique(dim=1).T) > 1 for image, region in pairs if region.sum() >= 50
    ]


def test_an_image_is_never_its_own_donor():
    flat = torch.full((3, *SIZE), 90, dtype=torch.uint8)
    rough = 100 * torch.randint(0, 3, (3, *SIZE), generator=torch.Generator().manual_seed(0)).byte()
    maker = DefectMaker(
        DefectSettings(texture_share=0),
        torch.empty(0, 3, *SIZE, dtype=torch.uint8),
        torch.stack([flat, rough]),
    )
    assert all(varied(maker.make(flat.expand(40, 3, *SIZE), None, keys(40))))


@pytest.mark.parametrize(("share", "donors"), [(1.0, 4), (0.5, 1), (0.0, 1), (0.5, 0)])
def test_textures_fill_all_defects_where_asked_or_where_no_other_normal_is(share, donors, textures):
    flat = torch.full((max(donors, 1), 3, *SIZE), 90, dtype=torch.uint8)
    maker = DefectMaker(DefectSettings(texture_share=share), textures, flat[:donors])
    shown = varied(make_many(maker, flat, 40))
    assert sum(shown) > 0.9 * len(shown)  # a posterized texture may be of one colour


def test_half_of_the_defects_come_from_donors_by_default(textures):
    flat = torch.stack(
        [torch.full((3, *SIZE), value, dtype=torch.uint8) for value in (90, 160, 30)]
    )
    shown = varied(
        make_many(DefectMaker(DefectSettings(max_transparency=0), textures, flat), flat[:1], 120)
    )
    assert 0.3 < np.mean(shown) < 0.65


@pytest.mark.parametrize(("share", "donors"), [(0.5, 6), (0.0, 1)])
def test_a_source_that_is_missing_is_named(share, donors, normals):
    none = torch.empty(0, 3, *SIZE, dtype=torch.uint8)
    with pytest.raises(DataError, match=f"No textures.*{donors} normal images.*texture_share"):
        DefectMaker(DefectSettings(texture_share=share), none, normals[:donors])


def test_sources_of_another_size_are_refused(textures, normals):
    maker = DefectMaker(DefectSettings(), textures[..., :64], normals)
    with pytest.raises(DataError, match=r"textures.*\(3, 64, 64\).*\(3, 64, 96\)"):
        maker.make(normals, None, keys(6))


def test_every_image_needs_a_key(textures, normals):
    with pytest.raises(ValueError, match="keys"):
        DefectMaker(DefectSettings(), textures, normals).make(normals, None, keys(5))


# ---- colour changes ----


def identity_view(images: torch.Tensor) -> SourceView:
    """Each sample finds its source at its own place in the image of the same number."""
    count, _, height, width = images.shape
    rows, columns = (torch.arange(-1, side + 1).clamp(0, side - 1) for side in (height, width))
    return SourceView(
        images,
        rows * width + 3 * height * width * torch.arange(count)[:, None],
        columns.repeat(count, 1),
    )


def changed_images(images: torch.Tensor, changes: ColourChanges) -> torch.Tensor:
    """All pixels of the images changed, float32 (B, 3, H, W) in 0..255."""
    count, _, height, width = images.shape
    sample, row, column = torch.ones(count, height, width).nonzero(as_tuple=True)
    view = identity_view(images)
    colours = changed_colours(
        view, sample, sample * (height + 2) + row + 1, sample * (width + 2) + column + 1, changes
    )
    return 255 * colours.view(3, count, height, width).transpose(0, 1)


def nothing_changed(count: int) -> ColourChanges:
    levels = torch.arange(256, dtype=torch.uint8).expand(count, 3, 256)
    return ColourChanges(
        np.zeros(count, np.int64),
        torch.ones(count),
        levels,
        torch.tensor([[1.0, 0, 0]]).repeat(count, 1),
    )


def level_change(name: str, image: torch.Tensor, *numbers: float) -> np.ndarray:
    """What one change of levels makes of an image, uint8 (3, H, W)."""
    u = np.zeros((1, 4))
    u[0, : len(numbers)] = numbers
    table = np.broadcast_to(
        np.rint(np.clip(LEVEL_CHANGES[name](u, count_levels(image[None])), 0, 255)), (1, 3, 256)
    )[0]
    return np.stack([table[channel][image[channel].numpy()] for channel in range(3)])


def test_levels_are_counted_per_image_and_channel(normals):
    counts = count_levels(normals)
    assert counts.shape == (6, 3, 256)
    assert (counts.sum(2) == SIZE[0] * SIZE[1]).all()
    assert counts[2, 1, 77] == (normals[2, 1] == 77).sum()


@pytest.mark.parametrize("name", LEVEL_CHANGES)
def test_a_change_of_levels_is_a_finite_table_for_every_channel(name, normals):
    u = random_uniforms(sample_key(0, 0, np.arange(6)), 1, 4)
    for counts in (count_levels(normals), count_levels(torch.full_like(normals, 40))):
        table = LEVEL_CHANGES[name](u, counts)
        assert np.broadcast_shapes(table.shape, (6, 3, 256)) == (6, 3, 256)
        assert np.isfinite(table).all()


@pytest.mark.parametrize(
    ("name", "number", "reference"),
    [
        ("invert", 0.0, ImageOps.invert),
        ("solarize", 0.5, lambda image: ImageOps.solarize(image, 80)),
        ("posterize", 0.5, lambda image: ImageOps.posterize(image, 3)),
        ("autocontrast", 0.0, ImageOps.autocontrast),
        ("equalize", 0.0, ImageOps.equalize),
    ],
)
def test_changes_of_levels_agree_with_pillow(name, number, reference, normals):
    for image in normals:
        expected = np.asarray(reference(Image.fromarray(image.permute(1, 2, 0).numpy()))).transpose(
            2, 0, 1
        )
        difference = np.abs(level_change(name, image, number) - expected)
        # Pillow equalizes with integer steps: a few levels where many pixels share one
        assert difference.mean() < 3
        assert name == "equalize" or difference.max() <= 1


def test_gamma_and_brightness_go_from_darker_to_brighter():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    assert level_change("gamma", grey, 0, 0, 0).mean() > 150
    assert level_change("gamma", grey, 0.999, 0.999, 0.999).mean() < 45
    assert level_change("brightness", grey, 0, 0).mean() == 50
    assert level_change("brightness", grey, 0.9999, 0.9999).mean() == 150


def test_sharpness_agrees_with_torchvision_inside_the_image(normals):
    changes = dataclasses.replace(
        nothing_changed(6),
        kinds=np.full(6, SHARPENED),
        sharpness=torch.tensor([0.0, 0.5, 1, 1.7, 2.5, 3]),
    )
    got = changed_images(normals, changes)
    for image, factor, ours in zip(normals, changes.sharpness, got, strict=True):
        expected = tv.adjust_sharpness(image, float(factor)).float()
        assert (ours - expected)[:, 1:-1, 1:-1].abs().max() <= 1


def coloured(images: torch.Tensor, turn: float, saturation: float) -> torch.Tensor:
    """Images after hue and saturation alone, through the draw: its uniforms are chosen so that
    nothing else is seen.
    """
    uniforms = np.ones((len(images), UNIFORMS_A_SAMPLE))
    first, second, third = (
        CHANGE_NAMES.index(name) for name in ("hue and saturation", "sharpness", "solarize")
    )
    uniforms[:, [first, second, third]] = [0.1, 0.2, 0.3]
    uniforms[:, len(CHANGE_NAMES) :] = [
        turn / (2 * math.pi),
        (math.log2(saturation) + 2) / 3,
        0,
        0,
        1 / 3,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]
    return changed_images(images, draw_colour_changes(uniforms, count_levels(images), CPU))


def test_a_third_of_a_turn_of_hue_swaps_channels_and_grey_stays():
    images = torch.randint(
        20, 120, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)
    ).byte()
    images[1] = images[1, :1]
    turned = coloured(images, 2 * math.pi / 3, 1)
    assert (turned - images.roll(1, 1).float()).abs().max() < 0.01
    assert (coloured(images, 0, 1) - images.float()).abs().max() < 0.01
    assert (coloured(images, 1.3, 1.9)[1] - images[1].float()).abs().max() < 0.01
    mean = images[0].float().mean(0)
    assert (coloured(images, 0, 0.25)[0] - (mean + 0.25 * (images[0] - mean))).abs().max() < 0.01


def test_each_sample_goes_through_three_changes_and_all_nine_are_drawn(normals):
    uniforms = random_uniforms(sample_key(0, 0, np.arange(600)), 1, UNIFORMS_A_SAMPLE)
    changes = draw_colour_changes(uniforms, count_levels(normals)[np.arange(600) % 6], CPU)
    for bit in (SHARPENED, RECOLOURED):
        assert 0.25 < np.mean(changes.kinds & bit > 0) < 0.42  # three of nine
    identity = (changes.levels == torch.arange(256, dtype=torch.uint8)).all(2).all(1)
    assert not identity.all(dim=0)
    assert identity.float().mean() < 0.02  # at least one of the three is a change of levels


def test_statistics_follow_the_changes_before_them(normals):
    """Equalizing after an inversion is the same as inverting the equalized, up to ties: the counts
    were carried along.
    """
    uniforms = np.ones((6, UNIFORMS_A_SAMPLE))
    order = [CHANGE_NAMES.index(name) for name in ("invert", "equalize", "hue and saturation")]
    uniforms[:, order] = [0.1, 0.2, 0.3]
    uniforms[:, len(CHANGE_NAMES) :] = 0
    changes = draw_colour_changes(uniforms, count_levels(normals), CPU)
    for image, table in zip(normals, changes.levels, strict=True):
        after = np.stack([table[channel].numpy()[image[channel].numpy()] for channel in range(3)])
        assert np.abs(after.mean((1, 2)) - 127.5).max() < 12
        assert after.min() < 5
        assert after.max() == 255
