"""What a report needs of a category and nobody could compute again without the images: written
once, right after the winner was judged.

<out>/evidence/<category>/images.parquet    one row an image of the validation set and the test set:
its scores and verdict
<out>/evidence/<category>/regions.parquet   one row a defect region of the test set: how large, how
visible, how much of it was found
<out>/evidence/<category>/pictures/         the cases that a person wants to see, each as input,
truth, and the three maps
<out>/evidence/<category>/facts.json        what was pictured, learning curves, hardware; written
last: with it, all is there

Unusual: the baseline, flows on the pretrained backbone (``cflow`` in
    :mod:`clsnf.benchmark.systems`), is judged on the same images by the
same code. Its depth is chosen on validation defects, as the winner's was, and its flows are a stage
like any other. No test image is opened here that the ledger does not know: the caller hands over
what it unlocked.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.core.config import DetectorSettings
from clsnf.core.files import atomic_write, write_json
from clsnf.core.progress import Progress
from clsnf.detector import Detector, package_versions, validation_normals
from clsnf.evaluation.evaluate import metrics_of_maps, samples_of_maps
from clsnf.evaluation.selection import family_metrics, mean_over_families, scores_of_map
from clsnf.metrics.bootstrap import (
    bin_images,
    compare,
    draw_replicates,
    intervals,
    replicate_metrics,
)
from clsnf.model.score_maps import image_scores
from clsnf.study.cases import chosen_cases, pictures_of, regions_of, strangest_normals
from clsnf.study.folder import StudyPlan
from clsnf.study.trial import Workbench
from clsnf.training.calibrate import threshold_from_normals
from clsnf.training.pipeline import PlacedImages
from clsnf.training.prepare import place_rows

REPLICATES = 1000


@dataclass(frozen=True)
class Judged:
    """A system's answers on images, on the network's canvas.

    Attributes:
        maps: (N, H, W) float32, 0 on padding.
        scores: (N,) float32 image scores.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, maps: Tensor, scored: Tensor, valid: Tensor | None) -> Judged:
        """From fused maps (N, H, W), those that scores are taken from, and where they are no
        padding.
        """
        return cls(
            (maps if valid is None else maps * valid).numpy(), image_scores(scored, valid).numpy()
        )


def keep_evidence(
    plan: StudyPlan,
    category: str,
    bench: Workbench,
    detector: Detector,
    test: pa.Table,
    verdicts: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Write a category's evidence.

    Args:
        plan, category: the study and the product.
        bench: the winner's pipeline and the validation images.
        detector: the winner.
        test: the unlocked test images' table; may be empty.
        verdicts: the winner's answers for them, ``scores`` of
            :func:`clsnf.evaluation.evaluate.evaluate_detector`.
        progress: told about it.

    Returns:
        ``folder``; with defects among the test images also ``intervals`` (figure -> 95 % interval
        of the winner) and ``baseline``: ``depth``, ``figures``, ``intervals``, ``recall`` and
        ``false_reject_rate`` at a threshold of its own from the same validation normals, and
        ``gain`` (figure -> what the winner is ahead by: ``low``, ``high``, and ``ahead``, the share
        of the replicates).
    """
    settings, folder = detector.settings, plan.folder / "evidence" / category
    validation = plan.validation_table(category).to_pylist()
    progress("evidence", 0, 4)
    depth = baseline_depth(bench, settings, plan.study_settings.objective)
    held_out = _baseline(bench, depth, bench.images)
    rows = held_out_rows = _rows(
        "validation",
        validation,
        _validation_scores(plan, category, detector, validation),
        held_out,
        detector,
    )
    progress("evidence", 1, 4)
    result: dict[str, Any] = {"folder": plan.place_of(f"evidence/{category}")}
    records, images, shown = validation, bench.images, rows
    if len(test):
        records, images = test.to_pylist(), place_rows(test, settings)
        baseline = _baseline(bench, depth, images)
        shown = _rows(
            "test", records, [verdict["score"] for verdict in verdicts], baseline, detector
        )
        rows = rows + shown
        if any(record["label"] for record in records):
            normal = bench.labels.is_normal
            limit = threshold_from_normals(
                held_out.scores[normal], detector.threshold.false_reject_rate
            ).value
            result |= _compared(
                records, _winner(bench, settings, images), baseline, settings, limit
            )
            result["baseline"]["depth"] = depth
    progress("evidence", 2, 4)
    layers = _layers(bench, settings, images)
    limits = _limits(bench, settings, detector.threshold.false_reject_rate)
    # The folder is new each time: what an interrupted attempt left is no part of it.
    with atomic_write(folder) as draft:
        (draft / "pictures").mkdir(parents=True)
        folder_of_pictures = draft / "pictures"
        chosen = chosen_cases(shown, detector.threshold.value)
        pictures = pictures_of(chosen, shown, records, layers, limits, detector, folder_of_pictures)
        odd = strangest_normals(held_out_rows)
        pictures += pictures_of(
            odd,
            held_out_rows,
            validation,
            _layers(bench, settings, bench.images),
            limits,
            detector,
            folder_of_pictures,
        )
        progress("evidence", 3, 4)
        regions = regions_of(shown, records, layers["fused"].numpy(), detector) if len(test) else []
        _write_rows(draft / "images.parquet", rows)
        _write_rows(draft / "regions.parquet", regions)
        facts = {
            "shown": "test" if len(test) else "validation",
            "pictures": pictures,
            "map_threshold": detector.map_threshold,
            "losses": bench.prepared.pipeline.losses(
                settings.finetune.joint_epochs, settings.flow.depth
            ),
            "frozen_epochs": settings.finetune.frozen_epochs,
            "machine": machine(bench.prepared.pipeline.device),
            "versions": package_versions(),
        }
        write_json(draft / "facts.json", facts)
    progress("evidence", 4, 4)
    return result


def _validation_scores(
    plan: StudyPlan, category: str, detector: Detector, records: list[dict[str, Any]]
) -> list[float]:
    """The detector's scores of the validation images: of the normals, exactly those that its
    threshold rests on.
    """
    normals = validation_normals(
        plan.train_table(category)
    )  # in the same batches as for the threshold: rounding depends on them
    known = dict(
        zip(
            normals["sha256"].to_pylist(),
            detector.predict(normals["path"].to_pylist()).scores.tolist(),
            strict=True,
        )
    )
    others = [record for record in records if record["sha256"] not in known]
    scores = detector.predict([record["path"] for record in others]).scores.tolist()
    known |= dict(zip((record["sha256"] for record in others), scores, strict=True))
    return [known[record["sha256"]] for record in records]


def _rows(
    split: str,
    records: list[dict[str, Any]],
    scores: list[float],
    baseline: Judged,
    detector: Detector,
) -> list[dict[str, Any]]:
    """What is kept of each image."""
    return [
        {
            "split": split,
            **{name: record[name] for name in ("path", "defect_type", "label")},
            "score": score,
            "verdict": score > detector.threshold.value,
            "baseline_score": beside,
        }
        for record, score, beside in zip(records, scores, baseline.scores.tolist(), strict=True)
    ]


def baseline_depth(bench: Workbench, settings: DetectorSettings, objective: str) -> int:
    """The depth of the baseline's flows that does best on validation defects: no training at all,
    or the winner's depth, 1 at least.
    """
    flow = settings.flow
    depths = [0, max(flow.depth, 1)] if flow.start == "data" else [flow.depth]
    maps = {depth: bench.prepared.pipeline.density_maps(0, depth, bench.images) for depth in depths}
    values = {
        d: mean_over_families(
            family_metrics(scores_of_map(m, bench.labels.valid), bench.labels, (objective,)),
            objective,
        )
        for d, m in maps.items()
    }
    return max(depths, key=lambda depth: (values[depth], -depth))


def _winner(bench: Workbench, settings: DetectorSettings, images: PlacedImages) -> Judged:
    maps = bench.prepared.pipeline.maps(settings.finetune.joint_epochs, settings.flow.depth, images)
    return Judged.of(
        maps.fused(settings.fusion_weight), maps.fused(settings.image_weight), images.valid
    )


def _layers(
    bench: Workbench, settings: DetectorSettings, images: PlacedImages
) -> dict[str, Tensor]:
    """The winner's maps of images by what people call them, (N, H, W) each."""
    maps = bench.prepared.pipeline.maps(settings.finetune.joint_epochs, settings.flow.depth, images)
    return {
        "density": maps.density,
        "classifier": maps.classifier,
        "fused": maps.fused(settings.fusion_weight),
    }


def _baseline(bench: Workbench, depth: int, images: PlacedImages) -> Judged:
    maps = bench.prepared.pipeline.density_maps(0, depth, images)
    return Judged.of(maps, maps, images.valid)


def _compared(
    rows: list[dict[str, Any]],
    winner: Judged,
    baseline: Judged,
    settings: DetectorSettings,
    baseline_threshold: float,
) -> dict[str, Any]:
    """Intervals of the winner's figures, and the baseline beside it on the same images and the same
    replicates.
    """
    labels = np.array([row["label"] for row in rows])
    weights = draw_replicates(labels, REPLICATES, settings.seed)
    replicated = []
    for system in (winner, baseline):
        samples = samples_of_maps(rows, system.maps, settings.image)
        replicated.append(replicate_metrics(bin_images(system.scores, labels, samples), weights))
    rejected = baseline.scores.astype(np.float64) > baseline_threshold

    def share(of: NDArray[np.bool_]) -> float | None:
        return float(rejected[of].mean()) if of.any() else None

    return {
        "intervals": intervals(replicated[0]),
        "baseline": {
            "figures": metrics_of_maps(rows, baseline.maps, baseline.scores, settings.image),
            "intervals": intervals(replicated[1]),
            "recall": share(labels == 1),
            "false_reject_rate": share(labels == 0),
            "gain": {
                figure: dataclasses.asdict(found) for figure, found in compare(*replicated).items()
            },
        },
    }


def _limits(
    bench: Workbench, settings: DetectorSettings, rate: float
) -> dict[str, tuple[float, float]]:
    """For each layer the map values that pictures show darkest and brightest: from what validation
    normals show, as the detector's.
    """
    normal = bench.labels.is_normal
    result = {}
    for name, values in _layers(bench, settings, bench.images).items():
        peaks = image_scores(values, bench.images.valid).numpy()[normal]
        result[name] = (
            0.8 * float(np.median(peaks)),
            1.2 * threshold_from_normals(peaks, rate).value,
        )
    return result


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({}), path)


def machine(device: torch.device) -> dict[str, Any]:
    """What the winner was made on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
