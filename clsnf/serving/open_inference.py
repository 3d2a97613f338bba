"""What the Open Inference Protocol's services over HTTP and over gRPC have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clsnf.serving.answers import Inspection
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.errors import NotFound
from clsnf.serving.store import ModelStore
from clsnf.serving.tensors import FILES, OUTPUTS, PIXELS, InferResponse

INPUT_SHAPES = {PIXELS: [-1, -1, -1, 3], FILES: [-1]}


def served_entry(store: ModelStore, category: str, version: str | None = None) -> ModelEntry:
    """The served model of a category; raises NotFound where it is not of that version."""
    entry = store.entry(category)
    if version is not None and version != entry.version:
        raise NotFound(
            f"{category!r} has no version {version[:50]!r}: it serves {entry.version}.",
            {"versions": [entry.version]},
        )
    return entry


def output_shapes(entry: ModelEntry) -> dict[str, list[int]]:
    """Shapes of the outputs for any number of images."""
    return {name: [-1, *entry.image_size] if name == "map" else [-1] for name in OUTPUTS}


def response_of(
    category: str, inspections: Sequence[Inspection], request_id: str | None
) -> InferResponse:
    """The response about N images."""
    answers = [inspection.answer for inspection in inspections]
    outputs = {
        "score": np.array([answer.score for answer in answers]),
        "threshold": np.array([answer.threshold for answer in answers]),
        "verdict": np.array([answer.verdict == "defect" for answer in answers]),
        "p_value": np.array([answer.p_value for answer in answers]),
    }
    maps = [inspection.score_map for inspection in inspections]
    return InferResponse(category, answers[0].version, request_id, outputs, maps)
