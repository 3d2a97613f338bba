"""Thresholds that people set, and what they are tied to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from clsnf.core.errors import SettingsError
from clsnf.core.files import write_json
from clsnf.detector import Detector
from clsnf.serving.catalogue import read_catalogue
from clsnf.serving.errors import (
    ServiceUnavailable,
    UnprocessableContent,
)
from clsnf.serving.thresholds import Thresholds, _on_other_scale


def test_a_value_holds_for_its_version_a_rate_for_every_one(winners: Path, tmp_path: Path) -> None:
    entry = read_catalogue(winners, 2**30).entries["plate"]
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
    entry = read_catalogue(winners, 2**30).entries["plate"]
    kept = Thresholds(tmp_path / "state")
    (tmp_path / "state").write_text("a file in the folder's place")
    with pytest.raises(ServiceUnavailable, match="nothing was changed"):
        kept.set(entry, value=0.5)
    with pytest.raises(UnprocessableContent):
        Thresholds(tmp_path).set(entry, value=1.5)
    for damaged, words in (("{", "damaged"), ('{"plate": {"value": 5.0}}', "value is 5.0")):
        (tmp_path / "thresholds.json").write_text(damaged)
        with pytest.raises(SettingsError, match=words):
            Thresholds(tmp_path)


@pytest.mark.parametrize(
    ("plate", "words"),
    [
        ({"value": 5.0, "version": "v"}, "value is 5.0"),
        ({"value": -0.1, "version": "v"}, "value is -0.1"),
        ({"value": 0.5}, "version"),
        ({"value": 0.5, "false_reject_rate": 0.5, "version": "v"}, "one of both"),
        ({}, "one of both"),
        ({"false_reject_rate": 9.0}, "false_reject_rate is 9.0"),
        ({"false_reject_rate": 0.0}, "false_reject_rate is 0.0"),
        ({"false_reject_rate": "low"}, "float"),
        ({"rate": 0.1}, "unknown setting 'rate'"),
        ([], "mapping"),
        (None, "mapping"),
    ],
)
def test_an_entry_that_makes_no_sense_keeps_the_last_good_one_and_no_other(
    winners: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plate: object,
    words: str,
) -> None:
    entries = read_catalogue(winners, 2**30).entries
    kept = Thresholds(tmp_path)
    kept.set(entries["plate"], false_reject_rate=0.3)
    sheet = {"false_reject_rate": 0.2, "at": 1.0}
    write_json(tmp_path / "thresholds.json", {"plate": plate, "sheet": sheet})
    for _ in range(3):
        kept.refresh()
    assert kept.settings["plate"].false_reject_rate == 0.3
    assert kept.settings["sheet"].false_reject_rate == 0.2
    assert words in str(kept.cause("plate"))
    assert kept.cause("sheet") is None
    assert len([r for r in caplog.records if "plate" in r.getMessage()]) == 1, "said once"
    kept.set(entries["sheet"], false_reject_rate=0.4)
    assert kept.refused == {}, "setting any threshold writes what is in force"
    assert Thresholds(tmp_path).settings["plate"].false_reject_rate == 0.3


@pytest.mark.parametrize("raw", ["{", "[]", "[" * 200_000, '{"plate": NaN}', ""])
def test_a_damaged_file_keeps_all_settings_until_it_is_mended(
    winners: Path, tmp_path: Path, raw: str
) -> None:
    plate = read_catalogue(winners, 2**30).entries["plate"]
    kept = Thresholds(tmp_path)
    kept.set(plate, false_reject_rate=0.3)
    (tmp_path / "thresholds.json").write_text(raw)
    kept.refresh()
    assert kept.settings["plate"].false_reject_rate == 0.3
    assert "damaged" in str(kept.cause("plate"))
    (tmp_path / "thresholds.json").write_text("{}")
    kept.refresh()
    assert (kept.settings, kept.refused) == ({}, {})


def test_a_file_that_disappears_keeps_the_settings_and_is_written_anew_by_the_next_one(
    winners: Path, tmp_path: Path
) -> None:
    entries = read_catalogue(winners, 2**30).entries
    kept = Thresholds(tmp_path)
    kept.refresh()
    assert kept.refused == {}, "there never was one"
    kept.set(entries["plate"], false_reject_rate=0.3)
    (tmp_path / "thresholds.json").unlink()
    kept.refresh()
    assert kept.settings["plate"].false_reject_rate == 0.3
    assert "disappeared" in str(kept.cause("plate"))
    kept.set(entries["sheet"], value=0.5)
    assert kept.refused == {}
    assert sorted(Thresholds(tmp_path).settings) == ["plate", "sheet"]
    kept.set(entries["plate"])
    assert sorted(Thresholds(tmp_path).settings) == ["sheet"], "DELETE is how to go back"


def test_a_file_that_cannot_be_read_for_a_while_keeps_the_settings(
    winners: Path, tmp_path: Path
) -> None:
    plate = read_catalogue(winners, 2**30).entries["plate"]
    state, away = tmp_path / "state", tmp_path / "away"
    kept = Thresholds(state)
    kept.set(plate, false_reject_rate=0.3)
    state.rename(away)
    state.symlink_to(state)  # every call gives ELOOP, as one on a share that is away gives EIO
    kept.refresh()
    assert kept.settings["plate"].false_reject_rate == 0.3
    assert "can't be read" in str(kept.cause("plate"))
    with pytest.raises(ServiceUnavailable, match="nothing was changed"):
        kept.set(plate, false_reject_rate=0.4)
    state.unlink()
    away.rename(state)
    kept.refresh()
    assert kept.refused == {}
    assert kept.settings["plate"].false_reject_rate == 0.3
    (tmp_path / "thresholds.json").write_text("{")
    with pytest.raises(SettingsError, match="damaged"):
        Thresholds(tmp_path)


def test_a_value_on_the_scores_scale_has_a_place_on_the_maps() -> None:
    scores, peaks = np.array([0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.9])
    places = [_on_other_scale(value, scores, peaks) for value in (0.2, 0.25, 0.3, 0.4, 0.5, 0.0)]
    assert places == pytest.approx([0.5, 0.55, 0.6, 0.9, 1.1, 0.1])
    assert _on_other_scale(0.3, scores, np.array([])) == 0.3
    assert _on_other_scale(0.3, np.array([0.2]), np.array([0.5])) == pytest.approx(0.6)
