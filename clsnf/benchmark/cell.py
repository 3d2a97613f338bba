"""Trains and compares all systems for one cell: one category, one seed, one variant.

What the systems share is computed once. One finetuned backbone serves ``classifier``, ``flow`` and
``fused``. One cache of pretrained features serves ``cflow`` and ``fused_unshared``; the classifier
of the latter is the finetuned one again. Five systems cost two trainings and some maps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from clsnf.benchmark.comparison import compare_systems
from clsnf.benchmark.request import BenchmarkRequest, Cell
from clsnf.benchmark.selection import Selection, Selector
from clsnf.benchmark.systems import SYSTEMS, ComponentMaps, candidate_depths
from clsnf.core.config import DetectorSettings
from clsnf.core.device import choose_device
from clsnf.core.ledger import now, record_unlock
from clsnf.core.progress import Progress, silent
from clsnf.data.splits import assign_splits
from clsnf.evaluation.workbench import Workbench
from clsnf.results import CellResult, MaskReport
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.pipeline import CategoryPipeline, PlacedImages
from clsnf.training.prepare import Prepared, place_rows, prepare, rows_of

_TRAININGS = ("finetuning", "flows on the finetuned backbone", "flows on the pretrained backbone")


class Stopwatch:
    """Seconds by kind of work.

    Everything inside a block counts, unlike in :meth:`clsnf.training.artifacts.ArtifactStore.clock`
    where the artifacts that a block asks for count on their own.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Add the block's time to a kind of work."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started


class SystemTrainer:
    """Trains what the systems of a cell are made of, and computes their maps.

    Args:
        pipeline: of the cell's category and settings.
        baseline_passes: ``flow.passes`` of the flows on the pretrained backbone.
        systems: names of those that are wanted.
        stopwatch: counts the time.
    """

    def __init__(
        self,
        pipeline: CategoryPipeline,
        baseline_passes: float,
        systems: tuple[str, ...],
        stopwatch: Stopwatch,
    ) -> None:
        settings = pipeline.settings
        flow = dataclasses.replace(settings.flow, passes=baseline_passes)
        pipeline.feature_cache.resize(2)  # the finetuned backbone's and the pretrained one's
        self._joint_epochs = settings.finetune.joint_epochs
        self._depths = candidate_depths(settings.flow)
        self._smoothing = settings.smoothing
        self._finetuned = pipeline
        # By backbone: the pipeline, and how many joint epochs its backbone is finetuned.
        self._flows = {
            "finetuned": (pipeline, self._joint_epochs),
            "pretrained": (pipeline.with_settings(dataclasses.replace(settings, flow=flow)), 0),
        }
        wanted = [SYSTEMS[name] for name in systems]
        self._wants_classifier = any(system.classifier for system in wanted)
        self._backbones = [
            name for name in self._flows if any(system.flow == name for system in wanted)
        ]
        self._stopwatch = stopwatch

    def maps(self, images: PlacedImages) -> ComponentMaps:
        """All score maps of images that the systems are made of."""
        classifier = {}
        if self._wants_classifier:
            with self._stopwatch.of("finetuning"):
                self._finetuned.finetune_with_snapshots(self._joint_epochs)
            with self._stopwatch.of("classifier maps"):
                classifier = self._finetuned.classifier_maps_by_epoch(self._joint_epochs, images)
        elif "finetuned" in self._backbones:
            with self._stopwatch.of("finetuning"):
                self._finetuned.finetuned(self._joint_epochs)
        density = {}
        for name in self._backbones:
            pipeline, joint_epochs = self._flows[name]
            with self._stopwatch.of(f"flows on the {name} backbone"):
                for depth in self._depths:
                    pipeline.flows(joint_epochs, depth)
            with self._stopwatch.of("density maps"):
                for depth in self._depths:
                    density[name, depth] = pipeline.density_maps(joint_epochs, depth, images)
        return ComponentMaps(classifier, density, images.valid, self._smoothing)


def run_cell(
    cell: Cell,
    request: BenchmarkRequest,
    progress: Progress = silent,
    before: Prepared | None = None,
) -> tuple[CellResult, Prepared]:
    """Train, choose and compare.

    Args:
        cell: what to run.
        request: what the whole benchmark was asked for.
        progress: told about long work.
        before: what an earlier cell prepared; used where this cell needs the same.

    Returns:
        The result, and what was prepared, for the next cell.

    Raises:
        ClsnfError: whatever a user can mend.
    """
    stopwatch = Stopwatch()
    table = assign_splits(cell.table, cell.settings.validation.fraction, cell.seed)
    with stopwatch.of("reading"):
        bench = _workbench(cell, request, table, progress, before)
    trainer = SystemTrainer(bench.pipeline, cell.recipe.baseline_passes, request.systems, stopwatch)
    store = bench.store
    computed_before, reused_before = dict(store.computed), dict(store.reused)
    maps = trainer.maps(bench.images)
    with stopwatch.of("selection"):
        selections = _select(request, maps, bench, progress)
    systems = {name: selection.to_result() for name, selection in selections.items()}
    test = rows_of(table, "test")
    if request.test and len(test):
        purpose = f"benchmark, seed {cell.seed}: {len(systems)} systems"
        record_unlock(request.out, cell.category, purpose)
        with stopwatch.of("reading"):
            images = place_rows(test, cell.settings)
        maps = trainer.maps(images)
        with stopwatch.of("test figures"):
            tests = compare_systems(selections, maps, test.to_pylist(), cell.settings, progress)
        systems = {
            name: dataclasses.replace(found, test=tests[name]) for name, found in systems.items()
        }
    computed = _difference(store.computed, computed_before)
    result = CellResult(
        variant=cell.variant,
        category=cell.category,
        seed=cell.seed,
        identity=cell.identity(request.textures),
        at=now(),
        systems=systems,
        object_mask=MaskReport(bench.prepared.mask_mode, bench.prepared.mask_reason),
        images={name: len(rows_of(table, name)) for name in ("fit", "validation", "test")}
        | {"validation set": len(bench.images.images)},
        seconds={name: round(value, 2) for name, value in stopwatch.seconds.items()},
        cost=_cost(stopwatch.seconds, computed),
        artifacts={"computed": computed, "reused": _difference(store.reused, reused_before)},
    )
    return result, bench.prepared


def _workbench(
    cell: Cell,
    request: BenchmarkRequest,
    table: pa.Table,
    progress: Progress,
    before: Prepared | None,
) -> Workbench:
    """The cell's pipeline and its validation images."""
    settings = cell.settings
    prepared = _with_settings(before, settings) or prepare(
        table,
        settings,
        request.textures,
        ArtifactStore(request.out / "stages"),
        choose_device(request.device),
        progress,
    )
    validation = write_validation_set(
        table,
        request.out / "validation" / cell.category / f"seed-{cell.seed}",
        images_per_family=settings.validation.images_per_family,
        seed=cell.seed,
        mask_mode=prepared.mask_mode,
    )
    return Workbench.load(prepared, validation)


def _with_settings(before: Prepared | None, settings: DetectorSettings) -> Prepared | None:
    """What an earlier cell prepared, under other settings.

    None where there is nothing, or where more than the flows or the fusion differs.
    """
    if before is None:
        return None
    known = before.pipeline.settings
    same = dataclasses.replace(
        settings, flow=known.flow, fusion_weight=known.fusion_weight, smoothing=known.smoothing
    )
    if same != known:
        return None
    return dataclasses.replace(before, pipeline=before.pipeline.with_settings(settings))


def _select(
    request: BenchmarkRequest, maps: ComponentMaps, bench: Workbench, progress: Progress
) -> dict[str, Selection]:
    """Name of each system that is wanted -> what validation chose."""
    selector = Selector(maps, bench.labels, bench.pipeline.settings)
    names = [name for name in SYSTEMS if name in request.systems]
    selections = {}
    for number, name in enumerate(names):
        progress("selecting", number, len(names))
        selections[name] = selector.select(name)
    progress("selecting", len(names), len(names))
    return selections


def _difference(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What was added to counts; kinds without any are left out."""
    added = {name: count - before.get(name, 0) for name, count in counts.items()}
    return {name: count for name, count in added.items() if count}


def _cost(seconds: dict[str, float], computed: dict[str, int]) -> dict[str, float] | None:
    """Seconds of all systems over those of the trainings in them.

    The trainings are finetuning, and the flows on the finetuned and on the pretrained backbone.
    ``systems`` are trainings and score maps; ``everything`` counts reading, selection and test
    metrics as well.

    Returns:
        None where some of the trainings were found instead of done: there is nothing to compare.
    """
    if not computed.get("finetuned") or computed.get("flows", 0) < 2:
        return None
    trainings = sum(seconds.get(name, 0.0) for name in _TRAININGS)
    systems = trainings + seconds.get("classifier maps", 0.0) + seconds.get("density maps", 0.0)
    everything = sum(seconds.values())
    return {
        "trainings": round(trainings, 1),
        "systems": round(systems, 1),
        "systems_over_trainings": round(systems / trainings, 3),
        "everything_over_trainings": round(everything / trainings, 3),
    }
