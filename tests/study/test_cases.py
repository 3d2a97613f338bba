"""Which cases a study keeps pictures of, and how visible a defect is said to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.results import ImageEvidence
from clsnf.study.cases import _contrast, _shrink_mask, choose_cases, strangest_normals

DRAWN = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=30)


def images(drawn: list[tuple[bool, float]], threshold: float = 0.5) -> list[ImageEvidence]:
    return [
        ImageEvidence("test", str(n), "", int(label), score, score > threshold)
        for n, (label, score) in enumerate(drawn)
    ]


@given(DRAWN, st.floats(0, 1), st.integers(1, 5))
def test_each_kind_holds_its_worst_cases_first_and_no_image_is_shown_twice(
    drawn: list[tuple[bool, float]], threshold: float, most: int
) -> None:
    rows = images(drawn, threshold)
    chosen = choose_cases(rows, threshold, most)
    places = [place for kind in chosen.values() for place in kind]
    assert len(places) == len(set(places))
    misses = sorted(row.score for row in rows if row.label and not row.verdict)
    alarms = sorted((row.score for row in rows if not row.label and row.verdict), reverse=True)
    right = sorted(abs(row.score - threshold) for row in rows if bool(row.label) == row.verdict)
    assert [rows[i].score for i in chosen["miss"]] == misses[:most]
    assert [rows[i].score for i in chosen["false_alarm"]] == alarms[:most]
    assert [abs(rows[i].score - threshold) for i in chosen["borderline"]] == right[:most]


@given(DRAWN)
def test_the_strangest_normals_are_those_with_the_highest_scores(
    drawn: list[tuple[bool, float]],
) -> None:
    rows = images(drawn)
    (places,) = strangest_normals(rows, 3).values()
    assert [rows[i].score for i in places] == sorted(
        (s for label, s in drawn if not label), reverse=True
    )[:3]


def test_contrast_is_the_difference_to_the_ring_around_without_other_defects() -> None:
    grey = np.full((60, 60), 100, np.float32)
    mask = np.zeros((60, 60), bool)
    mask[20:30, 20:30] = True
    grey[mask] = 151
    region = mask.copy()
    mask[20:30, 32:40] = True  # another defect in the ring
    grey[20:30, 32:40] = 255
    assert _contrast(grey, region, mask) == pytest.approx(51 / 255)
    assert _contrast(grey, np.ones_like(mask), np.ones_like(mask)) is None


def test_a_defect_of_one_pixel_is_still_outlined_on_a_small_picture() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[500, 700] = True
    small = _shrink_mask(mask, np.zeros((100, 100, 3), np.uint8))
    assert small.sum() == 1
    assert not _shrink_mask(np.zeros((1000, 1000), bool), np.zeros((100, 100, 3), np.uint8)).any()
