"""The validation set on disk: its layout, what it depends on, when it is used again, and what an
interruption leaves.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clsnf.core.errors import DataError, ImageError, OutputError, SettingsError
from clsnf.data.images import read_image, read_mask, write_image
from clsnf.data.layouts import CATEGORY_SCHEMA
from clsnf.synthesis import validation_set
from clsnf.synthesis.validation_defects import FAMILIES
from clsnf.synthesis.validation_set import write_validation_set


def draw_normals(folder: Path, numbers: Sequence[int]) -> list[Path]:
    """Bright plates of 96 x 128 pixels with a dark bar each, one file per number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image = (
            np.clip(np.random.default_rng(number).normal(190, 6, (96, 128, 1)), 0, 255)
            .astype(np.uint8)
            .repeat(3, axis=2)
        )
        image[30:66, 20:100] //= 2
        write_image(folder / f"{number:03}.png", image)
    return sorted(folder.iterdir())


def as_table(paths: Sequence[Path], split: str = "validation") -> pa.Table:
    rows = [
        {
            "path": str(path),
            "split": split,
            "label": 0,
            "defect_type": "good",
            "mask_path": None,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "category": "plate",
        }
        for path in paths
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)


def write(table: pa.Table, out: Path, **changes: Any) -> pa.Table:
    return write_validation_set(table, out, **{"images_per_family": 2, "seed": 3, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def normals(tmp_path: Path) -> list[Path]:
    return draw_normals(tmp_path / "normals", range(3))


def test_the_set_has_mvtec_layout_and_a_table_of_the_contract(
    normals: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    table = write(as_table(normals), out)
    assert table.schema == CATEGORY_SCHEMA
    assert set(table["split"].to_pylist()) == {"validation"}
    assert set(table["category"].to_pylist()) == {"plate"}
    counts = {name: table["defect_type"].to_pylist().count(name) for name in ["good", *FAMILIES]}
    assert counts == {"good": 3} | dict.fromkeys(FAMILIES, 2)
    for row in table.to_pylist():
        path = Path(row["path"])
        assert path.parent == out / "test" / row["defect_type"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        if row["defect_type"] == "good":
            assert row["label"] == 0
            assert row["mask_path"] is None
        else:
            assert row["label"] == 1
            assert row["mask_path"] == str(
                out / "ground_truth" / row["defect_type"] / f"{path.stem}_mask.png"
            )
            mask = read_mask(row["mask_path"])
            assert mask.any()
            assert mask.shape == read_image(path).shape[:2] == (96, 128)


def test_normals_keep_their_bytes(normals: list[Path], tmp_path: Path) -> None:
    write(as_table(normals), tmp_path / "set")
    copies = {path.read_bytes() for path in (tmp_path / "set" / "test" / "good").iterdir()}
    assert copies == {path.read_bytes() for path in normals}


def test_every_normal_is_the_ground_of_as_many_defects(normals: list[Path], tmp_path: Path) -> None:
    table = write(as_table(normals), tmp_path / "set", images_per_family=6)
    for family in FAMILIES:
        stems = [
            path.stem.rsplit("-", 1)[0] for path in (tmp_path / "set" / "test" / family).iterdir()
        ]
        assert sorted(stems.count(stem) for stem in set(stems)) == [2, 2, 2]
    assert len(table) == 3 + 6 * len(FAMILIES)


def test_defects_lie_on_the_product(normals: list[Path], tmp_path: Path) -> None:
    table = write(as_table(normals), tmp_path / "set", mask_mode="dark", images_per_family=4)
    product = np.zeros((96, 128), bool)
    product[30:66, 20:100] = True
    for row in table.to_pylist():
        if row["mask_path"]:
            mask = read_mask(row["mask_path"])
            assert (mask & product).sum() >= 0.4 * mask.sum()


def test_an_image_without_a_product_gets_defects_anywhere_and_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "blank.png", np.full((96, 96, 3), 128, np.uint8))
    with pytest.warns(UserWarning, match=r"blank\.png.*finds no product"):
        write(as_table([tmp_path / "blank.png"]), tmp_path / "set", mask_mode="dark")


def test_bytes_do_not_depend_on_order_names_places_or_threads(
    normals: list[Path], tmp_path: Path
) -> None:
    write(as_table(normals), tmp_path / "first", threads=1)
    write(as_table(normals[::-1]), tmp_path / "second", threads=3)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    renamed = [path.rename(path.with_name(f"x{path.name}")) for path in normals]
    write(as_table(renamed), tmp_path / "third")
    images = [
        {data for name, data in contents(tmp_path / run / "test").items()}
        for run in ("first", "third")
    ]
    assert images[0] == images[1]


def test_another_seed_draws_other_defects(normals: list[Path], tmp_path: Path) -> None:
    first, second = (
        write(as_table(normals), tmp_path / str(seed), seed=seed)["sha256"].to_pylist()
        for seed in (1, 2)
    )
    assert first[:3] == second[:3]
    assert not set(first[3:]) & set(second[3:])


def test_adding_a_normal_keeps_the_defects_of_the_others(
    normals: list[Path], tmp_path: Path
) -> None:
    before = write(as_table(normals), tmp_path / "before", images_per_family=3)
    more = [*normals, *draw_normals(tmp_path / "more", [9])]
    after = set(
        write(as_table(more), tmp_path / "after", images_per_family=4)["sha256"].to_pylist()
    )
    kept = [sha in after for sha in before["sha256"].to_pylist()]
    assert np.mean(kept) >= 0.9  # a few have the new one as their donor


def test_files_of_equal_content_count_once(normals: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "twin.png"
    twin.write_bytes(normals[0].read_bytes())
    assert len(write(as_table([*normals, twin]), tmp_path / "set")) == 3 + 2 * len(FAMILIES)


def test_a_single_normal_is_enough(normals: list[Path], tmp_path: Path) -> None:
    assert len(write(as_table(normals[:1]), tmp_path / "set")) == 1 + 2 * len(FAMILIES)


def test_a_matching_set_is_used_again_and_read_from_where_it_lies(
    normals: list[Path], tmp_path: Path
) -> None:
    first = write(as_table(normals), tmp_path / "set")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert write(as_table(normals), tmp_path / "set").equals(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == stamps
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = write(as_table(normals), tmp_path / "moved")
    assert Path(moved["path"][0].as_py()).is_relative_to(tmp_path / "moved")


@pytest.mark.parametrize("change", [{"seed": 4}, {"images_per_family": 1}, {"mask_mode": "dark"}])
def test_a_set_of_another_recipe_is_replaced(
    normals: list[Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    write(as_table(normals), tmp_path / "set")
    write(as_table(normals), tmp_path / "set", **change)
    write(as_table(normals), tmp_path / "fresh", **change)
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_set_is_made_again(normals: list[Path], tmp_path: Path, damage: str) -> None:
    table = write(as_table(normals), tmp_path / "set")
    whole = contents(tmp_path / "set")
    victim = Path(table["mask_path"][5].as_py())
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:40])
    write(as_table(normals), tmp_path / "set")
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("thesis.txt", b"dear"),
        ("validation.json", b'{"images": []}'),
        ("validation.json", b"[]"),
        ("validation.json", b"{"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    normals: list[Path], tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(data)
    with pytest.raises(OutputError, match="no validation set"):
        write(as_table(normals), tmp_path / "set")
    assert contents(tmp_path / "set") == {name: data}


def test_an_interruption_leaves_the_old_set_and_no_half(
    normals: list[Path], tmp_path: Path
) -> None:
    write(as_table(normals), tmp_path / "set")
    whole = contents(tmp_path / "set")

    def stop(task: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(as_table(normals), tmp_path / "set", seed=99, progress=stop)
    assert contents(tmp_path / "set") == whole
    (tmp_path / ".set.dead.part").mkdir()  # as a killed process leaves it
    with pytest.raises(KeyboardInterrupt):
        write(as_table(normals), tmp_path / "new", progress=stop)
    assert not (tmp_path / "new").exists()
    write(as_table(normals), tmp_path / "set", seed=99)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".part", ".old")]


def test_the_record_says_what_the_set_was_made_from(normals: list[Path], tmp_path: Path) -> None:
    table = as_table(normals)
    write(table, tmp_path / "set")
    record = json.loads((tmp_path / "set" / "validation.json").read_text())
    assert record["seed"] == 3
    assert record["families"] == list(FAMILIES)
    assert record["normals"] == sorted(table["sha256"].to_pylist())
    assert {entry["path"] for entry in record["images"]} == {
        name for name in contents(tmp_path / "set") if name.startswith("test/")
    }


def test_the_contact_sheet_has_a_row_for_each_family(normals: list[Path], tmp_path: Path) -> None:
    write(as_table(normals), tmp_path / "set")
    sheet = read_image(tmp_path / "set" / "contact_sheet.png")
    assert sheet.shape == (len(FAMILIES) * 182, 6 * 320, 3)


def test_bad_input_is_refused_in_one_line(normals: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError, match="no validation normals"):
        write(as_table(normals, split="fit"), out)
    with pytest.raises(SettingsError, match="images_per_family is 0"):
        write(as_table(normals), out, images_per_family=0)
    with pytest.raises(SettingsError, match=r"mask_mode is 'darc'\. Did you mean 'dark'"):
        write(as_table(normals), out, mask_mode="darc")
    table = as_table(normals)
    normals[0].write_bytes(normals[1].read_bytes())
    with pytest.raises(DataError, match=r"000\.png is not the file"):
        write(table, out)
    normals[0].write_bytes(normals[1].read_bytes()[:300])
    with pytest.raises(ImageError, match=r"000\.png"):
        write(as_table(normals), out)
    assert not out.exists()


def test_the_generator_of_training_defects_is_not_used() -> None:
    """Nothing that selects may know what training saw: no module of the training generator is
    imported.
    """
    folder = Path(validation_set.__file__).parent
    for name in ("validation_defects", "brush", "validation_set"):
        text = (folder / f"{name}.py").read_text()
        generator = ("training_defects", "perlin", "augment", "fill", "kernels", "keyed_random")
        assert not any(f"clsnf.synthesis.{part}" in text for part in generator)
