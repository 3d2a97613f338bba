"""What is answered about pictures and models: the types of ``schemas.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.inference import NetworkOutput
from clsnf.serving.reading import Picture
from clsnf.serving.schemas import (
    ImageAnswer,
    Milliseconds,
    ModelLine,
    ModelPage,
    ThresholdState,
    TrainedOn,
    Verdict,
)
from clsnf.serving.thresholds import ActiveThreshold, ThresholdSetting, resolve_threshold
from clsnf.training.calibrate import p_value


@dataclass(frozen=True)
class Inspection:
    """All about one picture.

    Attributes:
        answer: without the map.
        score_map: (H, W) float32 on the network's canvas.
        map_file: a PNG or an NPY file, as asked for, in base64 if so; None where none was.
    """

    answer: ImageAnswer
    score_map: np.ndarray
    map_file: memoryview | None


def verdict_of(score: float, threshold: ActiveThreshold) -> Verdict:
    return "defect" if score > threshold.value else "good"


def image_answer(
    picture: Picture,
    output: NetworkOutput,
    entry: ModelEntry,
    threshold: ActiveThreshold,
    milliseconds: Milliseconds,
) -> ImageAnswer:
    """The answer about one picture, without a map."""
    normals = np.asarray(entry.provenance.validation_scores)
    height, width = picture.placement.source
    return ImageAnswer(
        name=picture.name,
        category=entry.category,
        version=entry.version,
        verdict=verdict_of(output.score, threshold),
        score=output.score,
        threshold=threshold.value,
        p_value=p_value(output.score, normals),
        reading=_reading(int((normals >= output.score).sum()), len(normals)),
        width=width,
        height=height,
        milliseconds=milliseconds,
        batch=output.batch,
    )


def _reading(higher: int, normals: int) -> str:
    """The p-value in words."""
    if higher == 0:
        return f"none of {normals} normal pictures scores as high"
    return (
        f"{higher} of {normals} normal pictures score{'s' if higher == 1 else ''} as high or higher"
    )


def model_line(entry: ModelEntry, setting: ThresholdSetting | None, loaded: bool) -> ModelLine:
    """A model in the list of models."""
    threshold, source = resolve_threshold(entry, setting)
    return ModelLine(
        category=entry.category,
        version=entry.version,
        loaded=loaded,
        threshold=threshold.value,
        threshold_source=source,
        image_size=list(entry.image_size),
    )


def model_page(entry: ModelEntry, setting: ThresholdSetting | None, loaded: bool) -> ModelPage:
    """All that is known about a model."""
    provenance = entry.provenance
    return ModelPage(
        category=entry.category,
        version=entry.version,
        loaded=loaded,
        trained_on=TrainedOn(
            images=provenance.fit_images,
            backbone=provenance.architecture,
            object_mask=provenance.object_mask,
            data_fingerprint=provenance.data_fingerprint,
            validation_fingerprint=provenance.validation_fingerprint,
            versions=provenance.versions,
            imported=provenance.imported,
        ),
        image_size=list(entry.image_size),
        fusion_weight=entry.fusion_weight,
        megabytes=round(entry.size / 1e6, 1),
        figures=entry.test_metrics,
        threshold=_threshold_state(entry, setting),
        validation_scores=list(provenance.validation_scores),
        looks=provenance.image_statistics,
    )


def _threshold_state(entry: ModelEntry, setting: ThresholdSetting | None) -> ThresholdState:
    threshold, source = resolve_threshold(entry, setting)
    return ThresholdState(
        value=threshold.value,
        source=source,
        false_reject_rate=threshold.false_reject_rate,
        supported_rate=threshold.supported_rate,
        # The interval belongs to a rate; a value that was set promises none.
        interval=list(threshold.interval) if source != "value" else [None, None],
        normals=threshold.normals,
        models_own=entry.threshold.value,
    )
