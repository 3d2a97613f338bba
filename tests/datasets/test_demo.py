"""The demo data set: layout, masks, repeatability, and that it is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from clsnf.core.errors import OutputError, SettingsError
from clsnf.data.images import read_image, read_mask
from clsnf.datasets.demo import MANIFEST, PRODUCTS, write_demo
from clsnf.datasets.drawing import PICTURE_SIDE, SMALLEST_DEFECT, Product, changed_pixels

DEFECTS = [
    (name, defect)
    for name, product in sorted(PRODUCTS.items())
    for defect in sorted(product.damage)
]


def small(root: Path, seed: int = 0, **changes: Any) -> list[str]:
    return write_demo(root, seed, **({"train": 2, "good": 1, "defective": 1} | changes))


def fingerprints(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*.png"))
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "data"
    assert small(root) == sorted(PRODUCTS)
    return root


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_a_category_has_mvtec_ads_layout(data: Path, name: str) -> None:
    groups = ["train/good"] * 2 + ["test/good"] + [f"test/{d}" for d in PRODUCTS[name].damage]
    masks = [f"ground_truth/{d}/000_mask.png" for d in PRODUCTS[name].damage]
    found = [p.relative_to(data / name).as_posix() for p in (data / name).rglob("*.png")]
    assert sorted(found) == sorted(
        [f"{g}/{groups[:i].count(g):03d}.png" for i, g in enumerate(groups)] + masks
    )
    for path in found:
        image = (
            read_mask(data / name / path)
            if "ground_truth" in path
            else read_image(data / name / path)
        )
        assert image.shape[:2] == (PICTURE_SIDE, PICTURE_SIDE)


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_a_mask_has_two_values_and_is_a_small_part_of_the_picture(
    data: Path, name: str, defect: str
) -> None:
    mask = cv2.imread(
        str(data / name / "ground_truth" / defect / "000_mask.png"), cv2.IMREAD_UNCHANGED
    )
    assert mask is not None
    assert set(np.unique(mask)) == {0, 255}
    assert SMALLEST_DEFECT <= np.count_nonzero(mask) < 0.1 * mask.size


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_a_defect_changes_the_product_inside_its_mask_only(name: str, defect: str) -> None:
    product, rng = PRODUCTS[name], np.random.default_rng(5)
    scene = product.sample(rng)
    good, bad = product.render(scene), product.render(product.damage[defect](rng, scene))
    assert np.array_equal(good, product.render(scene)), "drawing a scene must not change it"
    mask = changed_pixels(good, bad, product.bridge)
    near = cv2.dilate(
        mask.astype(np.uint8), np.ones((2 * product.bridge + 11,) * 2, np.uint8)
    ).astype(bool)
    far = cv2.resize(
        (~near).astype(np.uint8), good.shape[1:], interpolation=cv2.INTER_NEAREST
    ).astype(bool)
    assert far.mean() > 0.5
    assert np.abs(good - bad)[:, far].max() < 0.05
    assert np.abs(good - bad).max() > 0.05


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(
    data: Path, tmp_path: Path
) -> None:
    small(tmp_path / "again", categories=["gear", "fabric"])
    small(tmp_path / "other", seed=1, categories=["gear"])
    first, again, other = (
        fingerprints(root) for root in (data, tmp_path / "again", tmp_path / "other")
    )
    assert again == {
        path: digest for path, digest in first.items() if not path.startswith("blister")
    }
    pictures = [path for path in other if "ground_truth" not in path]
    assert all(other[path] != first[path] for path in pictures)
    assert len({first[path] for path in pictures}) == len(pictures)


def test_more_pictures_leave_those_that_were_there_unchanged(data: Path, tmp_path: Path) -> None:
    small(tmp_path / "more", train=3, categories=["fabric"])
    first, more = fingerprints(data), fingerprints(tmp_path / "more")
    assert len(more) == 3 + 1 + 3 + 3
    assert all(more[path] == digest for path, digest in first.items() if path.startswith("fabric"))


def test_a_data_set_that_is_there_is_used_as_it_is(data: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    assert small(data) == sorted(PRODUCTS)
    assert before == {p: p.stat().st_mtime_ns for p in data.rglob("*")}


def test_another_demo_data_set_in_the_folder_is_refused(data: Path) -> None:
    with pytest.raises(OutputError, match="seed 0 instead of 3"):
        small(data, seed=3)


def test_a_data_set_with_pictures_missing_is_refused(tmp_path: Path) -> None:
    small(tmp_path / "demo", categories=["gear"])
    (tmp_path / "demo/gear/train/good/001.png").unlink()
    with pytest.raises(OutputError, match="8 of its 9"):
        small(tmp_path / "demo", categories=["gear"])


@pytest.mark.parametrize("manifest", [None, "[1]", "{}", "{broken"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    tmp_path: Path, manifest: str | None
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="holds no demo data set"):
        small(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    small(tmp_path, categories=["fabric"])
    assert json.loads((tmp_path / MANIFEST).read_text())["categories"] == ["fabric"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = iter(range(2))

    def sample(rng: np.random.Generator) -> Any:
        if next(pictures) == 1:
            raise KeyboardInterrupt
        return PRODUCTS["fabric"].sample(rng)

    monkeypatch.setitem(PRODUCTS, "halting", Product(sample, {}, PRODUCTS["fabric"].render))
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "demo", categories=["halting"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"can't be written to .*demo"):
        small(tmp_path / "file" / "demo", categories=["fabric"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["fabrik"]}, "Did you mean 'fabric'"),
        ({"seed": -1}, "seed is -1"),
        ({"train": 0}, "train is 0"),
        ({"defective": 0}, "defective is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        small(tmp_path / "demo", **changes)
    assert list(tmp_path.iterdir()) == []
