"""The command line: how settings are given, errors for bad input, and a quick --help."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from clsnf import __version__
from clsnf.cli import main
from clsnf.cli.options import paper_preset
from clsnf.core.config import DetectorSettings, from_dict
from clsnf.core.errors import DataError
from clsnf.core.yaml import read_yaml_mapping
from clsnf.data.images import write_mask
from clsnf.paper.presets import preset_for
from clsnf.study.space import DEFAULT_SPACE
from tests.conftest import random_state
from tests.support.small_data import tiny_options, write_category

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "timm", "numpy", "pyarrow", "optuna", "cv2", "rich")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


# ---- the fast path ----


def test_help_of_every_command_imports_no_heavy_library() -> None:
    code = (
        "import sys, io, contextlib\n"
        "from clsnf.cli import main\n"
        "for command in ([], ['study'], ['train'], ['predict'], ['evaluate'], ['settings'],\n"
        "                ['data', 'download'], ['data', 'synthesize'], ['data', 'show']):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        code = main([*command, '--help'], standalone_mode=False)\n"
        "    assert 'Usage:' in out.getvalue(), command\n"
        "main(['settings'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_the_study_script_shows_its_options_without_being_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tune" / "run_study.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: run_study.py [OPTIONS]")
    assert "--trials" in done.stdout
    assert done.stderr == ""


def test_the_study_script_refuses_bad_input_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tune" / "run_study.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == f"error: {tmp_path / 'none'} does not exist: give the folder that holds the data.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_printed() -> None:
    assert f"version {__version__}" in CliRunner().invoke(main, ["--version"]).output


# ---- settings ----


def settings_of(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, said: str = ""
) -> DetectorSettings:
    """The settings that a command gets; it ends before the work. `said` is what it prints first."""
    from clsnf.cli import options

    seen: list[DetectorSettings] = []

    def stop(*_: object) -> None:
        raise options.DataError("stop")

    inner = options.settings_of

    def settings(*given: object) -> DetectorSettings:
        seen.append(inner(*given))  # type: ignore[arg-type]
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(options, "settings_of", settings)
        patch.setattr(options, "read_tables", stop)
        result = CliRunner().invoke(main, ["train", "--out", "never", *arguments])
    assert result.stderr == f"{said}error: stop\n", result.output
    return seen[0]


def test_settings_are_shown_as_yaml_that_gives_them_back(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["settings"])
    assert result.exit_code == 0
    (tmp_path / "s.yaml").write_text(result.stdout)
    assert (
        from_dict(DetectorSettings, read_yaml_mapping(tmp_path / "s.yaml", ""))
        == DetectorSettings()
    )


@pytest.mark.parametrize(
    ("given", "size"), [("96", (96, 96)), ("64x128", (64, 128)), ("128X32", (128, 32))]
)
def test_image_size_is_one_number_or_height_x_width(
    monkeypatch: pytest.MonkeyPatch, given: str, size: tuple[int, int]
) -> None:
    assert settings_of(monkeypatch, "--image-size", given).image.size == size


@pytest.mark.parametrize("given", ["", "x", "64x", "64x64x64", "64,64", "-64", "6.4", "²", "big"])
def test_other_forms_of_image_size_are_refused(given: str) -> None:
    result = CliRunner().invoke(main, ["train", "--out", "never", "--image-size", given])
    assert result.exit_code == 2
    assert "give one number, such as 256, or HEIGHTxWIDTH, such as 256x512" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize("given", ["31", "0", "64x20", "8192"])
def test_image_sizes_that_a_network_cannot_take_are_refused(given: str) -> None:
    result = CliRunner().invoke(main, ["train", "--out", "never", "--image-size", given])
    assert result.exit_code == 2
    assert "it must be from 32 to 4096." in result.stderr


def test_named_options_go_before_the_file_and_set_before_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "seed: 3\nfusion_weight: 0.5\nimage: {height: 96}\nflow:\n  passes: 3\n  learning_rate: "
        "1e-4\n"
    )
    found = settings_of(
        monkeypatch,
        "--config",
        str(file),
        "--seed",
        "4",
        "--image-size",
        "64",
        "--set",
        "flow.passes=5",
    )
    assert (found.seed, found.fusion_weight, found.image.size) == (4, 0.5, (64, 64))
    assert (found.flow.passes, found.flow.learning_rate) == (5.0, 1e-4)
    assert settings_of(monkeypatch, "--config", str(file)).image.size == (96, 256), (
        "what a file leaves out keeps its default"
    )


def test_set_reads_values_as_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [
        "finetune.learning_rate=5e-4",
        "backbone.levels=[1, 2]",
        "backbone.weights=null",
        "defects.object_mask=dark",
    ]
    found = settings_of(monkeypatch, *(part for text in sets for part in ("--set", text)))
    assert found.finetune.learning_rate == 5e-4
    assert (found.backbone.levels, found.backbone.weights, found.defects.object_mask) == (
        (1, 2),
        None,
        "dark",
    )


MOST_SHARE = (
    "it is what most of their categories share (carpet, grid, hazelnut, leather, tile, wood)\n"
)


def test_the_fast_preset_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        settings_of(monkeypatch, "--preset", "fast")
        == settings_of(monkeypatch)
        == DetectorSettings()
    )


def test_the_paper_preset_is_the_authors_for_the_category(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "preset paper: the authors' settings for screw\n"
    found = settings_of(monkeypatch, "--preset", "paper", "--category", "screw", said=said)
    assert found == preset_for("screw").settings
    (tmp_path / "screw").mkdir()
    assert (
        settings_of(
            monkeypatch, "--preset", "paper", "--normals", str(tmp_path / "screw"), said=said
        )
        == found
    )


def test_the_paper_preset_finds_the_only_category_of_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "01" / "train" / "ok").mkdir(parents=True)
    found = settings_of(
        monkeypatch,
        "--preset",
        "paper",
        "--data",
        str(tmp_path),
        said="preset paper: the authors' settings for 01\n",
    )
    assert found.flow.passes == 48


def test_a_category_that_the_authors_do_not_have_takes_what_most_of_theirs_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = f"preset paper: the authors have no settings for nut: {MOST_SHARE}"
    found = settings_of(monkeypatch, "--preset", "paper", "--category", "nut", said=said)
    assert found == preset_for("carpet").settings
    assert (
        settings_of(
            monkeypatch,
            "--preset",
            "paper",
            said=f"preset paper: no category is named: {MOST_SHARE}",
        )
        == found
    )


def test_a_preset_comes_before_the_file_and_all_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "backbone: {name: resnet34}\nflow: {passes: 3, clamp: 1.5}\nfinetune: {loss: hard}\n"
    )
    arguments = [
        "--preset",
        "paper",
        "--category",
        "screw",
        "--config",
        str(file),
        "--levels",
        "2,3",
        "--set",
        "finetune.loss=dice",
    ]
    found = settings_of(
        monkeypatch, *arguments, said="preset paper: the authors' settings for screw\n"
    )
    assert (found.backbone.name, found.backbone.levels) == ("resnet34", (2, 3))
    assert (found.flow.passes, found.flow.clamp, found.flow.depth, found.finetune.loss) == (
        3.0,
        1.5,
        6,
        "dice",
    )


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    result = CliRunner().invoke(main, ["train", "--out", "never", "--preset", "quick"])
    assert result.exit_code == 2
    assert "'fast', 'paper'" in result.stderr


@pytest.mark.parametrize(
    ("categories", "row", "said"),
    [
        (["screw"], "screw", "the authors' settings for screw"),
        (["carpet", "grid"], "carpet", "the authors' settings for carpet, grid"),
        (
            ["carpet", "screw"],
            "carpet",
            "the authors' settings for carpet, screw differ, and one base serves all: it is what",
        ),
        (["screw", "nut"], "carpet", "the authors have no settings for nut: it is what most"),
        ([], "carpet", "no category is named: it is what most"),
    ],
)
def test_several_categories_share_the_paper_preset_where_the_authors_do(
    categories: list[str], row: str, said: str
) -> None:
    preset, line = paper_preset(categories)
    assert preset.recipe == preset_for(row).recipe
    assert line.startswith(said)
    assert "\n" not in line


def test_settings_show_a_preset_as_yaml_that_gives_it_back(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["settings", "--preset", "paper", "--category", "screw"])
    assert (result.exit_code, result.stderr) == (
        0,
        "preset paper: the authors' settings for screw\n",
    )
    (tmp_path / "s.yaml").write_text(result.stdout)
    shown = from_dict(DetectorSettings, read_yaml_mapping(tmp_path / "s.yaml", ""))
    assert shown == preset_for("screw").settings


def test_a_study_of_the_paper_preset_searches_only_the_fusion_weight_by_default(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    from clsnf.study import run as study

    requests: list[study.StudyRequest] = []

    def stop(request: study.StudyRequest, *_: object) -> None:
        requests.append(request)
        raise DataError("stop")

    monkeypatch.setattr(study, "run_study", stop)
    arguments = ["study", "--data", str(data), "--out", str(tmp_path / "out"), "--preset", "paper"]
    for more in ([], ["--space", str(ROOT / "tune" / "spaces" / "default.yaml")]):
        result = CliRunner().invoke(main, [*arguments, *more])
        assert (
            result.stderr
            == f"preset paper: the authors have no settings for nut: {MOST_SHARE}error: stop\n"
        )
    assert [list(request.space.ranges) for request in requests] == [
        ["fusion_weight"],
        list(DEFAULT_SPACE),
    ]
    requests[0].space.check(requests[0].settings)
    assert requests[0].settings == preset_for("nut").settings


def test_the_word_off_needs_no_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In YAML 1.1 a bare off is false; here it is a value of defects.object_mask."""
    assert settings_of(monkeypatch, "--set", "defects.object_mask=off").defects.object_mask == "off"
    (tmp_path / "s.yaml").write_text("defects: {object_mask: off}\n")
    assert (
        settings_of(monkeypatch, "--config", str(tmp_path / "s.yaml")).defects.object_mask == "off"
    )


def test_weights_are_found_from_where_the_command_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_of(monkeypatch, "--weights", "w.pth").backbone.weights == str(
        tmp_path / "w.pth"
    )


def test_weights_may_be_named_after_their_backbone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "lr=0.1.pth"
    odd.touch()
    assert settings_of(monkeypatch, "--weights", "lr=0.1.pth").backbone.weights == str(odd)
    (tmp_path / "b=c.pth").touch()
    given = settings_of(monkeypatch, "--weights", "resnet18=b=c.pth")
    assert given.backbone.weights == str(tmp_path / "b=c.pth")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["resnet18=a.pth", "b.pth"], "--weights b.pth: beside NAME=FILE each is one, such as"),
        (["resnet18=a.pth", "resnet18=b.pth"], "--weights names two files of 'resnet18': keep one"),
        (["resnet34=a.pth"], "--weights names a file of 'resnet34', and the backbone is resnet18:"),
        (["resnet18=none.pth"], "There is no weights file "),
    ],
)
def test_weights_of_something_else_are_refused_by_every_command(
    weights: list[str], said: str, data: Path, tmp_path: Path
) -> None:
    options = [part for text in weights for part in ("--weights", text)]
    options += ["--data", str(data), "--out", str(tmp_path / "out")]
    for command in ("train", "study"):
        result = CliRunner().invoke(main, [command, *options])
        assert result.exit_code == 2
        assert error_of(result).startswith(f"error: {said}")
        assert not (tmp_path / "out").exists()


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_of(monkeypatch, "--weights=~/w.pth").backbone.weights == str(tmp_path / "w.pth")
    result = CliRunner().invoke(main, ["study", "--data=~/none", "--out=~/out"])
    assert (
        error_of(result)
        == f"error: {tmp_path / 'none'} does not exist: give the folder that holds the data."
    )


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("flow.pases=4", "There is no setting 'flow.pases'. Did you mean 'flow.passes'?"),
        ("flwo.passes=4", "There is no setting 'flwo.passes'. Did you mean 'flow.passes'?"),
        ("flow.passes", "--set 'flow.passes': give NAME=VALUE, such as flow.passes=4."),
        ("flow.passes=many", "settings.flow.passes is 'many': it must be of type float."),
        ("flow.passes=", "settings.flow.passes is None: it must be of type float."),
        ("flow.passes=[1", "--set flow.passes is no YAML:"),
        ("flow.passes=0", "FlowSettings.passes is 0.0: it must be above 0 and finite."),
        (
            "flow=4",
            "There is no setting 'flow'. It is a section: name one of its settings, such as",
        ),
        ("seed.x=4", "There is no setting 'seed.x'. Did you mean 'seed'?"),
        ("defects.object_mask=drak", "DefectSettings.object_mask is 'drak'. Did you mean 'dark'?"),
        ("=4", "There is no setting ''."),
    ],
)
def test_assignments_that_make_no_sense_are_one_line(assignment: str, said: str) -> None:
    result = CliRunner().invoke(main, ["train", "--out", "never", "--set", assignment])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flow: {pases: 4}", "unknown setting 'pases'. Did you mean 'passes'?"),
        ("flow: [", "is no YAML"),
        ("- 1", "holds no names with values"),
        ("", "holds no names with values"),
    ],
)
def test_settings_files_that_make_no_sense_are_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["train", "--out", "never", "--config", str(file)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert str(file) in result.stderr
    assert result.stderr.count("\n") == 1


# ---- bad input ----


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_category(tmp_path / "data" / "nut", train=8, good=2, defective=2)
    return tmp_path / "data"


@pytest.fixture(params=["train", "study"])
def refused(
    request: pytest.FixtureRequest, tmp_path: Path, resnet18_weights: Path
) -> Callable[..., str]:
    """Runs a command that must end with exit code 2, one line and no files; returns the line."""

    def run(*arguments: str) -> str:
        before = listing(tmp_path)
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        result = CliRunner().invoke(
            main, [request.param, *out, *tiny_options(resnet18_weights), *arguments]
        )
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert result.stdout == ""
        assert listing(tmp_path) == before, "something was left behind"
        return error_of(result)

    return run


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def error_of(result: Result) -> str:
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.rstrip("\n")


def test_no_data_is_refused() -> None:
    result = CliRunner().invoke(main, ["train", "--out", "never"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: There is no data: give --data FOLDER or --normals FOLDER.\n",
    )


def test_data_and_normals_together_are_refused(refused: Callable[..., str], data: Path) -> None:
    assert "Give --data or --normals, not both." in refused(
        "--data", str(data), "--normals", str(data)
    )


@pytest.mark.parametrize("option", ["--data", "--normals"])
def test_a_missing_folder_is_named(
    refused: Callable[..., str], tmp_path: Path, option: str
) -> None:
    assert f"{tmp_path / 'none'} does not exist" in refused(option, str(tmp_path / "none"))


def test_a_folder_without_categories_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no category" in refused("--data", str(tmp_path / "empty"))
    assert f"{tmp_path / 'empty'} holds no pictures" in refused(
        "--normals", str(tmp_path / "empty")
    )


def test_a_category_without_pictures_is_named(refused: Callable[..., str], data: Path) -> None:
    shutil.rmtree(data / "nut" / "train" / "good")
    (data / "nut" / "train" / "good").mkdir()
    assert f"{data / 'nut' / 'train' / 'good'} holds no pictures" in refused("--data", str(data))


def test_a_category_with_too_few_pictures_is_refused(
    refused: Callable[..., str], data: Path
) -> None:
    for path in sorted((data / "nut" / "train" / "good").iterdir())[3:]:
        path.unlink()
    assert "has 3 different good pictures to learn from: at least 6 are needed" in refused(
        "--data", str(data)
    )


def test_a_truncated_picture_is_named(refused: Callable[..., str], data: Path) -> None:
    path = data / "nut" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:-40])
    line = refused("--data", str(data))
    assert f"{path} is cut short" in line
    assert "copy it again from its source or remove it" in line


def test_a_mask_without_an_image_is_named(refused: Callable[..., str], data: Path) -> None:
    (data / "nut" / "test" / "spot" / "001.png").unlink()
    line = refused("--data", str(data))
    assert (
        f"Masks without an image: {data / 'nut' / 'ground_truth' / 'spot' / '001_mask.png'}" in line
    )


def test_an_image_without_its_mask_is_named(refused: Callable[..., str], data: Path) -> None:
    (data / "nut" / "ground_truth" / "spot" / "001_mask.png").unlink()
    line = refused("--data", str(data))
    assert f"{data / 'nut' / 'test' / 'spot' / '001.png'} shows a defect but has no mask" in line


def test_a_mask_of_another_size_is_named(refused: Callable[..., str], data: Path) -> None:
    path = data / "nut" / "ground_truth" / "spot" / "001_mask.png"
    with Image.open(path) as mask:
        mask.resize((32, 64)).save(path)
    assert f"{path} has the size 32x64, its image 64x64" in refused("--data", str(data))


def test_an_empty_mask_is_named(refused: Callable[..., str], data: Path) -> None:
    path = data / "nut" / "ground_truth" / "spot" / "001_mask.png"
    with Image.open(path) as mask:
        write_mask(path, torch.zeros(mask.height, mask.width, dtype=torch.bool).numpy())
    assert f"{path} marks no pixel" in refused("--data", str(data))


def test_a_picture_in_train_and_test_is_named(refused: Callable[..., str], data: Path) -> None:
    shutil.copy(
        data / "nut" / "train" / "good" / "002.png", data / "nut" / "test" / "good" / "copy.png"
    )
    line = refused("--data", str(data))
    assert "train/good/002.png" in line
    assert "test/good/copy.png are the same picture, in train and in test" in line
    assert "--allow-leak" in line


@pytest.mark.parametrize("command", [["train", "--category"], ["study", "--categories"]])
def test_an_unknown_category_is_named_with_those_there_are(
    data: Path, tmp_path: Path, command: list[str]
) -> None:
    write_category(data / "bolt", train=6, good=0, defective=0)
    result = CliRunner().invoke(
        main, [*command, "tyre", "--out", str(tmp_path / "out"), "--data", str(data)]
    )
    assert (result.exit_code, error_of(result)) == (
        2,
        f"error: {data} holds no category 'tyre': it holds bolt, nut.",
    )
    assert not (tmp_path / "out").exists()


def test_several_categories_are_no_choice_for_one_detector(data: Path, tmp_path: Path) -> None:
    write_category(data / "bolt", train=6, good=0, defective=0)
    for chosen in ([], ["--category", "all"], ["--category", "nut,bolt"]):
        result = CliRunner().invoke(
            main, ["train", "--out", str(tmp_path / "m"), "--data", str(data), *chosen]
        )
        assert result.exit_code == 2
        assert "holds several categories" in result.stderr
        assert "choose one with --category" in result.stderr


def test_a_list_without_categories_is_refused(data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["study", "--out", str(tmp_path / "out"), "--data", str(data), "--categories", " , "]
    )
    assert (result.exit_code, error_of(result)) == (
        2,
        f"error: ' , ' names no category: {data} holds nut.",
    )


def test_normals_take_no_category(
    refused: Callable[..., str], data: Path, request: pytest.FixtureRequest
) -> None:
    option = "--category" if "train" in request.node.name else "--categories"
    assert "--normals is one category" in refused(
        "--normals", str(data / "nut" / "train" / "good"), option, "nut"
    )


def test_an_unknown_backbone_is_named_with_the_nearest(
    refused: Callable[..., str], data: Path
) -> None:
    line = refused("--data", str(data), "--backbone", "resnet81")
    assert "There is no timm model 'resnet81'. Did you mean 'resnet" in line


def test_levels_that_a_backbone_does_not_have_are_refused(
    refused: Callable[..., str], data: Path
) -> None:
    assert "has levels 0 to 4, not 9" in refused("--data", str(data), "--levels", "1,9")


def test_missing_weights_are_named(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    line = refused("--data", str(data), "--weights", str(tmp_path / "none.pth"))
    assert f"There is no weights file {tmp_path / 'none.pth'}" in line


def test_weights_of_another_architecture_are_named_with_the_first_mismatches(
    refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "resnet10t.safetensors"
    save_file(random_state("resnet10t"), weights)
    line = refused("--data", str(data), "--weights", str(weights))
    assert f"{weights} does not fit 'resnet18': " in line
    assert "conv1" in line


def test_a_file_that_holds_no_weights_is_named(
    refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no weights at all")
    assert f"{tmp_path / 'w.safetensors'} can't be read as weights" in refused(
        "--data", str(data), "--weights", str(tmp_path / "w.safetensors")
    )


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_texture_folders_that_are_of_no_use_are_named(
    refused: Callable[..., str], data: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "textures"
    if what != "missing":
        folder.mkdir()
    if what == "damaged":
        shutil.copy(data / "nut" / "train" / "good" / "000.png", folder / "t.png")
        (folder / "t.png").write_bytes((folder / "t.png").read_bytes()[:60])
    assert str(folder) in refused("--data", str(data), "--textures", str(folder))


def test_an_output_folder_that_holds_other_things_is_refused(
    refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    line = refused("--data", str(data), "--out", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in line
    assert "choose a" in line


def test_an_output_folder_that_cannot_be_made_is_refused(
    refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file" in refused(
        "--data", str(data), "--out", str(tmp_path / "file" / "out")
    )
    assert str(tmp_path / "file") in refused("--data", str(data), "--out", str(tmp_path / "file"))


def test_a_device_that_is_not_there_is_refused(refused: Callable[..., str], data: Path) -> None:
    assert "There is no device 'cuda:7'" in refused("--data", str(data), "--device", "cuda:7")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objectives", "pixel_app"], "The objective is 'pixel_app'. Did you mean 'pixel_ap'?"),
        (["--objectives", "pixel_f1_max"], "The objective is 'pixel_f1_max'."),
        (["--trials", "0"], "StudySettings.trials is 0: it must be 1 or more."),
        (["--total-trials", "-1"], "StudySettings.total_trials is -1: it must be 0 or more."),
        (["--until", "soon"], "--until 'soon' is no time: give one such as 06:30"),
        (["--hours", "0"], "--hours is 0.0: it must be above 0, such as 8 or 0.5."),
        (["--hours", "1", "--until", "06:30"], "--until and --hours both say when the study ends"),
        (["--space", "none.yaml"], "none.yaml can't be read"),
        (["--set", "flow.start=random"], "The search space's flow_depth: FlowSettings.depth is 0"),
        (["--gpus-per-trial", "-1"], "StudySettings.gpus_per_trial is -1.0: it must be 0 or more."),
    ],
)
def test_what_only_a_study_asks_for_is_checked_first(
    data: Path, tmp_path: Path, resnet18_weights: Path, arguments: list[str], said: str
) -> None:
    base = [
        "study",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        *tiny_options(resnet18_weights),
    ]
    result = CliRunner().invoke(main, [*base, *arguments])
    assert result.exit_code == 2
    assert said in error_of(result)
    assert not (tmp_path / "out").exists()


def test_resuming_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["study", "--resume"])
    assert result.exit_code == 2
    assert (
        error_of(result)
        == "error: --resume goes on with the study in a folder: say --resume RUN, or name it with "
        "--out."
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    from clsnf.cli import options, study

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "data_source", interrupt)
    for command in (main, study):
        arguments = ["--data", str(data), "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(command, [*(["study"] if command is main else []), *arguments])
        assert result.exit_code == 130
        assert result.stderr == "interrupted: what was finished is kept\n"
    assert not (tmp_path / "out").exists()


# ---- predict and evaluate without a detector ----


@pytest.mark.parametrize(
    "command", [["predict", "MODEL", "PICTURE"], ["evaluate", "MODEL", "--data", "DATA"]]
)
def test_a_folder_that_holds_no_detector_is_named(
    command: list[str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    places = {
        "MODEL": tmp_path / "model",
        "PICTURE": data / "nut" / "train" / "good" / "000.png",
        "DATA": data,
    }
    result = CliRunner().invoke(main, [str(places.get(part, part)) for part in command])
    assert result.exit_code == 2
    assert error_of(result) == (
        f"error: {tmp_path / 'model'} is no saved detector: it needs detector.safetensors and "
        "detector.json."
    )


def test_a_damaged_detector_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "detector.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "detector.safetensors").write_bytes(os.urandom(64))
    result = CliRunner().invoke(
        main, ["predict", str(tmp_path), str(data / "nut" / "train" / "good")]
    )
    assert result.exit_code == 2
    assert str(tmp_path) in error_of(result)
