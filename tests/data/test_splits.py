"""The seeded split of the normal training images, on tables of made-up hashes."""

import hashlib
from collections.abc import Iterable
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.core.errors import DataError, SettingsError
from clsnf.data.layouts import CATEGORY_SCHEMA
from clsnf.data.splits import PIXELS, assign_splits


def table(contents: Iterable[int], tests: Iterable[int] = ()) -> pa.Table:
    """One training row for each content, then one test row for each of ``tests``."""
    rows = [
        {
            "path": f"/{split}/{index}.png",
            "split": split,
            "label": 0,
            "defect_type": "good",
            "category": "c",
            "sha256": hashlib.sha256(str(content).encode()).hexdigest(),
        }
        for split, group in (("fit", contents), ("test", tests))
        for index, content in enumerate(group)
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)


def sides(result: pa.Table) -> dict[str, str]:
    """Content hash -> split."""
    return dict(zip(result["sha256"].to_pylist(), result["split"].to_pylist(), strict=True))


contents = st.lists(st.integers(), min_size=6, max_size=120, unique=True)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(contents, fractions, seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    images: list[int], fraction: float, seed: int, random: Random
) -> None:
    first = sides(assign_splits(table(images), fraction, seed))
    random.shuffle(images)
    assert sides(assign_splits(table(images), fraction, seed)) == first


@settings(deadline=None)
@given(st.integers(40, 100), st.integers(1, 60), st.floats(0.3, 0.7), seeds)
def test_images_keep_their_side_when_files_are_added(
    count: int, more: int, fraction: float, seed: int
) -> None:
    before = sides(assign_splits(table(range(count)), fraction, seed))
    after = sides(assign_splits(table(range(count + more)), fraction, seed))
    assert before.items() <= after.items()


@settings(deadline=None)
@given(contents, st.integers(), fractions, seeds)
def test_one_more_image_moves_at_most_one_of_a_small_set(
    images: list[int], added: int, fraction: float, seed: int
) -> None:
    before = sides(assign_splits(table(images), fraction, seed))
    after = sides(assign_splits(table([*images, added]), fraction, seed))
    assert sum(before[digest] != after[digest] for digest in before) <= 1


@settings(deadline=None)
@given(contents, fractions, seeds, st.integers(1, 4))
def test_both_sides_get_their_least_number(
    images: list[int], fraction: float, seed: int, minimum: int
) -> None:
    result = list(sides(assign_splits(table(images), fraction, seed, minimum=minimum)).values())
    assert result.count("validation") >= minimum
    assert result.count("fit") >= 2


@settings(deadline=None)
@given(contents, fractions, seeds)
def test_copies_lie_on_the_same_side_and_test_rows_stay(
    images: list[int], fraction: float, seed: int
) -> None:
    given_table = table(images + images, tests=[1, 2, 3])
    result = assign_splits(given_table, fraction, seed)
    assert result.schema == CATEGORY_SCHEMA
    assert result.drop_columns("split") == given_table.drop_columns("split")
    split = result["split"].to_pylist()
    assert split[: len(images)] == split[len(images) : 2 * len(images)]
    assert split[2 * len(images) :] == ["test"] * 3


def test_the_fraction_is_kept_on_average_and_the_seed_changes_who_validates() -> None:
    many = table(range(3000))
    splits = [
        np.array(assign_splits(many, 0.2, seed)["split"].to_pylist()) == "validation"
        for seed in range(3)
    ]
    for chosen in splits:
        assert abs(chosen.mean() - 0.2) < 0.03
    assert abs((splits[0] & splits[1]).mean() - 0.04) < 0.015  # independent


def test_splitting_again_gives_the_same() -> None:
    once = assign_splits(table(range(30)), 0.3, 7)
    assert assign_splits(once, 0.3, 7) == once


def test_the_split_of_a_seed_never_changes() -> None:
    # Worked out in a shell: the first byte of `printf 0:HASH | sha256sum`, HASH of the numbers 0 to
    # 19, is below 64.
    validation = [
        i
        for i, split in enumerate(assign_splits(table(range(20)), 0.25, 0)["split"].to_pylist())
        if split == "validation"
    ]
    assert validation == [5, 8, 9, 17, 18]


def test_too_few_different_images_are_an_error_that_says_how_many_are_needed() -> None:
    with pytest.raises(
        DataError, match=r"Category 'c' has 5 different good pictures .* at least 6 are needed"
    ):
        assign_splits(table([1, 2, 3, 4, 5, 5, 5]), 0.2, 0)
    with pytest.raises(DataError, match="has 0 different good pictures"):
        assign_splits(table([], tests=range(9)), 0.2, 0)
    with pytest.raises(DataError, match="The category has 0"):
        assign_splits(table([]), 0.2, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match="between 0 and 1"):
        assign_splits(table(range(9)), fraction, 0)


def test_a_least_number_below_one_is_refused() -> None:
    with pytest.raises(SettingsError, match="1 or more"):
        assign_splits(table(range(9)), 0.5, 0, minimum=0)


def own_splits(fit: int, validation: int) -> pa.Table:
    """A table whose layout names its validation pictures."""
    rows = [
        {
            "path": f"/{split}/{index}.png",
            "split": split,
            "label": 0,
            "defect_type": "good",
            "category": "c",
            "sha256": hashlib.sha256(f"{split} {index}".encode()).hexdigest(),
        }
        for split, count in (("fit", fit), ("validation", validation), ("test", 2))
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)


def test_a_layout_with_validation_pictures_of_its_own_keeps_them() -> None:
    for fraction, seed in ((0.1, 0), (0.9, 3)):
        assert assign_splits(own_splits(9, 5), fraction, seed) == own_splits(9, 5)


@pytest.mark.parametrize(
    ("fit", "validation", "message"),
    [
        (1, 5, "has 1 different good pictures in train: at least 2"),
        (9, 3, "has 3 different good pictures in validation: at least 4"),
    ],
)
def test_too_few_pictures_in_a_layouts_own_splits_are_refused(
    fit: int, validation: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        assign_splits(own_splits(fit, validation), 0.2, 0)


@settings(deadline=None)
@given(st.integers(10, 40), seeds, st.randoms(use_true_random=False))
def test_rows_of_equal_pixels_share_a_side_whatever_their_order_and_the_share_is_kept(
    count: int, seed: int, random: Random
) -> None:
    # Every picture twice: the second file has other bytes.
    files = [(f"{index}{ending}", index) for index in range(count) for ending in ("", " copy")]
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name, _ in files}
    first: dict[str, str] | None = None
    for _ in range(2):
        random.shuffle(files)
        rows = table(range(len(files)))
        rows = rows.set_column(5, "sha256", pa.array([hashes[name] for name, _ in files]))
        rows = rows.append_column(PIXELS, pa.array([str(index) for _, index in files]))
        result = assign_splits(rows, 0.3, seed)
        assert result.schema == CATEGORY_SCHEMA
        found = dict(zip((n for n, _ in files), result["split"].to_pylist(), strict=True))
        assert all(found[str(index)] == found[f"{index} copy"] for index in range(count))
        assert first in (None, found)
        first = found
