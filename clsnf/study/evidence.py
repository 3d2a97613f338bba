"""What a report needs of a category and nobody could compute again without the images.

It is written once, right after the winner was evaluated::

    evidence/<category>/images.parquet   a row for each validation and test image: scores, verdict
    evidence/<category>/regions.parquet  a row for each defect region of the test set: how large,
                                         how visible, how much of it was found
    evidence/<category>/pictures/        the cases that a person wants to see, each as input, truth
                                         and the three maps
    evidence/<category>/facts.json       the cases, learning curves, hardware; written last: where
                                         it is, all else is

The baseline is flows on the pretrained backbone (``cflow`` in :mod:`clsnf.benchmark.systems`). The
same code evaluates it on the same images. Its depth is chosen on validation defects, as the
winner's was, and its flows are artifacts like any other. This module opens no test images: the
caller hands over what it unlocked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from torch import Tensor

from clsnf.core.config import DetectorSettings
from clsnf.core.files import atomic_write
from clsnf.core.progress import Progress
from clsnf.detector import Detector, package_versions, validation_normals
from clsnf.evaluation.compare import Comparison
from clsnf.evaluation.evaluate import verdict_rates
from clsnf.evaluation.selection import family_metrics, mean_over_families, scores_of_map
from clsnf.evaluation.workbench import Workbench
from clsnf.model.score_maps import Scores, image_scores
from clsnf.results import (
    BaselineResult,
    EvidenceFacts,
    EvidenceResult,
    ImageEvidence,
    LearningCurves,
    TestResult,
    write_result,
    write_rows,
)
from clsnf.study.cases import (
    ScoredImages,
    choose_cases,
    draw_cases,
    measure_regions,
    strangest_normals,
)
from clsnf.study.context import StudyContext
from clsnf.training.calibrate import threshold_from_normals
from clsnf.training.pipeline import PlacedImages, ScoreMaps
from clsnf.training.prepare import place_rows


@dataclass(frozen=True)
class Winner:
    """A category's winner, with what it was made from.

    Attributes:
        category: the product.
        detector: the winner.
        bench: its pipeline, and the validation images.
        validation_maps: its score maps of the validation images.
    """

    category: str
    detector: Detector
    bench: Workbench
    validation_maps: ScoreMaps

    @property
    def settings(self) -> DetectorSettings:
        """The detector's settings."""
        return self.detector.settings

    def maps(self, images: PlacedImages) -> ScoreMaps:
        """Its score maps of images."""
        if images is self.bench.images:
            return self.validation_maps
        settings = self.settings
        return self.bench.maps(settings.finetune.joint_epochs, settings.flow.depth, images)


@dataclass(frozen=True)
class Baseline:
    """Flows of some depth on the pretrained backbone.

    Attributes:
        bench: the winner's pipeline, and the validation images.
        depth: coupling blocks of the flows; 0 for a density without training.
    """

    bench: Workbench
    depth: int

    @classmethod
    def choose(cls, winner: Winner, objective: str) -> Baseline:
        """The depth that is best on validation defects: 0, or the winner's, 1 at least.

        Flows that do not start from the data have the winner's depth.
        """
        bench, flow = winner.bench, winner.settings.flow
        depths = [0, max(flow.depth, 1)] if flow.start == "data" else [flow.depth]
        values = {}
        for depth in depths:
            maps = bench.pipeline.density_maps(0, depth, bench.images)
            answers = scores_of_map(maps, bench.images.valid)
            metrics = family_metrics(answers, bench.labels, (objective,))
            values[depth] = mean_over_families(metrics, objective)
        return cls(bench, max(depths, key=lambda depth: (values[depth], -depth)))

    def scores(self, images: PlacedImages) -> Scores:
        """Its answers on images."""
        maps = self.bench.pipeline.density_maps(0, self.depth, images)
        return scores_of_map(maps, images.valid)

    def threshold(self, false_reject_rate: float) -> float:
        """The threshold of its scores, from the validation normals."""
        scores = self.scores(self.bench.images).scores.numpy()
        return threshold_from_normals(scores[self.bench.labels.is_normal], false_reject_rate).value


def write_evidence(
    context: StudyContext,
    winner: Winner,
    test: pa.Table,
    tested: TestResult | None,
    progress: Progress,
) -> EvidenceResult:
    """Write a category's evidence.

    Args:
        context: the study.
        winner: its winner.
        test: the unlocked test images' table; may be empty.
        tested: the winner's answers on them; None without test images.
        progress: told about every step.
    """
    folder, detector = context.folder, winner.detector
    progress("evidence", 0, 4)
    baseline = Baseline.choose(winner, context.study.objective)
    records = folder.validation_table(winner.category).to_pylist()
    normals = validation_normals(folder.train_table(winner.category))
    scores = _validation_scores(detector, normals, records)
    placed = winner.bench.images
    validation = _scored_images("validation", records, scores, winner, baseline, placed)
    progress("evidence", 1, 4)
    name = f"evidence/{winner.category}"
    result, scored_test = EvidenceResult(folder.location_of(name)), None
    if tested is not None:
        records, placed = test.to_pylist(), place_rows(test, winner.settings)
        scores = [answer.score for answer in tested.scores]
        scored_test = _scored_images("test", records, scores, winner, baseline, placed)
        if any(record["label"] for record in records):
            result = _compare(result.folder, records, placed, winner, baseline)
    progress("evidence", 2, 4)
    # The folder is new each time: what an interrupted attempt left is no part of it.
    with atomic_write(folder.path / name) as draft:
        _write_files(draft, winner, validation, scored_test)
    progress("evidence", 4, 4)
    return result


# ---- answers ----


def _validation_scores(
    detector: Detector, normals: pa.Table, records: Sequence[dict[str, Any]]
) -> list[float]:
    """The detector's scores of the validation images.

    Those of the normals are the scores that its threshold rests on: they were computed for it.
    """
    assert detector.normal_scores is not None  # it was made in this process
    scores = detector.normal_scores.tolist()
    known = dict(zip(normals["sha256"].to_pylist(), scores, strict=True))
    others = [record for record in records if record["sha256"] not in known]
    scores = detector.predict([record["path"] for record in others]).scores.tolist()
    known |= dict(zip((record["sha256"] for record in others), scores, strict=True))
    return [known[record["sha256"]] for record in records]


def _scored_images(
    split: str,
    records: list[dict[str, Any]],
    scores: Sequence[float],
    winner: Winner,
    baseline: Baseline,
    placed: PlacedImages,
) -> ScoredImages:
    """Images of a split with the winner's scores and maps, and the baseline's scores."""
    limit = winner.detector.threshold.value
    rows = [
        ImageEvidence(
            split=split,
            path=record["path"],
            defect_type=record["defect_type"],
            label=record["label"],
            score=score,
            verdict=score > limit,
            baseline_score=baseline_score,
        )
        for record, score, baseline_score in zip(
            records, scores, baseline.scores(placed).scores.tolist(), strict=True
        )
    ]
    return ScoredImages(rows, records, _layers(winner, placed))


def _layers(winner: Winner, images: PlacedImages) -> dict[str, Tensor]:
    """The winner's maps of images by their names in the report, (N, H, W) each."""
    maps = winner.maps(images)
    return {
        "density": maps.density,
        "classifier": maps.classifier,
        "fused": maps.fused(winner.settings.fusion_weight),
    }


def _compare(
    folder: str,
    records: list[dict[str, Any]],
    images: PlacedImages,
    winner: Winner,
    baseline: Baseline,
) -> EvidenceResult:
    """Intervals of the winner's metrics, and the baseline on the same images and replicates."""
    comparison = Comparison(records, winner.settings)
    winner_scores = winner.maps(images).scores(winner.settings.fusion, images.valid)
    baseline_scores = baseline.scores(images)
    own, other = comparison.replicate(winner_scores), comparison.replicate(baseline_scores)
    limit = baseline.threshold(winner.detector.threshold.false_reject_rate)
    rejected = baseline_scores.scores.numpy().astype(np.float64) > limit
    rates = verdict_rates(comparison.labels, rejected)
    judged = BaselineResult(
        metrics=comparison.metrics(baseline_scores),
        intervals=other.intervals,
        recall=rates.recall,
        false_reject_rate=rates.false_reject_rate,
        gain=own.gain_over(other),
        depth=baseline.depth,
    )
    return EvidenceResult(folder, own.intervals, judged)


# ---- files ----


def _write_files(
    draft: Path, winner: Winner, validation: ScoredImages, test: ScoredImages | None
) -> None:
    """Write pictures, tables and facts into a folder."""
    detector, settings = winner.detector, winner.settings
    shown = validation if test is None else test
    pictures = draft / "pictures"
    pictures.mkdir(parents=True)
    ranges = _display_ranges(winner, validation)
    chosen = choose_cases(shown.rows, detector.threshold.value)
    cases = draw_cases(chosen, shown, ranges, detector, pictures)
    strange = strangest_normals(validation.rows)
    cases += draw_cases(strange, validation, ranges, detector, pictures)
    regions = [] if test is None else measure_regions(test, detector)
    write_rows(draft / "images.parquet", [*validation.rows, *([] if test is None else test.rows)])
    write_rows(draft / "regions.parquet", regions)
    pipeline = winner.bench.pipeline
    losses = pipeline.losses(settings.finetune.joint_epochs, settings.flow.depth)
    facts = EvidenceFacts(
        shown="validation" if test is None else "test",
        cases=cases,
        map_threshold=detector.map_threshold,
        losses=LearningCurves(losses["finetuning"], losses["flows"]),
        frozen_epochs=settings.finetune.frozen_epochs,
        machine=describe_machine(pipeline.device),
        versions=package_versions(),
    )
    write_result(draft / "facts.json", facts)


def _display_ranges(winner: Winner, validation: ScoredImages) -> dict[str, tuple[float, float]]:
    """Layer -> the map values that pictures show darkest and brightest.

    They follow from the largest values on validation normals, as the detector's own range does.
    """
    bench, rate = winner.bench, winner.detector.threshold.false_reject_rate
    ranges = {}
    for name, values in validation.maps.items():
        peaks = image_scores(values, bench.images.valid).numpy()[bench.labels.is_normal]
        limit = threshold_from_normals(peaks, rate).value
        ranges[name] = (0.8 * float(np.median(peaks)), 1.2 * limit)
    return ranges


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine that the winner was made on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
