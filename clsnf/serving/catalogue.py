"""What a folder of models holds, read without loading a network.

A name from a request is looked up in the catalogue and never made into a path, so no name leads out
of the folder. A model's version is the hash of its ``detector.json``, which holds the hash of its
tensors: equal versions answer equally.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clsnf.core.errors import ModelError, SettingsError
from clsnf.detector_file import DESCRIPTION, TENSORS, Provenance, read_description
from clsnf.training.calibrate import Threshold


@dataclass(frozen=True)
class ModelEntry:
    """One model as it lies in the folder.

    Attributes:
        category: the product's name, which requests ask for.
        version: 12 hex digits.
        folder: of the saved detector.
        size: bytes of its tensors.
        image_size: (height, width) of the network's canvas.
        fusion_weight: the one that the detector uses.
        threshold, provenance: as saved.
        test_metrics: of the test images, as the study that made the model noted them; empty where
            it did not.
    """

    category: str
    version: str
    folder: Path
    size: int
    image_size: tuple[int, int]
    fusion_weight: float
    threshold: Threshold
    provenance: Provenance
    test_metrics: dict[str, float]


@dataclass(frozen=True)
class Catalogue:
    """All models of a folder; immutable, so a request that holds one sees one state of affairs."""

    folder: Path
    entries: dict[str, ModelEntry]

    @property
    def categories(self) -> list[str]:
        return sorted(self.entries)


def read_catalogue(folder: Path) -> Catalogue:
    """The models right in a folder, or the one model that the folder is.

    Raises:
        SettingsError: no models, or no such folder.
        ModelError: one of them is damaged.
    """
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise SettingsError(
            f"{folder} can't be read as a folder of models ({error.strerror}): check the path."
        ) from error
    if (folder / DESCRIPTION).is_file():
        places = {_category_of(folder): folder}
    else:
        root = folder.resolve()
        # A link out of the folder would let whoever may write links in it serve any model of the
        # machine.
        places = {
            p.name: p
            for p in inside
            if (p / DESCRIPTION).is_file() and p.resolve().is_relative_to(root)
        }
    if not places:
        raise SettingsError(
            f"{folder} holds no saved detectors: give a study's winners folder, or a detector's."
        )
    metrics = _test_metrics(folder.parent / "summary.json")
    return Catalogue(
        folder, {name: _entry(name, place, metrics.get(name, {})) for name, place in places.items()}
    )


def read_catalogue_within(folder: Path, memory: int) -> Catalogue:
    """:func:`read_catalogue`, with each model checked against the bytes that all of them share.

    Raises:
        SettingsError: as :func:`read_catalogue`, or a model is larger than that.
        ModelError: as :func:`read_catalogue`.
    """
    catalogue = read_catalogue(folder)
    for entry in catalogue.entries.values():
        if entry.size > memory:
            raise SettingsError(
                f"The model {entry.category!r} has {entry.size / 2**20:.0f} MiB, but all models "
                "together may have "
                f"{memory / 2**20:.0f}: raise memory_mb."
            )
    return catalogue


def _category_of(folder: Path) -> str:
    """The category that a single detector names, else the folder's name."""
    return read_description(folder).provenance.category or folder.name


def _entry(category: str, folder: Path, test_metrics: dict[str, float]) -> ModelEntry:
    described = read_description(folder)
    try:
        size = (folder / TENSORS).stat().st_size
    except OSError as error:
        raise ModelError(f"{folder / TENSORS} can't be read ({error.strerror}).") from error
    return ModelEntry(
        category=category,
        version=described.version,
        folder=folder,
        size=size,
        image_size=described.settings.image.size,
        fusion_weight=described.fusion.fusion_weight,
        threshold=described.threshold,
        provenance=described.provenance,
        test_metrics=test_metrics,
    )


def _test_metrics(summary: Path) -> dict[str, dict[str, float]]:
    """The test metrics of each category, from a study's summary beside its winners.

    Empty where there is no such file, or where it can't be read.
    """
    try:
        categories = json.loads(summary.read_text())["categories"]
        tests = {name: found.get("test") or {} for name, found in categories.items()}
        return {
            name: {
                metric: float(value)
                for metric, value in (test.get("figures") or {}).items()
                if isinstance(value, (int, float))
            }
            for name, test in tests.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
