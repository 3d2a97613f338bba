"""How pictures look on the whole, and that a detector remembers how its normals did."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clsnf.core.config import ImageSettings
from clsnf.data.image_statistics import STATISTICS, statistics_of, statistics_of_normals
from clsnf.data.images import place, write_image
from clsnf.detector import Detector
from tests.support.small_data import draw_normal

SETTINGS = ImageSettings(64, 64)


def looks(image: np.ndarray) -> dict[str, float]:
    return dict(zip(STATISTICS, statistics_of(place(image, SETTINGS)[0]).tolist(), strict=True))


def test_each_look_answers_to_what_it_is_named_after() -> None:
    image = draw_normal(np.random.default_rng(0), (64, 64)).astype(np.int16)
    plain = looks(image.astype(np.uint8))
    dark = looks(np.clip(image - 40, 0, 255).astype(np.uint8))
    assert dark["brightness"] == pytest.approx(plain["brightness"] - 40, abs=1)
    flat = looks((128 + (image - 128) // 2).astype(np.uint8))
    assert flat["contrast"] == pytest.approx(plain["contrast"] / 2, rel=0.1)
    blurred = (image[:-1, :-1] + image[1:, :-1] + image[:-1, 1:] + image[1:, 1:]) // 4
    assert looks(blurred.astype(np.uint8))["sharpness"] < 0.8 * plain["sharpness"]
    red = image.copy()
    red[..., 0] = np.clip(red[..., 0] + 20, 0, 255)
    assert looks(red.astype(np.uint8))["redness"] == pytest.approx(plain["redness"] + 20, abs=1)
    assert looks(red.astype(np.uint8))["blueness"] == pytest.approx(plain["blueness"], abs=0.1)


def test_grey_has_no_colour_and_a_flat_picture_no_contrast() -> None:
    assert statistics_of(torch.full((3, 32, 32), 90, dtype=torch.uint8)).tolist() == [
        90,
        0,
        0,
        0,
        0,
    ]


def test_normals_are_summed_up_in_any_order_with_room_for_a_breath_of_change(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        write_image(path, draw_normal(rng, (50, 70)))
    found = statistics_of_normals(paths, SETTINGS)
    assert found == statistics_of_normals(paths[::-1], SETTINGS)
    assert set(found) == set(STATISTICS)
    same = statistics_of_normals(paths[:1] * 3, SETTINGS)
    assert [spread for _, spread in same.values()] == [1.0, 1.0, 0.5, 1.0, 1.0]


def test_a_detector_remembers_the_looks_of_the_normals_it_was_calibrated_on(winners: Path) -> None:
    detector = Detector.load(winners / "plate", device="cpu")
    mean, spread = detector.provenance.image_statistics["brightness"]
    assert mean == pytest.approx(110, abs=15)
    assert spread >= 1
