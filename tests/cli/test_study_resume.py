"""``clsnf study --resume RUN``: what was begun is asked again (Ray is not started)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from clsnf.cli import main
from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.core.hashing import sha256_file
from clsnf.results import DataSource, StoredRequest, read_result, write_result
from clsnf.study.inputs import StudyInputs, check_inputs
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.space import DEFAULT_SPACE, Space
from tests.support.small_data import tiny_options, write_category, write_weights


class AskedError(Exception):
    """Ends the command where the long work would begin."""


class Begun:
    """Studies that are begun and resumed up to the moment when Ray would start."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.out, self.data = folder, folder / "out", folder / "data"
        for seed, name in enumerate(("alpha", "beta")):
            write_category(self.data / name, seed)
        space = folder / "space.yaml"
        space.write_text("flow_depth: {type: choice, values: [0, 1]}\n")
        self.options = ["--data", str(self.data), *tiny_options(weights), "--space", str(space)]
        self.requests: list[StudyRequest] = []
        self.inputs: list[StudyInputs] = []

    def run_study(self, request: StudyRequest, reporter: Reporter) -> None:
        assert isinstance(request.out, Path)
        inputs = check_inputs(request, request.out, Reporter())
        request.out.mkdir(exist_ok=True)
        write_result(request.out / "request.json", request.stored())
        prefix = "" if request.optuna_storage is None else "night/"
        identity = dataclasses.replace(inputs.identity, storage_prefix=prefix)
        write_result(request.out / "study.json", identity)
        self.requests.append(request)
        self.inputs.append(inputs)
        raise AskedError

    def study(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["study", *arguments])

    def accepted(self, *arguments: str) -> StudyRequest:
        result = self.study(*arguments)
        assert isinstance(result.exception, AskedError), result.stderr
        return self.requests[-1]

    def refused(self, *arguments: str) -> str:
        result = self.study(*arguments)
        assert result.exit_code == 2, result.exception
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("error: ").strip()


@pytest.fixture
def begun(tmp_path: Path, resnet18_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    studies = Begun(tmp_path, resnet18_weights)
    monkeypatch.setattr("clsnf.study.run.run_study", studies.run_study)
    textures = tmp_path / "textures"
    shutil.copytree(studies.data / "alpha" / "train" / "good", textures)
    studies.accepted(
        "--out",
        str(studies.out),
        *studies.options,
        *("--trials", "4", "--objectives", "au_pro", "--textures", str(textures)),
        *("--optuna-storage", str(tmp_path / "s.journal"), "--max-bad", "0.5"),
    )
    return studies


# ---- the same again ----


def test_the_folder_alone_repeats_everything(
    begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(begun.folder)
    begin = begun.requests[0]
    again = begun.accepted("--resume", "out")
    assert again.stored() == begin.stored()
    assert (again.resume, again.out, again.categories) == (True, begun.out, ["alpha", "beta"])
    assert again.study == StudySettings(trials=4, objectives=("au_pro",))
    assert begun.inputs[-1].identity == begun.inputs[0].identity


def test_trials_may_be_added_and_what_may_not_change_is_refused_in_one_line(begun: Begun) -> None:
    more = begun.accepted("--resume", str(begun.out), "--trials", "20", "--device", "cpu")
    assert (more.study.trials, more.device, more.max_bad) == (20, "cpu", 0.5)
    for arguments, said in (
        (["--seed", "3"], "begun with other settings (seed was 0, is 3)"),
        (["--set", "flow.passes=9"], "begun with other settings (flow.passes was 0.2, is 9.0)"),
        (["--objectives", "pixel_ap"], "begun with other objectives"),
        (["--textures", str(begun.data / "beta" / "train" / "good")], "begun with other textures"),
        (["--out", "elsewhere"], "and --out names another, elsewhere: leave --out out."),
    ):
        assert said in begun.refused("--resume", str(begun.out), *arguments)


def test_the_old_way_goes_on_and_makes_a_damaged_request_anew(begun: Begun) -> None:
    file = begun.out / "request.json"
    whole = file.read_bytes()
    again = ["--out", str(begun.out), *begun.options, "--objectives", "au_pro"]
    again += ["--textures", str(begun.folder / "textures")]
    again += ["--optuna-storage", str(begun.folder / "s.journal")]
    for damaged in (b"", whole[:40], whole.replace(b'"device"', b'"device\xff'), b"[1]", b"{}"):
        file.write_bytes(damaged)
        said = begun.refused("--resume", str(begun.out))
        assert said.startswith(f"request.json in {begun.out} is damaged (")
        assert said.endswith(
            f"say what the study was begun with once more, --out {begun.out} --resume with --data "
            "and all other options, and the file is made anew."
        )
    file.unlink()  # of an earlier version
    assert "earlier versions did not write it" in begun.refused("--resume", str(begun.out))
    begun.accepted(*again, "--resume")
    assert begun.accepted("--resume", str(begun.out)).categories == ["alpha", "beta"]


@pytest.mark.parametrize("name", ["nowhere", "data"])
def test_a_folder_without_a_study_is_named(begun: Begun, name: str) -> None:
    place = begun.folder / name
    assert begun.refused("--resume", str(place)) == (
        f"{place} holds no study to go on with: give the folder of one, or begin one with --out."
    )


def test_no_password_is_stored(tmp_path: Path) -> None:
    secret = "postgresql://me:hunter2@host/studies"
    request = StudyRequest(
        [],
        tmp_path,
        DetectorSettings(),
        StudySettings(),
        Space(DEFAULT_SPACE),
        optuna_storage=secret,
        mlflow="http://me:hunter2@host",
    )
    write_result(tmp_path / "request.json", request.stored())
    assert "hunter2" not in (tmp_path / "request.json").read_text()
    stored = read_result(StoredRequest, tmp_path / "request.json")
    assert (stored.optuna_storage, stored.mlflow) == (None, None)
    assert stored.withheld == ["optuna_storage", "mlflow"]


def test_what_was_given_with_a_password_must_be_given_again(begun: Begun) -> None:
    file = begun.out / "request.json"
    stored = read_result(StoredRequest, file)
    write_result(file, dataclasses.replace(stored, withheld=["mlflow", "notify"]))
    result = begun.study("--resume", str(begun.out))
    assert isinstance(result.exception, AskedError)
    for option in ("--mlflow", "--notify"):
        line = f"the study was begun with {option}, whose password is not stored: without {option}"
        assert f"warning: {line} URL it is told nothing now\n" in result.stderr
    lost = dataclasses.replace(stored, optuna_storage=None, withheld=["optuna_storage"])
    write_result(file, lost)
    assert begun.refused("--resume", str(begun.out)) == (
        "The study was begun with --optuna-storage, whose password is not stored: give it again."
    )
    storage = str(begun.folder / "s.journal")
    begun.accepted("--resume", str(begun.out), "--optuna-storage", storage)


# ---- more data ----


def test_a_moved_data_folder_goes_on_with_the_same_contents_alone(begun: Begun) -> None:
    moved = begun.data.rename(begun.folder / "moved")
    assert begun.refused("--resume", str(begun.out)) == (
        f"The pictures of alpha, beta are no longer in {begun.data}: say with --data FOLDER where "
        "they are now."
    )
    again = begun.accepted("--resume", str(begun.out), "--data", str(moved))
    assert again.sources == [DataSource(str(moved), ["alpha", "beta"])]
    write_category(begun.folder / "other" / "alpha", 9)
    said = begun.refused("--resume", str(begun.out), "--data", str(begun.folder / "other"))
    assert "was begun with other data (alpha has changed)" in said


def test_products_are_added_by_name_or_from_another_folder(begun: Begun) -> None:
    write_category(begun.data / "gamma", 7)
    write_category(begun.folder / "new" / "delta", 8)
    assert begun.accepted("--resume", str(begun.out)).categories == ["alpha", "beta"]
    assert "holds no category 'epsilon': say with --data" in begun.refused(
        "--resume", str(begun.out), "--categories", "epsilon"
    )
    more = begun.accepted("--resume", str(begun.out), "--categories", "alpha,gamma")
    assert more.categories == ["alpha", "beta", "gamma"]
    more = begun.accepted("--resume", str(begun.out), "--data", str(begun.folder / "new"))
    assert more.sources == [
        DataSource(str(begun.data), ["alpha", "beta", "gamma"]),
        DataSource(str(begun.folder / "new"), ["delta"]),
    ]
    assert list(begun.inputs[-1].identity.data) == ["alpha", "beta", "gamma", "delta"]
    normals = begun.folder / "zeta"
    shutil.copytree(begun.data / "gamma" / "train" / "good", normals)
    (normals / "000.png").unlink(missing_ok=True)
    more = begun.accepted("--resume", str(begun.out), "--normals", str(normals))
    assert more.categories[-1] == "zeta"
    assert begun.accepted("--resume", str(begun.out)).categories == more.categories


def test_test_pictures_may_come_and_go_and_normals_may_not(begun: Begun) -> None:
    write_category(begun.folder / "more" / "alpha", 5)
    for kind in ("test", "ground_truth"):
        shutil.copytree(
            begun.folder / "more" / "alpha" / kind, begun.data / "alpha" / kind, dirs_exist_ok=True
        )
    begun.accepted("--resume", str(begun.out))
    new = begun.folder / "more" / "alpha" / "train" / "good"
    shutil.copy(next(new.iterdir()), begun.data / "alpha" / "train" / "good" / "new.png")
    assert "was begun with other data (alpha has changed)" in begun.refused(
        "--resume", str(begun.out)
    )


def test_moved_weights_are_the_same_weights(begun: Begun, resnet18_weights: Path) -> None:
    moved = begun.folder / "moved.safetensors"
    shutil.copy(resnet18_weights, moved)
    again = begun.accepted("--resume", str(begun.out), "--weights", str(moved))
    before = begun.requests[0].settings
    assert again.settings == replaced(before, {"backbone.weights": str(moved)})


def test_the_weights_of_several_backbones_are_repeated_and_may_move(
    begun: Begun, resnet18_weights: Path
) -> None:
    space = begun.folder / "joint.yaml"
    space.write_text(
        "network:\n  type: choice\n  values:\n"
        "    - {backbone.name: resnet18, backbone.levels: [1, 2]}\n"
        "    - {backbone.name: resnet10t, backbone.levels: [1, 2], image.height: 96}\n"
    )
    files = [
        begun.folder / "18.safetensors",
        write_weights(begun.folder / "10.safetensors", "resnet10t"),
    ]
    shutil.copy(resnet18_weights, files[0])
    options = [*begun.options[:-2], "--space", str(space), "--out", str(begun.folder / "two")]
    at = options.index("--weights")
    del options[at : at + 2]

    def weights(resnet18: Path, resnet10t: Path) -> list[str]:
        return ["--weights", f"resnet18={resnet18}", "--weights", f"resnet10t={resnet10t}"]

    first = begun.accepted(*options, *weights(*files))
    assert begun.inputs[-1].identity.weights == {
        str(file): sha256_file(file) for file in reversed(files)
    }
    two = str(begun.folder / "two")
    assert begun.accepted("--resume", two).settings == first.settings
    moved = [file.rename(file.with_name(f"moved-{file.name}")) for file in files]
    assert "There is no weights file" in begun.refused("--resume", two)
    begun.accepted("--resume", two, *weights(*moved))
    begun.accepted("--resume", two)
    save_file({name: -value for name, value in load_file(moved[0]).items()}, moved[0])
    assert "begun with other weights" in begun.refused("--resume", two)
    assert "and none of 'resnet10t': give --weights resnet10t=FILE too" in begun.refused(
        "--resume", two, "--weights", f"resnet18={resnet18_weights}"
    )


# ---- submitted jobs ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "and its results would be deleted with it: give --out an absolute path"),
        (["--out", "runs/first"], "and runs/first would be deleted with it: give an absolute path"),
        (["--resume", "runs/first"], "and runs/first would be deleted with it: give an absolute"),
    ],
)
def test_a_job_whose_results_would_be_deleted_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    result = CliRunner().invoke(main, ["study", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_job_goes_on_by_an_absolute_folder(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert begun.accepted("--resume", str(begun.out)).out == begun.out
