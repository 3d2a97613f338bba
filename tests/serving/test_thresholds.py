"""Thresholds that people set, and what they are tied to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from clsnf.core.errors import SettingsError
from clsnf.detector import Detector
from clsnf.serving.catalogue import read_catalogue
from clsnf.serving.errors import (
    ServiceUnavailable,
    UnprocessableContent,
)
from clsnf.serving.thresholds import Thresholds, _on_other_scale


def test_a_value_holds_for_its_version_a_rate_for_every_one(winners: Path, tmp_path: Path) -> None:
    entry = read_catalogue(winners).entries["plate"]
    detector = Detector.load(entry.folder, device="cpu")
    first, second = Thresholds(tmp_path), Thresholds(tmp_path)
    assert first.active(entry, detector).source == "model"
    first.set(entry, value=0.5)
    second.refresh()
    assert (second.active(entry, detector).value, second.active(entry, detector).source) == (
        0.5,
        "value",
    )
    other = dataclasses.replace(entry, version="another")
    assert second.active(other, detector).source == "model", (
        "a value means nothing on another model's scale"
    )
    second.set(entry, false_reject_rate=0.3)
    first.refresh()
    for version in (entry, other):
        assert first.active(version, detector).threshold.false_reject_rate == 0.3
    first.set(entry)
    assert Thresholds(tmp_path).active(entry, detector).threshold == entry.threshold


def test_thresholds_that_cannot_be_kept_or_read_say_so(winners: Path, tmp_path: Path) -> None:
    entry = read_catalogue(winners).entries["plate"]
    kept = Thresholds(tmp_path / "state")
    (tmp_path / "state").write_text("a file in the folder's place")
    with pytest.raises(ServiceUnavailable, match="nothing was changed"):
        kept.set(entry, value=0.5)
    with pytest.raises(UnprocessableContent):
        Thresholds(tmp_path).set(entry, value=1.5)
    (tmp_path / "thresholds.json").write_text("{")
    with pytest.raises(SettingsError, match="damaged"):
        Thresholds(tmp_path)


def test_a_value_on_the_scores_scale_has_a_place_on_the_maps() -> None:
    scores, peaks = np.array([0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.9])
    places = [_on_other_scale(value, scores, peaks) for value in (0.2, 0.25, 0.3, 0.4, 0.5, 0.0)]
    assert places == pytest.approx([0.5, 0.55, 0.6, 0.9, 1.1, 0.1])
    assert _on_other_scale(0.3, scores, np.array([])) == 0.3
    assert _on_other_scale(0.3, np.array([0.2]), np.array([0.5])) == pytest.approx(0.6)
