"""Heat maps, overlays and sheets: what is bright, what is outlined, what fits where."""

import cv2
import numpy as np
import pytest

from clsnf.evaluation.pictures import heat_map, outline, overlay, sheet

CYAN = (0, 255, 255)


def brightness(picture: np.ndarray) -> np.ndarray:
    return picture.astype(int).sum(axis=2)


def test_a_heat_map_grows_brighter_with_the_score_and_is_held_at_its_ends() -> None:
    scores = np.array([[-1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 9.0]], np.float32)
    shown = heat_map(scores, 0.1, 0.5)
    assert shown.shape == (1, 7, 3)
    assert shown.dtype == np.uint8
    steps = np.diff(brightness(shown)[0])
    assert (steps[1:-1] > 0).all()
    assert steps[0] == steps[-1] == 0
    assert brightness(shown)[0, 0] < 30, "the lowest is nearly black"


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5)])
def test_a_range_without_width_tells_below_from_above(low: float, high: float) -> None:
    shown = brightness(heat_map(np.array([[0.0, 1.0]], np.float32), low, high))
    assert shown[0, 0] < shown[0, 1]


def test_an_overlay_leaves_normal_pixels_as_they_are_and_outlines_what_is_above_the_threshold() -> (
    None
):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    before = image.copy()
    score_map = np.full((64, 48), 0.1, np.float32)
    score_map[20:40, 10:30] = 0.9
    shown = overlay(image, score_map, 0.2, 0.5)
    assert (image == before).all()
    outside = np.ones((64, 48), bool)
    outside[19:41, 9:31] = False
    assert (shown[outside] == image[outside]).all()
    outlined = (shown == CYAN).all(axis=2)
    assert outlined[20, 10:30].all()
    assert outlined[39, 10:30].all()
    assert not outlined[25:35, 15:25].any()


def test_without_a_pixel_above_the_threshold_nothing_is_outlined() -> None:
    image = np.full((32, 32, 3), 120, np.uint8)
    assert (overlay(image, np.full((32, 32), 0.1, np.float32), 0.2, 0.5) == image).all()


def test_an_outline_follows_every_region_and_grows_with_the_image() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:10, 5:10] = mask[20:30, 20:30] = True
    marked = (outline(np.zeros((40, 40, 3), np.uint8), mask, CYAN) == CYAN).all(axis=2)
    assert cv2.connectedComponents(marked.astype(np.uint8))[0] == 3, "two regions and the ground"
    large = np.zeros((1024, 1024), bool)
    large[300:700, 300:700] = True
    thick = (outline(np.zeros((1024, 1024, 3), np.uint8), large, CYAN) == CYAN).all(axis=2)
    assert thick[500].sum() >= 2 * 4


def test_a_sheet_holds_every_picture_whole_in_a_cell_of_its_row() -> None:
    def plain(shape: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
        return np.full((*shape, 3), colour, np.uint8)

    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    shown = sheet(
        [("two", [plain((50, 100), red), plain((300, 30), green)]), ("one", [plain((5, 5), blue)])],
        cell=100,
    )
    assert shown.shape == (2 * (22 + 100), 200, 3)
    for colour, ratio in ((red, 2.0), (green, 0.1), (blue, 1.0)):
        rows, columns = np.nonzero((shown == colour).all(axis=2))
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(ratio, rel=0.1)
        assert max(np.ptp(columns), np.ptp(rows)) == 95
    assert (shown[122 + 22 :, 100:] == 255).all(), "an empty cell is white"
