"""The detector: fit, predict, save and load, on pictures small enough that everything runs for
real.
"""

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
    to_dict,
)
from clsnf.core.errors import DataError, ImageError, ModelError, SettingsError
from clsnf.data.images import load_images, read_image
from clsnf.data.layouts import CATEGORY_SCHEMA, read_category
from clsnf.data.splits import assign_splits
from clsnf.detector import Detector, ScoreWorker
from clsnf.detector_file import FORMAT, read_description
from clsnf.model.score_maps import fuse
from clsnf.streams.choice import StreamChoice
from clsnf.streams.stream import ImageBatch
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.prepare import place_rows, prepare, rows_of
from tests.support.small_data import TINY, draw_normal, write_category

CPU = torch.device("cpu")


def part(section: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{section}."): value
        for name, value in TINY.items()
        if name.startswith(f"{section}.")
    }


def tiny(weights: Path, image: ImageSettings | None = None) -> DetectorSettings:
    return DetectorSettings(
        image=image or ImageSettings(64, 64),
        backbone=BackboneSettings("resnet18", (1, 2), str(weights)),
        finetune=FinetuneSettings(**part("finetune")),
        flow=FlowSettings(**part("flow")),
    )


def split(folder: Path) -> pa.Table:
    return assign_splits(read_category(folder.parent, folder.name), 0.4, seed=0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return split(write_category(tmp_path_factory.mktemp("data") / "plate", train=12))


@pytest.fixture(scope="module")
def settings(resnet18_weights: Path) -> DetectorSettings:
    return tiny(resnet18_weights)


@pytest.fixture(scope="module")
def detector(table: pa.Table, settings: DetectorSettings) -> Detector:
    return Detector.fit(table, settings, device="cpu")


@pytest.fixture(scope="module")
def paths(table: pa.Table) -> list[str]:
    """Test images, normal and defective."""
    found: list[str] = rows_of(table, "test")["path"].to_pylist()
    return found


# ---- fit ----


def test_image_scores_may_come_from_a_map_of_their_own_weight(
    table: pa.Table,
    settings: DetectorSettings,
    detector: Detector,
    paths: list[str],
    tmp_path: Path,
) -> None:
    own = Detector.fit(table, dataclasses.replace(settings, score_weight=1.0), device="cpu")
    alone = Detector.fit(table, dataclasses.replace(settings, fusion_weight=1.0), device="cpu")
    found, plain, classifier = (d.predict(paths) for d in (own, detector, alone))
    np.testing.assert_array_equal(found.maps, plain.maps)
    np.testing.assert_array_equal(found.scores, classifier.scores)
    assert own.threshold == alone.threshold  # in the scores' own units
    assert own.map_threshold == pytest.approx(detector.threshold.value)  # pictures are in the map's
    assert own.shown_from == pytest.approx(detector.shown_from)
    own.save(tmp_path / "own")
    again = Detector.load(tmp_path / "own", device="cpu")
    np.testing.assert_array_equal(again.predict(paths).scores, found.scores)
    assert again.map_threshold == own.map_threshold


def test_the_threshold_rests_on_the_validation_normals_alone(
    detector: Detector, table: pa.Table
) -> None:
    validation = rows_of(table, "validation")
    scores = detector.predict(validation["path"].to_pylist()).scores
    assert (
        detector.threshold.normals == len(validation) == len(detector.provenance.validation_scores)
    )
    assert sorted(scores.astype(float)) == pytest.approx(
        detector.provenance.validation_scores, abs=1e-6
    )
    assert detector.threshold.value == max(
        detector.provenance.validation_scores
    )  # too few for the rate that was asked for
    assert detector.threshold.false_reject_rate == 0.01
    assert detector.threshold.supported_rate == pytest.approx(1 / (len(validation) + 1))
    assert not detector.predict(validation["path"].to_pylist()).verdicts.any()


def test_a_detector_says_where_it_comes_from(detector: Detector, table: pa.Table) -> None:
    said = detector.provenance
    assert said.category == "plate"
    assert said.architecture == "resnet18"
    assert said.fit_images == len(rows_of(table, "fit"))
    assert said.object_mask in ("off", "dark", "bright")
    assert said.data_fingerprint != said.validation_fingerprint
    assert set(said.versions) >= {"clsnf", "torch", "timm"}


def test_fitting_reads_no_test_image_and_no_validation_defect(
    detector: Detector, table: pa.Table, settings: DetectorSettings
) -> None:
    kept = table.filter(pa.compute.not_equal(table["split"], "test"))
    missing = [
        {
            "path": f"/none/{i}.png",
            "split": name,
            "label": 1,
            "defect_type": "x",
            "mask_path": None,
            "sha256": str(i),
            "category": "plate",
        }
        for i, name in enumerate(("test", "validation"))
    ]
    trap = pa.concat_tables([kept, pa.Table.from_pylist(missing, schema=CATEGORY_SCHEMA)])
    assert_same_detector(Detector.fit(trap, settings, device="cpu"), detector)


def assert_same_detector(one: Detector, other: Detector) -> None:
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert one.network.scales == other.network.scales
    assert (one.threshold, one.provenance, one.settings) == (
        other.threshold,
        other.provenance,
        other.settings,
    )


def test_the_same_seed_gives_the_same_detector_whatever_the_order_of_the_table(
    detector: Detector, table: pa.Table, settings: DetectorSettings
) -> None:
    turned = table.take(list(reversed(range(len(table)))))
    assert_same_detector(Detector.fit(turned, settings, device="cpu"), detector)


def test_a_work_folder_keeps_what_was_finished(
    detector: Detector, table: pa.Table, settings: DetectorSettings, tmp_path: Path
) -> None:
    tasks: list[str] = []
    for _ in range(2):
        tasks.clear()
        again = Detector.fit(
            table,
            settings,
            work=tmp_path,
            device="cpu",
            progress=lambda task, done, total: tasks.append(task),
        )
        assert_same_detector(again, detector)
    assert set(tasks) == {"threshold"}


@pytest.mark.parametrize(("name", "least"), [("fit", 2), ("validation", 1)])
def test_too_few_images_are_said_before_anything_is_trained(
    table: pa.Table, settings: DetectorSettings, name: str, least: int
) -> None:
    few = pa.concat_tables(
        [
            rows_of(table, name)[: least - 1],
            table.filter(pa.compute.not_equal(table["split"], name)),
        ]
    )
    tasks: list[str] = []
    with pytest.raises(DataError):
        Detector.fit(
            few, settings, device="cpu", progress=lambda task, done, total: tasks.append(task)
        )
    assert tasks == []


def test_a_texture_that_changed_makes_other_artifacts(
    table: pa.Table, settings: DetectorSettings, tmp_path: Path
) -> None:
    (tmp_path / "textures").mkdir()
    texture = draw_normal(np.random.default_rng(5), (64, 64))
    picture = tmp_path / "textures" / "a.bmp"
    keys = []
    for level in (0, 1):
        texture[0, 0] = level
        Image.fromarray(texture).save(picture)  # not compressed: the file's size stays
        keys.append(
            prepare(
                table, settings, tmp_path / "textures", ArtifactStore(tmp_path), CPU
            ).pipeline.data.textures_key
        )
    picture.rename(tmp_path / "textures" / "renamed.bmp")
    (tmp_path / "textures" / "notes.txt").write_text("mine")
    keys.append(
        prepare(
            table, settings, tmp_path / "textures", ArtifactStore(tmp_path), CPU
        ).pipeline.data.textures_key
    )
    assert keys[0] != keys[1] == keys[2]


# ---- predict ----


def test_maps_and_scores_are_in_the_unit_interval_and_scores_are_the_maps_largest(
    detector: Detector, paths: list[str]
) -> None:
    maps, scores, verdicts = detector.predict(paths)
    assert maps.shape == (len(paths), 64, 64)
    assert (maps.dtype, scores.dtype, verdicts.dtype) == (np.float32, np.float32, np.bool_)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert (scores == maps.max(axis=(1, 2))).all()
    assert (verdicts == (scores > detector.threshold.value)).all()


def test_paths_and_arrays_and_any_batch_size_give_the_same_answers(
    detector: Detector, paths: list[str]
) -> None:
    expected = detector.predict(paths)
    arrays = [read_image(path) for path in paths]
    answers = [
        detector.predict([Path(path) for path in paths], batch_size=1),
        detector.predict(arrays, batch_size=4),
        detector.predict(np.stack(arrays), batch_size=5),
        detector.predict([*paths[:3], *arrays[3:]]),
    ]
    for answer in answers:
        np.testing.assert_allclose(answer.maps, expected.maps, atol=1e-5)
        np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-5)


def test_an_image_s_answer_does_not_depend_on_the_images_asked_about_with_it(
    detector: Detector, paths: list[str]
) -> None:
    image = read_image(paths[0])
    alone = detector.predict([image])
    for other in (np.zeros((64, 64, 3), np.uint8), np.full((300, 20, 3), 255, np.uint8)):
        together = detector.predict([other, image, other])
        np.testing.assert_allclose(together.maps[1], alone.maps[0], atol=1e-5)


def test_no_images_give_no_answers(detector: Detector) -> None:
    maps, scores, verdicts = detector.predict([])
    assert (maps.shape, scores.shape, verdicts.shape) == ((0, 64, 64), (0,), (0,))


def test_each_prediction_has_its_map_at_the_image_s_own_size(
    detector: Detector, paths: list[str]
) -> None:
    images = [
        read_image(paths[0]),
        draw_normal(np.random.default_rng(1), (50, 90)),
        draw_normal(np.random.default_rng(2), (200, 33)),
    ]
    whole = detector.predict(images)
    each = list(detector.predict_each(images, batch_size=2))
    assert [found.shape for found, _, _ in each] == [(64, 64), (50, 90), (200, 33)]
    np.testing.assert_allclose([score for _, score, _ in each], whole.scores, atol=1e-5)
    assert [verdict for _, _, verdict in each] == whole.verdicts.tolist()
    np.testing.assert_allclose(each[0][0], whole.maps[0], atol=1e-5)


def test_progress_is_told_up_to_the_last_image(detector: Detector, paths: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    detector.predict(
        paths, batch_size=4, progress=lambda *report: told.append(report), task="looking"
    )
    assert told[-1] == ("looking", len(paths), len(paths))
    assert [done for _, done, _ in told[:-1]] == [4 * i for i in range(1, len(told))]


def test_the_maps_of_a_study_are_those_of_the_saved_detector(
    detector: Detector, table: pa.Table, settings: DetectorSettings, tmp_path: Path
) -> None:
    """Selection looks at stored maps: they must describe what the detector will answer."""
    prepared = prepare(table, settings, None, ArtifactStore(tmp_path), CPU)
    rows = rows_of(table, "test")
    maps = prepared.pipeline.maps(
        settings.finetune.joint_epochs, settings.flow.depth, place_rows(rows, settings)
    )
    fused = fuse(maps.density, maps.classifier, settings.fusion_weight).numpy()
    np.testing.assert_allclose(
        fused, detector.predict(rows["path"].to_pylist()).maps, atol=5e-3
    )  # features are stored in half precision


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((0, 64, 3), np.uint8),
    ],
    ids=["grey", "alpha", "float", "empty"],
)
def test_arrays_that_are_no_rgb_images_are_refused(detector: Detector, image: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"\(h, w, 3\) uint8"):
        detector.predict([image])


def test_a_file_that_can_t_be_read_is_named(
    detector: Detector, paths: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(Path(paths[0]).read_bytes()[:200])
    with pytest.raises(ImageError, match=r"cut\.png"):
        detector.predict([paths[0], path])


@pytest.mark.parametrize("given", ["a.png", Path("a.png")])
def test_a_lone_path_is_refused_instead_of_being_read_letter_by_letter(
    detector: Detector, given: Any
) -> None:
    with pytest.raises(SettingsError, match=r"list of images"):
        detector.predict(given)
    with pytest.raises(SettingsError, match=r"list of images"):
        next(detector.predict_each(given))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_images_is_refused(detector: Detector, paths: list[str], size: int) -> None:
    with pytest.raises(SettingsError, match="batch_size"):
        detector.predict(paths, batch_size=size)


# ---- images of other shapes ----


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Detector:
    """A detector for long pictures on a square canvas, padded."""
    folder = write_category(tmp_path_factory.mktemp("long") / "strip", size=(48, 96))
    return Detector.fit(
        split(folder), tiny(resnet18_weights, ImageSettings(64, 64, "fit")), device="cpu"
    )


def test_padding_scores_nothing_and_never_decides(fitting: Detector) -> None:
    images = [draw_normal(np.random.default_rng(i), (48, 96)) for i in range(4)]
    maps, scores, _ = fitting.predict(images)
    assert (maps[:, :16] == 0).all()  # 96 x 48 becomes 64 x 32, in the middle
    assert (maps[:, 48:] == 0).all()
    assert (maps[:, 16:48] > 0).mean() > 0.9
    assert (scores == maps[:, 16:48].max(axis=(1, 2))).all()
    inside = maps[:, 16:48].mean(axis=(0, 2))
    assert inside[[0, -1]].max() < inside.mean() + 3 * inside.std()


@pytest.mark.parametrize("size", [(96, 48), (64, 64), (500, 20), (12, 400)])
def test_images_of_any_shape_are_scored_alone_as_together(
    fitting: Detector, size: tuple[int, int]
) -> None:
    image, wide = (
        draw_normal(np.random.default_rng(3), size),
        draw_normal(np.random.default_rng(4), (48, 96)),
    )
    alone, together = fitting.predict([image]), fitting.predict([wide, image])
    assert np.isfinite(alone.maps).all()
    assert alone.scores[0] > 0
    np.testing.assert_allclose(together.maps[1], alone.maps[0], atol=1e-5)
    found, score, _ = next(fitting.predict_each([image]))
    assert found.shape == size
    assert score == pytest.approx(float(alone.scores[0]), abs=1e-5)


def test_thin_pictures_alone_make_a_detector(resnet18_weights: Path, tmp_path: Path) -> None:
    """On a square canvas they are thinner than half a cell of the deepest level."""
    folder = write_category(tmp_path / "wire", size=(12, 300), train=8)
    thin = Detector.fit(
        split(folder), tiny(resnet18_weights, ImageSettings(64, 64, "fit")), device="cpu"
    )
    assert 0 < thin.threshold.value <= 1


# ---- save and load ----


@pytest.fixture
def saved(detector: Detector, tmp_path: Path) -> Path:
    detector.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_detector_gives_equal_answers_and_knows_the_same(
    detector: Detector, saved: Path, paths: list[str]
) -> None:
    loaded = Detector.load(saved, device="cpu")
    assert sorted(p.name for p in saved.iterdir()) == ["detector.json", "detector.safetensors"]
    assert_same_detector(loaded, detector)
    expected, found = detector.predict(paths), loaded.predict(paths)
    assert (found.maps == expected.maps).all()
    assert (found.scores == expected.scores).all()
    assert (found.verdicts == expected.verdicts).all()


def test_a_detector_of_other_training_settings_comes_back_equal(
    table: pa.Table, settings: DetectorSettings, paths: list[str], tmp_path: Path
) -> None:
    finetune = dataclasses.replace(settings.finetune, skips=False, loss="dice", schedule="cosine")
    detector = Detector.fit(table, dataclasses.replace(settings, finetune=finetune), device="cpu")
    detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model", device="cpu")
    assert loaded.settings.finetune == finetune
    assert (loaded.predict(paths).maps == detector.predict(paths).maps).all()


def test_the_description_is_readable_without_clsnf_and_says_each_fact_once(
    detector: Detector, saved: Path
) -> None:
    said = json.loads((saved / "detector.json").read_text())
    assert said["format"] == FORMAT
    uses = said["uses"]
    fusion = ("fusion_weight", "score_weight", "smoothing")
    assert said["trained_with"] | {name: uses[name] for name in fusion} == to_dict(
        detector.settings
    )
    assert not set(fusion) & set(said["trained_with"])
    assert uses["threshold"] == dataclasses.asdict(detector.threshold)
    assert uses["level_scales"] == [list(scale) for scale in detector.network.scales]
    assert set(said["preprocessing"]) == {"colour", "resize", "range", "mean", "std"}
    assert said["provenance"]["image_statistics"] == detector.provenance.image_statistics != {}


def test_a_description_is_what_was_saved_whatever_its_tensors_are(
    detector: Detector, saved: Path
) -> None:
    said = read_description(saved)
    assert said.settings == detector.settings
    assert said.fusion == detector.network.fusion
    assert said.threshold == detector.threshold
    assert said.provenance == detector.provenance
    assert list(said.level_scales) == list(detector.network.scales)
    edit_uses(fusion_weight=0.5)(saved)
    flip(saved)
    assert read_description(saved).version != said.version
    assert read_description(saved).fusion.fusion_weight == 0.5


def test_another_false_reject_rate_stands_beside_the_one_of_training(
    detector: Detector, saved: Path
) -> None:
    other = Detector.load(saved, device="cpu")
    other.calibrate(false_reject_rate=0.2)
    other.save(saved)
    said = json.loads((saved / "detector.json").read_text())
    assert said["trained_with"]["validation"]["false_reject_rate"] == 0.01
    assert said["uses"]["threshold"]["false_reject_rate"] == 0.2
    assert Detector.load(saved, device="cpu").settings == detector.settings


def as_format_2(folder: Path) -> None:
    """Rewrite a description as versions before format 3 did."""
    said = json.loads((folder / "detector.json").read_text())
    uses = said.pop("uses")
    scales, threshold = uses.pop("level_scales"), uses.pop("threshold")
    asked = said.pop("trained_with")
    said["provenance"]["looks"] = said["provenance"].pop("image_statistics")
    said |= {
        "format": 2,
        "settings": asked | uses,
        "preprocessing": said["preprocessing"] | asked["image"],
        "channels": [64, 128],
        "level_scales": scales,
        "fusion_weight": uses["fusion_weight"],
        "threshold": threshold,
    }
    (folder / "detector.json").write_text(json.dumps(said))


def test_a_detector_of_format_2_is_the_same_detector(
    detector: Detector, saved: Path, paths: list[str]
) -> None:
    as_format_2(saved)
    loaded = Detector.load(saved, device="cpu")
    assert_same_detector(loaded, detector)
    assert (loaded.predict(paths).maps == detector.predict(paths).maps).all()
    loaded.save(saved)
    assert json.loads((saved / "detector.json").read_text())["format"] == FORMAT
    assert_same_detector(Detector.load(saved, device="cpu"), detector)


def test_the_fusion_weight_of_format_2_that_no_detector_used_counts_for_nothing(
    detector: Detector, saved: Path
) -> None:
    as_format_2(saved)
    edit(fusion_weight=0.99)(saved)
    assert read_description(saved).fusion == detector.settings.fusion
    assert Detector.load(saved, device="cpu").fusion_weight == detector.fusion_weight


def test_settings_that_the_first_detectors_of_format_2_did_not_have_are_defaults(
    detector: Detector, saved: Path
) -> None:
    as_format_2(saved)
    said = json.loads((saved / "detector.json").read_text())
    for name in ("fusion_weight", "score_weight", "smoothing", "seed"):
        del said["settings"][name]
    for name in ("imported", "validation_peaks", "looks"):
        del said["provenance"][name]
    (saved / "detector.json").write_text(json.dumps(said))
    loaded = Detector.load(saved, device="cpu")
    assert loaded.settings == detector.settings
    assert loaded.provenance.image_statistics == {}


def test_loading_runs_no_pickle_fetches_nothing_and_needs_no_weights_file(
    saved: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("called")

    facts = json.loads((saved / "detector.json").read_text())
    facts["trained_with"]["backbone"]["weights"] = "/none/weights.safetensors"
    (saved / "detector.json").write_text(json.dumps(facts))
    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (socket.socket, "connect"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert Detector.load(saved, device="cpu").predict(paths[:1]).scores[0] > 0


def test_saving_again_replaces_the_detector(detector: Detector, saved: Path) -> None:
    before = (saved / "detector.safetensors").read_bytes()
    detector.save(saved)
    assert (saved / "detector.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_folder_with_other_things_is_left_alone(detector: Detector, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="holds other files") as caught:
        detector.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert "\n" not in str(caught.value)


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change entries of the facts; None takes one away."""

    def change(folder: Path) -> None:
        facts = json.loads((folder / "detector.json").read_text()) | changes
        (folder / "detector.json").write_text(
            json.dumps({name: value for name, value in facts.items() if value is not None})
        )

    return change


def edit_settings(section: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / "detector.json").read_text())
        facts["trained_with"][section] |= changes
        (folder / "detector.json").write_text(json.dumps(facts))

    return change


def edit_uses(**changes: Any) -> Callable[[Path], None]:
    """As :func:`edit`, what the detector uses."""

    def change(folder: Path) -> None:
        facts = json.loads((folder / "detector.json").read_text())
        uses = facts["uses"] | changes
        facts["uses"] = {name: value for name, value in uses.items() if value is not None}
        (folder / "detector.json").write_text(json.dumps(facts))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return change


def flip(folder: Path) -> None:
    content = bytearray((folder / "detector.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "detector.safetensors").write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no facts": (lambda folder: (folder / "detector.json").unlink(), "is no saved detector"),
    "no tensors": (
        lambda folder: (folder / "detector.safetensors").unlink(),
        "is no saved detector",
    ),
    "facts cut short": (cut("detector.json"), "is damaged"),
    "tensors cut short": (cut("detector.safetensors"), "is damaged"),
    "one bit": (flip, "is damaged"),
    "facts of another kind": (
        lambda folder: (folder / "detector.json").write_text("[]"),
        "is damaged",
    ),
    "a newer format": (edit(format=FORMAT + 1), f"format {FORMAT + 1}"),
    "an older format": (edit(format=1), "format 1"),
    "an unknown setting": (edit_settings("flow", glow=3), "unknown setting 'glow'"),
    "a setting out of range": (edit_settings("flow", depth=-3), "depth is -3"),
    "another depth": (edit_settings("flow", depth=2), "blocks"),
    "a fact twice": (edit(trained_with={"fusion_weight": 0.99}), "fusion_weight stands under"),
    "no settings": (edit(trained_with=None), "trained_with"),
    "nothing in use": (edit(uses=None), "uses"),
    "no fusion weight": (edit_uses(fusion_weight=None), "fusion_weight must be given"),
    "a fusion weight out of range": (edit_uses(fusion_weight=1.5), "fusion_weight is 1.5"),
    "no scales": (edit_uses(level_scales=None), "level_scales"),
    "a scale too few": (edit_uses(level_scales=[[1.0, 1.0]]), "level_scales"),
    "scales that are words": (edit_uses(level_scales=[["a", "b"], ["a", "b"]]), "level_scales"),
    "no threshold": (edit_uses(threshold=None), "threshold"),
    "half a threshold": (edit_uses(threshold={"value": 0.5}), "threshold"),
    "no provenance": (edit(provenance=None), "provenance"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_detector_is_refused_in_one_line_that_says_what_is_wrong(
    saved: Path, name: str
) -> None:
    damage, words = DAMAGES[name]
    damage(saved)
    with pytest.raises(ModelError, match=words) as caught:
        Detector.load(saved, device="cpu")
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none"):
        Detector.load(tmp_path / "none")


# ---- without Ray ----

SCRIPT = """
import json, sys
import pyarrow.parquet as pq
import clsnf.detector
from clsnf.core.config import DetectorSettings, from_dict
settings = from_dict(DetectorSettings, json.loads(sys.argv[2]))
table = pq.read_table(sys.argv[1])
detector = clsnf.detector.Detector.fit(table, settings, device="cpu")
detector.predict(table["path"].to_pylist()[:1])
print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""


def test_fitting_and_predicting_import_no_ray(
    table: pa.Table, settings: DetectorSettings, tmp_path: Path
) -> None:
    pq.write_table(table, tmp_path / "table.parquet")
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tmp_path / "table.parquet"),
        json.dumps(to_dict(settings)),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout.strip() == "[]"


# ---- streams ----


def test_fitting_from_a_stream_gives_the_detector_of_fitting_from_memory(
    table: pa.Table, settings: DetectorSettings
) -> None:
    detectors = [
        Detector.fit(table, settings, device="cpu", stream=StreamChoice(kind, ""))
        for kind in ("memory", "local")
    ]
    first, second = (detector.network.state_dict() for detector in detectors)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert detectors[0].threshold == detectors[1].threshold
    assert detectors[0].provenance == detectors[1].provenance


def test_workers_with_a_copy_of_the_detector_say_what_it_says(
    detector: Detector, table: pa.Table
) -> None:
    paths = table["path"].to_pylist()[:5]
    worker = cloudpickle.loads(cloudpickle.dumps(partial(ScoreWorker, detector.network)))(
        CPU
    )  # as Ray sends it
    loaded = load_images(paths, detector.settings.image)
    found = worker(ImageBatch(loaded.images, loaded.valid, torch.arange(5)))
    prediction = detector.predict(paths, batch_size=5)
    assert np.array_equal(found["maps"], prediction.maps)
    assert np.array_equal(found["scores"], prediction.scores)


def _answers_of(detector: Detector, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    found = detector.predict(pictures)
    return found.maps, found.scores


def _some_pictures() -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.stack([draw_normal(rng, (64, 64)) for _ in range(4)])


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_detector_is_the_same_and_independent(detector: Detector, way: str) -> None:
    made = pickle.loads(pickle.dumps(detector)) if way == "pickle" else copy.deepcopy(detector)
    expected, found = detector.predict(_some_pictures()), made.predict(_some_pictures())
    assert np.array_equal(found.maps, expected.maps)
    assert np.array_equal(found.scores, expected.scores)
    assert made.threshold == detector.threshold
    assert made.provenance == detector.provenance
    assert made.device == detector.device
    np.testing.assert_array_equal(made.normal_scores, detector.normal_scores)
    for mine, theirs in zip(made.network.parameters(), detector.network.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.slow
def test_a_spawned_process_gets_a_detector_and_answers_the_same(detector: Detector) -> None:
    pictures = _some_pictures()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        maps, scores = pool.submit(_answers_of, detector, pictures).result(timeout=120)
    expected = detector.predict(pictures)
    assert np.array_equal(maps, expected.maps)
    assert np.array_equal(scores, expected.scores)


_FORKS = """
import os, sys
import numpy as np, torch
from clsnf.core.threads import use_torch_threads
from clsnf.detector import Detector
torch.set_num_threads(2)
detector = Detector.load(sys.argv[1], "cpu")
pictures = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
expected = detector.predict(pictures)
child = os.fork()
if child == 0:
    use_torch_threads(2)
    found = detector.predict(pictures)
    os._exit(0 if np.allclose(found.maps, expected.maps, atol=1e-5) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_answers_with_the_detector_of_its_parent(
    detector: Detector, tmp_path: Path
) -> None:
    detector.save(tmp_path / "model")
    # In a process group: a child that hangs must end with its parent.
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKS, str(tmp_path / "model")], start_new_session=True
    )
    try:
        assert process.wait(timeout=120) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
