"""What is answered about pictures and models: plain JSON types, and pictures as PNG."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsnf.data.images import png_bytes, restore_map
from clsnf.detector import Detector
from clsnf.evaluation.pictures import heat_map, overlay
from clsnf.serving.catalogue import Entry
from clsnf.serving.preprocess import Picture
from clsnf.serving.thresholds import InForce, Setting, resolve

MAPS = ("none", "png", "npy", "overlay")


@dataclass(frozen=True)
class Seen:
    """What the network says about one picture.

    Attributes:
        canvas_map: (H, W) float32 on the network's canvas.
        score: in [0, 1].
        seconds: the network took for the whole batch.
        batch: images in it.
    """

    canvas_map: np.ndarray
    score: float
    seconds: float
    batch: int


@dataclass(frozen=True)
class Answer:
    """All about one picture.

    Attributes:
        fields: the JSON answer but for the map.
        seen: from the network.
        picture: a PNG or an NPY file, as asked for; None where none was.
    """

    fields: dict[str, Any]
    seen: Seen
    picture: bytes | None

    def json(self, kind: str) -> dict[str, Any]:
        """The fields, with the map in base64 where there is one."""
        if self.picture is None:
            return self.fields
        return {
            **self.fields,
            "map": {"format": kind, "base64": base64.b64encode(self.picture).decode()},
        }


def p_value(score: float, normals: tuple[float, ...]) -> float:
    """The share of validation normals that score at least as high, counted with the picture itself
    (split-conformal), in (0, 1].
    """
    return (int((np.asarray(normals) >= score).sum()) + 1) / (len(normals) + 1)


def verdict_of(score: float, in_force: InForce) -> str:
    return "defect" if score > in_force.value else "good"


def answer(
    picture: Picture, seen: Seen, entry: Entry, detector: Detector, in_force: InForce, kind: str
) -> Answer:
    """What is answered about one picture, with a map of `kind` (one of :data:`MAPS`)."""
    normals = entry.provenance.validation_scores
    higher = int((np.asarray(normals) >= seen.score).sum())
    verdict = verdict_of(seen.score, in_force)
    fields = {
        "name": picture.name,
        "category": entry.category,
        "version": entry.version,
        "verdict": verdict,
        "score": seen.score,
        "threshold": in_force.value,
        "p_value": p_value(seen.score, normals),
        "reading": _reading(higher, len(normals)),
        "width": picture.placement.source[1],
        "height": picture.placement.source[0],
    }
    return Answer(fields, seen, _drawn(picture, seen, detector, in_force, kind))


def _reading(higher: int, normals: int) -> str:
    """The p-value in words."""
    if higher == 0:
        return f"none of {normals} normal pictures scores as high"
    return (
        f"{higher} of {normals} normal pictures score{'s' if higher == 1 else ''} as high or higher"
    )


def _drawn(
    picture: Picture, seen: Seen, detector: Detector, in_force: InForce, kind: str
) -> bytes | None:
    if kind == "none":
        return None
    score_map = restore_map(seen.canvas_map, picture.placement)
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, score_map, allow_pickle=False)
        return file.getvalue()
    if kind == "png":
        return png_bytes(heat_map(score_map, detector.shown_from, 1.2 * in_force.map_value))
    return png_bytes(overlay(picture.image(), score_map, detector.shown_from, in_force.map_value))


def model_line(entry: Entry, setting: Setting | None, loaded: bool) -> dict[str, Any]:
    """A model in the list of models."""
    threshold, source = resolve(entry, setting)
    return {
        "category": entry.category,
        "version": entry.version,
        "loaded": loaded,
        "threshold": threshold.value,
        "threshold_source": source,
        "image_size": list(entry.image_size),
    }


def model_page(entry: Entry, setting: Setting | None, loaded: bool) -> dict[str, Any]:
    """All that is known about a model: what it was trained on, its figures, its threshold, the
    scores of its validation normals.
    """
    threshold, source = resolve(entry, setting)
    low, high = threshold.interval if source != "value" else (None, None)
    said = entry.provenance
    return {
        "category": entry.category,
        "version": entry.version,
        "loaded": loaded,
        "trained_on": {
            "images": said.fit_images,
            "backbone": said.architecture,
            "object_mask": said.object_mask,
            "data_fingerprint": said.data_fingerprint,
            "validation_fingerprint": said.validation_fingerprint,
            "versions": said.versions,
            "imported": said.imported,
        },
        "image_size": list(entry.image_size),
        "fusion_weight": entry.fusion_weight,
        "megabytes": round(entry.size / 1e6, 1),
        "figures": entry.figures,
        "threshold": {
            "value": threshold.value,
            "source": source,
            "false_reject_rate": threshold.false_reject_rate,
            "supported_rate": threshold.supported_rate,
            "interval": [low, high],
            "normals": threshold.normals,
            "models_own": entry.threshold.value,
        },
        "validation_scores": list(said.validation_scores),
        "looks": said.looks,
    }
