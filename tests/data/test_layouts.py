"""Finding and reading data sets, on folders of tiny files: a reader never looks at pixels."""

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.core.errors import DataError, SettingsError
from clsnf.data.layouts import (
    CATEGORY_SCHEMA,
    LAYOUTS,
    list_categories,
    read_category,
    read_normals,
)
from clsnf.data.picture_folders import natural_key


def make(root: Path, *names: str) -> Path:
    """Files of their own name's bytes."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    return make(
        tmp_path,
        *(f"nut/train/good/{i}.png" for i in (10, 9, 1)),
        "nut/test/good/0.png",
        "nut/test/cut/000.jpg",
        "nut/test/cut/001.JPG",
        "nut/ground_truth/cut/000_mask.png",
        "nut/ground_truth/cut/001_mask.png",
    )


def columns(table: pa.Table, *names: str) -> list[tuple[object, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_mvtec_layout_gives_one_row_for_each_image(mvtec: Path) -> None:
    table = read_category(mvtec, "nut")
    assert table.schema == CATEGORY_SCHEMA
    good, cut = mvtec / "nut/train/good", mvtec / "nut/test/cut"
    assert columns(table, "path", "split", "label", "defect_type", "mask_path") == [
        (str(good / "1.png"), "fit", 0, "good", None),
        (str(good / "9.png"), "fit", 0, "good", None),
        (str(good / "10.png"), "fit", 0, "good", None),
        (str(cut / "000.jpg"), "test", 1, "cut", str(mvtec / "nut/ground_truth/cut/000_mask.png")),
        (str(cut / "001.JPG"), "test", 1, "cut", str(mvtec / "nut/ground_truth/cut/001_mask.png")),
        (str(mvtec / "nut/test/good/0.png"), "test", 0, "good", None),
    ]
    assert table["sha256"][0].as_py() == hashlib.sha256(b"nut/train/good/1.png").hexdigest()
    assert set(table["category"].to_pylist()) == {"nut"}


def test_btad_layout_has_ok_and_ko_and_masks_of_the_images_name_in_any_format(
    tmp_path: Path,
) -> None:
    make(tmp_path, "01/train/ok/0.bmp", "01/test/ok/1.bmp", "01/test/ko/2.bmp", "01/test/ko/3.bmp")
    make(
        tmp_path, "01/ground_truth/ko/2.png", "01/ground_truth/ko/3.bmp", "01/ground_truth/ok/1.png"
    )
    masks = tmp_path / "01/ground_truth/ko"
    for layout in ("auto", "btad"):
        assert list_categories(tmp_path, layout) == ["01"]
        assert columns(
            read_category(tmp_path, "01", layout), "split", "label", "defect_type", "mask_path"
        ) == [
            ("fit", 0, "good", None),
            ("test", 1, "ko", str(masks / "2.png")),
            ("test", 1, "ko", str(masks / "3.bmp")),
            ("test", 0, "good", None),
        ]


def test_a_category_of_good_pictures_alone_has_no_test_rows(tmp_path: Path) -> None:
    make(tmp_path, "nut/train/good/1.png")
    assert read_category(tmp_path, "nut")["split"].to_pylist() == ["fit"]


def test_a_bare_folder_is_a_category_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "bolts/2.png", "bolts/1.tif", "bolts/old/3.png")
    monkeypatch.chdir(tmp_path)
    assert columns(read_normals("bolts"), "path", "split", "label", "category") == [
        (str(tmp_path / "bolts/1.tif"), "fit", 0, "bolts"),
        (str(tmp_path / "bolts/2.png"), "fit", 0, "bolts"),
    ]
    assert read_normals("bolts", category="M8")["category"].to_pylist() == ["M8", "M8"]
    assert read_category(tmp_path, "bolts", "normals") == read_normals("bolts")


def test_categories_are_listed_in_natural_order_and_other_folders_are_not(tmp_path: Path) -> None:
    make(
        tmp_path,
        *(f"{name}/train/good/1.png" for name in ("part10", "part2", "Part1")),
        "docs/1.png",
        ".cache/train/good/1.png",
    )
    assert list_categories(tmp_path) == ["Part1", "part2", "part10"]
    assert list_categories(tmp_path, "normals") == ["docs"]


def test_notes_and_hidden_files_are_passed_over_and_links_are_followed(mvtec: Path) -> None:
    before = read_category(mvtec, "nut")
    make(
        mvtec,
        "nut/train/good/.DS_Store",
        "nut/train/good/Thumbs.db",
        "nut/test/cut/000.json",
        "nut/readme.txt",
        "nut/test/cut/._000.jpg",
    )
    assert read_category(mvtec, "nut") == before
    (mvtec / "link").symlink_to(mvtec / "nut")
    assert list_categories(mvtec) == ["link", "nut"]
    assert read_category(mvtec, "link").num_rows == before.num_rows


def test_a_defect_without_a_mask_has_none_in_the_table(mvtec: Path) -> None:
    (mvtec / "nut/ground_truth/cut/001_mask.png").unlink()
    assert read_category(mvtec, "nut")["mask_path"].to_pylist().count(None) == 5


def test_relative_paths_become_absolute(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mvtec / "nut")
    assert all(map(os.path.isabs, read_category("..", "nut")["path"].to_pylist()))


BROKEN = {
    "no train folder": (
        ["a/test/good/1.png"],
        r"a has no folder train/good: put the good pictures",
    ),
    "no good folder": (["a/train/1.png"], r"a has no folder train/good"),
    "empty": (
        ["a/train/good/.keep"],
        r"good holds no pictures \(png, jpg, bmp, tif, webp, pnm\): put",
    ),
    "nested": (["a/train/good/rgb/1.png"], r"holds no pictures .*, only rgb"),
    "defects in train": (
        ["a/train/good/1.png", "a/train/bad/1.png"],
        r"train holds bad besides 'good'.*move the others to .*test",
    ),
    "pictures astray": (
        ["a/train/good/1.png", "a/test/1.png"],
        r"beside the folders for them: .*a/test/1.png: move",
    ),
    "a format that is not read": (
        ["a/train/good/1.png", "a/train/good/2.HEIC"],
        r"not read: 2.HEIC: convert them",
    ),
    "mask without image": (
        ["a/train/good/1.png", "a/test/x/1.png", "a/ground_truth/x/2_mask.png"],
        r"without an image: .*x/2_mask.png",
    ),
    "masks without a test folder": (
        ["a/train/good/1.png", "a/ground_truth/x/2.png"],
        r"without an image: .*x/2.png",
    ),
    "two masks": (
        [
            "a/train/good/1.png",
            "a/test/x/1.png",
            "a/ground_truth/x/1.png",
            "a/ground_truth/x/1.bmp",
        ],
        r"x/1.bmp and 1.png are masks of the same image",
    ),
    "a shared mask": (
        ["a/train/good/1.png", "a/test/x/1.png", "a/test/x/1.bmp", "a/ground_truth/x/1.png"],
        r"1.png would share the mask",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_category_is_listed_and_refused_in_one_line_that_names_the_place(
    case: str, tmp_path: Path
) -> None:
    names, message = BROKEN[case]
    make(tmp_path, *names)
    assert list_categories(tmp_path) == ["a"]
    with pytest.raises(DataError, match=message) as caught:
        read_category(tmp_path, "a")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_many_names_are_counted_not_listed(mvtec: Path) -> None:
    make(mvtec, *(f"nut/ground_truth/dent/{i}.png" for i in range(9)))
    with pytest.raises(DataError, match=r"4\.png and 4 more: add"):
        read_category(mvtec, "nut")


def test_wrong_roots_and_names_say_what_would_be_right(mvtec: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        list_categories(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no folder"):
        list_categories(mvtec / "nut/test/good/0.png")
    with pytest.raises(
        DataError, match=rf"is itself a category: give the folder above it, {mvtec}"
    ):
        list_categories(mvtec / "nut")
    with pytest.raises(
        DataError,
        match="holds no category: a category has <category>/train/ok or <category>/train/good",
    ):
        list_categories(mvtec / "nut/train/good")
    with pytest.raises(DataError, match=r"no category 'nuts'. Did you mean 'nut'"):
        read_category(mvtec, "nuts")
    with pytest.raises(DataError, match="no category ''"):
        read_category(mvtec, "")
    with pytest.raises(DataError, match="nut is no category: a category has <category>/train/ok"):
        read_category(mvtec, "nut", "btad")
    with pytest.raises(SettingsError, match=r"Unknown layout 'mvtek'. Did you mean 'mvtec'"):
        list_categories(mvtec, "mvtek")
    make(tmp_path, "other/notes.txt")
    with pytest.raises(DataError, match="other is no category"):
        read_category(tmp_path, "other")
    with pytest.raises(DataError, match=r"holds no pictures .* only notes.txt"):
        read_normals(tmp_path / "other")


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "nut/train/good"
    folder.mkdir(parents=True)
    try:
        (folder / os.fsdecode(b"gro\xdf.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system stores no such names")
    with pytest.raises(DataError, match="is no UTF-8: rename it"):
        read_category(tmp_path, "nut")


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    make(tmp_path, "nut/train/good/1.png")
    (tmp_path / "nut/train/good/2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"2.png can't be read .*check the link"):
        read_category(tmp_path, "nut")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_it_looks_like_and_refuses_an_empty_folder(
    layout: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        list_categories(tmp_path, layout)
    assert LAYOUTS[layout].about in str(caught.value)
    assert not LAYOUTS[layout].claims(tmp_path / "empty")
    with pytest.raises(DataError):
        LAYOUTS[layout].read(tmp_path / "empty")


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), unique=True))
def test_natural_order_is_total_and_does_not_depend_on_the_order_given(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    names.reverse()
    assert sorted(names, key=natural_key) == ordered


@settings(deadline=None)
@given(st.text("ab_", max_size=3), st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_in_names_count_as_numbers(prefix: str, first: int, second: int) -> None:
    assert (natural_key(f"{prefix}{first}.png") < natural_key(f"{prefix}{second}.png")) == (
        first < second
    )
