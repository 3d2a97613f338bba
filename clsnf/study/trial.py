"""A trial: one point of the search space, tried on one category. Runs in a Ray worker.

Unusual: a trial owns no work. It asks the category's pipeline for the maps of its backbone and
    depth, which computes only the stages
that no trial before it has left behind, and then weighs two stored maps.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clsnf.core.config import DetectorSettings, StudySettings, to_dict
from clsnf.core.device import choose_device
from clsnf.core.errors import ClsnfError, TrainingError
from clsnf.core.hashing import content_key
from clsnf.core.memory import keep_freed_memory, release_freed_memory
from clsnf.evaluation.selection import (
    family_metrics,
    family_metrics_of,
    mean_over_families,
    validation_labels,
)
from clsnf.study.folder import StudyPlan
from clsnf.study.latency import LATENCY, latency
from clsnf.study.progress_files import FileProgress
from clsnf.study.search import CATEGORY, METRIC, NUMBER
from clsnf.study.space import SHORT_NAMES, apply_config
from clsnf.training.artifacts import Artifact
from clsnf.training.finetune import decay_start
from clsnf.training.pipeline import PlacedImages
from clsnf.training.prepare import Prepared, place_rows, prepare

# Reported beside the objective; one pass over the pixels serves both pixel figures.
FIGURES = ("pixel_ap", "pixel_auroc", "image_auroc")


def reported_metrics(study: StudySettings) -> tuple[str, ...]:
    """Figures of a trial: its objectives and those that everybody asks for."""
    return tuple(dict.fromkeys((*(name for name in study.objectives if name != LATENCY), *FIGURES)))


class Workbench:
    """A category loaded into this process: pipeline, validation images, their labels."""

    def __init__(
        self, plan: StudyPlan, category: str, settings: DetectorSettings, stages: Path | None = None
    ) -> None:
        table = plan.train_table(category)
        validation = plan.validation_table(category)
        self.store = plan.store(stages)
        progress = FileProgress(plan.folder, category)
        device = choose_device(plan.device)
        self.prepared: Prepared = prepare(
            table, settings, plan.textures, self.store, device, progress, plan.stream
        )
        self.images: PlacedImages = place_rows(validation, settings)
        self.labels = validation_labels(validation.to_pylist(), settings, self.images)


_benches: OrderedDict[str, Workbench] = OrderedDict()
_MOST_BENCHES = 2


def workbench(plan: StudyPlan, category: str, settings: DetectorSettings) -> Workbench:
    """The category's workbench; a worker that Ray uses again finds it as the trial before left it."""
    plain = to_dict(settings)
    for name in SHORT_NAMES.values():  # these are given anew to each call of the pipeline
        *sections, last = name.split(".")
        place = plain
        for section in sections:
            place = place[section]
        del place[last]
    key = content_key([plan.out, category, plain])
    if key not in _benches:
        while len(_benches) >= _MOST_BENCHES:
            _benches.popitem(last=False)
        _benches[key] = Workbench(plan, category, settings)
    _benches.move_to_end(key)
    return _benches[key]


def use_threads(threads: int) -> None:
    """Keep to the share of the machine that Ray gave."""
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def run_trial(config: dict[str, Any], plan: StudyPlan) -> None:
    """Tune's trainable: report where the trial stands on its way, and at its end the objective and
    the figures beside it.
    """
    from ray import tune

    use_threads(plan.threads)
    values = {name: value for name, value in config.items() if name not in (CATEGORY, NUMBER)}
    try:
        for report in trial_reports(plan, config[CATEGORY], values):
            tune.report(report)
        release_freed_memory()  # this process may wait while others work
    except Exception as error:  # this trial fails, and leaves the process to the next
        if isinstance(error, torch.AcceleratorError) and not isinstance(
            error, torch.OutOfMemoryError
        ):
            raise  # nothing works any more on that GPU in this process: Tune starts another
        _benches.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report = {METRIC: 0.0, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        if not isinstance(
            error, ClsnfError
        ):  # a user can't mend it: whoever can wants to know where it was
            report["traceback"] = traceback.format_exc()
        tune.report(report)


def trial_reports(
    plan: StudyPlan, category: str, values: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A trial, step by step.

    Args:
        plan: the study.
        category: whose images.
        values: the point of the search space.

    Yields:
        On the way, where the space makes that worth its time: ``step`` (epochs of the trunk) and
        the classifier's ``objective`` there. At the end ``objective``, ``validation_*``,
        ``family_*``, ``seconds``, ``seconds_*`` by kind of work, ``stream_*`` (see
        :class:`clsnf.streams.stream.Counters`), ``stages_computed`` and ``stages_reused``; with
        ``latency`` among the objectives, that too.

    Raises:
        TrainingError: a figure is not finite, whatever training said.
        ClsnfError: see the pipeline.
    """
    started = time.perf_counter()
    settings = apply_config(plan.detector_settings, values)
    study = plan.study_settings
    with ExitStack() as cleaned:
        if study.reuse:
            bench = workbench(plan, category, settings)
        else:  # everything anew, and nothing left for others
            plan.folder.mkdir(parents=True, exist_ok=True)
            scratch = cleaned.enter_context(TemporaryDirectory(prefix=".scratch-", dir=plan.folder))
            bench = Workbench(plan, category, settings, Path(scratch))
        store, pipeline = bench.store, bench.prepared.pipeline
        computed, reused, seconds = (
            sum(store.computed.values()),
            sum(store.reused.values()),
            dict(store.seconds),
        )
        loading = time.perf_counter() - started
        counters = pipeline.fit.stream.counters
        streamed = counters.totals()
        epochs, depth = settings.finetune.joint_epochs, settings.flow.depth
        names = reported_metrics(study)
        stops = plan.leaving_epochs if study.reuse else ()
        for step in plan.rungs:
            if step <= decay_start(dataclasses.replace(settings.finetune, joint_epochs=epochs)):
                yield {METRIC: _on_the_way(bench, epochs, step, study.objective), "step": step}
        pipeline.finetuned(epochs, stops)
        maps = pipeline.maps(epochs, depth, bench.images)
        with store.clock("scoring"):
            figures = family_metrics(maps, bench.labels, settings.fusion_weight, names)
        report: dict[str, Any] = {
            f"validation_{name}": mean_over_families(figures, name) for name in names
        }
        report |= {f"family_{family}": found[study.objective] for family, found in figures.items()}
        if not all(math.isfinite(value) for value in report.values()):
            raise TrainingError(
                "The score maps hold values that are not finite: lower the learning rates."
            )
        report[METRIC] = report[f"validation_{study.objective}"]
        if LATENCY in study.objectives:
            report[LATENCY] = _latency(bench, plan, settings)
        report |= {
            f"stream_{name}": value - streamed.get(name, 0)
            for name, value in counters.totals().items()
        }
        report |= {
            f"seconds_{kind}": took - seconds.get(kind, 0.0) for kind, took in store.seconds.items()
        }
        report |= {
            "seconds": time.perf_counter() - started,
            "seconds_loading": loading,
            "stages_computed": sum(store.computed.values()) - computed,
            "stages_reused": sum(store.reused.values()) - reused,
        }
    yield report


def _latency(bench: Workbench, plan: StudyPlan, settings: DetectorSettings) -> float:
    """Milliseconds a picture on this machine: one measurement for all trials of one architecture,
    so that noise makes no front.
    """
    pipeline = bench.prepared.pipeline
    decoder = {
        name: getattr(settings.finetune, name) for name in ("decoder", "decoder_width", "skips")
    }
    content = {
        "image": to_dict(settings.image),
        "backbone": to_dict(settings.backbone),
        "decoder": decoder,
        "flow": {
            name: getattr(settings.flow, name)
            for name in ("depth", "start", "neighbourhood", "covariance", "memory")
        },
        "machine": [platform.node(), pipeline.device.type, plan.threads],
    }

    def compute() -> Artifact:
        network = pipeline.network(settings.finetune.joint_epochs, settings.flow.depth)
        return Artifact(
            {}, {"milliseconds": latency(network, bench.images.images, pipeline.device)}
        )

    return float(bench.store.get("latency", content, compute).facts["milliseconds"])


def _on_the_way(bench: Workbench, epochs: int, step: int, objective: str) -> float:
    """The classifier's objective on the trunk after `step` epochs; runs that share the trunk share
    it.
    """
    pipeline = bench.prepared.pipeline

    def compute() -> Artifact:
        maps = pipeline.stable_phase_maps(epochs, step, bench.images)
        figures = family_metrics_of(maps, bench.labels, (objective,))
        return Artifact({}, {"value": mean_over_families(figures, objective)})

    return float(
        pipeline.get_on_stable_phase(
            "rungs", epochs, step, {"images": bench.images.key, "objective": objective}, compute
        ).facts["value"]
    )
