"""What a Ray worker of a study keeps from one trial to the next: categories that are loaded."""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from clsnf.core.config import DetectorSettings, replaced, value_at
from clsnf.core.device import choose_device
from clsnf.core.memory import keep_freed_memory
from clsnf.core.progress import Progress
from clsnf.evaluation.workbench import Workbench
from clsnf.streams.choice import StreamChoice
from clsnf.study.context import StudyContext
from clsnf.study.names import SHORT_NAMES
from clsnf.study.progress_notes import NotedProgress
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.prepare import fit_mask_mode, open_fit_rows, prepare


def load_workbench(
    context: StudyContext, category: str, settings: DetectorSettings, store: ArtifactStore
) -> Workbench:
    """Load a category into this process; its artifacts are in `store`.

    The first process that loads a category draws its validation set.
    """
    train = context.folder.train_table(category)
    progress = NotedProgress(context.folder.notes, category)
    device = choose_device(context.device)
    prepared = prepare(train, settings, context.textures, store, device, progress, context.stream)
    context.folder.draw_validation_set(
        category, partial(_draw_validation_set, context, train, progress)
    )
    return Workbench.load(prepared, context.folder.validation_table(category))


def _draw_validation_set(
    context: StudyContext, train: pa.Table, progress: Progress, out: Path
) -> pa.Table:
    """Make a validation set by the study's settings: no trial's own ones decide it."""
    settings = context.settings
    fit = open_fit_rows(train, settings, StreamChoice("local", ""))
    return write_validation_set(
        train,
        out,
        images_per_family=settings.validation.images_per_family,
        seed=settings.seed,
        mask_mode=fit_mask_mode(fit, settings).mode,
        threads=context.threads,
        progress=progress,
    )


class LoadedWorkbenches:
    """The workbenches that this process has loaded, the most recently used ones.

    Ray runs many trials in one worker process, one after the other. Loading a category takes
    seconds, so the next trial of the same category uses what the trial before it loaded.

    Args:
        most: how many are kept in memory.

    Attributes:
        dropped: ``kind/key`` of each damaged artifact that one of them dropped.
    """

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self.dropped: list[str] = []
        self._loaded: OrderedDict[tuple[str, str, DetectorSettings], Workbench] = OrderedDict()

    def get(self, context: StudyContext, category: str, settings: DetectorSettings) -> Workbench:
        """The category's workbench; it is loaded where it is not in memory.

        Settings that differ only in fusion weights, joint epochs and flow depth share one.
        """
        key = (context.folder.driver_path, category, _shared_settings(settings))
        if key not in self._loaded:
            while len(self._loaded) >= self._most:  # first: two at once may not fit into memory
                self._loaded.popitem(last=False)
            store = context.folder.artifacts(NotedProgress(context.folder.notes, category))
            store.dropped = self.dropped
            self._loaded[key] = load_workbench(context, category, settings, store)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def clear(self) -> None:
        """Free all of them, for example after an error that may have damaged one."""
        self._loaded.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# The one of this process: trials, winners and what is computed beside them share it.
WORKBENCHES = LoadedWorkbenches()


# Each call of the pipeline gets these anew, so settings that differ in nothing else share a bench.
_GIVEN_ANEW = (*SHORT_NAMES.values(), "score_weight")


def _shared_settings(settings: DetectorSettings) -> DetectorSettings:
    default = DetectorSettings()
    return replaced(settings, {name: value_at(default, name) for name in _GIVEN_ANEW})


def use_threads(threads: int) -> None:
    """Limit this process to the share of the machine that Ray reserved for it."""
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
