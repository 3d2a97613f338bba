"""Thresholds that people set at run time: kept in a file that all replicas share.

A *false-reject rate* keeps its meaning when new models roll in: the threshold is taken anew from
their validation normals. A *value* means nothing on another model's scale. It holds for the version
of the model that it was set for, rests while another version serves, and holds again after a roll
back.

Hands write the file too. What makes no sense in it is refused, entry by entry, and the last good
settings stay in force, also where the file disappears or can't be read for a while. :meth:`set`
writes what is in force, and so mends it.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from clsnf.core.config import from_dict
from clsnf.core.errors import OutputError, SettingsError
from clsnf.core.files import read_json, write_json
from clsnf.detector import Detector
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.errors import ServiceUnavailable, UnprocessableContent
from clsnf.serving.schemas import ThresholdSource
from clsnf.training.calibrate import Threshold, threshold_from_normals

_FILE = "thresholds.json"
_WHOLE_FILE = ""  # among the causes by category
_GONE = (0, 0, 0)  # the stamp of a file that was there, and can't be read now

log = logging.getLogger("clsnf.serving")


@dataclass(frozen=True)
class ThresholdSetting:
    """What somebody set: a rate, or a value for one version of the model.

    ``at`` is the time of it, in seconds since 1970.

    Raises:
        SettingsError: not one of both, a rate outside (0, 1), a value outside [0, 1], or a value
            without a version.
    """

    false_reject_rate: float | None = None
    value: float | None = None
    version: str | None = None
    at: float = 0.0

    def __post_init__(self) -> None:
        rate, value = self.false_reject_rate, self.value
        if (rate is None) == (value is None):
            raise SettingsError("Give false_reject_rate or value, one of both.")
        if rate is not None and not 0 < rate < 1:
            raise SettingsError(
                f"false_reject_rate is {rate!r}: it must lie between 0 and 1, both excluded."
            )
        if value is not None and not 0 <= value <= 1:
            raise SettingsError(
                f"value is {value!r}: scores lie in [0, 1], and so must the threshold."
            )
        if value is not None and not self.version:
            raise SettingsError("A value needs the version of the model that it holds for.")


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
        SettingsError: the file that is there can't be read, or makes no sense: there are no
            settings of before that could stay in force.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._lock = threading.Lock()  # of refresh and set, which run in several threads
        self._stamp: tuple[int, int, int] | None = None
        self._settings: dict[str, ThresholdSetting] = {}
        self._refused: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self.refresh()
        if self._refused:
            raise SettingsError(
                f"{next(iter(self._refused.values()))} Remove the file to go back to the models' "
                "own thresholds."
            )

    @property
    def settings(self) -> dict[str, ThresholdSetting]:
        """Those in force, by category; never changed in place."""
        return self._settings

    @property
    def refused(self) -> dict[str, str]:
        """Why the file does not say what is in force, by category; of the whole file by ``""``."""
        return self._refused

    def cause(self, category: str) -> str | None:
        """Why a category's setting is not what the file says; None where it is."""
        return self._refused.get(category, self._refused.get(_WHOLE_FILE))

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        with self._lock:
            self._refresh()
            for name, cause in self._refused.items():
                if self._told.get(name) != cause:
                    log.warning("%s The settings of before stay in force.", cause)
            self._told = self._refused

    def _refresh(self) -> None:
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            if self._stamp is not None:
                self._stamp = _GONE
                self._refused = {_WHOLE_FILE: f"{self._file} has disappeared."}
            return
        except OSError as error:
            self._stamp = _GONE
            self._refused = {_WHOLE_FILE: f"{self._file} can't be read ({error.strerror})."}
            return
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp == self._stamp:
            return
        try:
            good, refused = self._read()
        except OSError as error:  # tried again at the next call
            self._stamp = _GONE
            self._refused = {_WHOLE_FILE: f"{self._file} can't be read ({error.strerror})."}
            return
        except ValueError as error:
            self._refused = {_WHOLE_FILE: f"{self._file} is damaged ({error})."}
        else:
            before = self._settings
            self._settings = good | {c: before[c] for c in refused if c in before}
            self._refused = refused
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
            ServiceUnavailable: the file can't be read or written.
        """
        new: ThresholdSetting | None = None
        if false_reject_rate is not None or value is not None:
            version = None if value is None else entry.version
            try:
                new = ThresholdSetting(false_reject_rate, value, version, time.time())
            except SettingsError as error:
                raise UnprocessableContent(str(error)) from error
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock"), timeout=10):
                self.refresh()  # what another replica was given
                if self._stamp == _GONE and self._file.exists():
                    raise OutputError(self._refused[_WHOLE_FILE])
                settings = {c: s for c, s in self._settings.items() if c != entry.category}
                if new is not None:
                    settings[entry.category] = new
                content = {category: asdict(s) for category, s in settings.items()}
                write_json(self._file, content, durable=True)
        except (OSError, Timeout, OutputError) as error:
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

    def _read(self) -> tuple[dict[str, ThresholdSetting], dict[str, str]]:
        """The settings that make sense, and the cause for each that does not.

        Raises:
            OSError: the file can't be read.
            ValueError: it holds no settings at all.
        """
        content = read_json(self._file)
        if not isinstance(content, dict):
            raise ValueError("it must be a mapping of categories to settings")
        good: dict[str, ThresholdSetting] = {}
        refused: dict[str, str] = {}
        for category, values in content.items():
            try:
                good[category] = from_dict(ThresholdSetting, values, "the entry")
            except SettingsError as error:
                line = " ".join(str(error).split())[:200]
                refused[category] = f"{self._file}, {category!r}: {line}"
        return good, refused


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
