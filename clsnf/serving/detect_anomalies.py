"""Answers in the shape of DetectAnomalies, the call of a cloud service that ended in 2025.

Amazon Lookout for Vision answered so; programs that asked it need another address only.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from clsnf.serving.answers import Inspection
from clsnf.serving.catalogue import ModelEntry

_BACKGROUND, _ANOMALY = "#FFFFFF", "#D0021B"


class ImageSource(BaseModel):
    """Where the image came from."""

    Type: Literal["direct"]


class PixelAnomaly(BaseModel):
    """What a kind of anomaly covers."""

    TotalPercentageArea: float = Field(description="share of the image, in [0, 1]")
    Color: str = Field(description="in the mask")


class Anomaly(BaseModel):
    """A kind of anomaly; the first one is the background, and is none."""

    Name: Literal["background", "anomaly"]
    PixelAnomaly: PixelAnomaly


class DetectAnomalyResult(BaseModel):
    """The result for one image."""

    Source: ImageSource
    IsAnomalous: bool
    Confidence: float = Field(
        description=(
            "in [0.5, 1]: 0.5 at the threshold, 0.9 as far from it as the typical normal picture; "
            "no probability of being right"
        )
    )
    Anomalies: list[Anomaly]
    AnomalyMask: str = Field(description="a PNG of the image's size, in base64")


class DetectAnomaliesAnswer(BaseModel):
    """The answer about one image."""

    DetectAnomalyResult: DetectAnomalyResult


def detect_anomalies_answer(inspection: Inspection, entry: ModelEntry) -> DetectAnomaliesAnswer:
    """The answer for an inspection whose ``map_file`` is a mask as a PNG."""
    assert inspection.map_file is not None
    with Image.open(io.BytesIO(inspection.map_file)) as opened:
        mask = np.asarray(opened) > 0
    share = float(mask.mean())
    anomalies = [("background", 1 - share, _BACKGROUND), ("anomaly", share, _ANOMALY)]
    answer = inspection.answer
    result = DetectAnomalyResult(
        Source=ImageSource(Type="direct"),
        IsAnomalous=answer.verdict == "defect",
        Confidence=confidence(answer.score, answer.threshold, entry),
        Anomalies=[
            Anomaly(
                Name=name,  # type: ignore[arg-type]
                PixelAnomaly=PixelAnomaly(TotalPercentageArea=area, Color=colour),
            )
            for name, area, colour in anomalies[: 2 if share else 1]
        ],
        AnomalyMask=base64.b64encode(_coloured(mask)).decode(),
    )
    return DetectAnomaliesAnswer(DetectAnomalyResult=result)


def confidence(score: float, threshold: float, entry: ModelEntry) -> float:
    """How far a score lies from the threshold, in [0.5, 1].

    1 / (1 + 9^(-d)), where d is the distance in units of that between the model's own threshold and
    the median of its validation normals: so a typical good picture has 0.9. It is no probability
    of being right, because no model has seen the defects that will come.
    """
    normals = entry.provenance.validation_scores
    unit = abs(entry.threshold.value - float(np.median(normals))) if len(normals) else 0.0
    return 1 / (1 + math.pow(9, -min(abs(score - threshold) / max(unit, 1e-3), 100)))


def _coloured(mask: np.ndarray) -> bytes:
    """A mask, bool (h, w), as a PNG with a palette of two colours."""
    image = Image.fromarray(mask.astype(np.uint8), "L")
    image.putpalette([*bytes.fromhex(_BACKGROUND[1:]), *bytes.fromhex(_ANOMALY[1:])])
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()
