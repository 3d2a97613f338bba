"""The study: from a data set to a winner for each category.

Called by ``tune/run_study.py`` and ``clsnf study``. The driver reads and checks the data. Ray does
everything that computes: one Tune run over all categories, then one task for each category that
picks, saves and evaluates its winner.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import clsnf
from clsnf.core.config import StudySettings
from clsnf.core.errors import OutputError
from clsnf.core.files import locked
from clsnf.core.ledger import now
from clsnf.core.memory import free_memory, memory_budget
from clsnf.core.patience import Patience
from clsnf.results import (
    StudySummary,
    TrialResult,
    write_result,
    write_trials,
)
from clsnf.streams.choice import StreamChoice, choose_stream
from clsnf.study.allocation import Allocation
from clsnf.study.cluster import Shares, node_resources, ray_session, share_out
from clsnf.study.context import StudyContext
from clsnf.study.deadline import Costs, Deadline, read_winner_seconds
from clsnf.study.disk import free_room
from clsnf.study.finish import Finish
from clsnf.study.folder import StudyFolder, claim_folder
from clsnf.study.inputs import StudyInputs, check_inputs
from clsnf.study.interrupts import interrupt_between_steps
from clsnf.study.lease_actor import start_lease_actor
from clsnf.study.notify import check_notify, notify_at_end
from clsnf.study.pause import Pause
from clsnf.study.progress_notes import report_notes
from clsnf.study.remote_copy import REQUEST, DriverCopy, driver_copy, remove_copies, upload_state
from clsnf.study.reports import OBJECTIVE
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.search import (
    DeadlineCallback,
    FailureCallback,
    ForgetfulCallback,
    PerCategorySearch,
    PruningScheduler,
)
from clsnf.study.trackers import tell_trackers
from clsnf.study.trials import (
    CategoryTrials,
    SearchPlan,
    directions_of,
    open_storage,
)
from clsnf.study.warm_start import best_points, points_of_space
from clsnf.training.prepare import rows_of

# Trials of a category that the sampler prepares for where only the clock ends a study.
_UNKNOWN_TRIALS = 16
_STREAM_OBJECT_STORE = 1 << 30  # bytes; the images of a ray stream travel through it


def run_study(request: StudyRequest, reporter: Reporter | None = None) -> StudySummary:
    """Run a study and return its summary, which is also written to ``summary.json``.

    Raises:
        ClsnfError: bad input, before anything long starts.
        KeyboardInterrupt: the user ended the study; finished trials are in the Optuna storage, and
            finished artifacts in the folder.
    """
    reporter = reporter or Reporter()
    check_notify(request.notify)
    with notify_at_end(request, reporter.say) as give_summary:
        summary = _run_study(request, reporter)
        give_summary(summary)
    return summary


def _run_study(request: StudyRequest, reporter: Reporter) -> StudySummary:
    started = time.perf_counter()
    patience = Patience(request.study.patience, reporter.say)
    with _working_folder(request, patience, reporter) as (out, copy):
        inputs = check_inputs(request, out, reporter)
        reporter.begin()
        object_store = _STREAM_OBJECT_STORE if request.study.stream == "ray" else None
        with ray_session(request.address, object_store), ExitStack() as stack:
            stream, shares = _divide_cluster(request, inputs)
            reporter.say(f"stream: {stream.reason}")
            context = _make_context(request, out, shares, stream)
            patience.wait_for(lambda: claim_folder(out, request.resume))
            if copy is None:
                in_use = f"{out} is in use by another study right now: choose another --out."
                patience.wait_for(lambda: stack.enter_context(locked(out, in_use)))
            else:
                stack.enter_context(_remote_services(copy, reporter))
            to_all = stack.enter_context(tell_trackers(request, context.folder, reporter))
            driver = _Driver(request, inputs, context, shares, to_all, patience, copy)
            return driver.run(started)


@contextmanager
def _working_folder(
    request: StudyRequest, patience: Patience, reporter: Reporter
) -> Iterator[tuple[Path, DriverCopy | None]]:
    """The study's folder on this machine; with the copy that it is of a remote one."""
    if not isinstance(request.out, str):
        yield request.out.absolute(), None
        return
    with driver_copy(request.out, request.resume, patience, reporter.say) as copy:
        yield copy.path, copy


@contextmanager
def _remote_services(copy: DriverCopy, reporter: Reporter) -> Iterator[None]:
    """What a study with a remote folder needs while it runs."""
    name = copy.path.name
    actor = start_lease_actor(name)  # it ends with this handle
    try:
        with upload_state(copy, reporter.say):
            yield
        remove_copies(name)
    finally:
        del actor


def _divide_cluster(request: StudyRequest, inputs: StudyInputs) -> tuple[StreamChoice, Shares]:
    """What brings the images to training, and each trial's share of the cluster."""
    study, nodes, categories = request.study, node_resources(), len(inputs.tables)
    without_stream = share_out(study, categories, nodes)
    trials_per_node = math.ceil(without_stream.concurrent / len(nodes))
    memory = min(node["memory"] for node in nodes) if len(nodes) > 1 else free_memory()
    stream = choose_stream(
        study.stream,
        [len(rows_of(table, "fit")) for table in inputs.tables.values()],
        request.settings.image,
        budget=memory_budget(trials_per_node, int(memory)),
        nodes=len(nodes),
        workers=study.stream_cpus or 1,
    )
    if stream.kind == "ray":
        return stream, share_out(study, categories, nodes, stream.workers)
    return dataclasses.replace(stream, workers=without_stream.cpus), without_stream


def _make_context(
    request: StudyRequest, out: Path, shares: Shares, stream: StreamChoice
) -> StudyContext:
    space, settings = request.space, request.settings
    return StudyContext(
        folder=StudyFolder(
            str(out),
            request.out if isinstance(request.out, str) else None,
            request.study.patience,
        ),
        settings=settings,
        study=request.study,
        joint_epochs_choices=tuple(space.joint_epochs(settings)),
        pruning_epochs=tuple(space.rungs(settings)) if request.study.stop_hopeless else (),
        fusion_weights=space.fusion_weights(settings),
        textures=None if request.textures is None else str(request.textures.absolute()),
        device=request.device,
        threads=shares.cpus,
        stream=stream,
    )


@dataclass(frozen=True)
class _Driver:
    """A study that runs: its checked input, its folder, and its share of the cluster."""

    request: StudyRequest
    inputs: StudyInputs
    context: StudyContext
    shares: Shares
    reporter: Reporter
    patience: Patience
    copy: DriverCopy | None

    @property
    def out(self) -> Path:
        """The study's folder on this machine."""
        return self.context.folder.path

    @property
    def in_sequence(self) -> bool:
        """Whether each category's trials run one at a time."""
        return self.shares.concurrent <= len(self.inputs.tables)

    def has_room(self) -> bool:
        """Whether the disk of the study's folder has room for another trial."""
        return free_room(self.out) > self.inputs.disk.trial

    def pause(self) -> Pause:
        """What holds work back while something that it needs is away."""
        return Pause(self.request.study.patience, self.reporter.say, self.has_room)

    @property
    def study(self) -> StudySettings:
        """How to search: no more trials of a category than the space has points."""
        return self.request.space.limited(self.request.study)

    def run(self, started: float) -> StudySummary:
        """Search, then pick and evaluate the winners; `started` by :func:`time.perf_counter`."""
        trials_of = self.open_trials()
        folder = self.context.folder
        for category, table in self.inputs.tables.items():
            self.patience.wait_for(partial(folder.write_train_table, category, table))
        deadline = self.make_deadline()
        self.announce(deadline)
        self.reporter.earlier(_results(trials_of))
        search = PerCategorySearch(
            trials_of,
            Allocation(self.study, deadline, self.reporter.say),
            self.in_sequence,
            self.reporter.begun,
            self.reporter.trial,
            self.pause(),
            self.reporter.say,
        )
        before, left = sum(own.begun for own in trials_of.values()), search.left
        if before:
            self.reporter.say(
                f"{before} trials ended before" + ("" if left is None else f": {left} are left")
            )
        with report_notes(folder.notes, self.reporter.notes):
            interrupted = left != 0 and self.search(search)
            if search.outage is not None:
                raise search.outage
            trials = _results(trials_of)
            self.patience.wait_for(lambda: write_trials(self.out / "trials.parquet", trials))
            if interrupted:
                raise KeyboardInterrupt
            for category, table in self.inputs.tables.items():
                self.patience.wait_for(partial(folder.write_test_table, category, table))
            finish = Finish(self.inputs, self.context, self.shares, self.reporter, self.pause())
            categories = finish.results(trials)
        summary = StudySummary(
            version=clsnf.__version__,
            at=now(),
            seconds=time.perf_counter() - started,
            categories=categories,
            settings=self.request.settings,
            study=self.request.study,
            origin=self.request.origin,
            backbone=self.request.settings.backbone.name,
            stream=self.context.stream.reason,
            space=self.inputs.identity.space,
        )
        self.patience.wait_for(lambda: write_result(self.out / "summary.json", summary))
        self.reporter.ended(summary)
        return summary

    def open_trials(self) -> dict[str, CategoryTrials]:
        """The trials of every category so far; ``study.json`` is written first."""
        request, resumed = self.request, self.inputs.resumed
        if resumed is not None:
            prefix = resumed.storage_prefix
        elif request.optuna_storage is None:
            prefix = ""
        else:  # other studies may use the same storage, and another study of this name may come
            prefix = f"{request.name}-{secrets.token_hex(3)}/"
        storage = open_storage(
            request.optuna_storage,
            self.out,
            self.reporter.say,
            self.patience,
            is_known=resumed is not None,
        )
        if (
            resumed is not None
            and prefix
            and not any(s.study_name.startswith(prefix) for s in storage.get_all_studies())
        ):
            raise OutputError(
                f"This Optuna storage holds no trials of the study in {self.out} ({prefix}...): "
                "give the one that it began with."
            )
        identity = dataclasses.replace(
            self.inputs.identity, storage_prefix=prefix, copy=self.out.name
        )
        # First: what has a study.json can be gone on with.
        self.patience.wait_for(lambda: write_result(self.out / REQUEST, request.stored()))
        self.patience.wait_for(lambda: write_result(self.out / "study.json", identity))
        plan = SearchPlan(
            distributions=request.space.distributions(),
            trials=self.expected_trials,
            directions=directions_of(request.study),
            seed=request.settings.seed,
            in_sequence=self.in_sequence,
            sampler=request.study.sampler,
        )
        return {
            category: CategoryTrials(
                storage,
                prefix + category,
                category,
                plan,
                self.first_points(category, plan),
                self.reporter.say,
            )
            for category in self.inputs.tables
        }

    def first_points(self, category: str, plan: SearchPlan) -> list[dict[str, Any]]:
        """The settings as they stand, then the best points of the study to start from."""
        start = self.request.space.start(self.request.settings)
        if self.inputs.resumed is not None or self.request.warm_start is None:
            return [start]
        earlier = best_points(self.inputs.earlier_trials, category)
        if not earlier:
            self.reporter.say(
                f"warm start: {self.request.warm_start} holds no finished trial of {category}"
            )
        points = points_of_space(
            earlier,
            start,
            plan.distributions,
            lambda line: self.reporter.say(f"{category}: {line}"),
        )
        return [start, *points]

    @property
    def expected_trials(self) -> int:
        """Trials of a category, as far as that is known."""
        study, categories = self.study, len(self.inputs.tables)
        limits = [study.trials] if study.trials is not None else []
        if study.total_trials:
            limits.append(math.ceil(study.total_trials / categories))
        return min(limits, default=_UNKNOWN_TRIALS)

    def make_deadline(self) -> Deadline | None:
        """The end of the study; None where it does not end by the clock."""
        request, tables = self.request, self.inputs.tables
        if request.until is None:
            return None
        earlier = [] if request.warm_start is None else [request.warm_start]
        costs = Costs(
            images={category: len(rows_of(table, "fit")) for category, table in tables.items()},
            reuse=request.study.reuse,
            winner_seconds=read_winner_seconds([*earlier, self.out], tables),
        )
        return Deadline(request.until, costs, self.shares.concurrent)

    def announce(self, deadline: Deadline | None) -> None:
        """One line: how many trials, what each gets, and when the study ends."""
        shares, study, categories = self.shares, self.study, self.inputs.tables
        at_once = f"{shares.concurrent} at once" if shares.concurrent > 1 else "one at a time"
        trials = [
            f"{study.trials} {'trial' if study.trials == 1 else 'trials'} each"
            if study.trials is not None
            else "",
            f"{study.total_trials} trials in all" if study.total_trials else "",
            at_once,
        ]
        self.reporter.say(
            f"{len(categories)} {'category' if len(categories) == 1 else 'categories'}, "
            f"{', '.join(part for part in trials if part)}, {shares.cpus} CPUs"
            + (f" and {shares.gpus:g} GPUs" if shares.gpus else "")
            + " a trial"
        )
        if deadline is not None:
            self.reporter.say(deadline.begin_line())
        if study != self.request.study:
            self.reporter.say(
                f"{study.trials} trials use the space up: it has no more points (the fusion weight "
                "is swept in each)"
            )

    def search(self, search: PerCategorySearch) -> bool:
        """Run the trials; whether the user ended the search. The results are in the storage."""
        from ray import tune

        from clsnf.study.hang_watch import HangCallback, HangWatch
        from clsnf.study.trial import run_trial

        trainable = tune.with_resources(
            tune.with_parameters(run_trial, context=self.context),
            tune.PlacementGroupFactory(self.shares.bundles, strategy="PACK"),
        )
        try:
            with (
                interrupt_between_steps() as interrupt,
                # Nobody needs what Tune itself writes: the trials are in the Optuna storage.
                TemporaryDirectory(prefix="clsnf-tune-") as tune_folder,
            ):
                tune_config = tune.TuneConfig(
                    search_alg=search,
                    scheduler=PruningScheduler(search),
                    num_samples=-1,  # the searcher knows when to end
                    max_concurrent_trials=self.shares.concurrent,
                    metric=OBJECTIVE,
                    mode="max",
                    reuse_actors=True,
                    trial_name_creator=lambda trial: search.name(trial.trial_id),
                    trial_dirname_creator=lambda trial: search.name(trial.trial_id),
                )
                timeout, notes = self.request.study.trial_timeout, self.context.folder.notes
                watches = [HangCallback(HangWatch(search, notes, timeout))] if timeout else []
                run_config = tune.RunConfig(
                    name=datetime.now().strftime("%Y%m%d-%H%M%S"),
                    storage_path=tune_folder,
                    verbose=0,
                    callbacks=[
                        FailureCallback(search),
                        *watches,
                        ForgetfulCallback(),
                        DeadlineCallback(search),
                        interrupt,
                    ],
                )
                tune.Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()
        except KeyboardInterrupt:
            return True
        return False


def _results(trials_of: Mapping[str, CategoryTrials]) -> list[TrialResult]:
    """All trials that ended."""
    return [trial for own in trials_of.values() for trial in own.results()]
