"""The driver's checks before anything long starts; nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clsnf.core.config import DetectorSettings, StudySettings, differences, replaced
from clsnf.core.errors import ClsnfError, DataError, OutputError, SettingsError, WeightsError
from clsnf.core.hashing import sha256_file
from clsnf.data.checks import CheckReport, check_category
from clsnf.data.splits import assign_splits
from clsnf.evaluation.selection import check_objective
from clsnf.evaluation.selection_rules import check_rule
from clsnf.model.resolve import resolved
from clsnf.model.weights_files import weights_file
from clsnf.results import LATENCY, SkippedImage, StudyIdentity, TrialResult, read_result, to_plain
from clsnf.study.disk import DiskNeed, check_room, estimate_disk
from clsnf.study.folder import check_folder
from clsnf.study.request import Reporter, StudyRequest, category_of
from clsnf.study.samplers import check_sampler
from clsnf.study.space import apply_config
from clsnf.study.trackers import check_trackers
from clsnf.study.trials import directions_of
from clsnf.study.warm_start import read_earlier_trials
from clsnf.synthesis.textures import texture_contents_key
from clsnf.synthesis.validation_defects import GENERATOR_VERSION
from clsnf.training.artifacts import RESULTS_VERSION
from clsnf.training.prepare import MAX_TEXTURES, check_ingredients, data_fingerprint

DRAWN = "drawn"  # the identity's textures where code draws them


@dataclass(frozen=True)
class StudyInputs:
    """A study's checked input.

    Attributes:
        tables: category -> table of its images, each with a split.
        skipped: category -> unreadable images that were left out.
        earlier_trials: of the study that ``--warm-start`` names.
        identity: what the study is.
        resumed: the identity that the study began with; None for a new study.
        disk: how much room the study needs.
    """

    tables: dict[str, pa.Table]
    skipped: dict[str, list[SkippedImage]]
    earlier_trials: list[TrialResult]
    identity: StudyIdentity
    resumed: StudyIdentity | None
    disk: DiskNeed


def check_inputs(request: StudyRequest, out: Path, reporter: Reporter) -> StudyInputs:
    """Read and check everything that could stop a trial.

    Args:
        request: what the user asks for.
        out: the study's folder on this machine.
        reporter: gets warnings and progress.

    Raises:
        ClsnfError: bad input.
    """
    _check_names(request.study)
    _check_end(request)
    request.space.check(request.settings)
    check_trackers(request)
    check_sampler(
        request.study.sampler,
        list(directions_of(request.study).values()),
        request.space.distributions(),
    )
    earlier_trials = read_earlier_trials(request.warm_start)
    check_folder(out, request.resume, str(request.out))
    resumed = _read_identity(out)
    if resumed is None:
        request.space.check_new(request.settings)
    # Of a space without the settings' own backbone, that one is never loaded.
    first = apply_config(request.settings, request.space.start(request.settings))
    check_ingredients(first, request.textures, request.device)
    reports = {category_of(t): _check_images(t, request, reporter) for t in request.tables}
    fraction, seed = request.settings.validation.fraction, request.settings.seed
    tables = {
        category: assign_splits(report.table, fraction, seed)
        for category, report in reports.items()
    }
    skipped = {
        category: [SkippedImage(path, cause) for path, cause in report.skipped.items()]
        for category, report in reports.items()
    }
    identity = StudyIdentity(
        settings=request.settings,
        space={name: dict(given) for name, given in request.space.ranges.items()},
        data={category: data_fingerprint(table) for category, table in tables.items()},
        objectives=list(request.study.objectives),
        training={category: data_fingerprint(_not_test(t)) for category, t in tables.items()},
        textures=_textures_key(request.textures),
        weights=_weights_keys(request),
        results_version=RESULTS_VERSION,
        generator_version=GENERATOR_VERSION,
    )
    if resumed is not None:
        _check_same_study(resumed, identity, out, request.optuna_storage)
    need = estimate_disk(request.settings, request.study, request.space, tables)
    reporter.say(check_room(out, need))
    return StudyInputs(tables, skipped, earlier_trials, identity, resumed, need)


def _not_test(table: pa.Table) -> pa.Table:
    return table.filter(pa.compute.not_equal(table["split"], "test"))


def _check_names(study: StudySettings) -> None:
    """Refuse unknown objectives and selection rules; the first objective is a metric."""
    first, *others = study.objectives
    for name in (first, *(name for name in others if name != LATENCY)):
        check_objective(name)
    check_rule(study.selection)


def _check_end(request: StudyRequest) -> None:
    """Refuse a study without an end, and one whose end is over."""
    study = request.study
    if study.trials is None and not study.total_trials and request.until is None:
        raise SettingsError(
            "The study has no end: say how many --trials or --total-trials, or give --hours or "
            "--until."
        )
    if request.until is not None and request.until <= time.time():
        raise SettingsError("The study's end is over already: give a time to come.")


def _textures_key(folder: Path | None) -> str:
    """What decides the textures beside settings, for the identity."""
    if folder is None:
        return DRAWN
    try:
        return texture_contents_key(folder, MAX_TEXTURES)
    except OSError as error:
        raise DataError(f"A picture of the texture folder can't be read: {error}.") from error


def _weights_keys(request: StudyRequest) -> dict[str, str]:
    """The sha256 of each weights file that a trial may load.

    A single file has its name in settings or space, one of several its whole path.

    Raises:
        WeightsError: a file is not there, or can't be read.
    """
    keys: dict[str, str] = {}
    for backbone in request.space.backbones(request.settings):
        weights = backbone.weights
        path = None if weights is None else weights_file(backbone)
        if weights is not None and path is not None:
            is_file = Path(weights).expanduser().is_file()
            keys[weights if is_file else str(path)] = _sha256_of(path)
    return keys


def _sha256_of(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise WeightsError(f"The weights file {path} can't be read ({error.strerror}).") from error


def _check_images(table: pa.Table, request: StudyRequest, reporter: Reporter) -> CheckReport:
    """What a table holds; every file is read once."""
    category = category_of(table)

    def progress(done: int, total: int) -> None:
        reporter.progress(f"checking {category}", done, total)

    report = check_category(
        table, allow_leak=request.allow_leak, max_bad=request.max_bad, progress=progress
    )
    for warning in report.warnings:
        reporter.say(f"warning: {warning}")
    return report


def _read_identity(out: Path) -> StudyIdentity | None:
    """The identity of the study in a folder; None where there is none.

    Raises:
        OutputError: it is damaged. Nothing else knows what the trials were measured on.
    """
    path = out / "study.json"
    remedy = (
        "it alone says what the study was begun with, so put a copy of it back, or begin another "
        f"study with --warm-start {out}, which tries its best points first"
    )
    return read_result(StudyIdentity, path, remedy) if path.is_file() else None


def _check_same_study(
    before: StudyIdentity, identity: StudyIdentity, out: Path, optuna_storage: str | None
) -> None:
    """Refuse to resume a study with anything else that decides a metric."""
    begun_with = before.settings
    if _same_weights(before, identity):  # the file may have been moved
        begun_with = replaced(begun_with, {"backbone.weights": identity.settings.backbone.weights})
    old, new = (
        to_plain(dataclasses.replace(study, settings=settings))
        for study, settings in zip(
            (before, identity), _comparable(begun_with, identity.settings), strict=True
        )
    )
    changed = {part: list(differences(old[part], new[part])) for part in ("settings", "space")}
    changed["data"] = list(_data_differences(before, identity))
    changed["objectives"] = list(differences(old["objectives"], new["objectives"]))
    changed["textures"] = list(_texture_differences(before.textures, identity.textures))
    changed["weights"] = list(_weights_differences(before.weights, identity.weights))
    found = [line for lines in changed.values() for line in lines]
    if found:
        kinds = " and ".join(part for part, lines in changed.items() if lines)
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise OutputError(
            f"The study in {out} was begun with other {kinds} ({'; '.join(found[:3])}{more}): "
            "choose another --out."
        )
    for name in ("results_version", "generator_version"):
        was, now = getattr(before, name), getattr(identity, name)
        if was not in (None, now):
            raise OutputError(
                f"The study in {out} was begun with a version of clsnf that gives other results "
                f"({name} was {was}, is {now}): choose another --out, or go on with that version."
            )
    if (optuna_storage is None) != (before.storage_prefix == ""):
        place = "its own journal" if before.storage_prefix == "" else "another --optuna-storage"
        raise OutputError(
            f"The study in {out} was begun with its trials in {place}: say the same again."
        )


def _comparable(
    before: DetectorSettings, now: DetectorSettings
) -> tuple[DetectorSettings, DetectorSettings]:
    """What both settings come to, however they say it: an earlier version had other words and
    defaults. As they are where one of the backbones can't be asked.
    """
    with contextlib.suppress(ClsnfError):
        before, now = resolved(before), resolved(now)
    if before.image.size == now.image.size:
        image = dataclasses.replace(before.image, multiple=now.image.multiple)
        before = dataclasses.replace(before, image=image)
    return before, now


def _same_weights(before: StudyIdentity, now: StudyIdentity) -> bool:
    """Whether the weights files have the same contents, wherever they are."""
    old, new = (sorted((study.weights or {}).values()) for study in (before, now))
    return bool(old) and old == new


def _data_differences(before: StudyIdentity, now: StudyIdentity) -> Iterator[str]:
    """Categories that are gone or have other images; new ones may come, and test images may.

    Studies of earlier versions did not tell test images apart.
    """
    if before.training is None or now.training is None:
        old, new = before.data, now.data
    else:
        old, new = before.training, now.training
    yield from differences(old, {name: found for name, found in new.items() if name in old})


def _texture_differences(before: str | None, now: str | None) -> Iterator[str]:
    """How the textures differ; earlier versions did not say what theirs were."""
    if before in (None, now):
        return
    if before == DRAWN:
        yield "they were drawn by code, are pictures of --textures"
    elif now == DRAWN:
        yield "they were pictures of --textures, are drawn by code"
    else:
        yield "the pictures of --textures have changed"


def _weights_differences(
    before: Mapping[str, str] | None, now: Mapping[str, str] | None
) -> Iterator[str]:
    """Weights files whose content differs; settings and space tell which files there are."""
    for name, sha in (before or {}).items():
        if now is not None and now.get(name, sha) != sha:
            yield f"the content of {name} has changed"
