"""``clsnf data synthesize`` and ``show``: synthetic defects for people to see."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from clsnf.cli import main
from clsnf.data.images import read_mask
from clsnf.data.layouts import NORMAL_TYPE
from clsnf.synthesis.validation_defects import FAMILIES
from tests.support.small_data import write_category

SETTINGS = ("--image-size", "64", "--set", "validation.images_per_family=2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_category(tmp_path / "data" / "plate")
    return tmp_path / "data"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["data", *arguments, *SETTINGS])


def test_synthesize_writes_every_family_with_masks(data: Path, tmp_path: Path) -> None:
    done = run("synthesize", "--data", str(data), "--out", str(tmp_path / "set"))
    assert done.exit_code == 0, done.output
    assert "object mask: " in done.output
    assert f"{2 * len(FAMILIES)} defects" in done.output
    assert {path.name for path in (tmp_path / "set/test").iterdir()} == {NORMAL_TYPE, *FAMILIES}
    assert all(read_mask(path).any() for path in (tmp_path / "set/ground_truth").rglob("*.png"))


@pytest.mark.parametrize(("share", "rows"), [("0.5", 2), ("1.0", 1), ("0.0", 1)])
def test_show_has_a_row_for_each_kind_of_defect(
    data: Path, tmp_path: Path, share: str, rows: int
) -> None:
    out = tmp_path / "look.png"
    given = ("--set", "defects.object_mask=off", "--set", f"defects.texture_share={share}")
    done = run("show", "--data", str(data), "--category", "plate", "--out", str(out), *given)
    assert done.exit_code == 0, done.output
    assert "object mask: off (set by hand)" in done.output
    with Image.open(out) as sheet:
        assert sheet.size == (6 * 2 * 160, (rows + len(FAMILIES)) * (160 + 22))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "look.png"]


def test_show_wants_the_name_of_a_png(data: Path, tmp_path: Path) -> None:
    done = run("show", "--data", str(data), "--out", str(tmp_path / "look.jpg"))
    assert done.exit_code == 2
    assert "ends with .png" in done.output
