"""What a folder of models holds, read without loading a network.

A name from a request is looked up in the catalogue and never made into a path. A model's version is
the hash of its ``detector.json``, which holds the hash of its tensors: equal versions answer
equally.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clsnf.core.errors import ClsnfError, ModelError, SettingsError
from clsnf.core.files import read_json
from clsnf.detector_file import TENSORS, Provenance, read_description
from clsnf.detector_folders import find_detectors
from clsnf.training.calibrate import Threshold


@dataclass(frozen=True)
class ModelEntry:
    """One model as it lies in the folder.

    Attributes:
        category: the product's name, which requests ask for.
        version: 12 hex digits.
        folder: of the saved detector, without links.
        size: bytes of its tensors.
        tensors_sha256: the checksum that their file must have.
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
    tensors_sha256: str
    image_size: tuple[int, int]
    fusion_weight: float
    threshold: Threshold
    provenance: Provenance
    test_metrics: dict[str, float]


@dataclass(frozen=True)
class Catalogue:
    """All models of a folder; immutable, so a request that holds one sees one state of affairs.

    Attributes:
        folder: as it was given.
        entries: the models that can be asked, by category.
        refused: the cause, by category, for those of the folder that can't be used.
        left_out: the cause, by name, for what lies in the folder and is no saved detector.
    """

    folder: Path
    entries: dict[str, ModelEntry]
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def categories(self) -> list[str]:
        return sorted(self.entries)


def read_catalogue_within(folder: Path, memory: int) -> Catalogue:
    """:func:`read_catalogue` of a folder that has to hold a model that can be used.

    Raises:
        ClsnfError: it can't be read, or holds none.
    """
    catalogue = read_catalogue(folder, memory)
    if not catalogue.entries:
        raise ModelError(none_usable(folder, catalogue.refused))
    return catalogue


def read_catalogue(folder: Path, memory: int) -> Catalogue:
    """What a folder holds: see :func:`clsnf.detector_folders.find_detectors`.

    Args:
        folder: of models, of a study, or of one model.
        memory: bytes of parameters that all models share.

    Raises:
        SettingsError: the folder can't be read, or holds no models.
        ModelError: it is a single model, and damaged.
    """
    found = find_detectors(folder)
    metrics = _test_metrics(found.folder.resolve().parent / "summary.json")
    entries: dict[str, ModelEntry] = {}
    refused: dict[str, str] = {}
    for category, place in found.places.items():
        try:
            entry = _entry(category, place, metrics.get(category, {}))
            _check_size(entry, memory)
            entries[category] = entry
        except ClsnfError as error:
            refused[category] = str(error)
    return Catalogue(folder, entries, refused, found.left_out)


def none_usable(folder: Path, refused: Mapping[str, str]) -> str:
    """One line about a folder of which no model can be used."""
    causes = list(refused.values())
    more = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
    return f"No model of {folder} can be used: {causes[0]}{more}"


def _check_size(entry: ModelEntry, memory: int) -> None:
    if entry.size > memory:
        raise SettingsError(
            f"The model {entry.category!r} has {entry.size / 2**20:.0f} MiB, but all models "
            f"together may have {memory / 2**20:.0f}: raise memory_mb."
        )


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
        tensors_sha256=described.tensors_sha256,
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
        categories = read_json(summary)["categories"]
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
