"""``clsnf train``, ``predict`` and ``evaluate`` on a small product: the whole way without Ray."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from clsnf import Detector
from clsnf.cli import main
from clsnf.data.images import read_image
from clsnf.data.layouts import read_category
from clsnf.evaluation.evaluate import evaluate_detector
from clsnf.metrics import METRICS
from clsnf.results import to_plain
from clsnf.training.prepare import rows_of
from tests.support.small_data import tiny_options, write_category

SIZE = (64, 80)  # of the pictures, on a network of 64 x 64
WITHOUT_REGIONS = {name for name, metric in METRICS.items() if not metric.regions}


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Path:
    """A folder with ``data/nut``, and ``model``: a detector of it."""
    folder = tmp_path_factory.mktemp("product")
    write_category(folder / "data" / "nut", size=SIZE, train=12)
    result = run(
        "train",
        "--data",
        folder / "data",
        "--out",
        folder / "model",
        *tiny_options(resnet18_weights),
    )
    assert result.stdout.startswith(f"saved {folder / 'model'}: threshold 0.")
    assert "4 validation normals, 8 images fitted" in result.stdout
    return folder


@pytest.fixture(scope="module")
def pictures(product: Path) -> list[Path]:
    return sorted((product / "data" / "nut" / "test").glob("*/*.png"))


def records_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---- train ----


def test_a_trained_detector_is_two_files_and_remembers_where_it_comes_from(product: Path) -> None:
    assert sorted(p.name for p in (product / "model").iterdir()) == [
        "detector.json",
        "detector.safetensors",
    ]
    detector = Detector.load(product / "model")
    assert detector.provenance.category == "nut"
    assert detector.provenance.fit_images == 8
    assert detector.threshold.normals == len(detector.provenance.validation_scores) == 4
    assert detector.threshold.supported_rate == 1 / 5


def test_the_same_command_gives_the_same_detector(
    product: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    run(
        "train",
        "--data",
        product / "data",
        "--out",
        tmp_path / "again",
        *tiny_options(resnet18_weights),
    )
    name = "detector.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (product / "model" / name).read_bytes()


def test_a_second_training_finds_the_stages_of_the_first(
    product: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    options: list[str | Path] = [
        "--data",
        product / "data",
        "--work",
        tmp_path / "work",
        *tiny_options(resnet18_weights),
    ]
    run("train", "--out", tmp_path / "one", *options)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/*/facts.json")}
    assert {path.parent.parent.name for path in made} == {
        "trunk",
        "finetuned",
        "flow_starts",
        "flows",
    }
    run("train", "--out", tmp_path / "two", "--set", "fusion_weight=0.9", *options)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/*/facts.json")
    } == made
    assert Detector.load(tmp_path / "two").fusion_weight == 0.9


def test_good_pictures_alone_give_a_detector_with_a_threshold(
    product: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    normals = product / "data" / "nut" / "train" / "good"
    run("train", "--normals", normals, "--out", tmp_path / "m", *tiny_options(resnet18_weights))
    detector, beside = Detector.load(tmp_path / "m"), Detector.load(product / "model")
    assert detector.provenance.category == "good"
    assert detector.threshold == beside.threshold, "the same pictures, in another layout"


def test_btads_layout_gives_the_same_detector(
    product: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    data = tmp_path / "btad"
    shutil.copytree(product / "data", data)
    for part in ("train", "test"):
        (data / "nut" / part / "good").rename(data / "nut" / part / "ok")
    (data / "nut" / "test" / "spot").rename(data / "nut" / "test" / "ko")
    (data / "nut" / "ground_truth" / "spot").rename(data / "nut" / "ground_truth" / "ko")
    run("train", "--data", data, "--out", tmp_path / "m", *tiny_options(resnet18_weights))
    assert Detector.load(tmp_path / "m").threshold == Detector.load(product / "model").threshold
    result = run("evaluate", tmp_path / "m", "--data", data, "--json", tmp_path / "f.json")
    assert "image_auroc" in result.stdout
    assert json.loads((tmp_path / "f.json").read_text())["counts"] == {"good": 3, "cut": 3, "ko": 3}


def test_a_leak_is_allowed_when_asked_for_and_still_said(
    product: Path, tmp_path: Path, resnet18_weights: Path
) -> None:
    shutil.copytree(product / "data", tmp_path / "data")
    nut = tmp_path / "data" / "nut"
    shutil.copy(nut / "train" / "good" / "000.png", nut / "test" / "good" / "copy.png")
    options: list[str | Path] = [
        "--data",
        tmp_path / "data",
        "--allow-leak",
        *tiny_options(resnet18_weights),
    ]
    result = run("train", "--out", tmp_path / "m", *options)
    assert "warning: Category 'nut': " in result.stderr
    assert "are the same picture, in train and in test." in result.stderr


# ---- calibrate ----


def test_another_false_reject_rate_changes_the_threshold_and_nothing_else(
    product: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    shutil.copytree(product / "model", tmp_path / "model")
    before = Detector.load(tmp_path / "model")
    said = run("calibrate", tmp_path / "model", "--false-reject-rate", "0.5")
    after = Detector.load(tmp_path / "model")
    # The third of four: ceil(5 * 0.5).
    assert after.threshold.value == pytest.approx(sorted(before.provenance.validation_scores)[2])
    assert (
        f"threshold {after.threshold.value:.4f} (was {before.threshold.value:.4f}) for a "
        "false-reject rate of 0.5" in said.stdout
    )
    assert "note" not in said.stderr
    assert after.provenance == before.provenance
    assert np.array_equal(after.predict(pictures).maps, before.predict(pictures).maps)


def test_a_threshold_from_other_good_pictures_rests_on_them_alone(
    product: Path, tmp_path: Path
) -> None:
    normals = product / "data" / "nut" / "test" / "good"
    said = run("calibrate", product / "model", "--normals", normals, "--out", tmp_path / "new")
    before, after = Detector.load(product / "model"), Detector.load(tmp_path / "new")
    scores = after.predict(sorted(normals.iterdir())).scores
    assert after.threshold.value == scores.max()
    assert after.threshold.normals == len(scores)
    assert after.provenance.validation_scores == tuple(sorted(scores.tolist()))
    assert after.provenance.validation_fingerprint != before.provenance.validation_fingerprint
    assert f"{len(scores)} normals can promise no rate below" in said.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Say what changes"),
        (["--false-reject-rate", "1.5"], "must lie between 0 and 1"),
        (["--normals", "nowhere"], "nowhere"),
    ],
)
def test_a_calibration_that_makes_no_sense_leaves_the_detector_as_it_is(
    product: Path, options: list[str], said: str
) -> None:
    facts = (product / "model" / "detector.json").read_bytes()
    result = CliRunner().invoke(main, ["calibrate", str(product / "model"), *options])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (product / "model" / "detector.json").read_bytes() == facts


# ---- predict ----


def test_a_table_shows_every_picture_with_its_verdict(product: Path, pictures: list[Path]) -> None:
    result = run("predict", product / "model", *pictures)
    shown = "".join(result.stdout.split())
    detector = Detector.load(product / "model")
    prediction = detector.predict(pictures)
    assert f"threshold{detector.threshold.value:.4f}" in shown
    for score, verdict in zip(prediction.scores, prediction.verdicts, strict=True):
        assert f"{score:.4f}" in shown
        assert ("defect" if verdict else "good") in shown
    assert result.stderr == ""


def test_json_lines_hold_what_the_detector_says(product: Path, pictures: list[Path]) -> None:
    result = run("predict", product / "model", "--json", *pictures)
    records = records_of(result)
    detector = Detector.load(product / "model")
    prediction = detector.predict(pictures)
    normals = np.array(detector.provenance.validation_scores)
    assert [r["path"] for r in records] == [str(p) for p in pictures]
    for record, score, verdict in zip(records, prediction.scores, prediction.verdicts, strict=True):
        assert set(record) == {"path", "score", "threshold", "verdict", "p_value"}
        assert math.isclose(record["score"], float(score), rel_tol=1e-5)
        assert record["threshold"] == detector.threshold.value
        assert record["verdict"] == ("defect" if verdict else "good")
        assert record["verdict"] == ("defect" if record["score"] > record["threshold"] else "good")
        assert record["p_value"] == (1 + sum(normals >= record["score"])) / (1 + len(normals))


def test_a_folder_stands_for_the_pictures_in_it_in_natural_order(
    product: Path, pictures: list[Path], tmp_path: Path
) -> None:
    for name in ("10.png", "9.PNG", "B.bmp.png", ".hidden.png", "notes.txt"):
        shutil.copy(pictures[0], tmp_path / name)
    (tmp_path / "below").mkdir()
    shutil.copy(pictures[0], tmp_path / "below" / "deeper.png")
    records = records_of(run("predict", product / "model", "--json", tmp_path))
    assert [Path(r["path"]).name for r in records] == ["9.PNG", "10.png", "B.bmp.png"]
    assert len({r["score"] for r in records}) == 1


def test_heat_maps_and_overlays_have_the_pictures_own_size(
    product: Path, pictures: list[Path], tmp_path: Path
) -> None:
    cut, spot = (next(p for p in pictures if p.parent.name == kind) for kind in ("cut", "spot"))
    before = {p: p.read_bytes() for p in pictures}
    result = run("predict", product / "model", "--json", "--out", tmp_path / "a" / "b", cut, spot)
    for record, folder in zip(records_of(result), ("cut", "spot"), strict=True):
        # Both are called 000.png, so the folder's name becomes part of the pictures'.
        stem = f"{folder}_{Path(record['path']).stem}"
        written = [tmp_path / "a" / "b" / f"{stem}_{kind}.png" for kind in ("map", "overlay")]
        assert record["pictures"] == [str(path) for path in written]
        assert all(read_image(path).shape == (*SIZE, 3) for path in written)
        assert read_image(written[0]).std() > 0
    assert {p: p.read_bytes() for p in pictures} == before


def test_pictures_of_the_same_name_are_told_apart_by_their_folders(
    product: Path, pictures: list[Path], tmp_path: Path
) -> None:
    run("predict", product / "model", "--out", tmp_path / "out", *pictures)
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(pictures)
    assert (tmp_path / "out" / "spot_001_overlay.png").is_file()
    assert (tmp_path / "out" / "good_001_map.png").is_file()


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_pictures_that_would_overwrite_each_other_are_refused(
    product: Path, pictures: list[Path], tmp_path: Path
) -> None:
    line = refused(
        "predict", product / "model", "--out", tmp_path / "out", pictures[0], pictures[0]
    )
    assert (
        f"Several pictures would be written as {pictures[0].parent.name}_{pictures[0].stem}_map.png"
        in line
    )
    assert not (tmp_path / "out").exists()
    assert (
        len(records_of(run("predict", product / "model", "--json", pictures[0], pictures[0]))) == 2
    )


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_damaged_picture_among_good_ones_leaves_no_half_of_the_answers(
    product: Path, pictures: list[Path], tmp_path: Path, how: list[str]
) -> None:
    for index in range(20):  # more than a batch
        shutil.copy(pictures[0], tmp_path / f"{index:02d}.png")
    (tmp_path / "19.png").write_bytes(pictures[0].read_bytes()[:-30])
    line = refused("predict", product / "model", *how, "--out", tmp_path / "out", tmp_path)
    assert f"{tmp_path / '19.png'} is cut short" in line
    assert not (tmp_path / "out").exists()


def test_pictures_and_places_that_are_of_no_use_are_named(
    product: Path, pictures: list[Path], tmp_path: Path
) -> None:
    model = product / "model"
    assert f"There is no picture {tmp_path / 'none.png'}." in refused(
        "predict", model, tmp_path / "none.png"
    )
    assert f"{tmp_path} holds no pictures" in refused("predict", model, tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in refused("predict", model, pictures[0], "--out", tmp_path / "file")
    assert "is a file" in refused("predict", model, pictures[0], "--out", tmp_path / "file" / "out")
    assert "There is no device" in refused("predict", model, pictures[0], "--device", "gpu")


def test_prediction_imports_no_ray(product: Path, pictures: list[Path]) -> None:
    code = (
        "import sys\n"
        "from clsnf import Detector\n"
        f"detector = Detector.load({str(product / 'model')!r})\n"
        f"print(detector.predict([{str(pictures[0])!r}]).scores.shape)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('ray', 'optuna', 'rich', 'click')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(1,)", "[]"]


# ---- evaluate ----


def test_an_evaluation_is_the_detectors_on_the_test_pictures(product: Path, tmp_path: Path) -> None:
    result = run(
        "evaluate",
        product / "model",
        "--data",
        product / "data",
        "--json",
        tmp_path / "x" / "f.json",
    )
    written = json.loads((tmp_path / "x" / "f.json").read_text())
    detector = Detector.load(product / "model")
    test = rows_of(read_category(product / "data", "nut"), "test")
    assert written == to_plain(evaluate_detector(detector, test))
    assert set(written["figures"]) == WITHOUT_REGIONS
    assert written["counts"] == {"good": 3, "cut": 3, "spot": 3}
    for name, value in written["figures"].items():
        assert name in result.stdout
        assert f"{value:.4f}" in result.stdout
    verdicts = [s["verdict"] for s in written["scores"] if s["label"]]
    assert written["recall"] == sum(verdicts) / len(verdicts)
    assert [s["path"] for s in written["scores"]] == test["path"].to_pylist()


def test_the_category_is_the_detectors_own_unless_another_is_named(
    product: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(product / "data", data)
    write_category(data / "bolt", seed=5, train=6, size=SIZE)
    run("evaluate", product / "model", "--data", data, "--json", tmp_path / "own.json")
    run(
        "evaluate",
        product / "model",
        "--data",
        data,
        "--category",
        "bolt",
        "--json",
        tmp_path / "other.json",
    )
    own, other = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "other.json"))
    assert all("/nut/" in s["path"] for s in own["scores"])
    assert all("/bolt/" in s["path"] for s in other["scores"])
    assert "holds no category 'nutt'" in refused(
        "evaluate", product / "model", "--data", data, "--category", "nutt"
    )
    assert "several categories" in refused(
        "evaluate", product / "model", "--data", data, "--category", "nut,bolt"
    )


def test_good_test_pictures_alone_give_the_false_reject_rate_and_say_what_is_left_out(
    product: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    write_category(data / "nut", seed=3, train=6, good=4, defective=0, size=SIZE)
    result = run("evaluate", product / "model", "--data", data, "--json", tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["figures"] == {}
    assert written["recall"] is None
    assert 0 <= written["false_reject_rate"] <= 1
    assert "false_reject_rate" in result.stdout
    assert "note: there are no pictures with defects" in result.stderr


def test_defects_alone_give_pixel_metrics_and_recall(product: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_category(data / "nut", seed=3, train=6, good=0, defective=2, size=SIZE)
    run("evaluate", product / "model", "--data", data, "--json", tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    assert set(written["figures"]) == {
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1_max",
        "au_pro",
        "au_pro_05",
    }
    assert written["false_reject_rate"] is None
    assert 0 <= written["recall"] <= 1


def test_a_category_without_test_pictures_has_nothing_to_evaluate_on(
    product: Path, tmp_path: Path
) -> None:
    write_category(tmp_path / "data" / "nut", train=6, good=0, defective=0)
    line = refused(
        "evaluate", product / "model", "--data", tmp_path / "data", "--json", tmp_path / "f.json"
    )
    assert "has no test pictures for 'nut'" in line
    assert not (tmp_path / "f.json").exists()


def test_broken_test_data_and_places_are_refused_before_the_work(
    product: Path, tmp_path: Path
) -> None:
    shutil.copytree(product / "data", tmp_path / "data")
    (tmp_path / "data" / "nut" / "ground_truth" / "cut" / "001_mask.png").unlink()
    line = refused(
        "evaluate", product / "model", "--data", tmp_path / "data", "--json", tmp_path / "f.json"
    )
    assert "001.png shows a defect but has no mask" in line
    assert "is a folder" in refused(
        "evaluate", product / "model", "--data", product / "data", "--json", tmp_path
    )
    assert not (tmp_path / "f.json").exists()


def test_masks_that_are_missing_cost_the_pixel_metrics_only(product: Path) -> None:
    """For Python users with pictures that are labelled but not drawn on; the commands ask for
    masks.
    """
    import pyarrow as pa

    test = rows_of(read_category(product / "data", "nut"), "test")
    bare = test.set_column(
        test.schema.get_field_index("mask_path"), "mask_path", pa.nulls(len(test), pa.string())
    )
    metrics = evaluate_detector(Detector.load(product / "model"), bare).metrics
    assert set(metrics) == {"image_auroc", "image_ap", "image_f1_max"}


# ---- shapes ----


def test_long_pictures_keep_their_shape_with_aspect_fit(
    tmp_path: Path, resnet18_weights: Path
) -> None:
    data = tmp_path / "data"
    write_category(data / "rod", size=(48, 128))
    options = [*tiny_options(resnet18_weights), "--aspect", "fit"]
    run("train", "--data", data, "--out", tmp_path / "m", *options)
    detector = Detector.load(tmp_path / "m")
    assert detector.settings.image.aspect == "fit"
    pictures = sorted((data / "rod" / "test" / "spot").iterdir())
    prediction = detector.predict(pictures)
    assert (prediction.maps[:, :20] == 0).all(), "48 x 128 lies in rows 20 to 43 of a square of 64"
    assert (prediction.maps[:, 44:] == 0).all()
    assert (prediction.maps[:, 20:44] > 0).any()
    result = run("predict", tmp_path / "m", "--json", "--out", tmp_path / "out", *pictures)
    for record in records_of(result):
        assert read_image(record["pictures"][0]).shape == (48, 128, 3)
    run("evaluate", tmp_path / "m", "--data", data, "--json", tmp_path / "f.json")
    assert set(json.loads((tmp_path / "f.json").read_text())["figures"]) == WITHOUT_REGIONS


def test_a_network_need_not_be_square(tmp_path: Path, resnet18_weights: Path) -> None:
    data = tmp_path / "data"
    write_category(data / "rod", size=(40, 160), good=2, defective=2)
    run(
        "train",
        "--data",
        data,
        "--out",
        tmp_path / "m",
        *tiny_options(resnet18_weights),
        "--image-size",
        "32x128",
    )
    detector = Detector.load(tmp_path / "m")
    assert detector.predict([next((data / "rod" / "test" / "cut").iterdir())]).maps.shape == (
        1,
        32,
        128,
    )
    assert "au_pro" in run("evaluate", tmp_path / "m", "--data", data).stdout
