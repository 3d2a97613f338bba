"""Exported networks: their maps are the detector's, in files that other programs open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnxruntime
import pytest
import torch

from clsnf.cli import main
from clsnf.core.errors import ModelError
from clsnf.data.images import place, write_image
from clsnf.detector import Detector
from clsnf.model.resample import _matrix
from clsnf.model.score_maps import Scores
from clsnf.serving import export
from clsnf.serving.export import export_detector
from tests.support.small_server import picture


def placed(
    detector: Detector, sizes: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = [place(picture(seed, size), detector.settings.image) for seed, size in enumerate(sizes)]
    valid = (
        torch.stack([p.valid for _, p in found])
        if detector.settings.image.aspect == "fit"
        else None
    )
    return torch.stack([image for image, _ in found]), valid


SIZES = [(64, 80), (90, 40), (64, 96), (30, 30), (70, 70)]


@pytest.mark.parametrize("category", ["plate", "sheet"])
def test_an_onnx_file_gives_the_detectors_maps_for_any_number_of_pictures(
    winners: Path, tmp_path: Path, category: str
) -> None:
    detector = Detector.load(winners / category, device="cpu")
    export_detector(detector, tmp_path / "network.onnx", "onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"]
    )
    images, valid = placed(detector, SIZES)
    inputs = {"images": images.numpy()} | ({} if valid is None else {"valid": valid.numpy()})
    maps, scores = session.run(["maps", "scores"], inputs)
    expected_maps, expected_scores = detector.score_placed(images, valid)
    np.testing.assert_allclose(maps, expected_maps, atol=1e-4)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert said["category"] == category
    assert json.loads(said["threshold"]) == detector.threshold.value


@pytest.mark.parametrize("category", ["plate", "sheet"])
def test_a_torch_program_gives_the_detectors_maps(
    winners: Path, tmp_path: Path, category: str
) -> None:
    detector = Detector.load(winners / category, device="cpu")
    export_detector(detector, tmp_path / "network.pt2", "torch")
    images, valid = placed(detector, SIZES)
    program = torch.export.load(str(tmp_path / "network.pt2")).module()
    maps, scores = program(images) if valid is None else program(images, valid)
    expected_maps, expected_scores = detector.score_placed(images, valid)
    np.testing.assert_allclose(maps.detach().numpy(), expected_maps, atol=1e-4)
    np.testing.assert_allclose(scores.detach().numpy(), expected_scores, atol=1e-4)


def test_a_network_that_differs_is_not_written(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector.load(winners / "plate", device="cpu")
    fuse_scores = export.fuse_scores

    def darker(*arguments: Any) -> Scores:
        maps, scores = fuse_scores(*arguments)
        return Scores(0.9 * maps, 0.9 * scores)

    monkeypatch.setattr(export, "fuse_scores", darker)
    with pytest.raises(ModelError, match="differ"):
        export_detector(detector, tmp_path / "network.pt2", "torch")
    assert list(tmp_path.iterdir()) == []


def test_exporting_leaves_the_detector_as_it_was_though_it_was_never_asked_before(
    winners: Path, tmp_path: Path
) -> None:
    _matrix.cache_clear()
    detector = Detector.load(winners / "plate", device="cpu")
    export_detector(detector, tmp_path / "network.pt2", "torch")
    again = Detector.load(winners / "plate", device="cpu")
    np.testing.assert_array_equal(
        detector.predict([picture()]).maps, again.predict([picture()]).maps
    )


def test_the_command_compares_on_given_pictures_and_says_how_close(
    winners: Path, tmp_path: Path
) -> None:
    write_image(tmp_path / "a.png", picture())
    command = [
        "export",
        str(winners / "plate"),
        "--format",
        "torch",
        "--out",
        str(tmp_path / "p.pt2"),
        "--pictures",
        str(tmp_path),
    ]
    done = click.testing.CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "on 4 pictures its maps" in done.output
    assert (tmp_path / "p.pt2").is_file()
