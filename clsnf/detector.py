"""The detector: what a Python user imports. Learns from normal images, gives maps, scores and
verdicts; needs no Ray.

    detector = Detector.fit(table, DetectorSettings())
    maps, scores, verdicts = detector.predict(["a.png", "b.png"])
    detector.save("model"); Detector.load("model")

A saved detector is a folder of ``detector.safetensors`` and ``detector.json``; loading runs no
pickled code. Unusual: every figure in it comes from training and validation normals, so the answer
for one image never depends on the images asked about with it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clsnf.core.config import DetectorSettings, from_dict, to_dict
from clsnf.core.device import choose_device
from clsnf.core.errors import DataError, ImageError, ModelError, SettingsError
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import sha256_file
from clsnf.core.memory import allocate_tensor
from clsnf.core.progress import Progress, silent
from clsnf.data.image_statistics import statistics_of_normals
from clsnf.data.images import Placement, image_size, place, read_image, restore_map
from clsnf.model.backbone import IMAGENET_MEAN, IMAGENET_STD, empty_backbone, fingerprint
from clsnf.model.flow import LevelScale
from clsnf.model.network import ScoreNetwork, build_decoder, empty_flows
from clsnf.streams.choice import StreamChoice, open_stream
from clsnf.streams.stream import ImageBatch, consecutive, map_in_batches
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.calibrate import Threshold, check_rate, threshold_from_normals
from clsnf.training.prepare import Prepared, data_fingerprint, prepare, rows_of

FORMAT = 2
TENSORS, FACTS = "detector.safetensors", "detector.json"

ImageLike = str | os.PathLike[str] | NDArray[np.uint8]


class Prediction(NamedTuple):
    """Answers for N images.

    Attributes:
        maps: (N, H, W) float32 in [0, 1] on the network's canvas, 0 on padding;
            :meth:`Detector.predict_each` gives them at the images' own sizes.
        scores: (N,) float32, the largest value of each map, or, with a ``score_weight`` of its own,
            of the map of that weight.
        verdicts: (N,) bool, True for a defect: a score above the threshold.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    verdicts: NDArray[np.bool_]


@dataclass(frozen=True)
class Provenance:
    """Where a detector comes from.

    Attributes:
        category: the product's name.
        architecture: timm's name of the backbone.
        backbone_fingerprint: sha256 of the pretrained weights that training started from; of an
            imported detector, of its backbone.
        data_fingerprint: hash of the contents of the images it was fitted on; of an imported
            detector, its level constants.
        validation_fingerprint: hash of the contents of the held-out normal images.
        object_mask: where training defects could lie (``off``, ``dark``, ``bright``; ``unknown``
            for an imported detector).
        fit_images: number of images it was fitted on.
        validation_scores: sorted image scores of the held-out normal images; what the threshold
            rests on.
        versions: of the packages that made it.
        imported: the sha256, by name, of the checkpoint files that the network comes from; empty
            where it was trained by clsnf.
        validation_peaks: sorted largest map values of the held-out normal images; what pictures for
            people are drawn by.
        looks: mean and standard deviation of each of :data:`clsnf.data.image_statistics.STATISTICS` over
            the held-out normal images: what a server compares the pictures of the day with. Empty
            in detectors saved before there were looks.
    """

    category: str
    architecture: str
    backbone_fingerprint: str
    data_fingerprint: str
    validation_fingerprint: str
    object_mask: str
    fit_images: int
    validation_scores: tuple[float, ...]
    versions: dict[str, str]
    imported: dict[str, str] = field(default_factory=dict)
    validation_peaks: tuple[float, ...] = ()
    looks: dict[str, list[float]] = field(default_factory=dict)


class Detector:
    """A trained network with its preprocessing, fusion weight and threshold.

    Args:
        network: maps images to both score maps.
        settings: everything that decided it.
        threshold: from validation normals.
        provenance: where it comes from.
        device: where it computes.
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
            raise ValueError(f"{network.fusion} of the network is not {settings.fusion}.")
        self.network = network.to(device).to(memory_format=torch.channels_last).eval()
        self.settings, self.threshold, self.provenance, self.device = (
            settings,
            threshold,
            provenance,
            device,
        )

    @property
    def fusion_weight(self) -> float:
        """w in the fused map (1 - w) a_nf + w a_cls."""
        return self.settings.fusion_weight

    @property
    def shown_from(self) -> float:
        """Map values up to here are what normal images show everywhere: pictures for people leave
        them uncoloured.
        """
        return 0.8 * float(
            np.median(self.provenance.validation_peaks or self.provenance.validation_scores)
        )

    @property
    def map_threshold(self) -> float:
        """The value that normal images' maps stay below at the threshold's false-reject rate: where
        pictures for people draw the line.
        """
        peaks = self.provenance.validation_peaks
        return (
            threshold_from_normals(np.array(peaks), self.threshold.false_reject_rate).value
            if peaks
            else self.threshold.value
        )

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
                :func:`clsnf.data.splits.assign_splits`; only rows of the splits ``fit`` and
                ``validation`` are read, and of the latter only the normal ones.
            settings: defaults where None.
            textures: a folder of pictures to make defects from; None for textures drawn by code.
            work: a folder for finished stages: training that was interrupted goes on from there. A
                temporary one where None.
            device: ``auto``, ``cpu``, ``cuda``, ``mps``.
            progress: told about long work.
            stream: how the images come to training; None for memory where they fit into it, else
                decoded by this process.

        Raises:
            ClsnfError: whatever a user can mend; see :mod:`clsnf.core.errors`.
        """
        settings = settings or DetectorSettings()
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
        """The detector of one setting of a pipeline, its threshold taken from the table's
        validation normals.
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
        """The detector of a finished network, its threshold and validation scores taken from the
        rows `normals`.
        """
        unset = Threshold(0.0, settings.validation.false_reject_rate, 1.0, 0)
        detector = cls(network, settings, unset, provenance, device)
        detector.calibrate(normals, progress=progress)
        return detector

    def calibrate(
        self,
        normals: pa.Table | None = None,
        *,
        false_reject_rate: float | None = None,
        progress: Progress = silent,
    ) -> None:
        """Take the threshold anew: for another false-reject rate, from other normal images, or
        both. Nothing is trained.

        Args:
            normals: rows of normal images that training did not see; their scores take the place of
                those that the threshold rested on. None for the scores of the images that it rests
                on now.
            false_reject_rate: in (0, 1); None for the threshold's own.
            progress: told about every batch.

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
            provenance = dataclasses.replace(
                provenance,
                validation_fingerprint=data_fingerprint(normals),
                validation_scores=tuple(float(s) for s in np.sort(found_scores)),
                validation_peaks=tuple(float(m) for m in np.sort(found_peaks)),
                looks=statistics_of_normals(normals["path"].to_pylist(), self.settings.image),
            )
        self.threshold = threshold_from_normals(
            np.array(provenance.validation_scores, np.float32), rate
        )
        self.provenance = provenance

    def _scores_and_peaks(
        self, paths: list[str], progress: Progress
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score and largest map value of each image, both (N,); no more maps in memory than a few
        batches'.
        """
        scores, peaks = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for start, (maps, batch_scores, _) in self._batches(paths, 16):
            scores.append(batch_scores)
            peaks.append(maps.max(axis=(1, 2)))
            progress("threshold", start + len(maps), len(paths))
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
            batch_size: images looked at together; it changes no figure beyond float rounding.
            progress: told about every batch.
            stream: the workers of a Ray cluster score files where it says so, else this process
                does.

        Raises:
            ImageError: a file can't be read, or an array is not (h, w, 3) uint8.
            SettingsError: a path instead of a list of them, or a batch of none.
        """
        _check_request(images, batch_size)
        n = len(images)
        maps = allocate_tensor(
            (n, *self.settings.image.size), torch.float32
        ).numpy()  # on disk where they would fill the memory
        scores = np.empty(n, np.float32)
        for start, (batch_maps, batch_scores, _) in self._batches(images, batch_size, stream):
            maps[start : start + len(batch_maps)] = batch_maps
            scores[start : start + len(batch_maps)] = batch_scores
            progress(task, start + len(batch_maps), n)
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
        Memory: a few batches.

        `stream` as for :meth:`predict`.
        """
        _check_request(images, batch_size)
        for _, (maps, scores, placements) in self._batches(images, batch_size, stream):
            for canvas_map, score, verdict, placement in zip(
                maps, scores, self.verdicts(scores), placements, strict=True
            ):
                yield restore_map(canvas_map, placement), float(score), bool(verdict)

    def _batches(
        self,
        images: Sequence[ImageLike] | NDArray[np.uint8],
        batch_size: int,
        stream: StreamChoice | None = None,
    ) -> Iterator[tuple[int, tuple[NDArray[np.float32], NDArray[np.float32], list[Placement]]]]:
        starts = range(0, len(images), batch_size)
        if (
            stream is not None
            and stream.kind == "ray"
            and not any(isinstance(image, np.ndarray) for image in images)
        ):
            paths = [os.fspath(image) for image in images]  # type: ignore[arg-type]
            yield from self._batches_of_workers(paths, batch_size, stream)
            return

        def placed(image: ImageLike) -> tuple[torch.Tensor, Placement]:
            return place(_as_array(image), self.settings.image)

        parts: Iterator[Any] = (images[start : start + batch_size] for start in starts)
        for start, batch in zip(starts, map_in_batches(placed, parts), strict=True):
            placements = [placement for _, placement in batch]
            valid = (
                torch.stack([p.valid for p in placements])
                if any(p.padded for p in placements)
                else None
            )
            maps, scores = self.score_placed(torch.stack([tensor for tensor, _ in batch]), valid)
            yield start, (maps, scores, placements)

    def _batches_of_workers(
        self, paths: list[str], batch_size: int, choice: StreamChoice
    ) -> Iterator[tuple[int, tuple[NDArray[np.float32], NDArray[np.float32], list[Placement]]]]:
        """What the workers of a stream, each with a copy of this detector, say of files."""
        stream = open_stream(choice, paths, self.settings.image)
        start = 0
        for found in stream.map_batches(
            partial(_Scorer, self._on_cpu()), consecutive(len(paths), batch_size), self.device
        ):
            batch = paths[start : start + len(found["scores"])]
            yield (
                start,
                (
                    found["maps"],
                    found["scores"],
                    [Placement.of(image_size(path), self.settings.image) for path in batch],
                ),
            )
            start += len(batch)

    def _on_cpu(self) -> Detector:
        """A copy that can travel to a machine without a GPU."""
        if self.device.type == "cpu":
            return self
        return Detector(
            copy.deepcopy(self.network),
            self.settings,
            self.threshold,
            self.provenance,
            torch.device("cpu"),
        )

    def score_batch(self, batch: ImageBatch) -> dict[str, NDArray[np.float32]]:
        """``maps`` (B, H, W) and ``scores`` (B,) of images on the canvas, as :meth:`predict` gives
        them.
        """
        maps, scores = self.score_placed(batch.images, batch.valid)
        return {"maps": maps, "scores": scores}

    def score_placed(
        self, images: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score images that lie on the canvas already (:func:`clsnf.data.images.place`).

        Args:
            images: (B, 3, H, W) uint8.
            valid: (B, H, W) bool, False on padding; None where none of them is padded.

        Returns:
            Fused maps (B, H, W) and scores (B,), both float32.
        """
        answers = self.network.score(images, valid)
        return answers.maps.cpu().numpy(), answers.scores.cpu().numpy()

    # ---- save and load ----

    @staticmethod
    def check_folder(folder: str | os.PathLike[str]) -> Path:
        """Refuse a folder that :meth:`save` would refuse, before the long work.

        Raises:
            ModelError: it holds something else than a detector.
        """
        path = Path(folder)
        if path.exists() and not (
            path.is_dir() and all(p.name in (TENSORS, FACTS) for p in path.iterdir())
        ):
            raise ModelError(
                f"{path} holds other files: choose a folder that is empty or holds a detector."
            )
        return path

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``detector.safetensors`` and ``detector.json`` into a folder, which appears whole
        or not at all.

        Raises:
            ModelError: the folder holds something else than a detector.
        """
        path = self.check_folder(folder)
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in self.network.state_dict().items()
        }
        with atomic_write(path) as draft:
            draft.mkdir()
            save_file(tensors, draft / TENSORS)
            facts = {
                "format": FORMAT,
                "settings": to_dict(self.settings),
                "preprocessing": {
                    "colour": "RGB",
                    "range": [0, 1],
                    "mean": list(IMAGENET_MEAN),
                    "std": list(IMAGENET_STD),
                    "resize": "bilinear, antialiased",
                    **to_dict(self.settings.image),
                },
                "channels": list(self.network.backbone.info.channels),
                "level_scales": [list(scale) for scale in self.network.scales],
                "fusion_weight": self.fusion_weight,
                "threshold": dataclasses.asdict(self.threshold),
                "provenance": dataclasses.asdict(self.provenance),
                "tensors_sha256": sha256_file(draft / TENSORS),
            }
            write_json(draft / FACTS, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str = "auto") -> Detector:
        """Load a saved detector. Runs no pickled code and fetches nothing.

        Raises:
            ModelError: the folder is no detector, is damaged, or was written by a newer version.
        """
        path = Path(folder)
        facts = read_facts(path)
        try:
            settings = from_dict(DetectorSettings, facts["settings"], f"{path / FACTS}: settings")
            provenance = from_dict(Provenance, facts["provenance"], f"{path / FACTS}: provenance")
            threshold = from_dict(Threshold, facts["threshold"], f"{path / FACTS}: threshold")
            backbone = empty_backbone(
                provenance.architecture, settings.backbone.levels, settings.image.size
            )
            decoder = build_decoder(backbone.info, settings.image, settings.finetune, seed=0)
            flows = empty_flows(backbone.info, settings.flow)
            scales = facts["level_scales"]
            if len(scales) != len(flows) or not all(_is_pair(scale) for scale in scales):
                raise ModelError(
                    f"{path / FACTS}: level_scales are {scales!r}: they must be {len(flows)} "
                    "pairs of numbers."
                )
            network = ScoreNetwork(
                backbone,
                decoder,
                flows,
                [LevelScale(*scale) for scale in scales],
                settings.fusion,
            )
            if sha256_file(path / TENSORS) != facts["tensors_sha256"]:
                raise ModelError(
                    f"{path / TENSORS} is damaged: its checksum is not the one in {FACTS}. Save "
                    "the detector again."
                )
            network.load_state_dict(load_file(path / TENSORS))
        except KeyError as error:
            raise ModelError(
                f"{path / FACTS} is damaged (no entry {error}): save the detector again."
            ) from error
        except (TypeError, SettingsError, SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(
                f"{path} can't be loaded: {' '.join(str(error).split())[:300]}"
            ) from error
        return cls(network, settings, threshold, provenance, choose_device(device))


class _Scorer:
    """Holds a detector where a stream's worker computes."""

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self._detector = Detector(
            detector.network, detector.settings, detector.threshold, detector.provenance, device
        )

    def __call__(self, batch: ImageBatch) -> dict[str, NDArray[np.float32]]:
        return self._detector.score_batch(batch)


def validation_normals(table: pa.Table) -> pa.Table:
    """The rows that a threshold rests on.

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


def _as_array(image: ImageLike) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ImageError(
            f"An image is an array of shape {image.shape} and type {image.dtype}: it must be (h, "
            "w, 3) uint8, RGB."
        )
    return image


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, float) for v in value)


def read_facts(path: Path) -> dict[str, Any]:
    """What ``detector.json`` of a saved detector says, its format checked. Raises ModelError."""
    if not (path / FACTS).is_file() or not (path / TENSORS).is_file():
        raise ModelError(f"{path} is no saved detector: it needs {TENSORS} and {FACTS}.")
    try:
        facts: dict[str, Any] = json.loads((path / FACTS).read_text())
        version = facts["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{path / FACTS} is damaged ({error}): save the detector again."
        ) from error
    if version != FORMAT:
        raise ModelError(
            f"{path} has format {version!r}, this version of clsnf reads format {FORMAT}: use a "
            "version that matches."
        )
    return facts


def package_versions() -> dict[str, str]:
    """Versions of what a detector's figures rest on."""
    return {
        name: importlib.metadata.version(name)
        for name in ("clsnf", "torch", "timm", "FrEIA", "numpy")
    }
