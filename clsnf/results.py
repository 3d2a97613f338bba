"""What studies, benchmarks and reports say to each other: the content of each file as a type.

A study writes ``summary.json``, ``trials.parquet``, ``study.json``, ``finished/*.json`` and
``evidence/*``; a benchmark writes its cells. Reports, the terminal and the server read them. Each
file has one type here, and this module alone knows the keys in it.

Fields may have other names than the keys in the file (``metrics`` is stored as ``figures``): files
of earlier versions stay readable, and scripts that read the files go on working.

A JSON file: :func:`read_result` and :func:`write_result`. A table with a row for each image or
region: :func:`read_table` and :func:`write_rows`. Trials: :func:`read_trials` and
:func:`write_trials`, and :func:`trials_of_journal` while a study runs.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, TypeAdapter
from pydantic import ValidationError as PydanticError

from clsnf.core.config import DetectorSettings, StudySettings, from_dict, from_stored, to_dict
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.files import atomic_write, write_json
from clsnf.training.calibrate import Threshold

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

T = TypeVar("T")

LATENCY = "latency"  # the objective that is no metric: milliseconds an image
BEGUN_AGAIN = "begun_again"  # attribute of a trial in Optuna: when it was, as an ISO time
FORMAT = 1  # of all files below; files without a number are of earlier versions, and are read too

Number = Annotated[float, Field(strict=True)]  # a text or a boolean is none
Interval = tuple[Number, Number]
Metrics = dict[str, Number]
Stored = Annotated[Metrics, Field(alias="figures")]


# Keys of these values are left out of a file.
def _is_missing(value: Any) -> bool:
    return value is None


def _is_empty(value: Any) -> bool:
    return not value


def _settings_type(cls: Any) -> Any:
    """A field of settings: written as plain JSON types, read with all checks."""

    def read(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        return from_stored(value) if cls is DetectorSettings else from_dict(cls, value)

    return Annotated[cls, PlainValidator(read), PlainSerializer(to_dict)]


# ---- trials ----

TrialStatus = Literal["finished", "stopped", "failed", "under way"]


@dataclass(frozen=True)
class Measurements:
    """What one trial measured, beside its objectives.

    Attributes:
        validation: metric -> mean over the validation defect families.
        families: defect family -> the objective on it.
        metrics_by_family: defect family -> metric -> value.
        sweep: pairs of fusion weight and objective, of every weight that was swept on the trial's
            maps; all else is measured at the best of them. Empty where the space has no fusion
            weight, and in studies of earlier versions, which drew a weight for each trial.
        density: of the validation images and of the density maps the keys, by which running trials
            find them; None where trials are not compared on their way.
        latency: milliseconds an image; None where it was not asked for.
        seconds: of the trial's own work; None where it did not end.
        seconds_by_kind: seconds by kind of work.
        artifacts_computed, artifacts_reused: number of stored results that it computed, and found.
        stream: counters of the image stream (:class:`clsnf.streams.stream.Counters`).
        dropped: ``kind/key`` of stored results that were damaged, and computed anew.
        traceback: of an error that is a bug.
    """

    validation: Metrics = field(default_factory=dict)
    families: Metrics = field(default_factory=dict)
    metrics_by_family: dict[str, Metrics] = field(default_factory=dict)
    sweep: list[tuple[float, float]] = field(default_factory=list)
    density: tuple[str, str] | None = None
    latency: float | None = None
    seconds: float | None = None
    seconds_by_kind: dict[str, float] = field(default_factory=dict)
    artifacts_computed: int | None = None
    artifacts_reused: int | None = None
    stream: dict[str, int | float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    traceback: str | None = None

    # Prefix of a name in the file -> field.
    _GROUPS = (
        ("validation_", "validation"),
        ("family_", "families"),
        ("stream_", "stream"),
        ("seconds_", "seconds_by_kind"),
    )
    # Name in the file -> field.
    _SINGLE = (
        (LATENCY, "latency"),
        ("seconds", "seconds"),
        ("stages_computed", "artifacts_computed"),
        ("stages_reused", "artifacts_reused"),
        ("traceback", "traceback"),
    )
    # Stored under their own names, as JSON texts where only plain values are.
    _NESTED = ("metrics_by_family", "sweep", "density", "dropped")

    @property
    def fusion_weight(self) -> float | None:
        """The best weight of the sweep, the first of equals; None without a sweep."""
        if not self.sweep:
            return None
        return max(self.sweep, key=lambda pair: (pair[1], -pair[0]))[0]

    def value_of(self, objective: str) -> float:
        """The value of an objective by its name, ``latency`` or a metric. Raises KeyError."""
        if objective == LATENCY:
            if self.latency is None:
                raise KeyError(objective)
            return self.latency
        return self.validation[objective]

    def attributes(self) -> dict[str, Any]:
        """As :meth:`flat`, for Optuna's user attributes: what is nested stays nested."""
        nested = {name: getattr(self, name) for name in self._NESTED if getattr(self, name)}
        return self.flat() | nested

    def flat(self) -> dict[str, Any]:
        """One plain value a name, as Tune reports and table rows hold it."""
        result: dict[str, Any] = {}
        for prefix, name in self._GROUPS:
            result |= {f"{prefix}{key}": value for key, value in getattr(self, name).items()}
        values = {key: getattr(self, name) for key, name in self._SINGLE}
        result |= {
            name: json.dumps(getattr(self, name)) for name in self._NESTED if getattr(self, name)
        }
        return result | {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Measurements:
        """The opposite of :meth:`flat` and :meth:`attributes`.

        Unknown names and None values are left out.
        """
        given: dict[str, Any] = {name: {} for _, name in cls._GROUPS}
        single = dict(cls._SINGLE)
        for key, value in values.items():
            if value is None:
                continue
            if key in single:
                given[single[key]] = value
                continue
            if key in cls._NESTED:
                given[key] = _nested(value)
                continue
            prefix, name = next(((p, n) for p, n in cls._GROUPS if key.startswith(p)), ("", ""))
            if name:
                given[name][key.removeprefix(prefix)] = value
        return cls(**given)


@dataclass(frozen=True)
class TrialResult:
    """One trial: a point of the search space, tried on one category.

    Attributes:
        category: the product.
        number: of the trial in its category, from 0.
        status: how it ended.
        cause: why it failed; None where it did not.
        objective: the first objective's value; None where the trial did not finish.
        wall_seconds: from suggestion to result; of a trial that was begun again, from then on.
        config: name of a setting in the search space -> value; the fusion weight is the best one
            that was swept.
        measured: everything else that it found.
    """

    category: str
    number: int
    status: TrialStatus
    cause: str | None = None
    objective: float | None = None
    wall_seconds: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    measured: Measurements = field(default_factory=Measurements)

    @property
    def seconds(self) -> float:
        """Of its own work; 0 where that is not known."""
        return self.measured.seconds or 0.0

    def value_of(self, objective: str) -> float:
        """The value of an objective by its name, ``latency`` or a metric. Raises KeyError."""
        return self.measured.value_of(objective)

    def to_row(self) -> dict[str, Any]:
        """A row of ``trials.parquet``."""
        measured = self.measured.flat()
        return {
            "category": self.category,
            "trial": self.number,
            "status": self.status,
            "cause": self.cause,
            "objective": self.objective,
            "seconds": measured.pop("seconds", None),
            "wall_seconds": self.wall_seconds,
            **{
                f"config/{name}": stored_choice(value) if isinstance(value, Mapping) else value
                for name, value in self.config.items()
            },
            **measured,
        }

    @classmethod
    def from_row(
        cls, row: Mapping[str, Any], where: str = "A row of trials.parquet"
    ) -> TrialResult:
        """The opposite of :meth:`to_row`; `where` is the row's place, for messages.

        Raises:
            OutputError: the row is damaged.
        """
        prefix = "config/"
        given = dict(row) | {"number": row.get("trial")}
        given["config"] = {
            name.removeprefix(prefix): choice_from_stored(value)
            for name, value in row.items()
            if name.startswith(prefix) and value is not None
        }
        given["measured"] = vars(Measurements.from_flat(row))
        return from_plain(cls, given, where)


def _nested(value: Any) -> Any:
    """What is stored nested, or as a JSON text; pairs are tuples."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        return found
    return [tuple(e) for e in found] if isinstance(found[0], (list, tuple)) else tuple(found)


def stored_choice(value: Any) -> Any:
    """A choice as Optuna stores it, because its tools take neither lists nor mappings.

    Both are JSON texts; the order of a mapping's names makes no difference.
    """
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    return json.dumps(value) if isinstance(value, list) else value


def choice_from_stored(value: Any) -> Any:
    """The opposite of :func:`stored_choice`."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:  # a text that begins so
        return value


# Name of Optuna's state of a trial -> status.
TRIAL_STATUS: dict[str, TrialStatus] = {
    "COMPLETE": "finished",
    "PRUNED": "stopped",
    "FAIL": "failed",
    "RUNNING": "under way",
}


def trial_result(category: str, trial: FrozenTrial) -> TrialResult:
    """A begun trial of an Optuna study as a result."""
    attributes = dict(trial.user_attrs)
    status = TRIAL_STATUS[trial.state.name]
    measured = Measurements.from_flat(attributes)
    config = {name: choice_from_stored(value) for name, value in trial.params.items()}
    if measured.fusion_weight is not None:
        config["fusion_weight"] = measured.fusion_weight
    return TrialResult(
        category=category,
        number=trial.number,
        status=status,
        cause=attributes.pop("cause", None),
        objective=trial.values[0] if status == "finished" else None,
        wall_seconds=_wall_seconds(trial),
        config=config,
        measured=measured,
    )


def _wall_seconds(trial: FrozenTrial) -> float | None:
    if trial.datetime_complete is None or trial.datetime_start is None:
        return None
    again = trial.user_attrs.get(BEGUN_AGAIN)
    begun = trial.datetime_start if again is None else datetime.fromisoformat(again)
    return (trial.datetime_complete - begun).total_seconds()


def trials_of_journal(path: Path) -> list[TrialResult]:
    """All begun trials in an Optuna journal; each Optuna study in it is named after its category.

    It is read up to its last whole record. Raises OSError, and what Optuna raises for records that
    contradict each other.
    """
    from optuna import logging
    from optuna.storages import JournalStorage

    from clsnf.core.journal import WholeRecords

    logging.set_verbosity(logging.WARNING)
    storage = JournalStorage(WholeRecords(path))
    return [
        trial_result(study.study_name.rpartition("/")[2], trial)
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id, deepcopy=False)
        if trial.state.name in TRIAL_STATUS
    ]


def trials_of_study(folder: Path) -> list[TrialResult]:
    """The trials of the study in a folder: of its table, or of its journal where that is damaged.

    Raises:
        OutputError: neither can be read.
    """
    try:
        return read_trials(folder / "trials.parquet")
    except OutputError:
        try:
            trials = trials_of_journal(folder / "optuna.journal")
        except Exception:  # Optuna raises what its records lead to
            trials = []
        if not trials:
            raise
        return trials


def write_trials(path: Path, trials: Sequence[TrialResult]) -> None:
    """Write ``trials.parquet``: a row a trial, a column for every name that some trial has."""
    rows = [trial.to_row() for trial in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(path, pa.table({name: [row.get(name) for row in rows] for name in names}))


def read_trials(path: Path) -> list[TrialResult]:
    """The trials of a ``trials.parquet``.

    Raises:
        OutputError: the file can't be read, or is damaged.
    """
    return [
        TrialResult.from_row(row, f"{path}, row {number}")
        for number, row in enumerate(read_table(path))
    ]


# ---- a category's result ----


@dataclass(frozen=True)
class FailedTrial:
    """A trial that failed, and why."""

    trial: int
    cause: str | None = None


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read and was left out, and why."""

    path: str
    cause: str


@dataclass(frozen=True)
class StreamTotals:
    """What streams did in a category's trials.

    Attributes:
        images: that came to training.
        waited_seconds: that training waited for them.
        images_per_second: of one worker, by step (read, decode, defects).
    """

    images: int
    waited_seconds: float
    images_per_second: dict[str, float]


@dataclass(frozen=True)
class MaskReport:
    """Where training defects could lie.

    Attributes:
        mode: ``off``, ``dark`` or ``bright``.
        reason: one line for people.
    """

    mode: Annotated[str, Field(alias="kind")]
    reason: str = ""


@dataclass(frozen=True)
class ThresholdReport:
    """A threshold (:class:`clsnf.training.calibrate.Threshold`) with its 95 % interval."""

    value: float
    false_reject_rate: float
    supported_rate: float
    normals: int
    interval: Interval

    @classmethod
    def of(cls, threshold: Threshold) -> ThresholdReport:
        """The report on a threshold."""
        return cls(
            threshold.value,
            threshold.false_reject_rate,
            threshold.supported_rate,
            threshold.normals,
            threshold.interval,
        )


@dataclass(frozen=True)
class WeightSweep:
    """The objective over the fusion weight, for one trial's maps.

    Attributes:
        config: of the trial, without the fusion weight.
        weights: pairs of fusion weight and objective.
    """

    config: dict[str, Any]
    weights: list[tuple[float, float]]


@dataclass(frozen=True)
class RulePick:
    """What a selection rule would have picked: a trial's config, and the fusion weight."""

    config: dict[str, Any]
    fusion_weight: float


def _families_apart(value: Any) -> Any:
    """The metrics lie beside ``families`` in the file."""
    if isinstance(value, Mapping) and "metrics" not in value:
        metrics = {name: found for name, found in value.items() if name != "families"}
        return {"metrics": metrics, "families": value.get("families") or {}}
    return value


@dataclass(frozen=True)
class ValidationResult:
    """The winner's metrics on the validation defects.

    Attributes:
        metrics: metric -> mean over the families.
        families: defect family -> metric -> value.
    """

    metrics: Metrics
    families: dict[str, Metrics]


StoredValidation = Annotated[
    ValidationResult,
    BeforeValidator(_families_apart),
    PlainSerializer(lambda value: {**value.metrics, "families": value.families}),
]


@dataclass(frozen=True)
class ImageScore:
    """The winner's answer about one test image; ``verdict`` is True for a defect."""

    path: str
    defect_type: str
    label: int
    score: float
    verdict: bool


@dataclass(frozen=True)
class TestResult:
    """A detector's answers about labelled images.

    Attributes:
        metrics: metric -> value (:data:`clsnf.metrics.METRICS`); empty without defects.
        counts: defect type -> number of images.
        false_reject_rate, recall: at the detector's threshold; None without normals, or defects.
        scores: image by image.
    """

    __test__ = False  # pytest takes classes of this name for tests

    metrics: Stored
    counts: dict[str, int] = field(default_factory=dict)
    false_reject_rate: float | None = None
    recall: float | None = None
    scores: list[ImageScore] = field(default_factory=list)


@dataclass(frozen=True)
class OracleLoss:
    """What a choice lost against an oracle that picks on the test images.

    Attributes:
        selected, oracle: the metric of what was chosen, and of the oracle's pick.
        regret: oracle minus selected.
        trial: the trial that the oracle picked; None for the winner's own maps.
        weight: the fusion weight that it picked.
    """

    selected: float
    oracle: float
    regret: float
    trial: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Regret:
    """Losses against the oracle: of the fusion weight alone, and of trial and weight together.

    Attributes:
        fusion_weight, trial: metric -> loss.
        rules: selection rule -> metric -> value of the rule's pick on the test images.
    """

    fusion_weight: dict[str, OracleLoss] = field(default_factory=dict)
    trial: dict[str, OracleLoss] = field(default_factory=dict)
    rules: dict[str, Metrics] = field(default_factory=dict)


@dataclass(frozen=True)
class Gain:
    """What one system is ahead of another by, on the same images (95 % interval)."""

    low: float
    high: float
    ahead: float | None = None


@dataclass(frozen=True)
class BaselineResult:
    """The baseline ``cflow``, judged on the same test images.

    Attributes:
        metrics, intervals: metric -> value, and 95 % interval.
        recall, false_reject_rate: at a threshold of its own from the same validation normals.
        gain: metric -> what the winner is ahead by.
        depth: coupling blocks of its flows.
    """

    metrics: Stored
    intervals: dict[str, Interval] = field(default_factory=dict)
    recall: float | None = None
    false_reject_rate: float | None = None
    gain: dict[str, Gain] = field(default_factory=dict)
    depth: int | None = None


@dataclass(frozen=True)
class EvidenceResult:
    """Where a category's evidence lies; with test defects, intervals and the baseline."""

    folder: str
    intervals: Annotated[dict[str, Interval], Field(exclude_if=_is_empty)] = field(
        default_factory=dict
    )
    baseline: Annotated[BaselineResult | None, Field(exclude_if=_is_missing)] = None


@dataclass(frozen=True)
class FrontMember:
    """A detector on the Pareto front: its trial, config, objectives and folder."""

    trial: int
    config: dict[str, Any]
    objectives: dict[str, float]
    detector: str


@dataclass(frozen=True)
class WinnerResult:
    """What a study chose for a category, and what that is worth.

    Attributes:
        folder: of the saved detector.
        trial: number of the trial that it comes from.
        settings: of the detector.
        chosen: the searched settings' values, with ``score_weight``.
        validation: metrics on the validation defects.
        threshold: with its interval.
        object_mask: where training defects could lie.
        sweeps: the objective over the fusion weight.
        rules: what each selection rule would have picked.
        test: metrics on the test images; None without any.
        regret: against the oracle; None without labelled normals and defects,
            and where the study left it out.
        front: the Pareto front, with several objectives.
        examples: path of the sheet of example answers.
        evidence: for reports.
        seconds: that choosing and judging took.
        dropped: as in :class:`Measurements`.
    """

    folder: Annotated[str, Field(alias="winner")]
    trial: int
    settings: _settings_type(DetectorSettings)  # type: ignore[valid-type]
    chosen: dict[str, Any]
    validation: StoredValidation
    threshold: ThresholdReport
    object_mask: MaskReport | None = None
    sweeps: list[WeightSweep] = field(default_factory=list)
    rules: dict[str, RulePick] = field(default_factory=dict)
    test: TestResult | None = None
    regret: Regret | None = None
    front: Annotated[list[FrontMember], Field(exclude_if=_is_empty)] = field(default_factory=list)
    examples: str | None = None
    evidence: EvidenceResult | None = None
    seconds: float | None = None
    dropped: Annotated[list[str], Field(exclude_if=_is_empty)] = field(default_factory=list)


def _winner_apart(value: Any) -> Any:
    """The winner's entries lie beside the category's in the file."""
    if not isinstance(value, Mapping) or not isinstance(value.get("winner"), str):
        return value
    own = {f.name for f in fields(CategoryResult)} - {"winner"}
    winner = {name: found for name, found in value.items() if name not in own}
    return {name: found for name, found in value.items() if name in own} | {"winner": winner}


@dataclass(frozen=True)
class CategoryResult:
    """What a study says of one category.

    Attributes:
        finished_trials, stopped_trials: their numbers.
        failed_trials: with causes.
        error: why there is no winner although trials finished.
        winner: None where there is none.
        skipped: images that could not be read.
        stream: what streams did in its trials.
    """

    finished_trials: int = 0
    stopped_trials: int = 0
    failed_trials: list[FailedTrial] = field(default_factory=list)
    error: str | None = None
    winner: WinnerResult | None = None
    skipped: list[SkippedImage] = field(default_factory=list)
    stream: StreamTotals | None = None


def _winner_beside(value: CategoryResult) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for f in fields(value):
        found = to_plain(getattr(value, f.name))
        if found is not None:
            content |= found if f.name == "winner" else {f.name: found}
    return content


StoredCategory = Annotated[
    CategoryResult, BeforeValidator(_winner_apart), PlainSerializer(_winner_beside)
]


# ---- files of a study ----


@dataclass(frozen=True)
class StudySummary:
    """``summary.json``: what a study came to.

    Attributes:
        version: of clsnf.
        at: when it ended, UTC, ISO 8601.
        seconds: that it took.
        origin: where the data came from.
        backbone: its name.
        study: how it searched.
        stream: what brought images to training, in one line.
        space: what it searched, name -> range as in the space's file.
        settings: what every trial started from.
        categories: name -> result.
    """

    version: Annotated[str, Field(alias="clsnf")]
    at: str
    seconds: float
    categories: dict[str, StoredCategory]
    settings: _settings_type(DetectorSettings)  # type: ignore[valid-type]
    study: _settings_type(StudySettings)  # type: ignore[valid-type]
    origin: str = ""
    backbone: str = ""
    stream: str = ""
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class StudyIdentity:
    """``study.json``: what a study is; resuming with anything else is refused.

    None is unknown: earlier versions did not write down `training` and what follows it here.

    Attributes:
        settings: what every trial starts from.
        space: what is searched.
        data: category -> hash of its images' contents.
        objectives: names, the first picks the winner.
        training: as `data`, without the test images: they decide no trial, and may change.
        textures: hash of the pictures that training defects are filled from; ``drawn`` where code
            draws them.
        weights: weights file of a backbone -> sha256 of its content; empty where timm's are used.
        results_version: of what the same settings give
            (:data:`clsnf.training.artifacts.RESULTS_VERSION`).
        generator_version: of the validation defects
            (:data:`clsnf.synthesis.validation_defects.GENERATOR_VERSION`).
        storage_prefix: what the names of its Optuna studies begin with; empty for a journal of its
            own.
        copy: name of the driver's local folder.
    """

    settings: _settings_type(DetectorSettings)  # type: ignore[valid-type]
    space: dict[str, dict[str, Any]]
    data: dict[str, str]
    objectives: list[str]
    training: dict[str, str] | None = None
    textures: str | None = None
    weights: dict[str, str] | None = None
    results_version: int | None = None
    generator_version: int | None = None
    storage_prefix: Annotated[str, Field(alias="studies")] = ""
    copy: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class TrackedRuns:
    """``tracked.json``: what trackers have of a study.

    Attributes:
        study: distinct for each study; runs carry it.
        sent: tracker with its place -> keys of the runs that have arrived.
    """

    study: str
    sent: dict[str, list[str]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class DataSource:
    """Where the images of some categories are.

    Attributes:
        location: absolute path or URI of a data set or a pack; of a folder of good images if
            `normals`.
        categories: that the study reads from there.
        normals: whether the folder is one category of good images alone.
    """

    location: str
    categories: list[str]
    normals: bool = False


@dataclass(frozen=True)
class StoredRequest:
    """``request.json``: what a user asked a study for, as far as ``--resume RUN`` repeats it.

    Paths are absolute. No password is stored: a location that has one is None.

    Attributes:
        sources: where the images are; empty where tables were handed over instead.
        settings, study, space: as in :class:`StudySummary`.
        textures: folder of the textures.
        device, address, allow_leak, max_bad, optuna_storage, warm_start, mlflow, wandb, notify:
            as in
            :class:`clsnf.study.request.StudyRequest`.
        withheld: names of those that are None for their password.
    """

    sources: list[DataSource]
    settings: _settings_type(DetectorSettings)  # type: ignore[valid-type]
    study: _settings_type(StudySettings)  # type: ignore[valid-type]
    space: dict[str, dict[str, Any]]
    textures: str | None = None
    device: str = "auto"
    address: str | None = None
    allow_leak: bool = False
    max_bad: float = 0.01
    optuna_storage: str | None = None
    warm_start: str | None = None
    mlflow: str | None = None
    wandb: str | None = None
    notify: str | None = None
    withheld: list[str] = field(default_factory=list)
    format: int = FORMAT


@dataclass(frozen=True)
class FinishedCategory:
    """``finished/<category>.json``: a winner.

    Attributes:
        rests_on: hash of what chose it.
        result: the winner.
        test: hash of the test images that it was evaluated on; None is unknown (earlier versions).
    """

    rests_on: str
    result: Annotated[WinnerResult, Field()]
    test: str | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class Case:
    """An image in the report: why it is shown, what was said of it, and its pictures by layer."""

    kind: str
    path: str
    defect_type: str
    label: int
    score: float
    files: dict[str, str]


@dataclass(frozen=True)
class LearningCurves:
    """Losses: of every epoch of finetuning, and of each level's flow."""

    finetuning: list[float] = field(default_factory=list)
    flows: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class EvidenceFacts:
    """``evidence/<category>/facts.json``.

    Attributes:
        shown: ``test`` or ``validation``: where the cases come from.
        cases: images that a person wants to see.
        map_threshold: where pictures draw the line.
        losses: learning curves.
        frozen_epochs: epochs of the decoder alone.
        machine: what the winner was made on.
        versions: of packages.
    """

    shown: str
    cases: Annotated[list[Case], Field(alias="pictures")]
    map_threshold: float
    losses: LearningCurves
    frozen_epochs: int
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class ImageEvidence:
    """A row of ``evidence/<category>/images.parquet``."""

    split: str
    path: str
    defect_type: str
    label: int
    score: float
    verdict: bool
    baseline_score: float | None = None


@dataclass(frozen=True)
class RegionEvidence:
    """A row of ``evidence/<category>/regions.parquet``: one connected region of a defect's mask.

    Attributes:
        pixels, share: its area, absolute and as a share of the image.
        contrast: |mean inside - mean of a ring around it| as a share of the full range; None where
            there is no ring.
        overlap: share of its pixels above the line that pictures draw.
        found: whether any pixel is above it.
        rejected: the image's verdict.
    """

    path: str
    defect_type: str
    pixels: int
    share: float
    contrast: float | None
    overlap: float
    found: bool
    rejected: bool


@dataclass(frozen=True)
class WinnerProvenance:
    """The part of a winner's ``detector.json`` that reports show.

    :class:`clsnf.detector.Provenance` holds all of it, and imports torch: reports do without.
    """

    architecture: str | None = None
    backbone_fingerprint: str | None = None
    data_fingerprint: str | None = None
    validation_fingerprint: str | None = None
    fit_images: int = 0
    versions: dict[str, str] = field(default_factory=dict)


# ---- files of a benchmark ----


@dataclass(frozen=True)
class CandidateResult:
    """One way to run a system, with its objective.

    Attributes:
        epoch: joint epochs of the classifier; None without one.
        depth: coupling blocks of the flows; None without flows.
        weight: fusion weight.
        score_weight: fusion weight of the map that image scores are taken from; None for `weight`.
        objective: mean over the validation defect families.
    """

    epoch: int | None
    depth: int | None
    weight: float
    score_weight: float | None = None
    objective: Annotated[float | None, Field(alias="pixel_ap", exclude_if=_is_missing)] = None


@dataclass(frozen=True)
class SystemTest:
    """A system's metrics on the test images.

    Attributes:
        selected, last, oracle: metric -> value, of the candidate that validation chose, of the one
            that the settings name, and of the best one on the test images.
        intervals: metric -> 95 % interval of ``selected``.
        ahead_by: metric -> what the method is ahead of this system by.
    """

    selected: Metrics
    last: Metrics
    oracle: Metrics
    intervals: dict[str, Interval]
    ahead_by: Annotated[
        dict[str, Gain] | None, Field(alias="fused_ahead_by", exclude_if=_is_missing)
    ] = None


@dataclass(frozen=True)
class SystemResult:
    """What a benchmark says of one system in one cell."""

    candidates: list[CandidateResult]
    selected: CandidateResult
    last: CandidateResult
    validation: Metrics
    families: dict[str, Metrics]
    test: SystemTest | None = None


@dataclass(frozen=True)
class CellResult:
    """``cells/<variant>/<category>/seed-N.json``: all systems for one category and one seed.

    Attributes:
        identity: hash of everything that decides the cell.
        at: when it ended.
        systems: name -> result.
        object_mask: where training defects could lie.
        images: number of images by split.
        seconds: by kind of work.
        cost: seconds of all systems, and of the trainings in them; None where some were found.
        artifacts: ``computed`` and ``reused``, each by kind.
    """

    variant: str
    category: str
    seed: int
    identity: str
    at: str
    systems: dict[str, SystemResult]
    object_mask: MaskReport
    images: dict[str, int]
    seconds: dict[str, float]
    cost: dict[str, float] | None
    artifacts: Annotated[dict[str, dict[str, int]], Field(alias="stages")]
    format: int = FORMAT


# ---- reading and writing ----


@cache
def _adapter(cls: Hashable) -> TypeAdapter[Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, cls))
    return adapter


def to_plain(value: Any) -> Any:
    """A result, or a list or mapping of results, as plain JSON types."""
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: to_plain(entry) for name, entry in value.items()}
    if isinstance(value, CategoryResult):
        return _winner_beside(value)
    if not hasattr(value, "__dataclass_fields__"):
        return value
    cls: Any = type(value)
    return _adapter(cls).dump_python(value, mode="json", by_alias=True)


def check_format(content: Any, where: str) -> None:
    """Refuse what a newer version wrote; `where` is its file, for the message.

    Raises:
        OutputError: the content has a newer format.
    """
    number = content.get("format", FORMAT) if isinstance(content, Mapping) else FORMAT
    if isinstance(number, int) and number > FORMAT:
        raise OutputError(
            f"{where} has format {number}, and this version of clsnf reads formats up to "
            f"{FORMAT}: use a newer version of clsnf."
        )


def from_plain(cls: type[T], content: Any, where: str, remedy: str = "") -> T:
    """A result from plain JSON types; entries that the type does not know are left out.

    Args:
        cls: a type of this module.
        content: what its file holds.
        where: the file, for messages.
        remedy: what to do about damage, for messages.

    Raises:
        OutputError: the content is damaged, or was written by a newer version.
    """
    check_format(content, where)
    end = f": {remedy}." if remedy else "."
    typed: Any = StoredCategory if cls is CategoryResult else cls
    try:
        result: T = _adapter(typed).validate_python(content)
    except ClsnfError as error:  # of settings
        raise OutputError(f"{where} is damaged ({error}){end}") from error
    except PydanticError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        cause = f"{place or 'content'}: {first['msg']}"
        raise OutputError(f"{where} is damaged ({cause}){end}") from error
    return result


def read_result(cls: type[T], path: Path, remedy: str = "") -> T:
    """The content of a JSON file as a type of this module.

    Args:
        cls: a type of this module.
        path: its file.
        remedy: what to do about damage, for messages.

    Raises:
        OutputError: the file can't be read, is damaged, or was written by a newer version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        end = f": {remedy}." if remedy else "."
        raise OutputError(f"{path} is damaged ({error}){end}") from error
    return from_plain(cls, content, str(path), remedy)


def write_result(path: Path, value: Any) -> None:
    """Write a result as JSON, whole or not at all, whatever happens to the machine's power.

    Raises:
        ValueError: a number is not finite.
        OutputError: the disk is full.
    """
    write_json(path, to_plain(value), durable=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet, whole or not at all, whatever happens to the machine's power."""
    with atomic_write(path, durable=True) as draft:
        pq.write_table(table, draft)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; :func:`from_plain` makes each one a type.

    Raises:
        OutputError: the file can't be read, or is damaged.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{path} is damaged ({line}).") from error
    return rows


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a table with a row for each result: images or regions of the evidence."""
    content = [to_plain(row) for row in rows]
    write_table(path, pa.Table.from_pylist(content) if content else pa.table({}))
