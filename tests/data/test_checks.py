"""The check before the long work, on a small category that is broken in one way at a time."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from clsnf.core.errors import DataError, ImageError, SettingsError
from clsnf.data.checks import CheckReport, check_category
from clsnf.data.images import write_image, write_mask
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits

SIZE = (24, 32)


@pytest.fixture
def nut(tmp_path: Path) -> Path:
    """A whole category: 8 good pictures to learn from, 2 good and 3 defective ones to test."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "nut"
    names = (
        [f"train/good/{i}.png" for i in range(8)]
        + [f"test/good/{i}.png" for i in range(2)]
        + [f"test/cut/{i}.png" for i in range(3)]
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    (folder / "ground_truth/cut").mkdir(parents=True)
    for i in range(3):
        mask = np.zeros(SIZE, bool)
        mask[5:9, i : i + 3] = True
        write_mask(folder / f"ground_truth/cut/{i}_mask.png", mask)
    return folder


def check(folder: Path, **options: Any) -> CheckReport:
    return check_category(read_category(folder.parent, folder.name), **options)


def refusal(folder: Path, kind: type[Exception], **options: Any) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(kind) as caught:
        check(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_a_whole_category_passes_and_progress_reaches_its_end(nut: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check(nut, progress=lambda *counts: seen.append(counts))
    assert (report.images, report.masks, report.warnings) == (13, 3, ())
    assert seen == [(i, 13) for i in range(1, 14)]
    assert check_category(assign_splits(read_category(nut.parent, "nut"), 0.3, 0)) == report


def test_a_category_of_good_pictures_alone_passes(nut: Path) -> None:
    shutil.rmtree(nut / "test")
    shutil.rmtree(nut / "ground_truth")
    assert (check(nut).images, check(nut).masks) == (8, 0)


def test_a_truncated_image_is_named(nut: Path) -> None:
    cut(nut / "train/good/3.png")
    assert refusal(nut, ImageError).startswith(
        f"Category 'nut': {nut / 'train/good/3.png'} is cut short"
    )


def test_a_truncated_mask_is_named(nut: Path) -> None:
    cut(nut / "ground_truth/cut/1_mask.png", 0.9)
    assert f"{nut / 'ground_truth/cut/1_mask.png'} is cut short" in refusal(nut, ImageError)


def test_many_problems_are_counted_and_the_first_five_named(nut: Path) -> None:
    for i in range(7):
        cut(nut / f"train/good/{i}.png")
    message = refusal(nut, ImageError)
    assert message.startswith("Category 'nut' has 7 problems: ")
    assert message.endswith(" ... and 2 more.")
    assert message.count("is cut short") == 5


def test_problems_of_different_kinds_come_together(nut: Path) -> None:
    (nut / "train/good/0.png").write_bytes(b"")
    (nut / "ground_truth/cut/0_mask.png").unlink()
    write_mask(nut / "ground_truth/cut/1_mask.png", np.zeros(SIZE, bool))
    write_mask(nut / "ground_truth/cut/2_mask.png", np.ones((24, 24), bool))
    message = refusal(nut, DataError)
    assert message.startswith("Category 'nut' has 4 problems")
    assert "train/good/0.png is empty" in message
    assert "cut/0.png shows a defect but has no mask: add ground_truth/cut/0_mask.png" in message
    assert "1_mask.png marks no pixel" in message
    assert "2_mask.png has the size 24x24, its image 32x24" in message


def test_a_picture_in_train_and_in_test_is_a_leak_however_it_was_saved(nut: Path) -> None:
    shutil.copy(nut / "train/good/2.png", nut / "test/good/0.png")
    bmp = nut / "test/good/1.bmp"
    Image.open(nut / "train/good/5.png").save(bmp)
    message = refusal(nut, DataError)
    assert message.startswith("Category 'nut' has 2 leaks: ")
    assert (
        f"{nut / 'train/good/2.png'} and {nut / 'test/good/0.png'} are the same picture, in train "
        "and in test" in message
    )
    assert str(bmp) in message
    assert "--allow-leak" in message

    report = check(nut, allow_leak=True)
    assert len(report.warnings) == 1
    assert "2 leaks" in report.warnings[0]


def test_a_leak_into_validation_is_a_leak_too(nut: Path) -> None:
    table = assign_splits(read_category(nut.parent, "nut"), 0.5, 0)
    validation = next(row["path"] for row in table.to_pylist() if row["split"] == "validation")
    shutil.copy(validation, nut / "test/good/0.png")
    with pytest.raises(DataError, match="in validation and in test"):
        check_category(table)


def test_a_picture_that_is_both_good_and_defective_is_refused_even_with_leaks_allowed(
    nut: Path,
) -> None:
    shutil.copy(nut / "test/cut/0.png", nut / "test/good/0.png")
    assert "once good and once a defect" in refusal(nut, DataError, allow_leak=True)


def test_copies_within_train_are_a_warning(nut: Path) -> None:
    shutil.copy(nut / "train/good/0.png", nut / "train/good/7.png")
    (warning,) = check(nut).warnings
    assert "train/good/0.png" in warning
    assert "train/good/7.png are the same picture" in warning


def test_mixed_sizes_are_a_warning(nut: Path) -> None:
    write_image(
        nut / "train/good/0.png",
        np.random.default_rng(9).integers(0, 256, (48, 64, 3), dtype=np.uint8),
    )
    assert check(nut).warnings == (
        "Category 'nut' mixes 2 image sizes: 32x24 (12 images), 64x48 (1 images): are all of one "
        "camera and crop?",
    )


def test_12_bit_values_in_16_bit_files_are_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "nut/train/good"
    folder.mkdir(parents=True)
    for i in range(6):
        cv2.imwrite(
            str(folder / f"{i}.png"),
            np.random.default_rng(i).integers(0, 4096, SIZE, dtype=np.uint16),
        )
    (warning,) = check(tmp_path / "nut").warnings
    assert "no pixel above 15 of 255" in warning


def test_masks_in_jpeg_are_a_warning(nut: Path) -> None:
    (nut / "ground_truth/cut/0_mask.png").unlink()
    mask = np.zeros(SIZE, np.uint8)
    mask[4:12, 4:12] = 255
    cv2.imwrite(str(nut / "ground_truth/cut/0_mask.jpg"), mask)
    (warning,) = check(nut).warnings
    assert "1 masks in JPEG" in warning


def test_a_table_without_training_images_is_refused(nut: Path) -> None:
    table = read_category(nut.parent, "nut")
    for empty in (table.slice(0, 0), table.slice(8)):
        with pytest.raises(DataError, match="no training images"):
            check_category(empty)


# ---- a few unreadable pictures among many ----


def test_a_share_of_unreadable_pictures_is_left_out_and_named(nut: Path) -> None:
    cut(nut / "train/good/0.png")
    report = check(nut, max_bad=0.1)
    assert list(report.skipped) == [str(nut / "train/good/0.png")]
    assert report.images == len(report.table) == 12
    assert str(nut / "train/good/0.png") not in report.table["path"].to_pylist()
    assert any(
        "1 of the 13 pictures are left out" in warning and "0.png" in warning
        for warning in report.warnings
    )


def test_more_than_that_share_ends_it_and_the_message_says_the_share(nut: Path) -> None:
    cut(nut / "train/good/0.png")
    cut(nut / "train/good/1.png")
    message = refusal(nut, ImageError, max_bad=0.1)
    assert "2 of 13 pictures, more than --max-bad 0.1" in message
    assert "0.png" in message
    refusal(nut, ImageError)  # by default one in a hundred


def test_what_can_be_read_but_is_wrong_is_never_left_out(nut: Path) -> None:
    write_mask(nut / "ground_truth/cut/0_mask.png", np.zeros(SIZE, bool))
    assert "marks no pixel" in refusal(nut, ImageError, max_bad=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(nut: Path, share: float) -> None:
    assert "--max-bad" in refusal(nut, SettingsError, max_bad=share)


# ---- masks that seem inverted ----


def repaint(folder: Path, share: float, number: int) -> Path:
    """A mask that marks that share of its picture, from the top."""
    mask = np.zeros(SIZE, bool)
    mask.flat[: round(share * mask.size)] = True
    path = folder / f"ground_truth/cut/{number}_mask.png"
    write_mask(path, mask)
    return path


def test_masks_that_mark_the_good_part_are_called_inverted(nut: Path) -> None:
    paths = [repaint(nut, share, number) for number, share in enumerate((0.99, 0.97, 0.04))]
    (warning,) = check(nut).warnings
    assert warning.startswith(
        "Category 'nut' probably has inverted masks: 2 of 3 mark more than 50% of their picture "
        f"({paths[0]}: 98.9 %)"
    )


def test_one_mask_of_nearly_a_whole_picture_is_named_and_called_nothing(nut: Path) -> None:
    path = repaint(nut, 0.95, 1)
    (warning,) = check(nut).warnings
    assert warning.startswith(f"Category 'nut': {path} marks 95")
    assert "inverted masks" not in warning


@pytest.mark.parametrize("shares", [(1, 1, 1), (0.7, 0.1, 0.1), (0.4, 0.4, 0.4), (1, 1, 0.6)])
def test_defects_that_fill_their_picture_and_large_ones_pass(
    nut: Path, shares: tuple[float, ...]
) -> None:
    for number, share in enumerate(shares):
        repaint(nut, share, number)
    assert check(nut).warnings == ()


# ---- the same picture in several files ----


def test_pictures_saved_twice_in_other_formats_never_lie_on_both_sides(nut: Path) -> None:
    good = nut / "train/good"
    for path in sorted(good.glob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
    table = check(nut).table
    alone = assign_splits(read_category(nut.parent, "nut"), 0.4, 0, minimum=1)
    for seed in range(20):
        result = assign_splits(table, 0.4, seed, minimum=1)
        assert result.schema == alone.schema
        sides: dict[str, set[str]] = {}
        for path, split in zip(
            result["path"].to_pylist(), result["split"].to_pylist(), strict=True
        ):
            if "/train/" in path:
                sides.setdefault(Path(path).stem, set()).add(split)
        assert all(len(found) == 1 for found in sides.values()), sides


def test_a_category_without_copies_is_split_as_by_its_files(nut: Path) -> None:
    raw = read_category(nut.parent, "nut")
    for seed in range(20):
        assert assign_splits(check(nut).table, 0.3, seed) == assign_splits(raw, 0.3, seed)
