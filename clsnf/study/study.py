"""The study: from a data set to a winner for each category.

Called by ``tune/run_study.py`` and ``clsnf study``. The driver reads and checks the data, writes the validation defects, and hands
everything that computes to Ray: one Tune run over all categories, then one task a category that picks, saves and evaluates its winner.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

import clsnf
from clsnf.config import DetectorSettings, StudySettings, to_dict
from clsnf.data.checks import check_category
from clsnf.data.foreground import chosen_polarity
from clsnf.data.splits import assign_splits
from clsnf.data.validation_set import write_validation_set
from clsnf.errors import ClsnfError, OutputError
from clsnf.fingerprint import content_key, write_json
from clsnf.ledger import now
from clsnf.progress import Progress, silent
from clsnf.selection import check_objective
from clsnf.study.cluster import Shares, divide, ray_session
from clsnf.study.plan import StudyPlan, check_folder, claim_folder, write_table
from clsnf.study.search import PerCategorySearch
from clsnf.study.space import Space
from clsnf.study.watch import Watcher
from clsnf.training.prepare import check_ingredients, data_fingerprint, place_fit_rows


@dataclass(frozen=True)
class StudyRequest:
    """What a user asks for.

    Attributes:
        tables: one table a category, as the layout's reader gave it.
        out: the study's folder.
        settings: what every trial starts from.
        study: how to search.
        space: what to search.
        textures: folder of pictures to make training defects from; None for textures drawn by code.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        address: of a Ray cluster, None for a private one.
        allow_leak: go on where training and test images are the same.
        resume: go on with the study in `out`.
        origin: where the data came from, for the summary.
    """

    tables: Sequence[pa.Table]
    out: Path
    settings: DetectorSettings
    study: StudySettings
    space: Space
    textures: Path | None = None
    device: str = "auto"
    address: str | None = None
    allow_leak: bool = False
    resume: bool = False
    origin: str = ""


@dataclass
class Reporter:
    """Where a study tells what it does; the command line fills this in.

    Attributes:
        say: one line for people.
        progress: steps of the driver's own work.
        begin: the input is in order, the long work begins.
        notes: what the workers are at, about once a second.
        trial: a trial ended: its record.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Progress = silent
    begin: Callable[[], None] = lambda: None
    notes: Callable[[list[dict[str, object]]], None] = lambda notes: None
    trial: Callable[[dict[str, Any]], None] = lambda record: None


def run_study(request: StudyRequest, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run a study and return its summary, which also lies in ``summary.json``.

    Raises:
        ClsnfError: bad input, before anything long starts.
        KeyboardInterrupt: the user ended it; what was finished lies in ``trials.parquet`` and in the stages.
    """
    reporter = reporter or Reporter()
    started = time.perf_counter()
    out = request.out.absolute()
    tables = _checked_inputs(request, out, reporter)
    reporter.begin()
    with ray_session(request.address):
        shares = divide(request.study, len(tables))
        plan = _plan(request, out, shares)
        claim_folder(out, request.resume)
        try:
            with FileLock(out / ".lock", timeout=0):
                return _run(request, tables, plan, shares, reporter, started)
        except Timeout as error:
            raise OutputError(f"{out} is in use by another study right now: choose another --out.") from error


def _checked_inputs(request: StudyRequest, out: Path, reporter: Reporter) -> list[pa.Table]:
    """The tables with their normals split, after everything that could stop a trial was looked at; nothing is written."""
    check_objective(request.study.objective)
    request.space.check(request.settings)
    check_folder(out, request.resume)
    check_ingredients(request.settings, request.textures, request.device)
    tables = [_checked(table, request, reporter) for table in request.tables]
    _check_same_study(request, tables, out)
    return tables


def _run(
    request: StudyRequest, tables: list[pa.Table], plan: StudyPlan, shares: Shares, reporter: Reporter, started: float
) -> dict[str, Any]:
    out = Path(plan.out)
    write_json(out / "study.json", _identity(request, tables))
    categories = [str(table["category"][0].as_py()) for table in tables]
    for category, table in zip(categories, tables, strict=True):
        plan.write_tables(category, table, _validation_set(table, category, request, out, reporter))

    at_once = f"{shares.concurrent} at once" if shares.concurrent > 1 else "one at a time"
    reporter.say(
        f"{len(categories)} {'category' if len(categories) == 1 else 'categories'}, {request.study.trials} trials each, "
        f"{at_once}, {shares.cpus} CPUs" + (f" and {shares.gpus:g} GPUs" if shares.gpus else "") + " a trial"
    )
    with Watcher(out, reporter.notes):
        records, interrupted = _search(request, plan, categories, shares, reporter)
        write_table(out / "trials.parquet", _trials_table(records))
        if interrupted:
            raise KeyboardInterrupt
        finished = _finish(plan, categories, records, shares, reporter)
    summary = {
        "clsnf": clsnf.__version__,
        "at": now(),
        "seconds": time.perf_counter() - started,
        "origin": request.origin,
        "backbone": request.settings.backbone.name,
        "study": to_dict(request.study),
        "space": {name: dict(given) for name, given in request.space.ranges.items()},
        "settings": to_dict(request.settings),
        "categories": finished,
    }
    write_json(out / "summary.json", summary)
    return summary


def _plan(request: StudyRequest, out: Path, shares: Shares) -> StudyPlan:
    return StudyPlan(
        out=str(out),
        settings=to_dict(request.settings),
        study=to_dict(request.study),
        leaving_epochs=tuple(request.space.leaving_epochs(request.settings)),
        fusion_weights=request.space.fusion_weights(),
        textures=None if request.textures is None else str(request.textures.absolute()),
        device=request.device,
        threads=shares.cpus,
    )


def _checked(table: pa.Table, request: StudyRequest, reporter: Reporter) -> pa.Table:
    """The table with its normals split, every file read once."""
    category = table["category"][0].as_py()

    def progress(done: int, total: int) -> None:
        reporter.progress(f"checking {category}", done, total)

    report = check_category(table, allow_leak=request.allow_leak, progress=progress)
    for warning in report.warnings:
        reporter.say(f"warning: {warning}")
    return assign_splits(table, request.settings.validation.fraction, request.settings.seed)


def _identity(request: StudyRequest, tables: list[pa.Table]) -> dict[str, Any]:
    """What a study is: resuming with other settings or data is refused instead of mixed."""
    return {
        "settings": to_dict(request.settings),
        "space": {name: dict(given) for name, given in request.space.ranges.items()},
        "data": {table["category"][0].as_py(): data_fingerprint(table) for table in tables},
        "objective": request.study.objective,
    }


def _check_same_study(request: StudyRequest, tables: list[pa.Table], out: Path) -> None:
    path = out / "study.json"
    if not path.is_file():
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}): choose another --out.") from error
    identity = _identity(request, tables)
    changed = [name for name in identity if content_key(before.get(name)) != content_key(identity[name])]
    if changed:
        raise OutputError(f"The study in {out} was begun with other {' and '.join(changed)}: choose another --out.")


def _validation_set(table: pa.Table, category: str, request: StudyRequest, out: Path, reporter: Reporter) -> pa.Table:
    settings = request.settings
    kind = chosen_polarity(place_fit_rows(table, settings).images, settings.defects.object_mask).kind
    reporter.progress(f"validation defects for {category}", 0, 1)
    written = write_validation_set(
        table,
        out / "validation" / category,
        images_per_family=settings.validation.images_per_family,
        seed=settings.seed,
        polarity=kind,
    )
    reporter.progress(f"validation defects for {category}", 1, 1)
    return written


def _search(
    request: StudyRequest, plan: StudyPlan, categories: list[str], shares: Shares, reporter: Reporter
) -> tuple[list[dict[str, Any]], bool]:
    """The Tune run: records of all ended trials, and whether the user ended it."""
    import optuna
    from ray import tune

    from clsnf.study.telling import Telling
    from clsnf.study.trial import run_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = PerCategorySearch(
        categories,
        request.space.distributions(),
        request.space.start(request.settings),
        request.study.trials,
        "objective",
        request.settings.seed,
        in_sequence=shares.concurrent <= len(categories),
    )
    total = len(categories) * request.study.trials
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, plan=plan),
        {"cpu": shares.cpus, "gpu": shares.gpus} if shares.gpus else {"cpu": shares.cpus},
    )
    telling = Telling(reporter.trial)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=total,
            max_concurrent_trials=shares.concurrent,
            metric="objective",
            mode="max",
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=plan.out, verbose=0, callbacks=[telling]),
    )
    try:
        tuner.fit()
    except KeyboardInterrupt:
        return telling.records, True
    return telling.records, False


def _trials_table(records: list[dict[str, Any]]) -> pa.Table:
    rows = [
        {k: r[k] for k in ("category", "trial", "status", "cause", "objective", "seconds")}
        | {f"config/{name}": value for name, value in r["config"].items()}
        | r["figures"]
        for r in records
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _finish(
    plan: StudyPlan, categories: list[str], records: list[dict[str, Any]], shares: Shares, reporter: Reporter
) -> dict[str, Any]:
    """Winners of all categories, as many at once as trials were."""
    import ray

    from clsnf.study.finish import finish_category

    task = ray.remote(num_cpus=shares.cpus, num_gpus=shares.gpus, max_retries=1)(finish_category)
    pending, finished = {}, {}
    for category in categories:
        ended = [r for r in records if r["category"] == category and r["status"] == "finished"]
        failed = [
            {"trial": r["trial"], "cause": r["cause"]} for r in records if r["category"] == category and r["status"] == "failed"
        ]
        finished[category] = {"finished_trials": len(ended), "failed_trials": failed}
        if ended:
            pending[task.remote(plan, category, ended)] = category
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        category = pending.pop(done[0])
        try:
            finished[category] |= ray.get(done[0])
            reporter.say(f"{category}: done")
        except ray.exceptions.RayError as error:  # the other categories' winners must not be lost with this one
            cause = getattr(error, "cause", None) or error
            finished[category]["error"] = str(cause) if isinstance(cause, ClsnfError) else repr(cause)
            reporter.say(f"{category}: {cause if isinstance(cause, ClsnfError) else error}")  # a bug keeps its traceback
    return finished
