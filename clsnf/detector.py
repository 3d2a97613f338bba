"""The detector: what a Python user imports. It learns from normal images and gives maps, scores
and verdicts.

    detector = Detector.fit(table, DetectorSettings())
    maps, scores, verdicts = detector.predict(["a.png", "b.png"])
    detector.save("model"); Detector.load("model")

It needs no Ray. A saved detector is a folder (see :mod:`clsnf.detector_file`); loading it runs no
pickled code. Every number in it comes from training images and validation normals, so the answer
for an image does not depend on the images that are predicted together with it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from clsnf import detector_file
from clsnf.core.config import DetectorSettings
from clsnf.core.device import choose_device
from clsnf.core.errors import DataError, ImageError, ModelError, SettingsError
from clsnf.core.memory import allocate_tensor
from clsnf.core.progress import Progress, silent
from clsnf.core.threads import compute_after_a_fork
from clsnf.data.image_statistics import statistics_of_normals
from clsnf.data.images import Placement, image_size, place, read_placed, restore_map
from clsnf.detector_file import Provenance
from clsnf.model.backbone import empty_backbone, fingerprint
from clsnf.model.layers import to_channels_last
from clsnf.model.network import ScoreNetwork, build_decoder, empty_flows
from clsnf.model.resolve import resolved
from clsnf.streams.choice import StreamChoice, open_stream
from clsnf.streams.stream import ImageBatch, consecutive, map_in_batches
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.calibrate import Threshold, check_rate, threshold_from_normals
from clsnf.training.prepare import Prepared, data_fingerprint, prepare, rows_of

__all__ = [
    "Detector",
    "ImageLike",
    "Prediction",
    "Provenance",
    "package_versions",
    "validation_normals",
]

ImageLike = str | os.PathLike[str] | NDArray[np.uint8]

_BATCH = 16

compute_after_a_fork()


class Prediction(NamedTuple):
    """Answers for N images.

    Attributes:
        maps: (N, H, W) float32 in [0, 1] on the network's canvas, 0 on padding.
            :meth:`Detector.predict_each` gives them at the images' own sizes.
        scores: (N,) float32, the largest value of each map; where the settings have a
            ``score_weight``, of the map that is fused with that weight.
        verdicts: (N,) bool, True for a defect: the score is above the threshold.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    verdicts: NDArray[np.bool_]


class _ScoredBatch(NamedTuple):
    """Maps and scores of the images from `start` on, with where each lies on its canvas."""

    start: int
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    placements: list[Placement]


class Detector:
    """A trained network with its preprocessing, fusion and threshold.

    Args:
        network: gives maps and scores; its fusion is that of `settings`.
        settings: everything that training was asked for, with the fusion that is in use.
        threshold: in use. Its false-reject rate may be another than the one that training was asked
            for, ``settings.validation.false_reject_rate``: see :meth:`calibrate`.
        provenance: where the detector comes from.
        device: where it computes.

    The arguments are attributes too. ``normal_scores`` (N,) float32 are the scores of the normals
    that :meth:`calibrate` was given last, in their order; None where it was given none.
    """

    def __init__(
        self,
        network: ScoreNetwork,
        settings: DetectorSettings,
        threshold: Threshold,
        provenance: Provenance,
        device: torch.device,
    ) -> None:
        if network.fusion != settings.fusion:
            raise ValueError(f"The network uses {network.fusion}, not {settings.fusion}.")
        self.network = _ready(network, device)
        self.settings = settings
        self.threshold = threshold
        self.provenance = provenance
        self.device = device
        self.normal_scores: NDArray[np.float32] | None = None

    @property
    def fusion_weight(self) -> float:
        """w in the fused map (1 - w) a_nf + w a_cls."""
        return self.settings.fusion_weight

    @property
    def shown_from(self) -> float:
        """The map value from which pictures for people are coloured.

        Below it lies what normal images show everywhere.
        """
        return 0.8 * float(
            np.median(self.provenance.validation_peaks or self.provenance.validation_scores)
        )

    @property
    def map_threshold(self) -> float:
        """The map value at which pictures for people draw the outline of a defect.

        The largest map values of normal images exceed it at the threshold's false-reject rate.
        """
        peaks = self.provenance.validation_peaks
        if not peaks:
            return self.threshold.value
        return threshold_from_normals(np.array(peaks), self.threshold.false_reject_rate).value

    # ---- fit ----

    @classmethod
    def fit(
        cls,
        table: pa.Table,
        settings: DetectorSettings | None = None,
        *,
        textures: str | Path | None = None,
        work: str | Path | None = None,
        device: str = "auto",
        progress: Progress = silent,
        stream: StreamChoice | None = None,
    ) -> Detector:
        """Train a detector on a category's normal images.

        Args:
            table: a category as :func:`clsnf.data.layouts.read_category` gives it, split by
                :func:`clsnf.data.splits.assign_splits`. It reads rows of the split ``fit`` and the
                normal ones of ``validation``, no others.
            settings: defaults where None.
            textures: a folder of pictures to make defects from; None for textures drawn by code.
            work: a folder for artifacts. Training that was interrupted continues from there. None
                for a temporary folder.
            device: ``auto``, ``cpu``, ``cuda``, ``mps``.
            progress: called with the progress of long work.
            stream: how the images come to training. None: from memory where they fit into it, else
                this process decodes them.

        Raises:
            ClsnfError: whatever a user can mend; see :mod:`clsnf.core.errors`.
        """
        settings = resolved(settings or DetectorSettings())
        with tempfile.TemporaryDirectory() if work is None else nullcontext(str(work)) as folder:
            prepared = prepare(
                table,
                settings,
                textures,
                ArtifactStore(Path(folder)),
                choose_device(device),
                progress,
                stream,
            )
            return cls.from_pipeline(prepared, table, settings, progress)

    @classmethod
    def from_pipeline(
        cls,
        prepared: Prepared,
        table: pa.Table,
        settings: DetectorSettings,
        progress: Progress = silent,
    ) -> Detector:
        """The detector of a prepared category, with a threshold from its validation normals.

        Args:
            prepared: trains, or finds what was trained already.
            table: the category's; see :meth:`fit`.
            settings: resolved. Joint epochs, depth and fusion count; all others are those of the
                pipeline.
            progress: called with the progress of long work.
        """
        pipeline = prepared.pipeline
        normals = validation_normals(table)
        fit_rows = rows_of(table, "fit")
        network = pipeline.network(
            settings.finetune.joint_epochs, settings.flow.depth, settings.fusion
        )
        provenance = Provenance(
            category=str(table["category"][0].as_py()),
            architecture=pipeline.info.architecture,
            backbone_fingerprint=fingerprint(pipeline.pretrained),
            data_fingerprint=data_fingerprint(fit_rows),
            validation_fingerprint=data_fingerprint(normals),
            object_mask=prepared.mask_mode,
            fit_images=len(fit_rows),
            validation_scores=(),
            versions=package_versions(),
        )
        return cls.calibrated(network, settings, provenance, normals, pipeline.device, progress)

    @classmethod
    def calibrated(
        cls,
        network: ScoreNetwork,
        settings: DetectorSettings,
        provenance: Provenance,
        normals: pa.Table,
        device: torch.device,
        progress: Progress = silent,
    ) -> Detector:
        """The detector of a trained network, with threshold and validation scores from the rows
        `normals`.
        """
        uncalibrated = Threshold(0.0, settings.validation.false_reject_rate, 1.0, 0)
        detector = cls(network, settings, uncalibrated, provenance, device)
        detector.calibrate(normals, progress=progress)
        return detector

    def calibrate(
        self,
        normals: pa.Table | None = None,
        *,
        false_reject_rate: float | None = None,
        progress: Progress = silent,
    ) -> None:
        """Set the threshold for another false-reject rate, from other normal images, or both.

        Nothing is trained, and the settings stay what training was asked for.

        Args:
            normals: rows of normal images that training did not see. Their scores replace those
                that the threshold rested on. None keeps these.
            false_reject_rate: in (0, 1); None for the threshold's own.
            progress: called after every batch.

        Raises:
            MetricError: a rate outside (0, 1), or no images.
            ImageError: an image can't be read.
        """
        rate = self.threshold.false_reject_rate if false_reject_rate is None else false_reject_rate
        check_rate(rate)
        provenance = self.provenance
        if normals is not None:
            found_scores, found_peaks = self._scores_and_peaks(
                normals["path"].to_pylist(), progress
            )
            self.normal_scores = found_scores
            provenance = dataclasses.replace(
                provenance,
                validation_fingerprint=data_fingerprint(normals),
                validation_scores=tuple(float(s) for s in np.sort(found_scores)),
                validation_peaks=tuple(float(m) for m in np.sort(found_peaks)),
                image_statistics=statistics_of_normals(
                    normals["path"].to_pylist(), self.settings.image
                ),
            )
        self.threshold = threshold_from_normals(
            np.array(provenance.validation_scores, np.float32), rate
        )
        self.provenance = provenance

    def _scores_and_peaks(
        self, paths: list[str], progress: Progress
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score and largest map value of each image, both (N,), with few maps in memory at once."""
        scores, peaks = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for batch in self._batches(paths, _BATCH):
            scores.append(batch.scores)
            peaks.append(batch.maps.max(axis=(1, 2)))
            progress("threshold", batch.start + len(batch.maps), len(paths))
        return np.concatenate(scores), np.concatenate(peaks)

    # ---- predict ----

    def predict(
        self,
        images: Sequence[ImageLike] | NDArray[np.uint8],
        *,
        batch_size: int = 16,
        progress: Progress = silent,
        task: str = "predict",
        stream: StreamChoice | None = None,
    ) -> Prediction:
        """Score images.

        Args:
            images: paths, or RGB arrays (h, w, 3) uint8 of any size, or one array (N, h, w, 3).
            batch_size: images that the network takes at once; it changes answers by no more than
                float rounding.
            progress: called after every batch.
            task: the name of this work in `progress`.
            stream: of kind ``ray``, the workers of a Ray cluster score files; else this process
                scores them.

        Raises:
            ImageError: a file can't be read, or an array is not (h, w, 3) uint8.
            SettingsError: a path instead of a list of them, or a batch of none.
        """
        _check_request(images, batch_size)
        n = len(images)
        # In a file where they would fill the memory.
        maps = allocate_tensor((n, *self.settings.image.size), torch.float32).numpy()
        scores = np.empty(n, np.float32)
        for batch in self._batches(images, batch_size, stream):
            end = batch.start + len(batch.maps)
            maps[batch.start : end] = batch.maps
            scores[batch.start : end] = batch.scores
            progress(task, end, n)
        return Prediction(maps, scores, self.verdicts(scores))

    def verdicts(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """True where a score is above the threshold."""
        verdicts: NDArray[np.bool_] = scores.astype(np.float64) > self.threshold.value
        return verdicts

    def predict_each(
        self,
        images: Sequence[ImageLike],
        *,
        batch_size: int = 16,
        stream: StreamChoice | None = None,
    ) -> Iterator[tuple[NDArray[np.float32], float, bool]]:
        """Score images one by one, each with its map at its own size: (map (h, w), score, verdict).

        A few batches lie in memory at a time. `stream` as for :meth:`predict`.
        """
        _check_request(images, batch_size)
        for batch in self._batches(images, batch_size, stream):
            for canvas_map, score, verdict, placement in zip(
                batch.maps, batch.scores, self.verdicts(batch.scores), batch.placements, strict=True
            ):
                yield restore_map(canvas_map, placement), float(score), bool(verdict)

    def _batches(
        self,
        images: Sequence[ImageLike] | NDArray[np.uint8],
        batch_size: int,
        stream: StreamChoice | None = None,
    ) -> Iterator[_ScoredBatch]:
        on_workers = stream is not None and stream.kind == "ray"
        if on_workers and not any(isinstance(image, np.ndarray) for image in images):
            assert stream is not None
            paths = [os.fspath(image) for image in images]  # type: ignore[arg-type]
            yield from self._batches_of_workers(paths, batch_size, stream)
            return

        def placed(image: ImageLike) -> tuple[torch.Tensor, Placement]:
            if isinstance(image, np.ndarray):
                return place(_checked_array(image), self.settings.image)
            return read_placed(image, self.settings.image)

        starts = range(0, len(images), batch_size)
        parts: Iterator[Any] = (images[start : start + batch_size] for start in starts)
        for start, batch in zip(starts, map_in_batches(placed, parts), strict=True):
            placements = [placement for _, placement in batch]
            padded = any(placement.padded for placement in placements)
            valid = torch.stack([p.valid for p in placements]) if padded else None
            maps, scores = self.score_placed(torch.stack([tensor for tensor, _ in batch]), valid)
            yield _ScoredBatch(start, maps, scores, placements)

    def _batches_of_workers(
        self, paths: list[str], batch_size: int, choice: StreamChoice
    ) -> Iterator[_ScoredBatch]:
        """Batches of files that a stream's workers score, each with a copy of the network."""
        stream = open_stream(choice, paths, self.settings.image)
        make_worker = partial(ScoreWorker, _on_cpu(self.network))
        batches = consecutive(len(paths), batch_size)
        start = 0
        for found in stream.map_batches(make_worker, batches, self.device):
            files = paths[start : start + len(found["scores"])]
            placements = [Placement.of(image_size(file), self.settings.image) for file in files]
            yield _ScoredBatch(start, found["maps"], found["scores"], placements)
            start += len(files)

    def score_placed(
        self, images: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score images that :func:`clsnf.data.images.place` put on the canvas already.

        Args:
            images: (B, 3, H, W) uint8.
            valid: (B, H, W) bool, False on padding; None where no image is padded.

        Returns:
            Fused maps (B, H, W) and scores (B,), both float32.
        """
        answers = self.network.score(images, valid)
        return answers.maps.cpu().numpy(), answers.scores.cpu().numpy()

    # ---- save and load ----

    @staticmethod
    def check_folder(folder: str | os.PathLike[str]) -> Path:
        """Check that :meth:`save` may write to this folder, before long work.

        Raises:
            ModelError: it holds something else than a detector.
        """
        return detector_file.check_folder(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``detector.safetensors`` and ``detector.json`` into a folder, which appears whole
        or not at all.

        Raises:
            ModelError: the folder holds something else than a detector.
        """
        detector_file.write_detector(
            folder,
            self.network.state_dict(),
            self.settings,
            self.network.scales,
            self.threshold,
            self.provenance,
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str = "auto") -> Detector:
        """Load a saved detector. Runs no pickled code and fetches nothing.

        Raises:
            ModelError: the folder is no detector, is damaged, or was written by a newer version.
        """
        saved = detector_file.read_description(folder)
        try:
            settings = saved.settings
            tensors = detector_file.read_tensors(folder, saved)
            detector_file.check_backbone(saved, tensors)
            backbone = empty_backbone(
                settings.backbone, settings.image.size, saved.provenance.architecture
            )
            decoder = build_decoder(backbone.info, settings.image, settings.finetune, seed=0)
            flows = empty_flows(backbone.info, settings.flow)
            network = ScoreNetwork(backbone, decoder, flows, saved.level_scales, saved.fusion)
            network.load_state_dict(tensors)
        except ModelError:
            raise
        # The described network is built by libraries, which raise what they like for settings that
        # make no sense together.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(f"{os.fspath(folder)} can't be loaded: {reason}") from error
        return cls(network, settings, saved.threshold, saved.provenance, choose_device(device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy what :meth:`save` writes: the network's own modules can't be pickled."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "detector"
            self.save(place)
            files = {file.name: file.read_bytes() for file in place.iterdir()}
        return _unpickled, (files, str(self.device), self.normal_scores)


def _unpickled(
    files: dict[str, bytes], device: str, normal_scores: NDArray[np.float32] | None
) -> Detector:
    """The detector of :meth:`Detector.save`'s files, on `device` if this machine has it."""
    try:
        choose_device(device)
    except SettingsError:
        device = "auto"
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        detector = Detector.load(folder, device)
    detector.normal_scores = normal_scores
    return detector


class ScoreWorker:
    """Scores batches where a stream computes: ``maps`` (B, H, W) and ``scores`` (B,), float32.

    Args:
        network: moved to `device`.
        device: where to compute.
    """

    def __init__(self, network: ScoreNetwork, device: torch.device) -> None:
        self._network = _ready(network, device)

    def __call__(self, batch: ImageBatch) -> dict[str, NDArray[np.float32]]:
        answers = self._network.score(batch.images, batch.valid)
        return {"maps": answers.maps.cpu().numpy(), "scores": answers.scores.cpu().numpy()}


def _ready(network: ScoreNetwork, device: torch.device) -> ScoreNetwork:
    """The network in evaluation mode on `device`, its weights in channels-last memory."""
    return to_channels_last(network.to(device)).eval()


def _on_cpu(network: ScoreNetwork) -> ScoreNetwork:
    """The network on the CPU, from where any machine can load it: a copy if it is elsewhere."""
    on_cpu = next(network.parameters()).device.type == "cpu"
    return network if on_cpu else copy.deepcopy(network).to("cpu")


def validation_normals(table: pa.Table) -> pa.Table:
    """The normal rows of the split ``validation``, which the threshold rests on.

    Raises:
        DataError: there are none.
    """
    rows = rows_of(table, "validation")
    normals = rows.filter(pa.compute.equal(rows["label"], 0))
    if len(normals) == 0:
        raise DataError(
            "There are no validation normals to take a threshold from: raise validation.fraction "
            "or add normal images."
        )
    return normals


def _check_request(images: object, batch_size: int) -> None:
    if isinstance(images, (str, os.PathLike)):
        raise SettingsError(f"{os.fspath(images)!r} is no list of images: put the path into one.")
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}: it must be 1 or more.")


def _checked_array(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ImageError(
            f"An image is an array of shape {image.shape} and type {image.dtype}: it must be (h, "
            "w, 3) uint8, RGB."
        )
    return image


def package_versions() -> dict[str, str]:
    """Versions of the packages that a detector's answers depend on."""
    return {
        name: importlib.metadata.version(name)
        for name in ("clsnf", "torch", "timm", "FrEIA", "numpy")
    }
