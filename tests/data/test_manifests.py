"""Manifests of JSON lines as a data set, on real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clsnf.core.errors import DataError
from clsnf.data.images import read_mask
from clsnf.data.layouts import CATEGORY_SCHEMA
from clsnf.data.sets import list_categories, read_category


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def lookout(name: str, kind: str, **more: Any) -> dict[str, Any]:
    job = {"class-name": kind, "type": "groundtruth/image-classification", "confidence": 1}
    return {"source-ref": name, "anomaly-label": 1, "anomaly-label-metadata": job} | more


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(
        ["n10.png", "n2.png", "cookies/n3.png", "b/cookies/n4.png", "bad.png"]
    ):
        picture(tmp_path / name, seed)
    mask = np.full((20, 24, 3), 255, np.uint8)
    mask[4:9, 5:11] = (44, 160, 44)
    Image.fromarray(mask).quantize(4).save(tmp_path / "mask.png")
    return tmp_path


def test_lines_of_the_cloud_service_are_a_category(folder: Path) -> None:
    colours = {
        "0": {"class-name": "BACKGROUND", "hex-color": "#ffffff", "confidence": 0.0},
        "1": {"class-name": "scratch", "hex-color": "#2ca02c", "confidence": 0.0},
    }
    manifest = write(
        folder / "cookie.manifest",
        lookout("n10.png", "normal"),
        lookout("n2.png", "Normal"),
        lookout("s3://b/cookies/n3.png", "normal"),
        "",
        lookout("s3://b/cookies/n4.png", "normal", split="test"),
        lookout(
            f"file://{folder}/bad.png",
            "anomaly",
            **{
                "anomaly-mask-ref": "mask.png",
                "anomaly-mask-ref-metadata": {"internal-color-map": colours},
            },
        ),
    )
    assert list_categories(manifest) == ["cookie"]
    table = read_category(manifest, "cookie")
    assert table.schema == CATEGORY_SCHEMA
    assert [Path(p).name for p in table["path"].to_pylist()] == [
        "n2.png", "n3.png", "n10.png", "bad.png", "n4.png",
    ]  # fmt: skip
    assert table["split"].to_pylist() == ["fit"] * 3 + ["test"] * 2
    assert table["defect_type"].to_pylist() == ["good"] * 3 + ["scratch", "good"]
    mask = read_mask(table["mask_path"].to_pylist()[3])
    assert (int(mask.sum()), mask[4:9, 5:11].all()) == (30, True)


def test_the_small_form_is_enough(folder: Path) -> None:
    Image.fromarray(np.eye(20, 24, dtype=np.uint8) * 255).save(folder / "black.png")
    manifest = write(
        folder / "x.jsonl",
        {"image": "n2.png", "label": "normal", "category": "Größe-π"},
        {"image": "bad.png", "label": "anomaly", "mask": "black.png", "defect": "dent"},
    )
    assert list_categories(manifest) == ["Größe-π"]
    table = read_category(manifest, "Größe-π")
    assert table["defect_type"].to_pylist() == ["good", "dent"]
    assert read_mask(table["mask_path"].to_pylist()[1]).sum() == 20


NORMAL = {"image": "n2.png", "label": "normal"}
BAD_LINES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no JSON": ("{image: 3", "is no JSON"),
    "brackets": ("[" * 100_000, "is no JSON"),
    "no object": ("[1]", "no JSON object"),
    "no picture": ({"label": "normal"}, "names no picture"),
    "a number for a picture": ({"image": 3, "label": "normal"}, "must be a text"),
    "a picture that is not there": ({"image": "gone.png", "label": "normal"}, "not at .*gone.png"),
    "in a bucket": (lookout("s3://b/gone.png", "normal"), "aws s3 sync"),
    "another scheme": (lookout("https://b/a.png", "normal"), "file:// or s3://"),
    "no picture's file": ({"image": "x.jsonl", "label": "normal"}, "convert it"),
    "no label": ({"image": "bad.png"}, "class None"),
    "a number for a label": ({"image": "bad.png", "label": 1}, "class 1"),
    "no class": ({"source-ref": "bad.png", "anomaly-label": 1}, "class None"),
    "another class": (lookout("bad.png", "weird"), "'weird'.*normal or anomaly"),
    "another split": (NORMAL | {"split": "val"}, "train or test"),
    "a defect in train": ({"image": "bad.png", "label": "anomaly", "split": "train"}, "only norm"),
    "a defect called good": ({"image": "bad.png", "label": "anomaly", "defect": "good"}, "'good'"),
    "twice": (NORMAL, "line 1 again"),
    "two categories": ({"image": "bad.png", "label": "normal", "category": "b"}, "holds one"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(case: str, folder: Path) -> None:
    line, words = BAD_LINES[case]
    manifest = write(folder / "x.jsonl", NORMAL | {"category": "a"}, line)
    with pytest.raises(DataError, match=words) as caught:
        read_category(manifest, "a")
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_use_is_refused(folder: Path) -> None:
    for content, words in {
        "": "holds no lines",
        '{"image": "bad.png", "label": "anomaly"}': "no normal picture",
    }.items():
        (folder / "x.jsonl").write_text(content)
        with pytest.raises(DataError, match=words):
            read_category(folder / "x.jsonl", "x")
    with pytest.raises(DataError, match="can't be read"):
        list_categories(folder / "none.jsonl")
