"""One batch of pictures through the network of a model, on this replica's device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clsnf.serving.errors import ServiceUnavailable
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.reading import Picture
from clsnf.serving.store import LoadedModel


@dataclass(frozen=True)
class NetworkOutput:
    """What the network gives for one picture.

    Attributes:
        score_map: (H, W) float32 on the network's canvas.
        score: in [0, 1].
        seconds: the time of the network for the whole batch.
        batch: number of images in the batch.
    """

    score_map: np.ndarray
    score: float
    seconds: float
    batch: int


class NetworkRunner:
    """Computes batches on one device; :meth:`run` belongs to one thread.

    Args:
        device: such as ``cpu`` or ``cuda:0``.
        precision: ``float32``, ``mixed``, or ``auto`` for mixed on CUDA and float32 elsewhere.
        metrics: records the time and size of each batch.

    Attributes:
        seconds_per_image: a running mean.
        device_error: what a device said that will not compute again; None while all is well.
    """

    def __init__(self, device: str, precision: str, metrics: ServerMetrics) -> None:
        self._device_type = torch.device(device).type
        self._mixed = precision == "mixed" or (precision == "auto" and device.startswith("cuda"))
        self._metrics = metrics
        self.seconds_per_image = 0.0
        self.device_error: str | None = None

    def run(self, model: LoadedModel, pictures: Sequence[Picture]) -> list[NetworkOutput]:
        """The network's outputs for a batch, in the order of the pictures.

        Raises:
            ServiceUnavailable: the device has no memory or is lost, or the model gives no number.
        """
        started = time.perf_counter()
        maps, scores = self._score(model, pictures)
        seconds = time.perf_counter() - started
        category = model.entry.category
        if not np.isfinite(scores).all():
            raise ServiceUnavailable(
                f"The model {category!r} gives a score that is no number: it must be trained again."
            )
        self._metrics.record("clsnf_network_seconds", seconds, category)
        self._metrics.record("clsnf_batch_images", len(pictures), category)
        self.seconds_per_image += 0.2 * (seconds / len(pictures) - self.seconds_per_image)
        return [
            NetworkOutput(score_map, float(score), seconds, len(pictures))
            for score_map, score in zip(maps, scores, strict=True)
        ]

    def probe(self, model: LoadedModel) -> None:
        """Compute a black picture, which no metric counts. Raises as :meth:`run` does."""
        black = torch.zeros((1, 3, *model.entry.image_size), dtype=torch.uint8)
        self._compute(model, black, None)

    def _score(
        self, model: LoadedModel, pictures: Sequence[Picture]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maps (B, H, W) and scores (B,)."""
        images = torch.stack([p.placed for p in pictures])
        placements = [p.placement for p in pictures]
        padded = any(p.padded for p in placements)
        valid = torch.stack([p.valid for p in placements]) if padded else None
        return self._compute(model, images, valid)

    def _compute(
        self, model: LoadedModel, images: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._mixed):
                return model.detector.score_placed(images, valid)
        except torch.OutOfMemoryError as error:
            raise ServiceUnavailable(
                f"The device has no memory for {len(images)} images at once: lower batch_size, "
                "or the share of other replicas."
            ) from error
        except torch.AcceleratorError as error:
            self.device_error = str(error).splitlines()[0]
            raise ServiceUnavailable(
                f"The device is lost ({self.device_error}): this replica is about to be replaced."
            ) from error
