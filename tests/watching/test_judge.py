"""Verdicts of a real, tiny detector; what it can't judge is not ok."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clsnf import detector_file
from clsnf.detector import Detector
from clsnf.watching.judge import ComeAgainError, Judge
from clsnf.watching.pictures import FilePicture, Frame, MissingPicture, version_of
from tests.support.small_server import encoded, picture


@pytest.fixture(scope="module")
def judge(winners: Path) -> Judge:
    return Judge(winners / "sheet", "cpu", with_maps=True)


def test_a_file_gets_the_detectors_own_answer(judge: Judge, winners: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture(3)))
    version = version_of(file)
    assert version is not None
    result, image, score_map = judge.judge(FilePicture(str(file), version))
    ((expected_map, score, defect),) = Detector.load(winners / "sheet", "cpu").predict_each([file])
    assert (result.score, result.verdict) == (score, "ng" if defect else "ok")
    assert result.model_version == detector_file.read_description(winners / "sheet").version
    assert (result.category, result.reason) == ("sheet", None)
    assert 0 < (result.p_value or 0) <= 1
    assert result.at.endswith("+00:00")
    assert (result.size, result.mtime_ns) == version
    assert image is not None
    np.testing.assert_array_equal(score_map, expected_map)


def test_above_the_threshold_is_not_ok(judge: Judge) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 72, 3)).astype(np.uint8)
    result = judge.judge(Frame("camera 0", 7, noise)).result
    assert (result.verdict, result.frame, result.source) == ("ng", 7, "camera 0")
    assert (result.score or 0) > result.threshold


def test_a_damaged_file_is_not_ok_or_comes_again(judge: Judge, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture())[:300])
    version = version_of(file)
    assert version is not None
    with pytest.raises(ComeAgainError):
        judge.judge(FilePicture(str(file), version, may_change=True))
    result = judge.judge(FilePicture(str(file), version)).result
    assert (result.verdict, result.score, result.p_value) == ("ng", None, None)
    assert result.reason is not None
    assert "cut short" in result.reason


def test_a_picture_that_is_missing_is_not_ok(judge: Judge) -> None:
    result = judge.judge(MissingPicture("camera 0", "the camera is away")).result
    assert (result.verdict, result.reason) == ("ng", "the camera is away")
    assert not judge.failing


@pytest.mark.parametrize("answer", ["raises", "nan"])
def test_a_model_that_fails_is_not_ok(
    winners: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    judge = Judge(winners / "plate", "cpu", with_maps=False)

    def broken(images: object) -> object:
        if answer == "raises":
            raise RuntimeError("CUDA error: device-side assert\ntriggered")
        return type("Answer", (), {"scores": np.array([np.nan], np.float32)})

    with monkeypatch.context() as patch:
        patch.setattr(judge.detector, "predict", broken)
        result = judge.judge(Frame("camera 0", 0, picture())).result
    assert (result.verdict, result.score) == ("ng", None)
    assert judge.failing == result.reason
    assert "\n" not in judge.failing
    judge.judge(Frame("camera 0", 1, picture()))
    assert not judge.failing
