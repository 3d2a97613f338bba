"""The object mask and the decision about it, on products drawn here."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

from clsnf.core.errors import DataError
from clsnf.synthesis.object_mask import MASK_MODES, decide_mask_mode, object_mask, object_masks
from clsnf.synthesis.textures import draw_textures

SIDE = 128
Draw = Callable[[np.random.Generator], np.ndarray]


def photograph(
    rng: np.random.Generator, grey: np.ndarray, tint: tuple[float, float, float] = (1, 1, 1)
) -> np.ndarray:
    """A grey picture in 0..255 with a tint and a camera's noise, uint8 (SIDE, SIDE, 3)."""
    noisy = grey[..., None] * np.array(tint) + rng.normal(0, 3, (*grey.shape, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def ring_part(rng: np.random.Generator) -> np.ndarray:
    """A ring's mask with its hole, its place drawn."""
    part = np.zeros((SIDE, SIDE), np.uint8)
    centre = tuple(int(at) for at in rng.integers(58, 70, 2))
    cv2.circle(part, centre, 40, 1, -1)
    cv2.circle(part, centre, 15, 0, -1)
    return part > 0


def filled(part: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(part, np.uint8), contours, -1, 1, -1) > 0


def dark_ring(rng: np.random.Generator) -> np.ndarray:
    return photograph(
        rng,
        np.where(ring_part(rng), 60 + 20 * rng.random((SIDE, SIDE)), 190 + rng.uniform(-10, 10)),
        (1, 0.9, 0.8),
    )


def bright_ring_with_shadow(rng: np.random.Generator) -> np.ndarray:
    part = ring_part(rng)
    shadow = cv2.GaussianBlur(np.roll(part, (6, 6), (0, 1)).astype(np.float32), (0, 0), 6)
    return photograph(rng, np.where(part, 200.0, 70 - 25 * shadow))


def texture(rng: np.random.Generator) -> np.ndarray:
    bank = draw_textures(12, (SIDE, SIDE), seed=int(rng.integers(1000)))
    return bank[int(rng.integers(12))].permute(1, 2, 0).numpy()


def two_tone_capsule(rng: np.random.Generator) -> np.ndarray:
    """One half darker than the ground, the other a little brighter: a mask by brightness would lose
    the second.
    """
    part = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(part, (64, 64 + int(rng.integers(-5, 5))), (45, 20), 0, 0, 360, 1, -1)
    halves = np.where(np.arange(SIDE) < 64, 50.0, 225.0)[None]
    return photograph(rng, np.where(part > 0, halves, 185.0))


def uneven_light(rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return photograph(
        rng, 60 + rng.uniform(100, 140) * np.exp(-(rows**2 + columns**2) / (2 * 25**2))
    )


def dim_board(rng: np.random.Generator) -> np.ndarray:
    """Bright parts on a board that itself stands out from the ground only a little."""
    grey = np.full((SIDE, SIDE), 20.0)
    grey[20:108, 15:113] = 42
    for row, column in rng.integers(25, 90, (8, 2)):
        grey[row : row + 10, column : column + 14] = rng.uniform(60, 230)
    return photograph(rng, grey)


def strip_across(rng: np.random.Generator) -> np.ndarray:
    grey = np.full((SIDE, SIDE), 200.0)
    grey[:, 30:100] = 70
    return photograph(rng, grey)


def batch(draw: Draw, count: int = 10) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([draw(np.random.default_rng(seed)) for seed in range(count)])
    ).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("draw", "kind"), [(dark_ring, "dark"), (bright_ring_with_shadow, "bright")]
)
def test_a_product_on_a_plain_background_gets_its_polarity(draw, kind):
    decision = decide_mask_mode(batch(draw))
    assert decision.mode == kind
    assert "10 of 10 normal images" in decision.reason


@pytest.mark.parametrize("draw", [texture, two_tone_capsule, uneven_light, dim_board, strip_across])
def test_without_a_product_that_a_mask_would_hold_whole_it_stays_off(draw):
    decision = decide_mask_mode(batch(draw))
    assert decision.mode == "off"
    assert "\n" not in decision.reason
    assert "of 10 normal images" in decision.reason


def test_a_few_odd_images_dont_change_the_decision_but_many_do():
    images = batch(dark_ring, 20)
    images[3] = 128
    assert decide_mask_mode(images).mode == "dark"
    images[:4] = batch(texture, 4)
    assert decide_mask_mode(images).mode == "off"


def test_products_of_both_polarities_turn_the_mask_off():
    decision = decide_mask_mode(torch.cat([batch(dark_ring), batch(bright_ring_with_shadow)]))
    assert decision.mode == "off"
    assert "brighter in the others" in decision.reason


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
        torch.full((2, 3, 64, 64), 9, dtype=torch.uint8),
    ],
)
def test_nothing_to_see_is_off(images):
    assert decide_mask_mode(images).mode == "off"


@pytest.mark.parametrize(
    ("draw", "mask_mode"), [(dark_ring, "dark"), (bright_ring_with_shadow, "bright")]
)
def test_a_mask_covers_the_product_with_its_holes(draw, mask_mode):
    for seed in range(5):
        mask = object_mask(draw(np.random.default_rng(seed)), mask_mode)
        expected = filled(ring_part(np.random.default_rng(seed)))
        assert mask.dtype == np.bool_
        assert (mask & expected).sum() / (mask | expected).sum() > 0.93


def test_a_mask_keeps_its_shape_at_other_sizes():
    image = dark_ring(np.random.default_rng(0))
    small = object_mask(image, "dark")
    enlarged = np.asarray(
        cv2.resize(image, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_CUBIC), np.uint8
    )
    large = object_mask(enlarged, "dark")
    assert abs(large.mean() - small.mean()) < 0.01


def test_an_unknown_polarity_is_named():
    with pytest.raises(DataError, match=r"'drak'.*'dark'"):
        object_mask(np.zeros((32, 32, 3), np.uint8), "drak")


@pytest.mark.parametrize("kind", MASK_MODES)
def test_an_image_without_a_plausible_mask_is_used_whole(kind):
    images = torch.cat(
        [batch(dark_ring, 2), torch.full((1, 3, SIDE, SIDE), 100, dtype=torch.uint8)]
    )
    masks = object_masks(images, kind)
    assert masks.shape == (3, SIDE, SIDE)
    assert masks.dtype == torch.bool
    assert masks[2].all()
    if kind == "off":
        assert masks.all()
    if kind == "dark":
        assert torch.equal(
            masks[0],
            torch.from_numpy(object_mask(images[0].permute(1, 2, 0).contiguous().numpy(), "dark")),
        )
