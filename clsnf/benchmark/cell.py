"""One cell of the benchmark: all systems for one category, one seed and one variant of the
settings.

Unusual: what the systems share is computed once. One finetuned backbone serves ``classifier``,
    ``flow`` and ``fused``; one pretrained
feature cache serves ``cflow`` and ``fused_unshared``, whose classifier is the finetuned one again.
Five systems cost two trainings and some maps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clsnf.benchmark.systems import (
    SYSTEMS,
    WEIGHTS,
    Candidate,
    Parts,
    fused_candidates,
    last_candidate,
    part_candidates,
)
from clsnf.core.config import DetectorSettings
from clsnf.core.device import choose_device
from clsnf.core.ledger import record_unlock
from clsnf.core.progress import Progress, silent
from clsnf.data.splits import assign_splits
from clsnf.evaluation.evaluate import metrics_of_maps, samples_of_maps
from clsnf.evaluation.selection import (
    ValidationLabels,
    choose_score_weight,
    family_metrics_of,
    mean_over_families,
    validation_labels,
)
from clsnf.metrics import METRICS
from clsnf.metrics.bootstrap import (
    bin_images,
    compare,
    draw_replicates,
    intervals,
    replicate_metrics,
)
from clsnf.model.score_maps import image_scores
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.pipeline import CategoryPipeline, PlacedImages
from clsnf.training.prepare import Prepared, place_rows, prepare, rows_of

OBJECTIVE = "pixel_ap"  # what selection raises on the validation defects
# What an oracle is asked for; the others would cost as much again and say the same.
ORACLE_METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "au_pro")
VALIDATION_METRICS = ("pixel_ap", "image_auroc", "au_pro")
REPLICATES = 1000
_TRAININGS = ("finetuning", "flows on the finetuned backbone", "flows on the pretrained backbone")
_COMPARED = "fused"  # every other system is compared with the method


@dataclass
class Clock:
    """Seconds by kind of work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class CellRequest:
    """What a cell is asked for.

    Attributes:
        table: the category's, as its layout's reader gave it.
        settings: with the cell's seed.
        baseline_passes: ``flow.passes`` of the flows on the pretrained backbone.
        out: the benchmark's folder.
        textures, device: as for training.
        test: whether to go on to the test images once everything is chosen.
        systems: names of those that are wanted.
    """

    table: pa.Table
    settings: DetectorSettings
    baseline_passes: float
    out: Path
    textures: Path | None
    device: str
    test: bool
    systems: tuple[str, ...] = tuple(SYSTEMS)

    @property
    def category(self) -> str:
        return str(self.table["category"][0].as_py())


class _Bench:
    """Pipelines of a cell: the method's, and the baseline's where its flows are trained for another
    time.
    """

    def __init__(
        self, request: CellRequest, table: pa.Table, before: Prepared | None, progress: Progress
    ) -> None:
        self.settings = request.settings
        store = ArtifactStore(request.out / "stages")
        device = choose_device(request.device)
        self.prepared = _again(request.settings, before) or prepare(
            table, request.settings, request.textures, store, device, progress
        )
        flow = dataclasses.replace(self.settings.flow, passes=request.baseline_passes)
        method = self.prepared.pipeline
        method.feature_cache.resize(2)  # the finetuned backbone's and the pretrained one's
        self.pipelines: dict[str, CategoryPipeline] = {
            "finetuned": method,
            "pretrained": method.with_settings(dataclasses.replace(self.settings, flow=flow)),
        }
        self.store = method.store
        self.systems = {name: SYSTEMS[name] for name in SYSTEMS if name in request.systems}

    @property
    def epochs(self) -> int:
        return self.settings.finetune.joint_epochs

    @property
    def depths(self) -> list[int]:
        """What there is to choose from: flows that start from the data are a density before
        training, too.
        """
        depth = self.settings.flow.depth
        return [0, depth] if self.settings.flow.start == "data" and depth else [depth]

    def maps(self, images: PlacedImages, clock: Clock) -> Parts:
        """All score maps of images that the systems are made of."""
        method = self.pipelines["finetuned"]
        classifier = {}
        if any(system.classifier for system in self.systems.values()):
            with clock.of("finetuning"):
                method.finetune_with_snapshots(self.epochs)
            with clock.of("classifier maps"):
                classifier = method.classifier_maps_by_epoch(self.epochs, images)
        elif any(system.flow == "finetuned" for system in self.systems.values()):
            with clock.of("finetuning"):
                method.finetuned(self.epochs)
        density = {}
        for name, pipeline in self.pipelines.items():
            if all(system.flow != name for system in self.systems.values()):
                continue
            epochs = self.epochs if name == "finetuned" else 0
            with clock.of(f"flows on the {name} backbone"):
                for depth in self.depths:
                    pipeline.flows(epochs, depth)
            with clock.of("density maps"):
                for depth in self.depths:
                    density[name, depth] = pipeline.density_maps(epochs, depth, images)
        return Parts(classifier, density, self.settings.smoothing)


def _again(settings: DetectorSettings, before: Prepared | None) -> Prepared | None:
    """What another cell of the same category and seed had prepared, where only its flows or its
    fusion differed; None if there is none.
    """
    if before is None:
        return None
    of = before.pipeline.settings
    same = (
        dataclasses.replace(
            settings, flow=of.flow, fusion_weight=of.fusion_weight, smoothing=of.smoothing
        )
        == of
    )
    return (
        dataclasses.replace(before, pipeline=before.pipeline.with_settings(settings))
        if same
        else None
    )


def run_cell(
    request: CellRequest, progress: Progress = silent, before: Prepared | None = None
) -> tuple[dict[str, Any], Prepared]:
    """Train, choose and judge.

    Args:
        request: what is asked for.
        progress: told about long work.
        before: what a cell of the same category and seed had prepared, for what it has in memory.

    Returns:
        First the record:
        ``systems``: for each its candidates' validation objective, what was chosen, its validation
            figures, and, with test images,
        figures of ``selected``, ``last`` and ``oracle``, intervals and the comparison with the
        method. ``seconds`` by kind of work; ``stages`` computed and found. Then what was prepared.

    Raises:
        ClsnfError: whatever a user can mend.
    """
    clock, settings = Clock(), request.settings
    table = assign_splits(request.table, settings.validation.fraction, settings.seed)
    with clock.of("reading"):
        bench = _Bench(request, table, before, progress)
        validation = write_validation_set(
            table,
            request.out / "validation" / request.category / f"seed-{settings.seed}",
            images_per_family=settings.validation.images_per_family,
            seed=settings.seed,
            mask_mode=bench.prepared.mask_mode,
        )
        images = place_rows(validation, settings)
        labels = validation_labels(validation.to_pylist(), settings, images)
    had_computed, reused = dict(bench.store.computed), dict(bench.store.reused)
    parts = bench.maps(images, clock)
    with clock.of("selection"):
        systems = _select(parts, labels, bench, progress)
    test = rows_of(table, "test")
    if request.test and len(test):
        record_unlock(
            request.out,
            request.category,
            f"benchmark, seed {settings.seed}: {len(systems)} systems",
        )
        with clock.of("reading"):
            shown = place_rows(test, settings)
        parts = bench.maps(shown, clock)
        with clock.of("test figures"):
            _judge(systems, parts, shown, test.to_pylist(), bench, progress)
    computed = _since(bench.store.computed, had_computed)
    record = {
        "systems": systems,
        "object_mask": {"kind": bench.prepared.mask_mode, "reason": bench.prepared.mask_reason},
        "images": {name: len(rows_of(table, name)) for name in ("fit", "validation", "test")}
        | {"validation set": len(validation)},
        "seconds": {name: round(value, 2) for name, value in clock.seconds.items()},
        "cost": _cost(clock.seconds, computed),
        "stages": {"computed": computed, "reused": _since(bench.store.reused, reused)},
    }
    return record, bench.prepared


def _since(counts: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What was added to counts since an earlier look."""
    added = {name: count - before.get(name, 0) for name, count in counts.items()}
    return {name: count for name, count in added.items() if count}


def _cost(seconds: dict[str, float], computed: dict[str, int]) -> dict[str, float] | None:
    """What all systems cost over the trainings in them (finetuning, flows on the finetuned and on
    the pretrained backbone), in seconds.

    ``systems`` are trainings and score maps; ``everything`` counts reading, selection and figures
    as well. None where some of the trainings were found instead of done, because then the
    comparison would mean nothing.
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


def _select(
    parts: Parts, labels: ValidationLabels, bench: _Bench, progress: Progress
) -> dict[str, Any]:
    """Choose a candidate of each system on the validation defects."""
    values: dict[tuple[str | None, Candidate], float] = {}

    def objective(name: str, candidate: Candidate) -> float:
        system = SYSTEMS[name]
        # Two systems may have the same map (the classifier alone is both fused systems' at weight
        # 1).
        flow = None if candidate.depth is None or candidate.weight == 1 else system.flow
        key = (flow, candidate)
        if key not in values:
            figures = family_metrics_of(parts.map_of(system, candidate), labels, (OBJECTIVE,))
            values[key] = mean_over_families(figures, OBJECTIVE)
        return values[key]

    depth, weight = bench.depths[-1], bench.settings.fusion_weight
    best: dict[str, Candidate] = {}
    result: dict[str, Any] = {}
    for number, (name, system) in enumerate(bench.systems.items()):
        progress("selecting", number, len(bench.systems))
        if system.flow is not None and system.classifier:
            flow_alone = "flow" if system.flow == "finetuned" else "cflow"
            for part in ("classifier", flow_alone):  # whether or not it is wanted for itself
                if part not in best:
                    alone = part_candidates(SYSTEMS[part], sorted(parts.classifier), bench.depths)
                    best[part] = max(alone, key=partial(objective, part))
            epochs = [_number(best["classifier"].epoch), bench.epochs]
            candidates = fused_candidates(epochs, [_number(best[flow_alone].depth), depth], weight)
        else:
            candidates = part_candidates(system, sorted(parts.classifier), bench.depths)
        chosen = best[name] = max(candidates, key=partial(objective, name))
        if system.flow is not None and system.classifier:
            by_weight = (
                (w, parts.map_of(system, dataclasses.replace(chosen, weight=w)))
                for w in {*WEIGHTS, weight}
            )
            chosen = dataclasses.replace(
                chosen, score_weight=choose_score_weight(by_weight, labels)
            )
        validation = family_metrics_of(
            parts.map_of(system, chosen),
            labels,
            VALIDATION_METRICS,
            parts.scored_map_of(system, chosen),
        )
        result[name] = {
            "candidates": [
                dataclasses.asdict(c) | {OBJECTIVE: objective(name, c)} for c in candidates
            ],
            "selected": dataclasses.asdict(chosen),
            "last": dataclasses.asdict(
                last_candidate(system, bench.epochs, depth, weight, bench.settings.score_weight)
            ),
            "validation": {
                figure: mean_over_families(validation, figure) for figure in VALIDATION_METRICS
            },
            "families": validation,
            "test": None,
        }
    progress("selecting", len(bench.systems), len(bench.systems))
    return result


def _number(value: int | None) -> int:
    assert value is not None
    return value


def _judge(
    systems: dict[str, Any],
    parts: Parts,
    images: PlacedImages,
    rows: list[dict[str, Any]],
    bench: _Bench,
    progress: Progress,
) -> None:
    """Figures of the selected, the last and the oracle's candidates on the test images, with
    intervals.
    """
    labels = np.array([row["label"] for row in rows])
    weights = draw_replicates(labels, REPLICATES, bench.settings.seed)
    replicated: dict[str, dict[str, np.ndarray]] = {}
    total = sum(len(found["candidates"]) for found in systems.values())
    done = 0
    for name, found in systems.items():
        system = SYSTEMS[name]

        def figures(
            candidate: Candidate, names: Sequence[str], system: Any = system
        ) -> dict[str, float]:
            maps = parts.map_of(system, candidate)
            scores = image_scores(parts.scored_map_of(system, candidate), images.valid).numpy()
            return metrics_of_maps(rows, maps.numpy(), scores, bench.settings.image, names)

        selected, last = Candidate(**found["selected"]), Candidate(**found["last"])
        tried = []
        for record in found["candidates"]:
            tried.append(
                figures(
                    Candidate(**{k: record[k] for k in ("epoch", "depth", "weight")}),
                    ORACLE_METRICS,
                )
            )
            done += 1
            progress("test figures", done, total)
        maps = parts.map_of(system, selected)
        samples = samples_of_maps(rows, maps.numpy(), bench.settings.image)
        scores = image_scores(parts.scored_map_of(system, selected), images.valid).numpy()
        replicated[name] = replicate_metrics(bin_images(scores, labels, samples), weights)
        found["test"] = {
            "selected": figures(selected, tuple(METRICS)),
            "last": figures(last, ORACLE_METRICS),
            "oracle": {
                figure: max(values[figure] for values in tried)
                for figure in ORACLE_METRICS
                if figure in tried[0]
            },
            "intervals": intervals(replicated[name]),
        }
    for name, found in systems.items():
        if name != _COMPARED and _COMPARED in systems:
            differences = compare(replicated[_COMPARED], replicated[name])
            found["test"][f"{_COMPARED}_ahead_by"] = {
                figure: dataclasses.asdict(d) for figure, d in differences.items()
            }
