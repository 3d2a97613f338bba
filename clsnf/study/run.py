"""The study: from a data set to a winner for each category.

Called by ``tune/run_study.py`` and ``clsnf study``. The driver reads and checks the data, writes
the validation defects, and hands everything that computes to Ray: one Tune run over all categories,
then one task a category that picks, saves and evaluates its winner.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

import clsnf
from clsnf.core.config import DetectorSettings, StudySettings, differences, to_dict
from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.files import write_json
from clsnf.core.ledger import now
from clsnf.core.memory import free_memory, memory_budget
from clsnf.core.progress import Progress, silent
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import uri_name
from clsnf.data.checks import MAX_BAD, CheckReport, check_category
from clsnf.data.splits import assign_splits
from clsnf.evaluation.selection import check_objective
from clsnf.evaluation.selection_rules import check_rule
from clsnf.streams.choice import StreamChoice, choose_stream
from clsnf.study.callbacks import check_loggers, loggers
from clsnf.study.cluster import Shares, node_resources, ray_session, share_out
from clsnf.study.folder import StudyPlan, check_folder, claim_folder, write_table
from clsnf.study.interrupts import heeded_between_steps
from clsnf.study.latency import LATENCY
from clsnf.study.lease_actor import open_book
from clsnf.study.pareto import objectives_of
from clsnf.study.progress_files import notes_shown
from clsnf.study.remote_copy import copy_of, fetch_state, kept_up
from clsnf.study.search import METRIC, PerCategorySearch, StopHopeless, Telling
from clsnf.study.space import Space
from clsnf.study.stream_totals import streamed
from clsnf.study.trials import History, open_storage
from clsnf.study.warm_start import warm_values
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.prepare import (
    check_ingredients,
    data_fingerprint,
    fit_mask_mode,
    open_fit_rows,
    rows_of,
)


@dataclass(frozen=True)
class StudyRequest:
    """What a user asks for.

    Attributes:
        tables: one table a category, as the layout's reader gave it.
        out: the study's folder, or the URI of one on any file system that pyarrow knows.
        settings: what every trial starts from.
        study: how to search.
        space: what to search.
        textures: folder of pictures to make training defects from; None for textures drawn by code.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        address: of a Ray cluster, None for a private one.
        allow_leak: go on where training and test images are the same.
        max_bad: share of a category's images that may be unreadable.
        resume: go on with the study in `out`.
        optuna_storage: a file or URL for the Optuna studies; None for a journal in `out`.
        warm_start: folder of an earlier study: what was best there is tried first.
        mlflow: URI of an MLflow server to log trials to as well.
        wandb: Weights & Biases project to log trials to as well.
        origin: where the data came from, for the summary.
    """

    tables: Sequence[pa.Table]
    out: Path | str
    settings: DetectorSettings
    study: StudySettings
    space: Space
    textures: Path | None = None
    device: str = "auto"
    address: str | None = None
    allow_leak: bool = False
    max_bad: float = MAX_BAD
    resume: bool = False
    optuna_storage: str | None = None
    warm_start: Path | None = None
    mlflow: str | None = None
    wandb: str | None = None
    origin: str = ""

    @property
    def name(self) -> str:
        """What the study is called where it lies beside others."""
        return uri_name(self.out) if isinstance(self.out, str) else self.out.absolute().name


@dataclass
class Reporter:
    """Where a study tells what it does; the command line fills this in.

    Attributes:
        say: one line for people.
        progress: steps of the driver's own work.
        begin: the input is in order, the long work begins.
        notes: what the workers are at, about once a second.
        earlier: records of the trials that ended before this run.
        begun: a trial of a category begins.
        trial: a trial ended: its record.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Progress = silent
    begin: Callable[[], None] = lambda: None
    notes: Callable[[list[dict[str, object]]], None] = lambda notes: None
    earlier: Callable[[list[dict[str, Any]]], None] = lambda records: None
    begun: Callable[[str], None] = lambda category: None
    trial: Callable[[dict[str, Any]], None] = lambda record: None


def run_study(request: StudyRequest, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run a study and return its summary, which also lies in ``summary.json``.

    Raises:
        ClsnfError: bad input, before anything long starts.
        KeyboardInterrupt: the user ended it; what was finished lies in the Optuna storage and in
            the stages.
    """
    reporter = reporter or Reporter()
    started = time.perf_counter()
    remote = RemoteFolder(request.out) if isinstance(request.out, str) else None
    out = Path(request.out).absolute() if remote is None else copy_of(remote)
    try:
        if remote is not None:
            fetch_state(remote, out)
        tables, skipped = _checked_inputs(request, out, reporter)
        reporter.begin()
        # The images of a ray stream travel through the object store.
        with ray_session(request.address, _STREAM_STORE if request.study.stream == "ray" else None):
            stream, shares = _shares(request, tables)
            reporter.say(f"stream: {stream.reason}")
            plan = _plan(request, out, shares, stream)
            claim_folder(out, request.resume)
            book = None if remote is None else open_book(out.name)  # it ends with this handle
            try:
                with FileLock(out / ".lock", timeout=0), kept_up(remote, out):
                    return _run(request, tables, skipped, plan, shares, reporter, started)
            except Timeout as error:
                raise OutputError(
                    f"{request.out} is in use by another study right now: choose another --out."
                ) from error
            finally:
                del book
    finally:
        if remote is not None:
            shutil.rmtree(out, ignore_errors=True)


_STREAM_STORE = 1 << 30


def _shares(request: StudyRequest, tables: list[pa.Table]) -> tuple[StreamChoice, Shares]:
    """What brings the images to training, and what every trial gets."""
    study, nodes = request.study, node_resources()
    alone = share_out(study, len(tables), nodes)
    on_a_node = math.ceil(alone.concurrent / len(nodes))
    memory = min(node["memory"] for node in nodes) if len(nodes) > 1 else free_memory()
    fit = [len(rows_of(table, "fit")) for table in tables]
    workers = study.stream_cpus or 1
    budget = memory_budget(on_a_node, int(memory))
    stream = choose_stream(
        study.stream, fit, request.settings.image, budget=budget, nodes=len(nodes), workers=workers
    )
    if stream.kind == "ray":
        return stream, share_out(study, len(tables), nodes, stream.workers)
    return dataclasses.replace(stream, workers=alone.cpus), alone


def names_of(tables: Sequence[pa.Table]) -> list[str]:
    """The categories of tables, in their order."""
    return [str(table["category"][0].as_py()) for table in tables]


def _checked_inputs(
    request: StudyRequest, out: Path, reporter: Reporter
) -> tuple[list[pa.Table], list[dict[str, str]]]:
    """The tables with their normals split, and what each left out, after everything that could stop
    a trial was looked at.

    Nothing is written.
    """
    _check_choices(request.study)
    request.space.check(request.settings)
    check_loggers(request.mlflow, request.wandb)
    warm_values(request.warm_start, [])
    check_folder(out, request.resume, str(request.out))
    check_ingredients(request.settings, request.textures, request.device)
    reports = [_checked(table, request, reporter) for table in request.tables]
    fraction, seed = request.settings.validation.fraction, request.settings.seed
    tables = [assign_splits(report.table, fraction, seed) for report in reports]
    _check_same_study(request, tables, out)
    return tables, [report.skipped for report in reports]


def _run(
    request: StudyRequest,
    tables: list[pa.Table],
    skipped: list[dict[str, str]],
    plan: StudyPlan,
    shares: Shares,
    reporter: Reporter,
    started: float,
) -> dict[str, Any]:
    out = plan.folder
    categories = names_of(tables)
    histories = _histories(request, tables, out, shares)
    for category, table in zip(categories, tables, strict=True):
        plan.write_tables(category, table, _validation_set(table, category, request, out, reporter))

    at_once = f"{shares.concurrent} at once" if shares.concurrent > 1 else "one at a time"
    reporter.say(
        f"{len(categories)} {'category' if len(categories) == 1 else 'categories'}, "
        f"{request.study.trials} "
        f"{'trial' if request.study.trials == 1 else 'trials'} each, "
        f"{at_once}, {shares.cpus} CPUs"
        + (f" and {shares.gpus:g} GPUs" if shares.gpus else "")
        + " a trial"
    )
    reporter.earlier([record for history in histories.values() for record in history.records()])
    search = PerCategorySearch(
        histories,
        request.study.trials,
        shares.concurrent <= len(categories),
        reporter.begun,
        reporter.trial,
    )
    if search.left < request.study.trials * len(categories):
        reporter.say(
            f"{request.study.trials * len(categories) - search.left} trials ended before: "
            f"{search.left} are left"
        )
    with notes_shown(out, reporter.notes):
        interrupted = bool(search.left) and _search(request, plan, search, shares)
        records = [record for history in histories.values() for record in history.records()]
        write_table(out / "trials.parquet", _trials_table(records))
        if interrupted:
            raise KeyboardInterrupt
        for category, table in zip(categories, tables, strict=True):
            plan.write_test_table(category, table)
        # A winner's task has no stream's CPUs beside its own.
        plain = (
            plan
            if plan.stream.kind != "ray"
            else dataclasses.replace(plan, stream=StreamChoice("local", "", shares.cpus))
        )
        finished = _finish(plain, categories, records, shares, reporter)
    for category, left_out in zip(categories, skipped, strict=True):
        finished[category]["skipped"] = [
            {"path": path, "cause": cause} for path, cause in left_out.items()
        ]
        finished[category]["stream"] = streamed([r for r in records if r["category"] == category])
    summary = {
        "clsnf": clsnf.__version__,
        "at": now(),
        "seconds": time.perf_counter() - started,
        "origin": request.origin,
        "backbone": request.settings.backbone.name,
        "study": to_dict(request.study),
        "stream": plan.stream.reason,
        "space": {name: dict(given) for name, given in request.space.ranges.items()},
        "settings": to_dict(request.settings),
        "categories": finished,
    }
    write_json(out / "summary.json", summary)
    return summary


def _plan(request: StudyRequest, out: Path, shares: Shares, stream: StreamChoice) -> StudyPlan:
    return StudyPlan(
        out=str(out),
        settings=to_dict(request.settings),
        study=to_dict(request.study),
        leaving_epochs=tuple(request.space.joint_epochs(request.settings)),
        rungs=tuple(request.space.rungs(request.settings)) if request.study.stop_hopeless else (),
        fusion_weights=request.space.fusion_weights(),
        textures=None if request.textures is None else str(request.textures.absolute()),
        device=request.device,
        threads=shares.cpus,
        remote=request.out if isinstance(request.out, str) else None,
        stream=stream,
    )


def _checked(table: pa.Table, request: StudyRequest, reporter: Reporter) -> CheckReport:
    """What a table holds, every file read once."""
    category = table["category"][0].as_py()

    def progress(done: int, total: int) -> None:
        reporter.progress(f"checking {category}", done, total)

    report = check_category(
        table, allow_leak=request.allow_leak, max_bad=request.max_bad, progress=progress
    )
    for warning in report.warnings:
        reporter.say(f"warning: {warning}")
    return report


def _identity(request: StudyRequest, tables: list[pa.Table]) -> dict[str, Any]:
    """What a study is: resuming with other settings or data is refused instead of mixed."""
    return {
        "settings": to_dict(request.settings),
        "space": {name: dict(given) for name, given in request.space.ranges.items()},
        "data": {table["category"][0].as_py(): data_fingerprint(table) for table in tables},
        "objectives": list(request.study.objectives),
    }


def _check_same_study(request: StudyRequest, tables: list[pa.Table], out: Path) -> None:
    before = _begun(out)
    if before is None:
        return
    identity = json.loads(json.dumps(_identity(request, tables)))
    changed = {name: list(differences(before.get(name), identity[name])) for name in identity}
    if any(changed.values()):
        kinds = " and ".join(name for name, found in changed.items() if found)
        found = [line for lines in changed.values() for line in lines]
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise OutputError(
            f"The study in {out} was begun with other {kinds} ({'; '.join(found[:3])}{more}): "
            "choose another --out."
        )
    if (request.optuna_storage is None) != (before.get("studies", "") == ""):
        given = "its own journal" if before.get("studies", "") == "" else "another --optuna-storage"
        raise OutputError(
            f"The study in {out} was begun with its trials in {given}: say the same again."
        )


def _begun(out: Path) -> dict[str, Any] | None:
    """What ``study.json`` says of the study that was begun in a folder, None where none was."""
    path = out / "study.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}): choose another --out.") from error


def _check_choices(study: StudySettings) -> None:
    first, *others = study.objectives
    for name in (first, *(name for name in others if name != LATENCY)):
        check_objective(name)
    check_rule(study.selection)


def _histories(
    request: StudyRequest, tables: list[pa.Table], out: Path, shares: Shares
) -> dict[str, History]:
    """The trials of every category as far as there are any; a new study is written down first."""
    before = _begun(out)
    if before is None:
        # Others' studies may lie in the same storage, and another study of this name may come.
        prefix = "" if request.optuna_storage is None else f"{request.name}-{secrets.token_hex(3)}/"
    else:
        prefix = before.get("studies", "")
    storage = open_storage(request.optuna_storage, out)
    if (
        before is not None
        and prefix
        and not any(s.study_name.startswith(prefix) for s in storage.get_all_studies())
    ):
        raise OutputError(
            f"This Optuna storage holds no trials of the study in {out} ({prefix}...): give the "
            "one that it began with."
        )
    write_json(
        out / "study.json", _identity(request, tables) | {"studies": prefix, "copy": out.name}
    )
    distributions, start = request.space.distributions(), request.space.start(request.settings)
    return {
        category: History(
            storage,
            prefix + category,
            category,
            distributions,
            [start, *warm_values(request.warm_start, [category])],
            request.study.trials,
            objectives_of(request.study),
            request.settings.seed,
            shares.concurrent <= len(tables),
        )
        for category in names_of(tables)
    }


def _validation_set(
    table: pa.Table, category: str, request: StudyRequest, out: Path, reporter: Reporter
) -> pa.Table:
    settings = request.settings
    kind = fit_mask_mode(open_fit_rows(table, settings, StreamChoice("local", "")), settings).mode
    reporter.progress(f"validation defects for {category}", 0, 1)
    written = write_validation_set(
        table,
        out / "validation" / category,
        images_per_family=settings.validation.images_per_family,
        seed=settings.seed,
        mask_mode=kind,
    )
    reporter.progress(f"validation defects for {category}", 1, 1)
    return written


def _search(
    request: StudyRequest, plan: StudyPlan, search: PerCategorySearch, shares: Shares
) -> bool:
    """The Tune run; whether the user ended it. What came out is in the histories."""
    from ray import tune

    from clsnf.study.trial import run_trial

    trainable = tune.with_resources(
        tune.with_parameters(run_trial, plan=plan),
        tune.PlacementGroupFactory(shares.bundles, strategy="PACK"),
    )
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        with heeded_between_steps() as interrupts:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=StopHopeless(search),
                    num_samples=-1,  # the searcher knows when to end
                    max_concurrent_trials=shares.concurrent,
                    metric=METRIC,
                    mode="max",
                    reuse_actors=True,
                    trial_name_creator=lambda trial: search.name(trial.trial_id),
                    trial_dirname_creator=lambda trial: search.name(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=plan.place_of("tune"),
                    verbose=0,
                    callbacks=[
                        Telling(search),
                        *loggers(request.name, request.mlflow, request.wandb),
                        interrupts,
                    ],
                ),
            ).fit()
    except KeyboardInterrupt:
        return True
    return False


def _trials_table(records: list[dict[str, Any]]) -> pa.Table:
    rows = [
        {
            k: r[k]
            for k in (
                "category",
                "trial",
                "status",
                "cause",
                "objective",
                "seconds",
                "wall_seconds",
            )
        }
        | {f"config/{name}": value for name, value in r["config"].items()}
        | r["figures"]
        for r in records
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _finish(
    plan: StudyPlan,
    categories: list[str],
    records: list[dict[str, Any]],
    shares: Shares,
    reporter: Reporter,
) -> dict[str, Any]:
    """Winners of all categories, as many at once as trials were."""
    import ray

    from clsnf.study.winner import finish_category

    task = ray.remote(num_cpus=shares.cpus, num_gpus=shares.gpus, max_retries=1)(finish_category)
    pending: dict[Any, str] = {}
    finished: dict[str, dict[str, Any]] = {}
    for category in categories:
        own = [r for r in records if r["category"] == category]
        ended = [r for r in own if r["status"] == "finished"]
        finished[category] = {
            "finished_trials": len(ended),
            "stopped_trials": sum(r["status"] == "stopped" for r in own),
            "failed_trials": [
                {"trial": r["trial"], "cause": r["cause"]} for r in own if r["status"] == "failed"
            ],
        }
        before = plan.finished(category, ended)
        if before is not None:  # its test images stay closed: what they had to say was written down
            finished[category] |= before
        elif ended:
            pending[task.remote(plan, category, ended)] = category
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        category = pending.pop(done[0])
        try:
            finished[category] |= ray.get(done[0])
            reporter.say(f"{category}: done")
        except (
            ray.exceptions.RayError
        ) as error:  # the other categories' winners must not be lost with this one
            cause = getattr(error, "cause", None) or error
            finished[category]["error"] = (
                str(cause) if isinstance(cause, ClsnfError) else repr(cause)
            )
            reporter.say(
                f"{category}: {cause if isinstance(cause, ClsnfError) else error}"
            )  # a bug keeps its traceback
    return finished
