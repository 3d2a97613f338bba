"""The catalogue: what a folder of models holds, read without loading a network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from clsnf.core.errors import ModelError
from clsnf.core.files import write_json
from clsnf.detector import Detector
from clsnf.serving.catalogue import read_catalogue, read_catalogue_within


def test_a_catalogue_reads_one_detector_many_or_a_study(winners: Path) -> None:
    assert read_catalogue(winners / "plate", 2**30).categories == ["plate"]
    assert read_catalogue(winners, 2**30).categories == ["plate", "sheet"]
    assert read_catalogue(winners.parent, 2**30).categories == ["plate", "sheet"]


def test_links_are_followed_and_what_is_no_detector_is_named_with_its_cause(
    winners: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(winners / "plate", models / "plate")
    (models / "Größe π").symlink_to(winners / "sheet")
    (models / "away").symlink_to(tmp_path / "nowhere")
    (models / "notes").mkdir()
    (models / "readme.txt").touch()
    os.mkdir(os.fsencode(models) + b"/\xff")
    found = read_catalogue(models, 2**30)
    assert found.categories == ["Größe π", "plate"]
    assert found.entries["Größe π"].folder == (winners / "sheet").resolve()
    assert found.refused == {}
    assert found.left_out == {
        "away": "is a link that leads nowhere",
        "notes": "holds no saved detector",
        "\\xff": "has a name that is no valid UTF-8",
    }


def test_damaged_models_are_refused_each_with_its_cause(winners: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(winners, models)
    facts = models / "plate" / "detector.json"
    content = json.loads(facts.read_text())
    del content["uses"]["threshold"]
    write_json(facts, content)
    found = read_catalogue(models, 2**30)
    assert found.categories == ["sheet"]
    assert "threshold" in found.refused["plate"]
    (models / "sheet" / "detector.safetensors").unlink()
    with pytest.raises(ModelError, match=r"No model of .* can be used: .*threshold.*and 1 more"):
        read_catalogue_within(models, 2**30)


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
            assert read_catalogue(tmp_path / "plate", 2**30).entries["plate"].fusion_weight == used
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
    entries = read_catalogue(tmp_path / "winners", 2**30).entries
    assert entries["plate"].test_metrics == {"image_auroc": 0.9}
    assert entries["sheet"].test_metrics == {}
