"""What is checked before a study starts, on real files: what is resumed is what was begun."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
from click.testing import CliRunner
from safetensors.torch import save_file

from clsnf.cli import main
from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    ImageSettings,
    StudySettings,
    replaced,
)
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.data.layouts import read_category
from clsnf.model.resolve import resolved
from clsnf.results import StudyIdentity, read_result, write_result
from clsnf.study.inputs import StudyInputs, check_inputs
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.space import DEFAULT_SPACE, Space
from tests.support.small_data import tiny_options, write_category


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_category(folder / "plate")
    return folder


def write_textures(folder: Path, shade: int) -> Path:
    """Three flat pictures; those of other shades have the same names and sizes."""
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((64, 64, 3), shade, np.uint8))
    return folder


def request(data: Path, out: Path, weights: Path | None, **others: Any) -> StudyRequest:
    backbone = BackboneSettings(
        "demo" if weights is None else "resnet18",
        weights=None if weights is None else str(weights),
    )
    given: dict[str, Any] = {
        "tables": [read_category(data, "plate")],
        "out": out,
        "settings": DetectorSettings(image=ImageSettings(64, 64), backbone=backbone),
        "study": StudySettings(),
        "space": Space(DEFAULT_SPACE),
        "device": "cpu",
    }
    return StudyRequest(**(given | others))


def begin(request: StudyRequest) -> StudyInputs:
    """The checked input; ``study.json`` is written as a study does."""
    assert isinstance(request.out, Path)
    inputs = check_inputs(request, request.out, Reporter())
    request.out.mkdir()
    write_result(request.out / "study.json", inputs.identity)
    return inputs


def resume(request: StudyRequest) -> StudyInputs:
    assert isinstance(request.out, Path)
    return check_inputs(dataclasses.replace(request, resume=True), request.out, Reporter())


def rewrite(out: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = out / "study.json"
    content = {n: v for n, v in json.loads(path.read_text()).items() if n not in drop}
    path.write_text(json.dumps(content | changes))


# ---- what decides a metric ----


def test_the_same_input_is_the_same_study(
    data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    textures = write_textures(tmp_path / "textures", 90)
    asked = request(data, tmp_path / "out", resnet18_weights, textures=textures)
    begun = begin(asked)
    moved = shutil.move(textures, tmp_path / "moved")
    again = resume(dataclasses.replace(asked, textures=Path(moved)))
    assert again.resumed == begun.identity == again.identity


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (None, 90, "they were drawn by code, are pictures of --textures"),
        (90, None, "they were pictures of --textures, are drawn by code"),
        (90, 91, "the pictures of --textures have changed"),
    ],
)
def test_other_textures_are_another_study(
    before: int | None, now: int | None, said: str, data: Path, tmp_path: Path
) -> None:
    def folder(name: str, shade: int | None) -> Path | None:
        return None if shade is None else write_textures(tmp_path / name, shade)

    out = tmp_path / "out"
    asked = request(data, out, None, textures=folder("before", before))
    begin(asked)
    with pytest.raises(OutputError) as caught:
        resume(dataclasses.replace(asked, textures=folder("now", now)))
    assert str(caught.value) == (
        f"The study in {out} was begun with other textures ({said}): choose another --out."
    )


@pytest.mark.parametrize("searched", [False, True])
def test_a_weights_file_with_another_content_makes_another_study(
    searched: bool, data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    shutil.copy(resnet18_weights, weights)
    asked = request(data, out, resnet18_weights if searched else weights)
    if searched:
        ranges = {"backbone.weights": {"type": "choice", "values": [str(weights)]}}
        asked = dataclasses.replace(asked, space=Space(ranges))
    begin(asked)
    _change_last_byte(weights)
    with pytest.raises(OutputError) as caught:
        resume(asked)
    assert str(caught.value) == (
        f"The study in {out} was begun with other weights (the content of {weights} has changed): "
        "choose another --out."
    )


def _change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_study_of_a_version_with_fewer_words_goes_on_where_it_meant_the_same(
    data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    """It said its levels, and could not say the rest: it resized bilinearly, for example."""
    out = tmp_path / "out"
    asked = request(data, out, resnet18_weights)
    asked = dataclasses.replace(
        asked, settings=replaced(asked.settings, {"image.interpolation": "bilinear"})
    )
    begin(asked)
    settings = json.loads((out / "study.json").read_text())["settings"]
    settings["backbone"]["levels"] = list(resolved(asked.settings).backbone.level_numbers)
    settings["flow"]["neighbourhood"] = asked.settings.flow.side
    for section, name in (
        ("backbone", "mean"),
        ("backbone", "std"),
        ("backbone", "join"),
        ("image", "interpolation"),
        ("image", "multiple"),
    ):
        del settings[section][name]
    rewrite(out, settings=settings)
    resume(asked)
    other = replaced(asked.settings, {"image.interpolation": "auto"})
    with pytest.raises(OutputError, match="interpolation was 'bilinear', is 'bicubic'"):
        resume(dataclasses.replace(asked, settings=other))


@pytest.mark.parametrize("name", ["results_version", "generator_version"])
def test_a_version_that_gives_other_results_is_another_study(
    name: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = request(data, out, None)
    begun = begin(asked)
    now = getattr(begun.identity, name)
    rewrite(out, **{name: now - 1})
    with pytest.raises(OutputError) as caught:
        resume(asked)
    assert str(caught.value) == (
        f"The study in {out} was begun with a version of clsnf that gives other results "
        f"({name} was {now - 1}, is {now}): choose another --out, or go on with that version."
    )


def test_a_folder_of_weights_serves_several_backbones_and_may_move(
    data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    shutil.copy(resnet18_weights, folder / "resnet18.safetensors")
    space = Space({"backbone.name": {"type": "choice", "values": ["resnet18", "resnet34"]}})
    asked = request(data, out, folder, space=space)
    said = f"The weights folder {folder} holds no file of 'resnet34': put resnet34.safetensors"
    with pytest.raises(ClsnfError, match=re.escape(said)):
        check_inputs(asked, out, Reporter())
    resnet34 = timm.create_model("resnet34", pretrained=False)
    save_file(resnet34.state_dict(), folder / "resnet34.safetensors")
    begun = begin(asked)
    assert set(begun.identity.weights or {}) == {str(file) for file in folder.iterdir()}
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    again = request(data, out, moved, space=space)
    assert resume(again).resumed == begun.identity
    _change_last_byte(moved / "resnet34.safetensors")
    with pytest.raises(OutputError, match=r"begun with other settings \(backbone.weights "):
        resume(again)


# ---- studies of earlier versions ----

LACKING = ("textures", "weights", "results_version", "generator_version")


def test_a_study_of_an_earlier_version_goes_on(
    data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    out = tmp_path / "out"
    asked = request(data, out, resnet18_weights)
    begin(asked)
    rewrite(out, drop=LACKING)
    before = read_result(StudyIdentity, out / "study.json")
    assert [getattr(before, name) for name in LACKING] == [None] * 4
    assert resume(asked).resumed == before


def test_a_study_that_was_begun_with_a_space_that_is_refused_now_goes_on(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = request(data, out, None)
    begin(asked)
    space = {"validation.fraction": {"type": "choice", "values": [0.1, 0.2]}}
    rewrite(out, drop=LACKING, space=space)
    assert resume(dataclasses.replace(asked, space=Space(space))).resumed is not None


# ---- the command ----


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            "score_weight: {type: float, low: 0.0, high: 1.0}",
            "The search space's score_weight changes nothing in a trial: the study chooses it for "
            "the winner alone, by image AUROC.",
        ),
        (
            "backbone.name: {type: choice, values: [resnet18, resnet81]}",
            "The search space's backbone.name=resnet81: There is no timm model 'resnet81'.",
        ),
        (
            "backbone.name: {type: choice, values: [resnet18, resnet34]}",
            "The search space's backbone.name has 2 backbones (resnet18, resnet34), and --weights",
        ),
    ],
)
def test_a_space_that_wastes_trials_is_refused_in_one_line_before_anything_is_written(
    space: str, said: str, data: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    (tmp_path / "space.yaml").write_text(space)
    options = ["study", "--data", str(data), "--out", str(tmp_path / "out")]
    options += [*tiny_options(resnet18_weights), "--space", str(tmp_path / "space.yaml")]
    result = CliRunner().invoke(main, options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
