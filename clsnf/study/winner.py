"""From a category's finished trials to its winner: the last thing a study does for a category, in a
Ray worker.

The order matters: the fusion weight is swept and the winner chosen on validation images, the
detector is saved with its threshold from validation normals, and only then are the test images
unlocked, once, for its figures and for what a report will show.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clsnf.core.config import to_dict
from clsnf.core.memory import release_freed_memory
from clsnf.data.images import read_image, read_mask
from clsnf.detector import Detector
from clsnf.evaluation.evaluate import evaluate_detector
from clsnf.evaluation.pictures import Image, outline, overlay, sheet
from clsnf.evaluation.selection import (
    choose_score_weight,
    family_metrics_of,
    mean_over_families,
    sweep_weights,
)
from clsnf.evaluation.selection_rules import RULES, order, pick
from clsnf.results import to_plain
from clsnf.study.evidence import keep_evidence
from clsnf.study.folder import StudyPlan
from clsnf.study.pareto import save_front
from clsnf.study.progress_files import FileProgress
from clsnf.study.regret import regret
from clsnf.study.space import apply_config
from clsnf.study.trial import reported_metrics, use_threads, workbench

_EXAMPLES = 6


def best_few(trials: list[dict[str, Any]], most: int, rule: str = "mean") -> list[dict[str, Any]]:
    """The best trial of each setting apart from the fusion weight, best first, at most `most`.

    Args:
        trials: records with ``config`` and ``figures``, among them ``family_*``; ties go to the
            earlier trial.
        most: how many.
        rule: what makes one better, a name in :data:`clsnf.evaluation.selection_rules.RULES`.
    """
    best: dict[str, dict[str, Any]] = {}
    for index in order(rule, [families_of(trial) for trial in trials]):
        best.setdefault(str(sorted(without_weight(trials[index]["config"]).items())), trials[index])
    return list(best.values())[:most]


def families_of(trial: dict[str, Any]) -> list[float]:
    """The objective on each defect family, in the order of their names."""
    return [value for name, value in sorted(trial["figures"].items()) if name.startswith("family_")]


def without_weight(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a trial's maps."""
    return {name: value for name, value in config.items() if name != "fusion_weight"}


@dataclass(frozen=True)
class Candidate:
    """A trial's maps, fused with some weight.

    Attributes:
        trial: its record.
        weight: the fusion weight.
        families: the objective on each defect family.
    """

    trial: dict[str, Any]
    weight: float
    families: tuple[float, ...]


def finish_category(plan: StudyPlan, category: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose, save and evaluate a category's winner.

    Args:
        plan: the study.
        category: its name.
        trials: its finished trials, records with ``trial``, ``config`` and ``objective``.

    Returns:
        What ``summary.json`` holds of the category.
    """
    use_threads(plan.threads)
    started = time.perf_counter()
    progress = FileProgress(plan.folder, category)
    study = plan.study_settings
    few = best_few(trials, study.refine, study.selection)
    candidates: list[Candidate] = []
    sweeps = []
    for number, trial in enumerate(few):
        progress("choosing the fusion weight", number, len(few))
        settings = apply_config(plan.detector_settings, trial["config"])
        bench = workbench(plan, category, settings)
        maps = bench.prepared.pipeline.maps(
            settings.finetune.joint_epochs, settings.flow.depth, bench.images
        )
        weights = np.unique(np.append(plan.fusion_weights, settings.fusion_weight))
        values = sweep_weights(maps, bench.labels, study.objective, weights)
        candidates += [
            Candidate(trial, weight, tuple(families.values())) for weight, families in values
        ]
        sweeps.append(
            {
                "config": without_weight(trial["config"]),
                "weights": [
                    (weight, float(np.mean(list(families.values())))) for weight, families in values
                ],
            }
        )
    release_freed_memory()
    picks = {rule: candidates[pick(rule, [c.families for c in candidates])] for rule in RULES}
    chosen = picks[study.selection]
    trial, weight = chosen.trial, chosen.weight
    settings = dataclasses.replace(
        apply_config(plan.detector_settings, trial["config"]), fusion_weight=weight
    )
    bench = workbench(plan, category, settings)
    maps = bench.prepared.pipeline.maps(
        settings.finetune.joint_epochs, settings.flow.depth, bench.images
    )
    if settings.score_weight is None:
        by_weight = ((float(w), maps.fused(float(w))) for w in (*plan.fusion_weights, weight))
        settings = dataclasses.replace(
            settings, score_weight=choose_score_weight(by_weight, bench.labels)
        )
    train = plan.train_table(category)
    detector = Detector.from_pipeline(bench.prepared, train, settings, progress)
    detector.save(plan.folder / "winners" / category)

    names = reported_metrics(study)
    families = family_metrics_of(
        maps.fused(weight), bench.labels, names, maps.fused(settings.image_weight)
    )
    result: dict[str, Any] = {
        "winner": plan.place_of(f"winners/{category}"),
        "trial": trial["trial"],
        "settings": to_dict(settings),
        "chosen": {
            **trial["config"],
            "fusion_weight": weight,
            "score_weight": settings.image_weight,
        },
        "validation": {name: mean_over_families(families, name) for name in names}
        | {"families": families},
        "threshold": dataclasses.asdict(detector.threshold)
        | {"interval": detector.threshold.interval},
        "object_mask": {"kind": bench.prepared.mask_mode, "reason": bench.prepared.mask_reason},
        "sweeps": sweeps,
        "rules": {
            rule: {"config": without_weight(c.trial["config"]), "fusion_weight": c.weight}
            for rule, c in picks.items()
        },
        "test": None,
        "regret": None,
    }
    if len(study.objectives) > 1:
        result["front"] = save_front(plan, category, trials, progress)
    test = plan.unlock_test_table(
        category,
        f"evaluation of the winner, trial {trial['trial']}, fusion weight {weight:g}, and of the "
        "baseline beside it",
    )
    if len(test):
        result["test"] = to_plain(evaluate_detector(detector, test, progress))
        result["regret"] = regret(plan, category, trials, settings, test, picks, progress)
    shown = test if len(test) else plan.validation_table(category)
    write_examples(detector, shown.to_pylist(), plan.folder / "examples" / f"{category}.png")
    result["examples"] = plan.place_of(f"examples/{category}.png")
    verdicts = [] if result["test"] is None else result["test"]["scores"]
    result["evidence"] = keep_evidence(plan, category, bench, detector, test, verdicts, progress)
    result["seconds"] = time.perf_counter() - started
    plan.keep_finished(category, trials, result)
    return result


def write_examples(detector: Detector, rows: list[dict[str, Any]], path: Path) -> None:
    """A sheet of the detector's answers: pictures with the true defect outlined, and the overlay of
    the map below each.
    """
    from clsnf.data.images import write_image

    by_type: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_type.setdefault(row["defect_type"], []).append(row)
    lines: list[tuple[str, list[Image]]] = []
    for kind in sorted(by_type, key=lambda k: (k != "good", k)):
        chosen = by_type[kind][:_EXAMPLES]
        inputs, answers = [], []
        for row, (score_map, _, _) in zip(
            chosen, detector.predict_each([r["path"] for r in chosen]), strict=True
        ):
            image = read_image(row["path"])
            mask = None if row["mask_path"] is None else read_mask(row["mask_path"])
            inputs.append(image if mask is None else outline(image, mask, (0, 220, 0)))
            answers.append(overlay(image, score_map, detector.shown_from, detector.map_threshold))
        lines += [(f"{kind}: input" + (", true defect in green" if kind != "good" else ""), inputs)]
        lines += [(f"{kind}: score map, above the threshold in cyan", answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, sheet(lines))
