"""What a study's choices lose against an oracle that picks on the test images: computed after
selection, and never used by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from clsnf.core.config import DetectorSettings
from clsnf.core.progress import Progress
from clsnf.evaluation.selection import family_metrics, scores_at, validation_labels
from clsnf.study.folder import StudyPlan
from clsnf.study.space import apply_config
from clsnf.study.trial import workbench
from clsnf.training.pipeline import PlacedImages, ScoreMaps
from clsnf.training.prepare import place_rows

FIGURES = ("pixel_ap", "image_auroc")


class Choice(Protocol):
    """A trial's maps with a fusion weight."""

    @property
    def trial(self) -> dict[str, Any]: ...
    @property
    def weight(self) -> float: ...


def regret(
    plan: StudyPlan,
    category: str,
    trials: list[dict[str, Any]],
    selected: DetectorSettings,
    test: pa.Table,
    picks: Mapping[str, Choice],
    progress: Progress,
) -> dict[str, Any] | None:
    """Figures on the test images, placed on the network's canvas, of what was selected and of what
    an oracle would have.

    Args:
        plan, category: the study and the product.
        trials: the finished ones, which the oracle may choose from, each with its own fusion
            weight.
        selected: the winner's settings.
        test: the test images' table.
        picks: what each selection rule would have picked.
        progress: told about it.

    Returns:
        ``fusion_weight`` and ``trial``, for each of :data:`FIGURES`: ``selected``, ``oracle``,
        ``regret`` (their difference, 0 or more) and what the oracle picked. The first oracle has
        the winner's maps and picks their weight; the second has every trial as well.
        ``rules``: the figures of each selection rule's pick. None where the test images are all
            normal, or all defective.
    """
    rows = test.to_pylist()
    defective = [bool(row["label"]) for row in rows]
    if all(defective) or not any(defective):
        return None
    names = (
        FIGURES
        if all(row["mask_path"] is not None for row in rows if row["label"])
        else ("image_auroc",)
    )
    placed: dict[str, tuple[PlacedImages, Any]] = {}
    known: dict[tuple[str, float], dict[str, float]] = {}

    def maps_of(settings: DetectorSettings) -> tuple[ScoreMaps, Any]:
        bench = workbench(plan, category, settings)
        key = str(settings.image)
        if key not in placed:
            images = place_rows(test, settings)
            labels = validation_labels(rows, settings, images)
            labels = dataclasses.replace(
                labels, families=tuple("defect" if is_defect else "good" for is_defect in defective)
            )
            placed[key] = images, labels
        images, labels = placed[key]
        return bench.prepared.pipeline.maps(
            settings.finetune.joint_epochs, settings.flow.depth, images
        ), labels

    def figures(settings: DetectorSettings, weight: float) -> dict[str, float]:
        key = (str(dataclasses.replace(settings, fusion_weight=0.0, score_weight=None)), weight)
        if key not in known:
            maps, labels = maps_of(settings)
            answers = scores_at(maps, weight, labels.valid)
            known[key] = family_metrics(answers, labels, names)["defect"]
        return known[key]

    weights = [
        float(w)
        for w in np.unique([*plan.fusion_weights, selected.fusion_weight, selected.image_weight])
    ]
    total = len(weights) + len(trials) + len(picks)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("regret", done, total)

    swept = {}
    for weight in weights:
        swept[weight] = figures(selected, weight)
        step()
    tried: dict[tuple[int | None, float], dict[str, float]] = {
        (None, weight): found for weight, found in swept.items()
    }
    for trial in trials:
        settings = apply_config(plan.detector_settings, trial["config"])
        tried[trial["trial"], settings.fusion_weight] = figures(settings, settings.fusion_weight)
        step()
    by_rule = {}
    for rule, choice in picks.items():
        by_rule[rule] = figures(
            apply_config(plan.detector_settings, choice.trial["config"]), choice.weight
        )
        step()
    result: dict[str, Any] = {"fusion_weight": {}, "trial": {}, "rules": by_rule}
    for name in names:
        own = swept[selected.fusion_weight if name == "pixel_ap" else selected.image_weight][name]
        best = max(swept, key=lambda weight: swept[weight][name])
        result["fusion_weight"][name] = _loss(own, swept[best][name]) | {"weight": best}
        number, weight = max(tried, key=lambda key: tried[key][name])
        result["trial"][name] = _loss(own, tried[number, weight][name]) | {
            "trial": number,
            "weight": weight,
        }
    return result


def _loss(selected: float, oracle: float) -> dict[str, Any]:
    return {"selected": selected, "oracle": oracle, "regret": oracle - selected}
