"""A trial: one point of the search space, tried on one category. Runs in a Ray worker.

A trial asks the category's pipeline for the score maps of its joint epochs and flow depth. The
pipeline computes only the artifacts that no earlier trial has left. On the finished maps every
fusion weight of the space is tried, and the trial is worth what its best one is.
"""

from __future__ import annotations

import dataclasses
import platform
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import ClsnfError
from clsnf.core.memory import release_freed_memory
from clsnf.core.patience import is_outage, outage_line
from clsnf.evaluation.selection import SweptWeight, best_weight, sweep_weights
from clsnf.evaluation.workbench import Workbench
from clsnf.results import LATENCY, Measurements
from clsnf.study.context import StudyContext
from clsnf.study.latency import architecture_content, measure_in_turn
from clsnf.study.progress_notes import note_process
from clsnf.study.reports import TrialReport
from clsnf.study.search import CATEGORY, DENSITIES, NUMBER
from clsnf.study.space import settings_of_trial
from clsnf.study.worker import WORKBENCHES, load_workbench, use_threads
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.finetune import decay_start
from clsnf.training.pipeline import ScoreMaps

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
    known = (CATEGORY, NUMBER, DENSITIES)
    values = {name: value for name, value in config.items() if name not in known}
    try:
        for report in trial_reports(context, config[CATEGORY], values, config.get(DENSITIES) or {}):
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


def swept_maps(
    context: StudyContext, bench: Workbench, settings: DetectorSettings
) -> list[SweptWeight]:
    """The reported metrics of the settings' maps at every fusion weight of the study."""
    return bench.sweep(
        settings.finetune.joint_epochs,
        settings.flow.depth,
        reported_metrics(context.study),
        context.fusion_weights,
    )


def trial_reports(
    context: StudyContext,
    category: str,
    values: Mapping[str, Any],
    densities: Mapping[str, str],
) -> Iterator[TrialReport]:
    """A trial, step by step.

    Args:
        context: the study.
        category: whose images.
        values: the point of the search space.
        densities: key of placed validation images -> key of the best density maps known of them.

    Yields:
        On the way, where the study prunes trials, what the trial would be worth after some epochs.
        At the end the objective and all measurements.

    Raises:
        TrainingError: a metric is not finite.
        ClsnfError: see the pipeline.
    """
    started, dropped_before = time.perf_counter(), len(WORKBENCHES.dropped)
    settings = settings_of_trial(context.settings, values)
    with _open_workbench(context, category, settings) as bench:
        usage = _Usage(bench)
        loading = time.perf_counter() - started
        joint_epochs, depth = settings.finetune.joint_epochs, settings.flow.depth
        density = densities.get(bench.images.key)
        for step in context.pruning_epochs:
            if density is None or step > decay_start(settings.finetune):
                break
            worth = _worth_after(context, bench, joint_epochs, step, density)
            if worth is not None:
                yield TrialReport(worth, step)
        bench.pipeline.finetuned(
            joint_epochs, context.joint_epochs_choices if context.study.reuse else ()
        )
        swept = swept_maps(context, bench, settings)
        has_latency = LATENCY in context.study.objectives
        key = bench.pipeline.density_key(joint_epochs, depth, bench.images)
        measured = dataclasses.replace(
            _validation(swept, context),
            density=(bench.images.key, key) if context.pruning_epochs else None,
            latency=_latency(bench, context, settings) if has_latency else None,
            dropped=tuple(WORKBENCHES.dropped[dropped_before:]),
        )
        measured = usage.added_to(measured, started, loading)
    yield TrialReport(measured.validation[context.study.objective], measured=measured)


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


def _validation(swept: Sequence[SweptWeight], context: StudyContext) -> Measurements:
    """What was found on the validation images, at the best of the fusion weights."""
    objective = context.study.objective
    best = best_weight(swept, objective)
    return Measurements(
        validation={name: best.mean(name) for name in reported_metrics(context.study)},
        families={family: found[objective] for family, found in best.families.items()},
        metrics_by_family=best.families,
        sweep=[(at.fusion_weight, at.mean(objective)) for at in swept] if context.sweeps else [],
    )


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


def worth_on_the_way(
    context: StudyContext, bench: Workbench, density_maps: Tensor, classifier_maps: Tensor
) -> float:
    """What a running trial would be worth: the objective of its classifier's maps, fused with
    density maps that are known, at the best fusion weight.

    Args:
        context: the study.
        bench: of the trial.
        density_maps, classifier_maps: of the validation images, (N, H, W) each.
    """
    objective = context.study.objective
    maps = ScoreMaps(density_maps, classifier_maps, bench.pipeline.settings.smoothing)
    swept = sweep_weights(maps, bench.labels, (objective,), context.fusion_weights)
    return best_weight(swept, objective).mean(objective)


def _worth_after(
    context: StudyContext, bench: Workbench, joint_epochs: int, step: int, density: str
) -> float | None:
    """:func:`worth_on_the_way` after `step` epochs, before the learning rate decays.

    Runs that share these epochs share the value.

    Args:
        context: the study.
        bench: of the trial.
        joint_epochs: of the trial.
        step: epochs of the stable phase.
        density: key of the best density maps that are known of the validation images.

    Returns:
        None where the density maps are not stored any more.
    """
    pipeline = bench.pipeline
    density_maps = pipeline.stored_density_maps(density)
    if density_maps is None:
        return None

    def compute() -> Artifact:
        classifier = pipeline.stable_phase_maps(joint_epochs, step, bench.images)
        return Artifact({}, {"value": worth_on_the_way(context, bench, density_maps, classifier)})

    content = {
        "images": bench.images.key,
        "objective": context.study.objective,
        "density": density,
        "weights": list(context.fusion_weights),
    }
    return float(
        pipeline.get_on_stable_phase("rungs", joint_epochs, step, content, compute).facts["value"]
    )
