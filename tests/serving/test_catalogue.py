"""The catalogue: what a folder of models holds, read without loading a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clsnf.core.errors import ModelError
from clsnf.core.files import write_json
from clsnf.detector import Detector
from clsnf.serving.catalogue import read_catalogue


def test_a_catalogue_reads_one_detector_or_many_and_no_link_out_of_the_folder(
    winners: Path, tmp_path: Path
) -> None:
    assert read_catalogue(winners / "plate").categories == ["plate"]
    shutil.copytree(winners / "plate", tmp_path / "models" / "plate")
    (tmp_path / "models" / "elsewhere").symlink_to(winners / "sheet")
    assert read_catalogue(tmp_path / "models").categories == ["plate"]
    facts = tmp_path / "models" / "plate" / "detector.json"
    content = json.loads(facts.read_text())
    del content["uses"]["threshold"]
    write_json(facts, content)
    with pytest.raises(ModelError, match="threshold"):
        read_catalogue(tmp_path / "models")


def test_a_catalogue_shows_the_fusion_weight_that_the_detector_uses(
    winners: Path, tmp_path: Path
) -> None:
    """Wherever in its JSON somebody changes a fusion weight."""
    shutil.copytree(winners / "plate", tmp_path / "plate")
    file = tmp_path / "plate" / "detector.json"
    saved = json.loads(file.read_text())
    seen = set()
    for section in [saved, *(part for part in saved.values() if isinstance(part, dict))]:
        if "fusion_weight" in section:
            before, section["fusion_weight"] = section["fusion_weight"], 0.99
            write_json(file, saved)
            section["fusion_weight"] = before
            used = Detector.load(tmp_path / "plate", device="cpu").fusion_weight
            assert read_catalogue(tmp_path / "plate").entries["plate"].fusion_weight == used
            seen.add(used)
    assert 0.99 in seen


def test_test_metrics_are_shown_where_the_studys_summary_lies_beside(
    winners: Path, tmp_path: Path
) -> None:
    shutil.copytree(winners, tmp_path / "winners")
    test = {"figures": {"image_auroc": 0.9, "pixel_ap": None}}
    write_json(
        tmp_path / "summary.json",
        {"categories": {"plate": {"test": test}, "sheet": {"test": None}}},
    )
    entries = read_catalogue(tmp_path / "winners").entries
    assert entries["plate"].test_metrics == {"image_auroc": 0.9}
    assert entries["sheet"].test_metrics == {}
