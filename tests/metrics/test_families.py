"""Families that share their normals, held against each family's metrics alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.errors import MetricError
from clsnf.metrics import METRICS, FamilyPixels, PixelSample, evaluate, evaluate_families
from clsnf.metrics.pixels import count_pixels

SIZE = (7, 9)


def indices(families: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The normals, and each family's images."""
    names = np.array(families)
    return np.flatnonzero(names == "good"), {
        family: np.flatnonzero(names == family) for family in sorted(set(families) - {"good"})
    }


@given(
    families=st.lists(st.sampled_from(["good", "a", "b", "c"]), min_size=2, max_size=9).filter(
        lambda names: set(names) > {"good"}
    ),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([1, 3, 40, 10**6]),  # few levels make many ties
    padded=st.booleans(),
)
def test_metrics_are_those_of_each_family_alone_to_the_last_bit(
    families: list[str], seed: int, levels: int, padded: bool
) -> None:
    rng = np.random.default_rng(seed)
    n = len(families)
    maps = (rng.integers(0, levels, (n, *SIZE)) / levels - 0.2).astype(np.float32)
    maps[rng.random(maps.shape) < 0.1] = -0.0
    masks = rng.random(maps.shape) < rng.choice([0.05, 0.6])
    masks[:, 3, 4] = True
    valid = rng.random(maps.shape) < 0.7 if padded else None
    if valid is not None:
        valid[:, 3, 4] = valid[:, 0, 0] = True
    masks[:, 0, 0] = False
    masks[np.array(families) == "good"] = False
    normals, members = indices(families)
    labels = np.array(families) != "good"
    chosen = {family: np.concatenate([normals, found]) for family, found in members.items()}

    found = evaluate_families(
        maps.max(axis=(1, 2)), maps, labels, chosen, FamilyPixels(masks, valid, normals, members),
        list(METRICS),
    )  # fmt: skip

    assert list(found) == sorted(members)
    for family, images in chosen.items():
        samples = [
            PixelSample(maps[i], masks[i], None if valid is None else valid[i]) for i in images
        ]
        assert found[family] == evaluate(maps[images].max(axis=(1, 2)), labels[images], samples)


def test_counts_without_normals_are_those_of_the_family() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2, *SIZE), np.float32)
    masks = maps > 0.6
    pixels = FamilyPixels(masks, None, np.arange(0), {"a": np.arange(2)})
    alone = count_pixels([PixelSample(*pair) for pair in zip(maps, masks, strict=True)])
    together = pixels.count(maps)["a"]
    assert together.normal_rate is None
    np.testing.assert_array_equal(together.scores.false_above, alone.scores.false_above)
    np.testing.assert_array_equal(together.scores.false_at, alone.scores.false_at)
    np.testing.assert_array_equal(together.region_share, alone.region_share)


def test_one_set_of_masks_serves_many_maps() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((3, *SIZE), bool)
    masks[1:, 2:4, 2:5] = True
    pixels = FamilyPixels(masks, None, np.array([0]), {"a": np.array([1]), "b": np.array([2])})
    for _ in range(3):
        maps = rng.random(masks.shape, np.float32)
        for index, counts in enumerate(pixels.count(maps).values(), 1):
            alone = count_pixels([PixelSample(maps[i], masks[i]) for i in (0, index)])
            np.testing.assert_array_equal(counts.scores.false_above, alone.scores.false_above)
            np.testing.assert_array_equal(counts.normal_rate, alone.normal_rate)


def test_a_score_that_is_not_finite_is_refused_with_its_image() -> None:
    maps = np.zeros((2, *SIZE), np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[1, 0, 0] = True
    pixels = FamilyPixels(masks, None, np.array([0]), {"a": np.array([1])})
    maps[1, 2, 3] = np.nan
    with pytest.raises(MetricError, match="image 1 holds nan at row 2, column 3"):
        pixels.count(maps)
    with pytest.raises(MetricError, match="float64"):
        pixels.count(maps.astype(np.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        ([], "all 2 images are normal"),
        ([0, 1], "image 0 is labelled normal, but its mask marks 1 defect pixels"),
    ],
)
def test_masks_that_contradict_the_families_are_refused(marked: list[int], message: str) -> None:
    masks = np.zeros((2, *SIZE), bool)
    masks[marked, 0, 0] = True
    with pytest.raises(MetricError, match=message):
        FamilyPixels(masks, None, np.array([0]), {"a": np.array([1])})
