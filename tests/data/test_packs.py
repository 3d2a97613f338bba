"""Packs: the same table, pictures and figures as the folder they were made from; what is damaged is
named.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from clsnf.cli import main
from clsnf.core.errors import DataError, ImageError, OutputError, PackError
from clsnf.data.images import image_size, read_image, read_mask
from clsnf.data.layouts import CATEGORY_SCHEMA
from clsnf.data.layouts import read_category as read_folder
from clsnf.data.packs import (
    PACK_SCHEMA,
    is_pack,
    pack_categories,
    read_pack,
    verify_pack,
    write_pack,
)
from clsnf.data.sets import list_categories, read_category
from clsnf.data.sources import ShardCache, is_packed, packed_reference, read_bytes
from tests.support.object_store import bucket
from tests.support.small_data import write_category


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_category(root / "nut")
    write_category(root / "bolt 10", seed=1)
    return root


def pack_up(folder: Path, place: Path | str, **sizes: Any) -> None:
    write_pack(
        [(name, partial(read_category, folder, name)) for name in list_categories(folder)],
        place,
        **sizes,
    )


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards and row groups: several of each."""
    place = tmp_path_factory.mktemp("packs") / "pack"
    pack_up(folder, place, shard_bytes=60_000, group_bytes=20_000)
    return place


@pytest.fixture
def pack(packed: Path, tmp_path: Path) -> Path:
    """A pack to damage."""
    place = tmp_path / "pack"
    shutil.copytree(packed, place)
    return place


def shards(pack: Path) -> list[Path]:
    return sorted(pack.glob("*/*.parquet"))


def test_a_pack_gives_the_same_table_and_pictures_as_its_folder(folder: Path, packed: Path) -> None:
    assert is_pack(packed)
    assert not is_pack(folder)
    assert list_categories(packed) == list_categories(folder)
    assert len(shards(packed)) > 3
    facts = [name for name in CATEGORY_SCHEMA.names if not name.endswith("path")]
    for category in list_categories(folder):
        before, after = read_category(folder, category), read_category(packed, category)
        assert after.schema == CATEGORY_SCHEMA
        assert after.select(facts) == before.select(facts)
        for old, new in zip(before.to_pylist(), after.to_pylist(), strict=True):
            assert Path(new["path"]).name == Path(old["path"]).name
            assert np.array_equal(read_image(new["path"]), read_image(old["path"]))
            assert image_size(new["path"]) == image_size(old["path"])
            assert (new["mask_path"] is None) == (old["mask_path"] is None)
            if new["mask_path"] is not None:
                assert np.array_equal(read_mask(new["mask_path"]), read_mask(old["mask_path"]))


def test_a_pack_behind_a_uri_is_read_and_written_like_one_in_a_folder(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    place = f"file://{tmp_path}/far"
    pack_up(folder, place, shard_bytes=60_000, group_bytes=20_000)
    assert pack_categories(place) == pack_categories(packed)
    rows = read_category(place, "nut").to_pylist()
    assert rows[0]["path"].startswith(place)
    assert read_bytes(rows[-1]["path"]) == read_bytes(
        read_pack(packed, "nut").to_pylist()[-1]["path"]
    )
    assert verify_pack(place).rows == verify_pack(packed).rows


def test_a_pack_in_an_object_store_is_read_as_one_on_a_disk(folder: Path) -> None:
    with bucket() as end:
        place = f"s3://bucket/products{end}"
        pack_up(folder, place)
        assert is_pack(place)
        verify_pack(place)
        for category in list_categories(place):
            before, after = read_category(folder, category), read_category(place, category)
            assert after["sha256"].to_pylist() == before["sha256"].to_pylist()
            assert read_bytes(after["path"][0].as_py()) == read_bytes(before["path"][0].as_py())


def test_threads_that_read_a_pack_at_once_in_any_order_get_what_they_asked_for(
    packed: Path,
) -> None:
    paths = read_pack(packed, "nut")["path"].to_pylist()
    alone = [read_bytes(path) for path in paths]
    order = np.random.default_rng(0).permutation(len(paths) * 20) % len(paths)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: read_bytes(paths[index]), order)) == [
            alone[index] for index in order
        ]


@given(
    st.text(min_size=1).filter(lambda name: "\0" not in name),
    st.sampled_from(["image", "mask"]),
    st.integers(0, 10**9),
)
def test_references_into_packs_are_known_whatever_the_picture_is_called(
    name: str, column: str, row: int
) -> None:
    assert is_packed(packed_reference("s3://bucket/a#b/00000.parquet", column, row, name))
    assert not is_packed(name.replace(".parquet", "") + ".png")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_pack_at_the_place_of_an_earlier_one_is_read_anew(
    folder: Path, tmp_path: Path, scheme: str
) -> None:
    place, other = f"{scheme}{tmp_path}/pack", tmp_path / "other"
    pack_up(folder, place)
    path = read_pack(place, "nut")["path"][0].as_py()
    before = read_bytes(path)
    write_category(other / "nut", seed=7)
    shutil.rmtree(tmp_path / "pack")
    pack_up(other, place)
    if not scheme:  # a file on this machine is looked up before every read
        assert read_bytes(path) != before
    assert read_bytes(read_pack(place, "nut")["path"][0].as_py()) != before


def test_no_more_shards_are_kept_than_the_limits_say(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardCache, "MOST_FOOTERS", 2)
    monkeypatch.setattr(ShardCache, "MOST_OPEN", 1)
    cache = ShardCache()
    contents = [cache.read(str(shard), "image", 0) for shard in shards(packed)]
    assert len(shards(packed)) > 2
    assert len(cache._footers) == 2
    assert len(cache._open.files) == 1
    again = [cache.read(str(shard), "image", 0) for shard in shards(packed)[::-1]]
    assert again == contents[::-1]


# ---- writing ----


def test_a_pack_that_was_cut_short_says_so_and_is_begun_anew(folder: Path, tmp_path: Path) -> None:
    def interrupted() -> pa.Table:
        raise KeyboardInterrupt

    place = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        write_pack([("nut", partial(read_folder, folder, "nut")), ("bolt 10", interrupted)], place)
    with pytest.raises(PackError, match="cut short"):
        list_categories(place)
    pack_up(folder, place)
    assert verify_pack(place).rows == {"bolt 10": 19, "nut": 19}


def test_a_copy_without_the_list_is_a_pack_that_was_cut_short(pack: Path) -> None:
    (pack / "pack.json").unlink()
    with pytest.raises(PackError, match="cut short"):
        list_categories(pack)


def test_a_destination_that_holds_something_is_left_alone(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="a pack already"):
        pack_up(folder, packed)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="other things"):
        pack_up(folder, tmp_path)
    with pytest.raises(OutputError, match=r"notes\.txt can't be written"):
        pack_up(folder, tmp_path / "notes.txt")


def test_a_picture_that_changes_while_it_is_packed_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    table = read_folder(tmp_path / "folder", "nut")
    shutil.copyfile(table["path"][1].as_py(), table["path"][0].as_py())
    with pytest.raises(DataError, match=r"000\.png was changed"):
        write_pack([("nut", lambda: table)], tmp_path / "pack")


# ---- damage ----


def test_a_shard_that_is_missing_or_cut_short_is_named(pack: Path) -> None:
    first, second = shards(pack)[:2]
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    for read in (lambda: read_pack(pack, "bolt 10"), lambda: verify_pack(pack)):
        with pytest.raises(PackError, match=f"{second.name} has .* cut short"):
            read()
    first.unlink()
    with pytest.raises(PackError, match=f"{first.name} is missing"):
        read_pack(pack, "bolt 10")


def listed_anew(pack: Path, shard: Path) -> None:
    """The pack's list says of a shard what it is now."""
    content = json.loads((pack / "pack.json").read_text())
    for entry in content["shards"]:
        if entry["file"] == shard.relative_to(pack).as_posix():
            entry["bytes"] = shard.stat().st_size
    (pack / "pack.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.drop_columns(["mask"]), "no column 'mask'"),
        (lambda table: table.append_column("more", table["label"]), "'more' does not belong"),
        (
            lambda table: table.set_column(2, "label", table["label"].cast(pa.int64())),
            "'label' is int64, not int8",
        ),
        (lambda table: table.slice(1), "rows, not"),
    ],
)
def test_a_shard_of_another_schema_is_named(pack: Path, change: object, says: str) -> None:
    shard = shards(pack)[0]
    pq.write_table(change(pq.read_table(shard, schema=PACK_SCHEMA)), shard)  # type: ignore[operator]
    listed_anew(pack, shard)
    with pytest.raises(PackError, match=says):
        read_pack(pack, "bolt 10")


def test_a_flipped_bit_in_a_picture_is_found_by_verifying_and_by_reading(pack: Path) -> None:
    shard = shards(pack)[0]
    path = read_pack(pack, "bolt 10")["path"][0].as_py()
    data = bytearray(shard.read_bytes())
    data[data.index(read_bytes(path)) + 60] ^= 1
    shard.write_bytes(data)
    with pytest.raises(PackError, match=r"00000\.parquet is damaged: its sha256"):
        verify_pack(pack)
    with pytest.raises(ImageError, match="can't be read"):
        read_image(read_pack(pack, "bolt 10")["path"][0].as_py())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged"),
        ('{"kind": "something"}', "damaged"),
        ('{"kind": "clsnf pack", "format": 2}', "format 2"),
        ("[]", "damaged"),
    ],
)
def test_a_damaged_or_newer_list_is_named(pack: Path, content: str, says: str) -> None:
    (pack / "pack.json").write_text(content)
    with pytest.raises(PackError, match=says):
        list_categories(pack)


def test_a_category_that_the_pack_does_not_hold_is_named_with_the_nearest(packed: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'nut'"):
        read_category(packed, "nuts")


def test_places_that_can_not_be_packs_are_refused() -> None:
    with pytest.raises(DataError, match="can't be opened"):
        list_categories("floppy://a/b")


# ---- the commands ----


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_the_commands_pack_and_verify(folder: Path, tmp_path: Path) -> None:
    code, said = run("data", "pack", folder, tmp_path / "pack", "--categories", "nut")
    assert (code, "1 category, 19 pictures, 1 shard" in said) == (0, True), said
    code, said = run("data", "verify", tmp_path / "pack")
    assert (code, "whole, 1 shard" in said) == (0, True), said
    code, said = run(
        "data", "pack", folder / "nut" / "train" / "good", tmp_path / "bare", "--normals"
    )
    assert code == 0
    assert read_category(tmp_path / "bare", "good")["split"].to_pylist() == ["fit"] * 10
    code, said = run("data", "verify", folder)
    assert (code, "no pack" in said) == (2, True)


def test_verify_names_pictures_that_are_no_images(tmp_path: Path) -> None:
    write_category(tmp_path / "data" / "nut")
    (tmp_path / "data" / "nut" / "train" / "good" / "003.png").write_bytes(b"not a picture")
    assert run("data", "pack", tmp_path / "data", tmp_path / "pack")[0] == 0
    code, said = run("data", "verify", tmp_path / "pack")
    assert (code, "003.png" in said, "--max-bad" in said) == (2, True, True), said
    code, said = run("data", "verify", tmp_path / "pack", "--max-bad", "0.1")
    assert (code, "003.png" in said) == (0, True), said
