"""The contract of a validation defect family, over the whole registry."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from clsnf.core.errors import ImageError
from clsnf.synthesis.brush import Bool, UInt8
from clsnf.synthesis.validation_defects import FADE, FAMILIES, FREE_OVERHANG, OVERHANG, VISIBLE

Scene = tuple[UInt8, Bool]


def grained(
    shape: tuple[int, int],
    level: float,
    grain: float,
    colour: tuple[float, float, float] = (1, 1, 1),
) -> UInt8:
    noise = np.random.default_rng(7).normal(0, grain, shape)
    return np.clip((level + noise)[..., None] * np.array(colour), 0, 255).astype(np.uint8)


def everywhere(image: UInt8) -> Scene:
    return image, np.ones(image.shape[:2], bool)


def rod(shape: tuple[int, int]) -> Scene:
    """A slanting dark rod with rings on a bright background; its mask."""
    where = np.zeros(shape, np.uint8)
    h, w = shape
    cv2.line(where, (w // 5, h // 5), (4 * w // 5, 4 * h // 5), 1, max(3, min(shape) // 10))
    rows, columns = np.indices(shape)
    image = np.where(where > 0, 90 + 40 * np.sin((rows + columns) * 60 / min(shape)), 200)
    return np.repeat(image.astype(np.uint8)[..., None], 3, axis=2), where > 0


SCENES: dict[str, Callable[[], Scene]] = {
    "coloured surface": lambda: everywhere(grained((256, 256), 120, 12, (1.2, 0.9, 0.5))),
    "grey surface": lambda: everywhere(grained((256, 256), 140, 10)),
    "flat grey": lambda: everywhere(np.full((256, 256, 3), 128, np.uint8)),
    "black": lambda: everywhere(np.zeros((256, 256, 3), np.uint8)),
    "white": lambda: everywhere(np.full((256, 256, 3), 255, np.uint8)),
    "strong noise": lambda: everywhere(grained((256, 256), 128, 60)),
    "rod": lambda: rod((256, 256)),
    "long strip": lambda: everywhere(grained((128, 700), 100, 8)),
    "tall rod": lambda: rod((500, 180)),
    "tiny": lambda: everywhere(grained((64, 64), 110, 8)),
    "tiny rod": lambda: rod((64, 64)),
    "large": lambda: rod((1000, 1200)),
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_scene = pytest.mark.parametrize("scene", SCENES)


def dilated(mask: Bool, reach: float) -> Bool:
    """The pixels within ``reach`` of the mask."""
    return np.asarray(
        cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= reach
    )


def draw(family: str, image: UInt8, where: Bool, seed: int) -> tuple[UInt8, Bool]:
    donors = [np.ascontiguousarray(image[::-1]), np.ascontiguousarray(image[:-3, 2:])]
    return FAMILIES[family](image, where, donors, np.random.default_rng(seed))


@every_scene
@every_family
def test_a_defect_is_visible_on_the_product_and_nowhere_else(family: str, scene: str) -> None:
    image, where = SCENES[scene]()
    before, unit = image.copy(), max(1.0, min(where.shape) / 256)
    for seed in range(3 if image.size < 10**6 else 1):
        result, mask = draw(family, image, where, seed)
        assert np.array_equal(image, before)
        assert result.dtype == np.uint8
        assert result.shape == image.shape
        assert mask.dtype == bool
        assert mask.shape == where.shape
        change = cv2.absdiff(image, result).max(axis=-1)
        assert mask.sum() >= 8
        assert mask.mean() <= 0.1
        assert (change[mask] >= VISIBLE).mean() >= 0.5
        assert not change[~dilated(mask, FADE * unit)].any()
        overhang = FREE_OVERHANG if family in ("warp", "contamination") else OVERHANG
        assert not change[~dilated(where, overhang * unit + 1)].any()
        assert (mask & where).sum() * 2 >= mask.sum()


@every_family
def test_the_same_generator_state_draws_the_same_defect(family: str) -> None:
    image, where = rod((256, 256))
    first, again, other = (draw(family, image, where, seed) for seed in (5, 5, 6))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@every_family
def test_a_grey_camera_sees_only_grey_defects(family: str) -> None:
    image, where = rod((256, 256))
    for seed in range(5):
        result, _ = draw(family, image, where, seed)
        assert np.array_equal(result[..., 0], result[..., 1])
        assert np.array_equal(result[..., 0], result[..., 2])


@every_family
def test_defects_are_drawn_without_donors_too(family: str) -> None:
    image, where = rod((256, 256))
    for seed in range(5):
        assert FAMILIES[family](image, where, [], np.random.default_rng(seed))[1].any()


@every_family
def test_sizes_and_contrasts_range_from_subtle_to_strong(family: str) -> None:
    stripes = (
        40 * np.sin(np.indices((256, 256))[0] / 4) * np.linspace(0, 1, 256)
    )  # plain on the left, contrasty on the right
    image, where = everywhere(
        np.clip(grained((256, 256), 110, 5) + stripes[..., None], 0, 255).astype(np.uint8)
    )
    areas, changes = [], []
    for seed in range(25):
        result, mask = draw(family, image, where, seed)
        areas.append(mask.mean())
        changes.append(cv2.absdiff(image, result).max(axis=-1)[mask].mean())
    assert max(areas) / min(areas) > 6
    assert max(changes) / min(changes) > 2


@every_family
def test_an_empty_object_mask_is_refused(family: str) -> None:
    image, where = rod((64, 64))
    with pytest.raises(ImageError, match="object mask is empty"):
        draw(family, image, np.zeros_like(where), 0)


def test_a_product_too_small_for_a_visible_defect_is_refused() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    where = np.zeros((512, 512), bool)
    where[100, 100] = True
    with pytest.raises(ImageError, match=r"object mask has 1 pixels.*defects.object_mask=off"):
        draw("stain", image, where, 0)


def test_a_mask_that_is_off_is_not_to_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect that nobody could see: the object mask is not to blame."""
    monkeypatch.setattr("clsnf.synthesis.validation_defects._SMALLEST", 2.0)
    grey, where = everywhere(np.full((16, 16, 3), 128, np.uint8))
    with pytest.raises(ImageError) as caught:
        FAMILIES["scar"](grey, where, [grey], np.random.default_rng(0))
    assert "picture has 256 pixels, a defect needs 512: use larger images." in str(caught.value)
    assert "object" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (7, 300)])
def test_pictures_too_thin_for_a_defect_are_refused(name: str, shape: tuple[int, int]) -> None:
    thin, where = everywhere(np.full((*shape, 3), 128, np.uint8))
    large, everywhere_there = everywhere(np.full((64, 64, 3), 128, np.uint8))
    for image, product, donor in ((thin, where, large), (large, everywhere_there, thin)):
        with pytest.raises(ImageError, match=f"{shape[0]}x{shape[1]} pixels .*use larger images"):
            FAMILIES[name](image, product, [donor], np.random.default_rng(0))
