"""A category's workbench: its pipeline and its validation images."""

from pathlib import Path

import torch

from clsnf.core.config import DetectorSettings, from_dict
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.evaluation.workbench import Workbench
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.prepare import place_rows, prepare, rows_of
from tests.support.small_data import write_category


def test_a_workbench_has_the_validation_images_and_the_maps_of_any_images(
    tmp_path: Path, resnet18_weights: Path
) -> None:
    settings = from_dict(
        DetectorSettings,
        {
            "backbone": {"name": "resnet18", "levels": [1, 2], "weights": str(resnet18_weights)},
            "image": {"height": 64, "width": 64},
            "flow": {"depth": 0, "memory": 20},
            "finetune": {"frozen_epochs": 1, "joint_epochs": 0, "decoder_width": 16},
        },
    )
    write_category(tmp_path / "nut", train=12)
    table = assign_splits(read_category(tmp_path, "nut"), 0.3, 0)
    validation = write_validation_set(
        table, tmp_path / "validation", images_per_family=1, seed=0, mask_mode="off"
    )
    store = ArtifactStore(tmp_path / "stages")
    prepared = prepare(table, settings, None, store, torch.device("cpu"))
    bench = Workbench.load(prepared, validation)

    assert len(bench.images.images) == len(bench.labels.families) == len(validation)
    assert list(bench.labels.families) == validation["defect_type"].to_pylist()
    assert (bench.store, bench.pipeline) == (store, prepared.pipeline)
    maps = bench.maps(0, 0)
    assert maps.density.shape == maps.classifier.shape == (len(validation), 64, 64)
    test = place_rows(rows_of(table, "test"), settings)
    assert bench.maps(0, 0, test).density.shape == (len(test.images), 64, 64)
    assert store.computed["flows"] == 1
