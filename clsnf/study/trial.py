"""A trial: one point of the search space, tried on one category. Runs in a Ray worker.

Unusual: a trial owns no work. It asks the category's pipeline for the maps of its backbone and depth, which computes only the stages
that no trial before it has left behind, and then weighs two stored maps.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import Any

import torch

from clsnf.config import DetectorSettings, to_dict
from clsnf.device import choose_device
from clsnf.fingerprint import content_key
from clsnf.selection import family_figures, mean_over_families, validation_labels
from clsnf.study.plan import StudyPlan
from clsnf.study.search import CATEGORY
from clsnf.study.space import SHORT_NAMES, apply_config
from clsnf.study.watch import FileProgress
from clsnf.training.pipeline import PlacedImages
from clsnf.training.prepare import Prepared, place_rows, prepare
from clsnf.training.stages import StageStore

# Reported beside the objective; one pass over the pixels serves both pixel figures.
FIGURES = ("pixel_ap", "pixel_auroc", "image_auroc")


class Workbench:
    """A category loaded into this process: pipeline, validation images, their labels."""

    def __init__(self, plan: StudyPlan, category: str, settings: DetectorSettings) -> None:
        table = plan.train_table(category)
        validation = plan.validation_table(category)
        self.store = StageStore(plan.stages)
        progress = FileProgress(plan.out, category)
        self.prepared: Prepared = prepare(table, settings, plan.textures, self.store, choose_device(plan.device), progress)
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
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def run_trial(config: dict[str, Any], plan: StudyPlan) -> None:
    """Tune's trainable: report the objective and the figures beside it, once."""
    from ray import tune

    started = time.perf_counter()
    use_threads(plan.threads)
    values = {name: value for name, value in config.items() if name != CATEGORY}
    settings = apply_config(plan.detector_settings, values)
    bench = workbench(plan, config[CATEGORY], settings)
    computed, reused = dict(bench.store.computed), dict(bench.store.reused)
    epochs, depth = settings.finetune.joint_epochs, settings.flow.depth
    pipeline = bench.prepared.pipeline
    pipeline.finetuned(epochs, stops=plan.leaving_epochs)
    maps = pipeline.maps(epochs, depth, bench.images)
    objective = plan.study_settings.objective
    names = tuple(dict.fromkeys((objective, *FIGURES)))
    figures = family_figures(maps, bench.labels, settings.fusion_weight, names)
    report: dict[str, Any] = {f"validation_{name}": mean_over_families(figures, name) for name in names}
    report |= {f"family_{family}": values[objective] for family, values in figures.items()}
    report |= {
        "objective": report[f"validation_{objective}"],
        "seconds": time.perf_counter() - started,
        "stages_computed": sum(bench.store.computed.values()) - sum(computed.values()),
        "stages_reused": sum(bench.store.reused.values()) - sum(reused.values()),
    }
    tune.report(report)
