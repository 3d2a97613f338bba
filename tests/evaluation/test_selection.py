"""What selection looks at, held against the metrics themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsnf.core.config import DetectorSettings, ImageSettings
from clsnf.core.errors import MetricError, SettingsError
from clsnf.data.images import write_image, write_mask
from clsnf.evaluation.selection import (
    ValidationLabels,
    best_weight,
    check_objective,
    choose_score_weight,
    family_metrics,
    mean_over_families,
    scores_at,
    scores_of_map,
    sweep_weights,
    validation_labels,
)
from clsnf.metrics import METRICS, PixelSample, image_auroc, pixel_ap, pixel_auroc
from clsnf.model.score_maps import Scores
from clsnf.training.pipeline import PlacedImages, ScoreMaps

H, W = 12, 16
FAMILIES = ("good", "good", "good", "scar", "scar", "stain", "stain", "stain")


@pytest.fixture
def maps() -> ScoreMaps:
    generator = torch.Generator().manual_seed(0)
    density, classifier = (torch.rand(len(FAMILIES), H, W, generator=generator) for _ in range(2))
    return ScoreMaps(density, classifier)


@pytest.fixture
def labels() -> ValidationLabels:
    masks = np.zeros((len(FAMILIES), H, W), bool)
    for index, family in enumerate(FAMILIES):
        if family != "good":
            masks[index, 2 + index : 6 + index, 3 : 4 + index] = True
    return ValidationLabels(FAMILIES, masks, None)


def metrics_at(
    maps: ScoreMaps, labels: ValidationLabels, weight: float, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    return family_metrics(scores_at(maps, weight, labels.valid), labels, names)


def test_a_familys_metrics_are_those_of_its_images_and_all_normals(
    maps: ScoreMaps, labels: ValidationLabels
) -> None:
    weight = 0.3
    fused = (0.7 * maps.density + 0.3 * maps.classifier).numpy().astype(np.float32)
    found = metrics_at(maps, labels, weight, ("pixel_ap", "pixel_auroc", "image_auroc"))
    assert set(found) == {"scar", "stain"}
    for family, chosen in {"scar": [0, 1, 2, 3, 4], "stain": [0, 1, 2, 5, 6, 7]}.items():
        samples = [PixelSample(fused[i], labels.masks[i]) for i in chosen]
        is_defect = [FAMILIES[i] != "good" for i in chosen]
        assert found[family]["pixel_ap"] == pytest.approx(pixel_ap(samples), abs=1e-6)
        assert found[family]["pixel_auroc"] == pytest.approx(pixel_auroc(samples), abs=1e-6)
        assert found[family]["image_auroc"] == pytest.approx(
            image_auroc(fused[chosen].max(axis=(1, 2)), is_defect)
        )


def test_the_score_weight_is_the_one_whose_map_tells_normals_from_defects(
    labels: ValidationLabels,
) -> None:
    is_defect = torch.tensor([family != "good" for family in FAMILIES])
    useless, telling = torch.rand(
        2, len(FAMILIES), H, W, generator=torch.Generator().manual_seed(3)
    )
    telling[is_defect] += 10
    both = ScoreMaps(useless, telling)
    assert choose_score_weight(both, labels, [0.0, 0.9, 0.8, 1.0]) == 0.8
    assert choose_score_weight(both, labels, [0.0]) == 0.0


def test_image_metrics_are_of_the_scores_and_pixel_metrics_of_the_maps(
    maps: ScoreMaps, labels: ValidationLabels
) -> None:
    is_defect = torch.tensor([float(family != "good") for family in FAMILIES])
    found = family_metrics(Scores(maps.density, is_defect), labels, ("image_auroc", "pixel_ap"))
    assert mean_over_families(found, "image_auroc") == 1
    alone = family_metrics(scores_of_map(maps.density, None), labels, ("pixel_ap",))
    assert mean_over_families(found, "pixel_ap") == mean_over_families(alone, "pixel_ap")


def test_the_objective_is_the_plain_mean_over_families(
    maps: ScoreMaps, labels: ValidationLabels
) -> None:
    found = metrics_at(maps, labels, 0.5, ("pixel_ap",))
    assert mean_over_families(found, "pixel_ap") == pytest.approx(
        (found["scar"]["pixel_ap"] + found["stain"]["pixel_ap"]) / 2
    )


def test_padding_counts_as_no_pixel(maps: ScoreMaps, labels: ValidationLabels) -> None:
    """What a map holds on padding, and what a mask marks there, must change no metric."""
    valid = torch.zeros(len(FAMILIES), H, W, dtype=torch.bool)
    valid[:, :, 3:13] = True
    names = ("pixel_ap", "pixel_auroc", "image_auroc")
    before = metrics_at(maps, ValidationLabels(FAMILIES, labels.masks, valid), 0.3, names)

    for score_map in (maps.density, maps.classifier):
        score_map[~valid] = 1.0
    masks = labels.masks.copy()
    masks[3:, :, 13:] = True
    assert metrics_at(maps, ValidationLabels(FAMILIES, masks, valid), 0.3, names) == before

    cut = ScoreMaps(maps.density[:, :, 3:13], maps.classifier[:, :, 3:13])
    assert (
        metrics_at(cut, ValidationLabels(FAMILIES, labels.masks[:, :, 3:13], None), 0.3, names)
        == before
    )


def test_a_sweep_is_the_objective_of_each_weight(maps: ScoreMaps, labels: ValidationLabels) -> None:
    weights = np.array([0.0, 0.25, 1.0])
    swept = sweep_weights(maps, labels, ("pixel_ap",), weights)
    assert [at.fusion_weight for at in swept] == [0.0, 0.25, 1.0]
    for at in swept:
        expected = metrics_at(maps, labels, at.fusion_weight, ("pixel_ap",))
        assert at.families == expected
        assert at.mean("pixel_ap") == mean_over_families(expected, "pixel_ap")
    best = best_weight(swept, "pixel_ap")
    assert best.mean("pixel_ap") == max(at.mean("pixel_ap") for at in swept)
    assert best_weight([swept[0], swept[0], swept[1]], "pixel_ap").fusion_weight in (0.0, 0.25)
    only = ScoreMaps(maps.density, torch.zeros_like(maps.classifier))
    assert sweep_weights(only, labels, ("pixel_ap",), np.array([0.0]))[0] == swept[0], (
        "at w = 0 the classifier has no part"
    )


def test_every_metric_but_oracles_may_be_the_objective(
    maps: ScoreMaps, labels: ValidationLabels
) -> None:
    for name, metric in METRICS.items():
        if metric.oracle:
            with pytest.raises(SettingsError, match=f"The objective is '{name}'"):
                check_objective(name)
        else:
            check_objective(name)
            assert 0 <= mean_over_families(metrics_at(maps, labels, 0.5, (name,)), name) <= 1


def test_an_objective_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"The objective is 'pixel_app'. Did you mean 'pixel_ap'\?"
    ):
        check_objective("pixel_app")


def test_maps_that_are_not_finite_are_an_error_and_no_metric(
    maps: ScoreMaps, labels: ValidationLabels
) -> None:
    maps.density[0, 0, 0] = torch.nan
    with pytest.raises(MetricError, match="must be finite"):
        metrics_at(maps, labels, 0.5, ("pixel_ap",))


# ---- placed masks ----


def placed(folder: Path, mask: np.ndarray, settings: ImageSettings) -> np.ndarray:
    write_image(folder / "i.png", np.full((*mask.shape, 3), 90, np.uint8))
    write_mask(folder / "m.png", mask)
    rows: list[dict[str, Any]] = [
        {"path": str(folder / "i.png"), "mask_path": None, "defect_type": "good"},
        {"path": str(folder / "i.png"), "mask_path": str(folder / "m.png"), "defect_type": "scar"},
    ]
    images = PlacedImages(torch.zeros(2, 3, *settings.size, dtype=torch.uint8), None, "")
    found = validation_labels(rows, DetectorSettings(image=settings), images)
    assert found.families == ("good", "scar")
    assert not found.masks[0].any()
    return found.masks[1]


def test_masks_are_placed_as_their_images_are(tmp_path: Path) -> None:
    mask = np.zeros((128, 256), bool)
    mask[:64, :128] = True
    expected = np.zeros((64, 64), bool)
    expected[:32, :32] = True
    assert (placed(tmp_path, mask, ImageSettings(64, 64)) == expected).all()
    expected = np.zeros((64, 64), bool)
    expected[16:32, :32] = True
    assert (placed(tmp_path, mask, ImageSettings(64, 64, "fit")) == expected).all()


@pytest.mark.parametrize("aspect", ["squeeze", "fit"])
@pytest.mark.parametrize("at", [(0, 0), (401, 333), (799, 599), (2, 599)])
def test_a_defect_smaller_than_a_pixel_of_the_network_does_not_vanish(
    tmp_path: Path, at: tuple[int, int], aspect: str
) -> None:
    """A family's metrics are not defined where a defect has no pixel: one small defect would fail
    every trial.
    """
    mask = np.zeros((800, 600), bool)
    mask[at] = True
    marked = placed(tmp_path, mask, ImageSettings(64, 64, aspect))
    assert marked.sum() == 1
    scale = (64 / 800, 64 / 600) if aspect == "squeeze" else (64 / 800, 48 / 600)
    expected = (int(at[0] * scale[0]), int(at[1] * scale[1]) + (8 if aspect == "fit" else 0))
    assert tuple(np.argwhere(marked)[0]) == expected
