"""A category loaded into this process: what a trial, a winner and a benchmark cell work with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from clsnf.core.errors import TrainingError
from clsnf.evaluation.selection import (
    SweptWeight,
    ValidationLabels,
    sweep_weights,
    validation_labels,
)
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.pipeline import CategoryPipeline, PlacedImages, ScoreMaps
from clsnf.training.prepare import Prepared, place_rows


@dataclass(frozen=True)
class Workbench:
    """A category's pipeline with its validation images.

    Attributes:
        prepared: the pipeline, and where training defects may lie.
        images: the validation images, placed for the network.
        labels: what is known of the validation images.
    """

    prepared: Prepared
    images: PlacedImages
    labels: ValidationLabels

    @classmethod
    def load(cls, prepared: Prepared, validation: pa.Table) -> Workbench:
        """Read the validation images and their masks.

        Args:
            prepared: from :func:`clsnf.training.prepare.prepare`.
            validation: table of the validation set, normals and defects.

        Raises:
            ImageError: an image or a mask can't be read.
        """
        settings = prepared.pipeline.settings
        images = place_rows(validation, settings)
        labels = validation_labels(validation.to_pylist(), settings, images)
        return cls(prepared, images, labels)

    @property
    def pipeline(self) -> CategoryPipeline:
        """The stages of training."""
        return self.prepared.pipeline

    @property
    def store(self) -> ArtifactStore:
        """Where the pipeline's artifacts lie."""
        return self.pipeline.store

    def maps(self, joint_epochs: int, depth: int, images: PlacedImages | None = None) -> ScoreMaps:
        """Both score maps of images, (N, H, W) each; what is missing is trained first.

        Args:
            joint_epochs: of the backbone and the classifier.
            depth: coupling blocks of the flows.
            images: placed as the validation images are; None for the validation images.
        """
        return self.pipeline.maps(joint_epochs, depth, self.images if images is None else images)

    def sweep(
        self, joint_epochs: int, depth: int, names: tuple[str, ...], weights: Sequence[float]
    ) -> list[SweptWeight]:
        """Metrics of the validation images at each fusion weight; they are stored, as maps are.

        Args:
            joint_epochs, depth: of the maps, see :meth:`maps`.
            names: metrics of :data:`clsnf.metrics.METRICS`.
            weights: to try.

        Raises:
            TrainingError: a metric is not finite.
        """

        def compute() -> Artifact:
            maps = self.maps(joint_epochs, depth)
            swept = sweep_weights(maps, self.labels, names, weights)
            for at in swept:
                if not all(
                    math.isfinite(v) for found in at.families.values() for v in found.values()
                ):
                    raise TrainingError(
                        "The score maps hold values that are not finite: lower the learning rates."
                    )
            return Artifact({}, {"families": [at.families for at in swept]})

        content = {"metrics": list(names), "weights": list(weights)}
        stored = self.pipeline.get_on_maps(
            "scoring", joint_epochs, depth, self.images, content, compute
        )
        return [
            SweptWeight(weight, families)
            for weight, families in zip(weights, stored.facts["families"], strict=True)
        ]
