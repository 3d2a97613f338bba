"""A trial: one point of the search space, tried on one category. Runs in a Ray worker.

A trial asks the category's pipeline for the score maps of its joint epochs and flow depth. The
pipeline computes only the artifacts that no earlier trial has left, so many trials only weigh two
stored maps.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import ClsnfError, TrainingError
from clsnf.core.memory import release_freed_memory
from clsnf.core.patience import is_outage, outage_line
from clsnf.evaluation.selection import (
    family_metrics,
    mean_over_families,
    scores_at,
    scores_of_map,
)
from clsnf.evaluation.workbench import Workbench
from clsnf.results import LATENCY, Measurements
from clsnf.study.context import StudyContext
from clsnf.study.latency import architecture_content, measure_in_turn
from clsnf.study.progress_notes import note_process
from clsnf.study.reports import TrialReport
from clsnf.study.search import CATEGORY, NUMBER
from clsnf.study.space import apply_config
from clsnf.study.worker import WORKBENCHES, load_workbench, use_threads
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.finetune import decay_start

# Reported beside the objectives; both pixel metrics come from one pass over the pixels.
ALWAYS_REPORTED = ("pixel_ap", "pixel_auroc", "image_auroc")


def reported_metrics(study: StudySettings) -> tuple[str, ...]:
    """Metrics of a trial: its objectives, and those that are always reported."""
    objectives = (name for name in study.objectives if name != LATENCY)
    return tuple(dict.fromkeys((*objectives, *ALWAYS_REPORTED)))


def run_trial(config: dict[str, Any], context: StudyContext) -> None:
    """Tune's trainable: report on the way, and at the end the objective and all measurements.

    An error fails this trial alone: it is reported, and the process stays for the next trial.
    """
    import ray
    from ray import tune

    use_threads(context.threads)
    tune_context = tune.get_context()
    node = ray.get_runtime_context().get_node_id()
    note_process(context.folder.notes, str(tune_context.get_trial_id()), node)
    values = {name: value for name, value in config.items() if name not in (CATEGORY, NUMBER)}
    try:
        for report in trial_reports(context, config[CATEGORY], values):
            tune.report(report.to_tune())
        release_freed_memory()  # this process may wait while others work
    except torch.AcceleratorError:
        raise  # this process can't use its GPU any more: Tune starts another process
    except Exception as error:
        _report_failure(error)


def _report_failure(error: Exception) -> None:
    from ray import tune

    WORKBENCHES.clear()
    outage = is_outage(error)
    # A user can mend a ClsnfError; anything else is a bug, and its place is wanted.
    is_known = outage or isinstance(error, ClsnfError)
    trace = None if is_known else traceback.format_exc()
    cause = outage_line(error) if outage else f"{type(error).__name__}: {error}".splitlines()[0]
    report = TrialReport(
        0.0, failure=cause, is_outage=outage, measured=Measurements(traceback=trace)
    )
    tune.report(report.to_tune())


def trial_reports(
    context: StudyContext, category: str, values: Mapping[str, Any]
) -> Iterator[TrialReport]:
    """A trial, step by step.

    Args:
        context: the study.
        category: whose images.
        values: the point of the search space.

    Yields:
        On the way, where the study prunes trials, the classifier's objective after some epochs. At
        the end the objective and all measurements.

    Raises:
        TrainingError: a metric is not finite.
        ClsnfError: see the pipeline.
    """
    started = time.perf_counter()
    settings = apply_config(context.settings, values)
    with _open_workbench(context, category, settings) as bench:
        usage = _Usage(bench)
        loading = time.perf_counter() - started
        joint_epochs, objective = settings.finetune.joint_epochs, context.study.objective
        for step in context.pruning_epochs:
            if step <= decay_start(settings.finetune):
                yield TrialReport(_objective_after(bench, joint_epochs, step, objective), step)
        bench.pipeline.finetuned(
            joint_epochs, context.joint_epochs_choices if context.study.reuse else ()
        )
        names = reported_metrics(context.study)
        metrics = _family_metrics(bench, settings, names)
        has_latency = LATENCY in context.study.objectives
        measured = dataclasses.replace(
            _validation(metrics, names, objective),
            latency=_latency(bench, context, settings) if has_latency else None,
        )
        measured = usage.added_to(measured, started, loading)
    yield TrialReport(measured.validation[objective], measured=measured)


@contextmanager
def _open_workbench(
    context: StudyContext, category: str, settings: DetectorSettings
) -> Iterator[Workbench]:
    """The category's workbench; without reuse, a new one whose artifacts are deleted afterwards."""
    if context.study.reuse:
        yield WORKBENCHES.get(context, category, settings)
        return
    out = context.folder.path
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".scratch-", dir=out) as scratch:
        yield load_workbench(context, category, settings, ArtifactStore(Path(scratch)))


def _family_metrics(
    bench: Workbench, settings: DetectorSettings, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Metrics of the fused maps of the validation images, by defect family."""
    maps = bench.maps(settings.finetune.joint_epochs, settings.flow.depth)
    with bench.store.clock("scoring"):
        answers = scores_at(maps, settings.fusion_weight, bench.labels.valid)
        return family_metrics(answers, bench.labels, names)


def _validation(
    metrics: dict[str, dict[str, float]], names: tuple[str, ...], objective: str
) -> Measurements:
    validation = {name: mean_over_families(metrics, name) for name in names}
    families = {family: found[objective] for family, found in metrics.items()}
    if not all(math.isfinite(value) for value in (*validation.values(), *families.values())):
        raise TrainingError(
            "The score maps hold values that are not finite: lower the learning rates."
        )
    return Measurements(validation=validation, families=families)


class _Usage:
    """What a trial adds to the counters of its workbench, from now on."""

    def __init__(self, bench: Workbench) -> None:
        self._store = bench.store
        self._stream = bench.pipeline.fit.stream.counters
        self._seconds = dict(self._store.seconds)
        self._computed = sum(self._store.computed.values())
        self._reused = sum(self._store.reused.values())
        self._streamed = self._stream.totals()

    def added_to(self, measured: Measurements, started: float, loading: float) -> Measurements:
        """The measurements with the trial's cost.

        Args:
            measured: without it.
            started: when the trial began, by :func:`time.perf_counter`.
            loading: seconds before the counters were read.
        """
        stream = {
            name: value - self._streamed.get(name, 0)
            for name, value in self._stream.totals().items()
        }
        seconds = {
            kind: total - self._seconds.get(kind, 0.0)
            for kind, total in self._store.seconds.items()
        }
        return dataclasses.replace(
            measured,
            stream=stream,
            seconds=time.perf_counter() - started,
            seconds_by_kind=seconds | {"loading": loading},
            artifacts_computed=sum(self._store.computed.values()) - self._computed,
            artifacts_reused=sum(self._store.reused.values()) - self._reused,
        )


def _latency(bench: Workbench, context: StudyContext, settings: DetectorSettings) -> float:
    """Milliseconds an image on this machine.

    Measured once for all trials of one architecture; again, in turn, before a front rests on it.
    """
    pipeline = bench.pipeline
    machine = [platform.node(), pipeline.device.type, context.threads]
    content = architecture_content(settings) | {"machine": machine}

    def compute() -> Artifact:
        network = pipeline.network(settings.finetune.joint_epochs, settings.flow.depth)
        return Artifact({}, {"milliseconds": measure_in_turn([network])[0]})

    return float(bench.store.get("latency", content, compute).facts["milliseconds"])


def _objective_after(bench: Workbench, joint_epochs: int, step: int, objective: str) -> float:
    """The classifier's objective after `step` epochs, before the learning rate decays.

    Runs that share these epochs share the value.
    """
    pipeline = bench.pipeline

    def compute() -> Artifact:
        maps = pipeline.stable_phase_maps(joint_epochs, step, bench.images)
        answers = scores_of_map(maps, bench.labels.valid)
        metrics = family_metrics(answers, bench.labels, (objective,))
        return Artifact({}, {"value": mean_over_families(metrics, objective)})

    content = {"images": bench.images.key, "objective": objective}
    return float(
        pipeline.get_on_stable_phase("rungs", joint_epochs, step, content, compute).facts["value"]
    )
