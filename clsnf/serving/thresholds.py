"""Thresholds that people set at run time: kept in a file that all replicas share.

A *false-reject rate* keeps its meaning when new models roll in: the threshold is taken anew from
their validation normals. A *value* means nothing on another model's scale. It holds for the version
of the model that it was set for, rests while another version serves, and holds again after a roll
back.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from clsnf.core.config import from_dict
from clsnf.core.errors import ClsnfError, OutputError, SettingsError
from clsnf.core.files import write_json
from clsnf.detector import Detector
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.errors import ServiceUnavailable, UnprocessableContent
from clsnf.serving.schemas import ThresholdSource
from clsnf.training.calibrate import Threshold, threshold_from_normals

_FILE = "thresholds.json"


@dataclass(frozen=True)
class ThresholdSetting:
    """What somebody set: a rate, or a value for one version of the model.

    ``at`` is the time of it, in seconds since 1970.
    """

    false_reject_rate: float | None = None
    value: float | None = None
    version: str | None = None
    at: float = 0.0


@dataclass(frozen=True)
class ActiveThreshold:
    """The threshold that decides the verdicts of a model now.

    Attributes:
        value: scores above it are rejected.
        map_value: overlays outline map values above it.
        threshold: what `value` rests on. For a value that was set, the rate is the share of the
            validation normals that it rejects.
        source: ``model``, ``rate`` or ``value``.
    """

    value: float
    map_value: float
    threshold: Threshold
    source: ThresholdSource


class Thresholds:
    """What people set, by category, in a file that all replicas read.

    Args:
        folder: of the file; made when a threshold is set.

    Raises:
        SettingsError: the file that is there can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._stamp: tuple[int, int] | None = None
        self._settings: dict[str, ThresholdSetting] = {}
        self.refresh()

    @property
    def settings(self) -> dict[str, ThresholdSetting]:
        """As last read; never changed in place."""
        return self._settings

    def refresh(self) -> None:
        """Read the file again if it has changed. Raises SettingsError."""
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            self._stamp, self._settings = None, {}
            return
        except OSError as error:
            raise SettingsError(
                f"{self._file} can't be read ({error.strerror}): check its permissions."
            ) from error
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._stamp:
            self._settings = self._read()
            self._stamp = stamp

    def set(
        self,
        entry: ModelEntry,
        *,
        false_reject_rate: float | None = None,
        value: float | None = None,
    ) -> None:
        """Set a category's threshold for all replicas; with neither, go back to the model's own.

        Raises:
            UnprocessableContent: both are given, or one makes no sense.
            ServiceUnavailable: the file can't be written.
        """
        if false_reject_rate is not None and value is not None:
            raise UnprocessableContent("Give false_reject_rate or value, not both.")
        if false_reject_rate is not None and not 0 < false_reject_rate < 1:
            raise UnprocessableContent(
                f"false_reject_rate is {false_reject_rate!r}: it must lie between 0 and 1, both "
                "excluded."
            )
        if value is not None and not 0 <= value <= 1:
            raise UnprocessableContent(
                f"value is {value!r}: scores lie in [0, 1], and so must the threshold."
            )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock"), timeout=10):
                settings = dict(self._read()) if self._file.exists() else {}
                settings.pop(entry.category, None)
                if false_reject_rate is not None:
                    settings[entry.category] = ThresholdSetting(
                        false_reject_rate=false_reject_rate, at=time.time()
                    )
                elif value is not None:
                    settings[entry.category] = ThresholdSetting(
                        value=value, version=entry.version, at=time.time()
                    )
                write_json(self._file, {category: asdict(s) for category, s in settings.items()})
        except (OSError, Timeout, OutputError, SettingsError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ServiceUnavailable(
                f"The threshold can't be kept in {self._file.parent} ({reason}): nothing was "
                "changed."
            ) from error
        self.refresh()

    def active(
        self, entry: ModelEntry, detector: Detector, tried: float | None = None
    ) -> ActiveThreshold:
        """The threshold of a loaded model; a value that is `tried` takes its place."""
        setting = self._settings.get(entry.category)
        if tried is not None:
            setting = ThresholdSetting(value=tried, version=entry.version)
        threshold, source = resolve_threshold(entry, setting)
        peaks = detector.provenance.validation_peaks
        if source == "model":
            map_value = detector.map_threshold
        elif source == "rate" and peaks:
            map_value = threshold_from_normals(np.array(peaks), threshold.false_reject_rate).value
        elif detector.settings.image_weight == detector.fusion_weight:
            map_value = threshold.value
        else:  # the score comes from another map: a value on its scale is none on this one's
            scores = np.array(entry.provenance.validation_scores)
            map_value = _on_other_scale(threshold.value, scores, np.array(peaks))
        return ActiveThreshold(threshold.value, map_value, threshold, source)

    def _read(self) -> dict[str, ThresholdSetting]:
        try:
            content: Any = json.loads(self._file.read_text())
            return {
                str(c): from_dict(ThresholdSetting, values, f"{self._file}: {c}")
                for c, values in content.items()
            }
        except ClsnfError:
            raise
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise SettingsError(
                f"{self._file} is damaged ({error}): remove it to go back to the models' own "
                "thresholds."
            ) from error


def _on_other_scale(value: float, scores: np.ndarray, peaks: np.ndarray) -> float:
    """The map value that as many normals' peaks exceed as their scores exceed `value`.

    Between the normals and beyond them it is linear.

    Args:
        value: on the scale of `scores`.
        scores, peaks: (n,) and (m,), of the validation normals.
    """
    if not len(scores) or not len(peaks):
        return value
    ranks = np.linspace(0, 1, max(len(scores), len(peaks)))
    score_at, peak_at = np.quantile(scores, ranks), np.quantile(peaks, ranks)
    low, high = score_at[0], score_at[-1]
    slope = (peak_at[-1] - peak_at[0]) / (high - low) if high > low else 1.0
    inside = float(np.interp(value, score_at, peak_at))
    return max(0.0, inside + slope * (value - float(np.clip(value, low, high))))


def resolve_threshold(
    entry: ModelEntry, setting: ThresholdSetting | None
) -> tuple[Threshold, ThresholdSource]:
    """The active threshold of a model, and where it comes from."""
    scores = np.array(entry.provenance.validation_scores)
    if setting is not None and setting.false_reject_rate is not None and len(scores):
        return threshold_from_normals(scores, setting.false_reject_rate), "rate"
    if setting is not None and setting.value is not None and setting.version == entry.version:
        rejected = int((scores > setting.value).sum())
        share = (rejected + 1) / (len(scores) + 1)
        return Threshold(setting.value, share, share, len(scores)), "value"
    return entry.threshold, "model"
