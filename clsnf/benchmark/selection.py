"""Chooses a candidate of each system on the validation defects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from clsnf.benchmark.systems import (
    SYSTEMS,
    WEIGHTS,
    Candidate,
    ComponentMaps,
    candidate_depths,
    fused_candidates,
    last_candidate,
    single_candidates,
)
from clsnf.core.config import DetectorSettings
from clsnf.evaluation.selection import (
    ValidationLabels,
    choose_score_weight,
    family_metrics,
    mean_over_families,
)
from clsnf.results import CandidateResult, Metrics, SystemResult

OBJECTIVE = "pixel_ap"  # what selection maximizes on the validation defects
VALIDATION_METRICS = ("pixel_ap", "image_auroc", "au_pro")


@dataclass(frozen=True)
class Selection:
    """What validation says of a system.

    Attributes:
        candidates: candidate -> objective, mean over the validation defect families.
        selected: the best candidate.
        last: the candidate that the settings name.
        validation: metric -> mean over the families, of `selected`.
        families: defect family -> metric -> value, of `selected`.
    """

    candidates: dict[Candidate, float]
    selected: Candidate
    last: Candidate
    validation: Metrics
    families: dict[str, Metrics]

    def to_result(self) -> SystemResult:
        """As a cell's file holds it, without test metrics."""
        return SystemResult(
            candidates=[_result(each, value) for each, value in self.candidates.items()],
            selected=_result(self.selected),
            last=_result(self.last),
            validation=self.validation,
            families=self.families,
        )


def _result(candidate: Candidate, objective: float | None = None) -> CandidateResult:
    return CandidateResult(
        epoch=candidate.joint_epochs,
        depth=candidate.depth,
        weight=candidate.fusion_weight,
        score_weight=candidate.score_weight,
        objective=objective,
    )


class Selector:
    """Chooses candidates from one set of maps; what systems share is computed once.

    Args:
        maps: of the validation images.
        labels: of the validation images.
        settings: of the cell.
    """

    def __init__(
        self, maps: ComponentMaps, labels: ValidationLabels, settings: DetectorSettings
    ) -> None:
        self._maps, self._labels, self._settings = maps, labels, settings
        self._depths = candidate_depths(settings.flow)
        self._objectives: dict[tuple[str | None, Candidate], float] = {}
        self._best: dict[str, Candidate] = {}

    def select(self, name: str) -> Selection:
        """Choose a candidate of a system."""
        system, settings = SYSTEMS[name], self._settings
        candidates = {each: self._objective(name, each) for each in self._candidates(name)}
        selected = self._best_candidate(name)
        if system.is_fused:
            score_weight = choose_score_weight(
                self._maps.pair(system, selected),
                self._labels,
                {*WEIGHTS, settings.fusion_weight},
            )
            selected = dataclasses.replace(selected, score_weight=score_weight)
        families = family_metrics(
            self._maps.scores(system, selected), self._labels, VALIDATION_METRICS
        )
        return Selection(
            candidates=candidates,
            selected=selected,
            last=last_candidate(
                system,
                settings.finetune.joint_epochs,
                settings.flow.depth,
                settings.fusion_weight,
                settings.score_weight,
            ),
            validation={
                metric: mean_over_families(families, metric) for metric in VALIDATION_METRICS
            },
            families=families,
        )

    def _objective(self, name: str, candidate: Candidate) -> float:
        """The objective of a candidate, mean over the validation defect families."""
        system = SYSTEMS[name]
        # Systems may share a map: at weight 1, both fused systems are the classifier alone.
        flow = None if candidate.depth is None or candidate.fusion_weight == 1 else system.flow
        key = (flow, candidate)
        if key not in self._objectives:
            answers = self._maps.scores(system, candidate)
            metrics = family_metrics(answers, self._labels, (OBJECTIVE,))
            self._objectives[key] = mean_over_families(metrics, OBJECTIVE)
        return self._objectives[key]

    def _candidates(self, name: str) -> list[Candidate]:
        """A system's candidates; those of a fused system rest on the best ones of its parts."""
        system = SYSTEMS[name]
        if not system.is_fused:
            return single_candidates(system, sorted(self._maps.classifier), self._depths)
        best_epochs = self._best_candidate("classifier").joint_epochs
        best_depth = self._best_candidate("flow" if system.flow == "finetuned" else "cflow").depth
        assert best_epochs is not None
        assert best_depth is not None
        return fused_candidates(
            [best_epochs, self._settings.finetune.joint_epochs],
            [best_depth, self._settings.flow.depth],
            self._settings.fusion_weight,
        )

    def _best_candidate(self, name: str) -> Candidate:
        """The candidate with the largest objective; of equals, the first."""
        if name not in self._best:
            self._best[name] = max(
                self._candidates(name), key=lambda candidate: self._objective(name, candidate)
            )
        return self._best[name]
