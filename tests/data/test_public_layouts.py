"""MVTec AD 2 and MVTec LOCO AD as published: their own splits, folders of masks, saturation."""

import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clsnf.core.errors import DataError, ImageError
from clsnf.data.checks import check_category
from clsnf.data.images import decode_mask, read_mask, read_regions
from clsnf.data.layouts import list_categories, notes_of, read_category
from clsnf.data.packs import verify_pack, write_pack
from clsnf.data.region_files import (
    CONFIGURATION,
    Saturation,
    has_regions,
    read_saturations,
    regions_reference,
)
from clsnf.data.sets import read_category as read_set
from clsnf.data.sources import read_bytes
from clsnf.data.splits import assign_splits
from tests.support.small_data import draw_regions, write_loco, write_mvtec2

SIZE = (32, 40)


@pytest.fixture
def can(tmp_path: Path) -> Path:
    return write_mvtec2(tmp_path / "ad2" / "can", size=SIZE)


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    return write_loco(tmp_path / "loco" / "pins", size=SIZE)


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_category(folder.parent, folder.name).to_pylist()
    return found


def counts(folder: Path) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for row in rows(folder):
        key = row["split"], row["defect_type"]
        found[key] = found.get(key, 0) + 1
    return found


# ---- MVTec AD 2 ----


def test_mvtec_ad_2_has_its_own_validation_and_public_test_pictures(can: Path) -> None:
    assert list_categories(can.parent) == ["can"]
    assert counts(can) == {
        ("fit", "good"): 10,
        ("validation", "good"): 4,
        ("test", "good"): 3,
        ("test", "bad"): 3,
    }
    bad = [row for row in rows(can) if row["label"]]
    truth = can / "test_public/ground_truth/bad"
    assert [row["mask_path"] for row in bad] == [
        str(truth / f"{Path(row['path']).stem}_mask.png") for row in bad
    ]
    table = check_category(read_category(can.parent, "can")).table
    split = assign_splits(table, 0.5, 3)
    assert split == read_category(can.parent, "can")


def test_private_test_pictures_are_named_and_not_judged(can: Path) -> None:
    table = read_category(can.parent, "can")
    notes = notes_of(table)
    assert [note.split(" holds ")[0] for note in notes] == [
        str(can / "test_private"),
        str(can / "test_private_mixed"),
    ]
    assert all("2 pictures without labels" in note for note in notes)
    warnings = check_category(table).warnings
    assert warnings == tuple(f"Category 'can': {note}" for note in notes)


def test_folders_of_pictures_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = write_mvtec2(tmp_path / "nut", size=SIZE)
    (folder / "test_public").rename(folder / "test")
    (folder / "test/ground_truth").rename(folder / "ground_truth")
    (folder / "test_private_mixed").rename(folder / "notes")
    for path in (folder / "notes").iterdir():
        path.unlink()
    assert notes_of(read_category(tmp_path, "nut")) == [
        f"{folder / 'test_private'} is not read: pictures belong into train/good, "
        "validation/good and test."
    ]


def test_defects_in_validation_are_refused(can: Path) -> None:
    (can / "validation/bad").mkdir()
    with pytest.raises(DataError, match=r"validation holds bad besides 'good'"):
        read_category(can.parent, "can")


def test_a_picture_in_train_and_in_validation_is_a_leak(can: Path) -> None:
    with Image.open(can / "train/good/000_regular.png") as image:
        image.save(can / "validation/good/copy.bmp")
    table = read_category(can.parent, "can")
    with pytest.raises(DataError, match="in train and in validation"):
        check_category(table)
    assert any(
        "leak" in w or "same picture" in w for w in check_category(table, allow_leak=True).warnings
    )


# ---- MVTec LOCO AD ----


def test_loco_has_a_folder_of_masks_for_each_picture(pins: Path) -> None:
    assert list_categories(pins.parent) == ["pins"]
    assert counts(pins) == {
        ("fit", "good"): 10,
        ("validation", "good"): 4,
        ("test", "good"): 3,
        ("test", "logical_anomalies"): 2,
        ("test", "structural_anomalies"): 2,
    }
    defects = [row for row in rows(pins) if row["label"]]
    for row in defects:
        place = pins / "ground_truth" / row["defect_type"] / Path(row["path"]).stem
        assert row["mask_path"] == f"{place}#regions"
        assert has_regions(row["mask_path"])
        each = [np.asarray(Image.open(path)) > 0 for path in sorted(place.iterdir())]
        found = read_regions(row["mask_path"])
        assert all(np.array_equal(a, b.mask) for a, b in zip(each, found, strict=True))
        assert np.array_equal(read_mask(row["mask_path"]), np.logical_or.reduce(each))
    report = check_category(read_category(pins.parent, "pins"))
    assert (report.masks, report.warnings) == (4, ())


def test_the_configuration_says_when_a_region_is_saturated(pins: Path) -> None:
    # The first mask of each picture is of a type with 20 pixels, the second of one with half.
    for row in rows(pins):
        if row["defect_type"] == "logical_anomalies":
            first, second = read_regions(row["mask_path"])
            assert first.saturation == min(20, int(first.mask.sum()))
            assert second.saturation == int(second.mask.sum()) // 2


def test_a_pack_holds_the_same_regions(pins: Path, tmp_path: Path) -> None:
    write_pack([("pins", partial(read_category, pins.parent, "pins"))], tmp_path / "pack")
    assert verify_pack(tmp_path / "pack").unreadable == ()
    packed = read_set(tmp_path / "pack", "pins").to_pylist()
    for before, after in zip(rows(pins), packed, strict=True):
        assert before["split"] == after["split"]
        if before["mask_path"]:
            assert has_regions(after["mask_path"])
            assert read_bytes(after["mask_path"]) == read_bytes(before["mask_path"])
            for one, other in zip(
                read_regions(before["mask_path"]), read_regions(after["mask_path"]), strict=True
            ):
                assert one.saturation == other.saturation
                assert np.array_equal(one.mask, other.mask)


def test_a_bundle_is_an_archive_that_any_tool_opens_and_time_changes_nothing(pins: Path) -> None:
    reference = next(row["mask_path"] for row in rows(pins) if row["mask_path"])
    before = read_bytes(reference)
    for path in pins.rglob("*.png"):
        path.touch()
    assert read_bytes(reference) == before
    copy = pins / "copy.zip"
    copy.write_bytes(before)
    with zipfile.ZipFile(copy) as archive:
        assert archive.namelist() == [CONFIGURATION, "000.png", "001.png"]


def first_masks(pins: Path) -> Path:
    return pins / "ground_truth/logical_anomalies/000"


def refused(pins: Path) -> str:
    """The message for the category, one line."""
    with pytest.raises((DataError, ImageError)) as caught:
        check_category(read_category(pins.parent, "pins"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mask_value_that_the_configuration_lacks_is_named(pins: Path) -> None:
    draw_regions(first_masks(pins) / "000.png", np.ones(SIZE, bool), 9)
    assert "000.png marks no pixel, or not with one grey value of defects_config.json" in refused(
        pins
    )


def test_a_mask_of_two_values_of_none_or_in_colour_is_named(pins: Path) -> None:
    mask = np.full((*SIZE, 3), 255, np.uint8)
    for content in (mask, mask[..., 0] * 0, np.arange(mask.size // 3).reshape(SIZE) % 3 + 253):
        Image.fromarray(content.astype(np.uint8)).save(first_masks(pins) / "000.png")
        assert "grey value of defects_config.json (254, 255)" in refused(pins)


def test_masks_of_different_sizes_are_named(pins: Path) -> None:
    draw_regions(first_masks(pins) / "001.png", np.ones((4, 4), bool), 255)
    assert "001.png has another size than the masks beside it" in refused(pins)


def test_a_folder_without_masks_and_masks_without_a_folder_are_named(pins: Path) -> None:
    first_masks(pins).parent.joinpath("007").mkdir()
    assert "007 holds no mask" in refused(pins)
    first_masks(pins).parent.joinpath("007").rmdir()
    draw_regions(first_masks(pins).parent / "007.png", np.ones(SIZE, bool), 255)
    assert "Masks lie beside the folders for them" in refused(pins)


def test_a_defect_without_masks_is_named(pins: Path) -> None:
    for path in first_masks(pins).iterdir():
        path.unlink()
    first_masks(pins).rmdir()
    assert "000.png shows a defect but has no mask: add ground_truth/logical_anomalies" in refused(
        pins
    )


ENTRY = {
    "defect_name": "missing",
    "pixel_value": 255,
    "saturation_threshold": 20,
    "relative_saturation": False,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ("{}", "is no list of defect types"),
        ("[1]", "is no list of defect types"),
        (json.dumps([{**ENTRY, "pixel_value": 0}]), "has the pixel_value 0"),
        (json.dumps([ENTRY, ENTRY]), "has the pixel_value 255: it must be from 1 to 255, another"),
        (json.dumps([{**ENTRY, "saturation_threshold": 0}]), "saturation_threshold 0: it must be"),
        (json.dumps([{**ENTRY, "saturation_threshold": True}]), "saturation_threshold True"),
        ('[{"saturation_threshold": NaN, "relative_saturation": true}]', "threshold nan"),
        (
            json.dumps([{**ENTRY, "relative_saturation": True}]),
            "saturation_threshold 20: it must be a share from above 0 to 1",
        ),
        (json.dumps([{**ENTRY, "relative_saturation": 1}]), "relative_saturation 1"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(pins: Path, content: str, message: str) -> None:
    (pins / CONFIGURATION).write_text(content)
    said = refused(pins)
    assert str(pins / CONFIGURATION) in said
    assert message in said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
configurations = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "pixel_value": st.integers(-3, 300) | json_values,
            "saturation_threshold": st.floats() | st.integers() | json_values,
            "relative_saturation": st.booleans() | json_values,
        },
    ),
    max_size=4,
)


@given(configurations | json_values)
@settings(max_examples=150, deadline=None)
def test_any_configuration_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "configuration"
    folder.mkdir(exist_ok=True)
    (folder / CONFIGURATION).write_text(json.dumps(content))
    try:
        found = read_saturations(folder)
    except DataError as error:
        found, message = {}, str(error)
    else:
        message = ""
    assert "\n" not in message
    for saturation in found.values():
        for area in (1, 7, 10**6):
            assert 1 <= saturation.pixels(area) <= area


@given(st.integers(1, 10**6), st.floats(0.0001, 1), st.integers(1, 10**7))
def test_a_share_is_rounded_down_and_a_number_is_cut(area: int, share: float, number: int) -> None:
    assert Saturation(share, relative=True).pixels(area) == max(1, int(share * area))
    assert Saturation(number, relative=False).pixels(area) == min(number, area)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_damaged_bundles_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "bundles" / "pins"
    if not folder.exists():
        write_loco(folder, size=SIZE)
    whole = read_bytes(regions_reference(folder / "ground_truth/logical_anomalies/000"))
    at = len(damage) * 7 % (len(whole) - 60) + 50  # behind the name of the first file
    broken = whole[:at] + damage + whole[at + len(damage) :]
    message = ""
    try:
        decode_mask(broken, "x#regions")
    except ImageError as error:
        message = str(error)
    assert "\n" not in message
