"""A study of a folder and one of its pack, the one decoding for itself, the other with workers of
Ray: the same trials and winner.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from clsnf.data.layouts import read_category
from clsnf.data.packs import write_pack
from tests.support.running_study import Study
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow

TRIALS = 2
OPTIONS = ("--trials", str(TRIALS), "--cpus-per-trial", "1", "--max-bad", "0.1")
TRUNCATED = "train/good/004.png"


@pytest.fixture(scope="module")
def studies(
    tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path
) -> tuple[Study, Study]:
    """Both finished; a picture in them can't be read."""
    folder = Study(tmp_path_factory.mktemp("study"), resnet18_weights)
    # Fewer learning rates than the others' space: both trials end.
    (folder.folder / "space.yaml").write_text("fusion_weight: {type: float, low: 0.0, high: 1.0}\n")
    write_category(folder.data / "nut", train=14, size=(64, 96))
    picture = folder.data / "nut" / TRUNCATED
    picture.write_bytes(picture.read_bytes()[:300])
    pack = folder.at(folder.folder / "of-the-pack")
    pack.data = folder.folder / "pack"
    write_pack([("nut", partial(read_category, folder.data, "nut"))], pack.data)
    for study, stream in ((folder, "local"), (pack, "ray")):
        code, _, stderr = study.run(*OPTIONS, "--stream", stream, "--set", "image.aspect=fit")
        assert code == 0, stderr
        (study.out / "stderr").write_text(stderr)
    return folder, pack


def test_trials_and_winner_are_the_same(studies: tuple[Study, Study]) -> None:
    folder, pack = studies
    for one, other in zip(folder.trials(), pack.trials(), strict=True):
        assert one["status"] == other["status"] == "finished"
        for name in one:
            if name.startswith(("config/", "validation_", "family_", "objective")):
                assert one[name] == other[name], name
    first, second = (study.summary()["categories"]["nut"] for study in studies)
    assert first["settings"] == second["settings"]
    assert first["threshold"] == second["threshold"]
    assert first["test"]["figures"] == second["test"]["figures"]
    tensors = [
        json.loads((s.out / "winners/nut/detector.json").read_text())["tensors_sha256"]
        for s in studies
    ]
    assert tensors[0] == tensors[1]


def test_each_says_what_its_stream_was_and_did(studies: tuple[Study, Study]) -> None:
    for study, said, steps in zip(
        studies,
        ("local, from memory", "ray: as asked"),
        ({"defects"}, {"read", "decode", "defects"}),
        strict=True,
    ):
        assert f"stream: {said}" in (study.out / "stderr").read_text()
        assert study.summary()["stream"].startswith(said)
        found = study.summary()["categories"]["nut"]["stream"]
        assert found["images"] > 0
        assert found["waited_seconds"] > 0
        assert steps <= set(found["images_per_second"])
        assert all(pace > 0 for pace in found["images_per_second"].values())


def test_the_picture_that_can_not_be_read_is_named(studies: tuple[Study, Study]) -> None:
    for study in studies:
        (skipped,) = study.summary()["categories"]["nut"]["skipped"]
        assert skipped["path"].endswith(TRUNCATED)
        assert "cut short" in skipped["cause"] or "damaged" in skipped["cause"], skipped
        assert "nut: 1 unreadable picture was left out" in (study.out / "stderr").read_text()
