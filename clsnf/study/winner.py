"""From a category's finished trials to its winner. Runs in a Ray worker, once for each category.

The order matters. The winner is chosen among the swept weights on validation images, and the
detector is saved with a threshold from validation normals. Only then are the test images unlocked,
once, for the winner's metrics and for the report's evidence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from clsnf.core.errors import OutageError
from clsnf.core.memory import release_freed_memory
from clsnf.core.patience import is_outage, outage_line
from clsnf.core.progress import Progress
from clsnf.detector import Detector
from clsnf.evaluation.evaluate import evaluate_detector
from clsnf.evaluation.selection import family_metrics, mean_over_families
from clsnf.evaluation.selection_rules import RULES, order, pick
from clsnf.results import (
    MaskReport,
    Regret,
    RulePick,
    TestResult,
    ThresholdReport,
    TrialResult,
    ValidationResult,
    WeightSweep,
    WinnerResult,
)
from clsnf.study.candidates import Candidate, candidates_of
from clsnf.study.context import StudyContext
from clsnf.study.evidence import Winner, write_evidence
from clsnf.study.examples import write_examples
from clsnf.study.folder import images_key
from clsnf.study.latency import with_latencies_in_turn
from clsnf.study.pareto import front_of, save_front
from clsnf.study.progress_notes import NotedProgress
from clsnf.study.regret import TestMetrics, compute_regret, wants_regret
from clsnf.study.trial import reported_metrics
from clsnf.study.trials import without_fusion_weight
from clsnf.study.worker import WORKBENCHES, use_threads


def finish_category(
    context: StudyContext, category: str, trials: Sequence[TrialResult]
) -> WinnerResult:
    """Choose, save and evaluate a category's winner.

    Args:
        context: the study.
        category: its name.
        trials: its finished trials.

    Raises:
        OutageError: something that the work needs is away for now.
    """
    use_threads(context.threads)
    try:
        return _finish(context, category, trials)
    except Exception as error:
        WORKBENCHES.clear()
        if is_outage(error):  # an error's causes don't travel to the driver
            raise OutageError(outage_line(error)) from error
        raise


def _finish(context: StudyContext, category: str, trials: Sequence[TrialResult]) -> WinnerResult:
    started, dropped_before = time.perf_counter(), len(WORKBENCHES.dropped)
    folder = context.folder
    progress = NotedProgress(folder.notes, category)
    measured = with_latencies_in_turn(context, category, trials, progress)
    selection = select_candidates(context, category, measured, progress)
    release_freed_memory()
    chosen = selection.picks[context.study.selection]
    winner = _save_winner(context, category, chosen, progress)
    front = save_front(context, category, selection.front, progress)

    test = folder.unlock_test_table(
        category,
        f"evaluation of the winner, trial {chosen.trial.number}, fusion weight {chosen.weight:g}, "
        "and of the baseline beside it",
    )
    tested, regret = _evaluate(context, winner, trials, selection, test, progress)
    shown = test if len(test) else folder.validation_table(category)
    examples = f"examples/{category}.png"
    write_examples(winner.detector, shown.to_pylist(), folder.path / examples)
    evidence = write_evidence(context, winner, test, tested, progress)
    settings, bench = winner.detector.settings, winner.bench
    result = WinnerResult(
        folder=folder.location_of(f"winners/{category}"),
        trial=chosen.trial.number,
        settings=settings,
        chosen={
            **chosen.trial.config,
            "fusion_weight": chosen.weight,
            "score_weight": settings.image_weight,
        },
        validation=_validation(context, winner),
        threshold=ThresholdReport.of(winner.detector.threshold),
        object_mask=MaskReport(bench.prepared.mask_mode, bench.prepared.mask_reason),
        sweeps=selection.sweeps,
        rules={
            rule: RulePick(without_fusion_weight(picked.trial.config), picked.weight)
            for rule, picked in selection.picks.items()
        },
        test=tested,
        regret=regret,
        front=front,
        examples=folder.location_of(examples),
        evidence=evidence,
        seconds=time.perf_counter() - started,
        dropped=WORKBENCHES.dropped[dropped_before:],
    )
    folder.write_finished(category, context.selection_key(trials), result, images_key(test))
    return result


# ---- selection ----


@dataclass(frozen=True)
class Selection:
    """What selection found.

    Attributes:
        picks: selection rule -> what it picks.
        sweeps: the objective over the fusion weight, for each swept trial.
        front: the Pareto front of several objectives; empty with one.
    """

    picks: dict[str, Candidate]
    sweeps: list[WeightSweep]
    front: list[Candidate]


def select_candidates(
    context: StudyContext, category: str, trials: Sequence[TrialResult], progress: Progress
) -> Selection:
    """Pick among the swept weights of the best few trials, on their stored maps.

    With several objectives, all trials have candidates, and the picks lie on the front.
    """
    study = context.study
    several = len(study.objectives) > 1
    swept_trials = best_trials(trials, len(trials) if several else study.refine, study.selection)
    candidates: list[Candidate] = []
    sweeps = []
    for index, trial in enumerate(swept_trials):
        progress("sweeping the fusion weight", index, len(swept_trials))
        found, swept = candidates_of(context, category, trial)
        candidates += found
        means = [(at.fusion_weight, at.mean(study.objective)) for at in swept]
        sweeps.append(WeightSweep(without_fusion_weight(trial.config), means))
    front = front_of(candidates, study) if several else []
    pool = front or candidates
    families_of = [candidate.families for candidate in pool]
    return Selection({rule: pool[pick(rule, families_of)] for rule in RULES}, sweeps, front)


def best_trials(trials: Sequence[TrialResult], most: int, rule: str = "mean") -> list[TrialResult]:
    """The best trials whose score maps differ, best first.

    Of trials that differ only in the fusion weight, the best one is taken; of equal ones, the
    earlier one.

    Args:
        trials: finished ones.
        most: how many.
        rule: what makes a trial better, a name in
            :data:`clsnf.evaluation.selection_rules.RULES`.
    """
    values = [[value for _, value in sorted(t.measured.families.items())] for t in trials]
    best: dict[str, TrialResult] = {}
    for index in order(rule, values):
        decides_maps = sorted(without_fusion_weight(trials[index].config).items())
        best.setdefault(str(decides_maps), trials[index])
    return list(best.values())[:most]


# ---- the winner ----


def _save_winner(
    context: StudyContext, category: str, chosen: Candidate, progress: Progress
) -> Winner:
    """Make the chosen candidate a detector and save it."""
    settings = chosen.settings(context.settings)
    bench = WORKBENCHES.get(context, category, settings)
    maps = bench.maps(settings.finetune.joint_epochs, settings.flow.depth)
    train = context.folder.train_table(category)
    detector = Detector.from_pipeline(bench.prepared, train, settings, progress)
    detector.save(context.folder.path / "winners" / category)
    return Winner(category, detector, bench, maps)


def _validation(context: StudyContext, winner: Winner) -> ValidationResult:
    """The winner's metrics on the validation defects."""
    settings, maps = winner.detector.settings, winner.validation_maps
    names = reported_metrics(context.study)
    labels = winner.bench.labels
    families = family_metrics(maps.scores(settings.fusion, labels.valid), labels, names)
    return ValidationResult({name: mean_over_families(families, name) for name in names}, families)


def _evaluate(
    context: StudyContext,
    winner: Winner,
    trials: Sequence[TrialResult],
    selection: Selection,
    test: pa.Table,
    progress: Progress,
) -> tuple[TestResult | None, Regret | None]:
    """The winner's answers on the test images, and its regret where it is wanted; None without test
    images.
    """
    if not len(test):
        return None, None
    tested = evaluate_detector(winner.detector, test, progress)
    if not wants_regret(context, trials, len(test)):
        return tested, None
    metrics = TestMetrics(context, winner.category, test)
    settings = winner.detector.settings
    return tested, compute_regret(metrics, trials, settings, selection.picks, progress)
