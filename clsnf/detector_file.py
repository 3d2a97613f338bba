"""The folder of a saved detector: ``detector.safetensors`` and ``detector.json``.

``detector.json`` says each fact once:

    format            of this file
    trained_with      settings that training was asked for, its false-reject rate among them
    uses              what the detector computes with now: the fusion, the levels' scales, and the
                      threshold, with the false-reject rate that it was taken for
    preprocessing     what an image goes through before the network
    provenance        where the detector comes from
    tensors_sha256    of detector.safetensors

:func:`read_description` reads it without loading the network, format 2 included. Older formats are
read as if they were of the present one (see :func:`_from_format_2`).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    Fusion,
    from_dict,
    from_stored,
    to_dict,
    value_at,
)
from clsnf.core.errors import ClsnfError, ModelError, SettingsError
from clsnf.core.files import atomic_write, read_json, write_json
from clsnf.core.hashing import content_key, sha256_file
from clsnf.core.tensors import save_tensors
from clsnf.data.image_statistics import STATISTICS
from clsnf.model.extractors import build_extractor
from clsnf.model.flow import LevelScale
from clsnf.training.calibrate import Threshold

FORMAT = 3
READABLE_FORMATS = (2, FORMAT)
TENSORS, DESCRIPTION = "detector.safetensors", "detector.json"

# A name of timm's own: one with a colon or a slash would be looked up on a hub or a disk.
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.]{1,100}")
_HEX = re.compile(r"[0-9a-f]{64}")
_MOST_NORMALS = 10**9
_ROUNDING = 1e-4  # by which a score may lie outside [0, 1]

_FUSION = tuple(f.name for f in dataclasses.fields(Fusion))


@dataclass(frozen=True)
class Provenance:
    """Where a detector comes from.

    Attributes:
        category: the product's name.
        architecture: timm's name of the backbone.
        backbone_fingerprint: sha256 of the pretrained weights that training started from; of an
            imported detector, of its backbone.
        data_fingerprint: hash of the contents of the images it was fitted on; of an imported
            detector, of those that its level constants come from.
        validation_fingerprint: hash of the contents of the held-out normal images.
        object_mask: where training defects could lie (``off``, ``dark``, ``bright``; ``unknown``
            for an imported detector).
        fit_images: number of images it was fitted on.
        validation_scores: sorted image scores of the held-out normal images. The threshold rests on
            them.
        versions: of the packages that made it.
        imported: the sha256, by name, of the checkpoint files that the network comes from; empty
            where clsnf trained it.
        validation_peaks: sorted largest map values of the held-out normal images. The colours and
            outlines of pictures for people rest on them.
        image_statistics: mean and standard deviation of each of
            :data:`clsnf.data.image_statistics.STATISTICS` over the held-out normal images. A server
            compares the images of the day with them. Empty in detectors saved by versions without
            these statistics.
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
    image_statistics: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectorDescription:
    """What ``detector.json`` says.

    Attributes:
        settings: what training was asked for, with the fusion that the detector uses.
        level_scales: of each level (see :meth:`clsnf.model.flow.LevelFlow.relative_likelihood`).
        threshold: in use, with the false-reject rate that it was taken for;
            ``settings.validation.false_reject_rate`` is the one that training was asked for.
        provenance: where the detector comes from.
        tensors_sha256: of ``detector.safetensors``.
        version: 12 hex digits, a hash of the whole file. It covers `tensors_sha256`, so detectors
            of equal versions answer equally.
    """

    settings: DetectorSettings
    level_scales: tuple[LevelScale, ...]
    threshold: Threshold
    provenance: Provenance
    tensors_sha256: str
    version: str

    @property
    def fusion(self) -> Fusion:
        """How the detector makes one map of both score maps."""
        return self.settings.fusion


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Check that a detector may be written to this folder, before long work.

    Raises:
        ModelError: it holds something else than a detector.
    """
    path = Path(folder)
    if path.exists() and not (
        path.is_dir() and all(p.name in (TENSORS, DESCRIPTION) for p in path.iterdir())
    ):
        raise ModelError(
            f"{path} holds other files: choose a folder that is empty or holds a detector."
        )
    return path


def write_detector(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    settings: DetectorSettings,
    level_scales: Sequence[LevelScale],
    threshold: Threshold,
    provenance: Provenance,
) -> None:
    """Write a detector's folder. It appears whole or not at all.

    Args:
        folder: empty, absent, or an older detector, which is replaced.
        tensors: the network's state.
        settings, level_scales, threshold, provenance: see :class:`DetectorDescription`.

    Raises:
        ModelError: the folder holds something else than a detector.
    """
    path = check_folder(folder)
    trained_with = to_dict(settings)
    fusion = {name: trained_with.pop(name) for name in _FUSION}
    with atomic_write(path) as draft:
        draft.mkdir()
        save_tensors(tensors, draft / TENSORS)
        content = {
            "format": FORMAT,
            "trained_with": trained_with,
            "uses": fusion
            | {
                "level_scales": [list(scale) for scale in level_scales],
                "threshold": dataclasses.asdict(threshold),
            },
            "preprocessing": {
                "colour": "RGB",
                "resize": f"{settings.image.interpolation}, antialiased, to trained_with.image",
                "range": [0, 1],
                "mean": settings.backbone.mean,
                "std": settings.backbone.std,
            },
            "provenance": dataclasses.asdict(provenance),
            "tensors_sha256": sha256_file(draft / TENSORS),
        }
        write_json(draft / DESCRIPTION, content)


def read_description(folder: str | os.PathLike[str]) -> DetectorDescription:
    """Read what a saved detector is, without its tensors. Every field is checked.

    Raises:
        ModelError: the folder is no detector, its description is damaged, or a newer version of
            clsnf wrote it.
    """
    file = Path(folder) / DESCRIPTION
    content = _read_content(Path(folder))
    try:
        return _described(content)
    except KeyError as error:
        raise ModelError(f"{file} is damaged (no entry {error}): save the detector again.") from (
            error
        )
    # Anybody may have written the file, with a list where a mapping was, or worse.
    except (TypeError, ValueError, AttributeError, OverflowError, ClsnfError) as error:
        raise ModelError(f"{file} can't be used: {' '.join(str(error).split())[:300]}") from error


def _described(content: dict[str, Any]) -> DetectorDescription:
    """The description of checked content. Raises SettingsError, or what Python does."""
    now = _from_format_2(content) if content["format"] == 2 else content
    uses = dict(now["uses"])
    scales, threshold = uses.pop("level_scales"), uses.pop("threshold")
    fusion = from_dict(Fusion, uses, "uses")
    asked = from_stored(now["trained_with"], "trained_with")
    twice = [name for name in _FUSION if name in now["trained_with"]]
    if twice:
        raise SettingsError(
            f"{', '.join(twice)} stands under trained_with: say it under uses alone."
        )
    settings = dataclasses.replace(asked, **to_dict(fusion))
    _check_resolved(settings)
    levels = len(settings.backbone.levels or ())
    rule = f"{levels} pairs of numbers, or fewer where levels are joined"
    _check("uses.level_scales", scales, lambda s: _are_pairs(s, settings.backbone), rule)
    described = DetectorDescription(
        settings,
        tuple(LevelScale(*scale) for scale in scales),
        from_dict(Threshold, threshold, "uses.threshold"),
        from_dict(Provenance, now["provenance"], "provenance"),
        now["tensors_sha256"],
        content_key(content)[:12],
    )
    _check_threshold(described.threshold)
    _check_provenance(described.provenance)
    _check("tensors_sha256", described.tensors_sha256, _is_hash, "64 hexadecimal digits")
    return described


def _check_resolved(settings: DetectorSettings) -> None:
    """Refuse settings that leave open what a network is built with."""
    for name in ("backbone.levels", "backbone.mean", "backbone.std"):
        _check(f"trained_with.{name}", value_at(settings, name), lambda v: v is not None, "given")
    levels, join = settings.backbone.levels or (), settings.backbone.join
    whole = "numbers of timm's levels"
    _check("trained_with.backbone.levels", levels, lambda v: float not in map(type, v), whole)
    _check("trained_with.backbone.join", join, lambda v: v != "auto", "mean or none")


def _check_threshold(threshold: Threshold) -> None:
    where, rate = "uses.threshold.", threshold.false_reject_rate
    _check(where + "value", threshold.value, _is_score, "in [0, 1]")
    _check(where + "false_reject_rate", rate, lambda v: 0 < v < 1, "in (0, 1)")
    _check(where + "supported_rate", threshold.supported_rate, lambda v: 0 < v <= 1, "in (0, 1]")
    _check(where + "normals", threshold.normals, lambda n: 1 <= n <= _MOST_NORMALS, "1 or more")


def _check_provenance(provenance: Provenance) -> None:
    where = "provenance."
    known = provenance.architecture
    _check(where + "architecture", known, _ARCHITECTURE.fullmatch, "a name of timm's own models")
    images = provenance.fit_images
    _check(where + "fit_images", images, lambda n: 0 <= n <= _MOST_NORMALS, "0 or more")
    for name in ("validation_scores", "validation_peaks"):
        values = getattr(provenance, name)
        _check(where + name, values, lambda v: all(map(_is_score, v)), "numbers in [0, 1]")
        _check(where + name, values, lambda v: list(v) == sorted(v), "in rising order")
    scores = provenance.validation_scores
    _check(where + "validation_scores", scores, len, "of one image or more")
    for name in ("versions", "imported"):
        texts = getattr(provenance, name)
        rule = "a mapping of names to texts"
        _check(where + name, texts, lambda t: all(isinstance(v, str) for v in t.values()), rule)
    for name, pair in provenance.image_statistics.items():
        _check(f"{where}image_statistics.{name}", name, STATISTICS.__contains__, str(STATISTICS))
        rule = "a mean and a spread above 0"
        _check(f"{where}image_statistics.{name}", pair, _is_mean_and_spread, rule)


def _check(where: str, value: Any, is_valid: Callable[[Any], object], rule: str) -> None:
    """Raise SettingsError with the field's name, its value and the rule, unless it is valid."""
    if not is_valid(value):
        raise SettingsError(f"{where} is {repr(value)[:60]}: it must be {rule}.")


def read_tensors(
    folder: str | os.PathLike[str], description: DetectorDescription
) -> dict[str, Tensor]:
    """Read the tensors of a saved detector.

    Raises:
        ModelError: they are not those that the description names.
    """
    file = Path(folder) / TENSORS
    check_tensors(folder, description.tensors_sha256)
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} can't be read: {' '.join(str(error).split())[:200]}") from error


def check_backbone(description: DetectorDescription, tensors: Mapping[str, Tensor]) -> None:
    """Check that a detector's tensors fill its backbone, before memory is spent on one.

    Raises:
        ModelError: they are too few.
        SettingsError: see :func:`~clsnf.model.extractors.build_extractor`.
    """
    settings, architecture = description.settings, description.provenance.architecture
    with torch.device("meta"):
        extractor = build_extractor(
            architecture, settings.backbone.level_numbers, settings.image.size
        )
    # Tensors that layers share may be stored once.
    needed = {id(tensor): tensor for tensor in extractor.state_dict(keep_vars=True).values()}
    numbers = sum(tensor.numel() for tensor in needed.values())
    stored = sum(t.numel() for name, t in tensors.items() if name.startswith("backbone."))
    if stored < numbers:
        raise ModelError(
            f"{DESCRIPTION} names the backbone {architecture!r} of {numbers} numbers, and "
            f"{TENSORS} has {stored}: save the detector again."
        )


def check_tensors(folder: str | os.PathLike[str], sha256: str) -> None:
    """Check that a detector's file of tensors is the one with this checksum.

    Raises:
        ModelError: it is another, or can't be read.
    """
    file = Path(folder) / TENSORS
    try:
        found = sha256_file(file)
    except OSError as error:
        raise ModelError(f"{file} can't be read ({error.strerror}).") from error
    if found != sha256:
        raise ModelError(
            f"{file} is damaged: its checksum is not the one in {DESCRIPTION}. Save the detector "
            "again."
        )


def _read_content(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not file.is_file() or not (path / TENSORS).is_file():
        raise ModelError(f"{path} is no saved detector: it needs {TENSORS} and {DESCRIPTION}.")
    try:
        content: dict[str, Any] = read_json(file)
        version = content["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error}): save the detector again.") from error
    if version not in READABLE_FORMATS or not isinstance(content, dict):
        raise ModelError(
            f"{path} has format {repr(version)[:30]}, this version of clsnf reads formats "
            f"{' and '.join(map(str, READABLE_FORMATS))}: use a version that matches."
        )
    return content


def _from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    """The content of format 2 in the order of format 3.

    Format 2 kept the fusion among the settings, and a copy of the fusion weight that no detector
    used. The image's statistics were called ``looks``.
    """
    asked = dict(content["settings"])
    fusion = {name: asked.pop(name) for name in _FUSION if name in asked}
    provenance = dict(content["provenance"])
    if "looks" in provenance:
        provenance["image_statistics"] = provenance.pop("looks")
    return {
        "trained_with": asked,
        "uses": {"fusion_weight": DetectorSettings().fusion_weight}
        | fusion
        | {name: content[name] for name in ("level_scales", "threshold")},
        "provenance": provenance,
        "tensors_sha256": content["tensors_sha256"],
    }


def _are_pairs(value: object, backbone: BackboneSettings) -> bool:
    most = len(backbone.levels or ())
    least = most if backbone.join == "none" else 1
    return isinstance(value, list) and least <= len(value) <= most and all(map(_is_pair, value))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, float) for v in value)


def _is_mean_and_spread(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    return numbers and value[1] > 0


def _is_score(value: object) -> bool:
    return isinstance(value, float) and -_ROUNDING <= value <= 1 + _ROUNDING


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
