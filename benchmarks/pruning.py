"""How often stopping hopeless trials would have lost a study's best trial, and what it saves.

    clsnf study --space SPACE --trials 14 --no-stop-hopeless --out runs/all   # with a learning rate
    python benchmarks/pruning.py runs/all

All trials of such a study ended. For each one, each epoch at which running trials are compared, and
each density that another trial left, the benchmark computes what the trial would have reported: its
classifier's maps alone (the rule of earlier versions), and fused with the density (the rule now).
The trials are then run again in random orders, with the study's own code for storing and stopping:
one at a time, each compared by the best density of those that finished before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from optuna import logging
from optuna.distributions import IntDistribution
from optuna.storages import InMemoryStorage
from scipy.stats import spearmanr

from clsnf.results import Measurements, TrialResult, trials_of_study
from clsnf.study.context import StudyContext
from clsnf.study.folder import StudyFolder
from clsnf.study.space import Space, apply_config
from clsnf.study.stored_request import read_request
from clsnf.study.trial import worth_on_the_way
from clsnf.study.trials import CategoryTrials, SearchPlan
from clsnf.study.worker import WORKBENCHES
from clsnf.training.finetune import decay_start


@dataclass(frozen=True)
class Ended:
    """A trial that ended.

    Attributes:
        objective: at its end.
        seconds: that it took; `by_epoch` of them for each epoch of its training.
        alone: epoch -> what its classifier's maps were worth alone.
        fused: epoch -> trial whose density they are fused with -> what they were worth.
    """

    objective: float
    seconds: float
    by_epoch: float
    alone: Mapping[int, float]
    fused: Mapping[int, Sequence[float]]

    def left_after(self, step: int) -> float:
        """Seconds that stopping it after so many epochs saves."""
        return self.seconds - self.by_epoch * step


def read_context(run: Path) -> StudyContext:
    """The study as its workers knew it."""
    request = read_request(run)
    space = Space(request.space)
    return StudyContext(
        folder=StudyFolder(str(run.absolute())),
        settings=request.settings,
        study=request.study,
        joint_epochs_choices=tuple(space.joint_epochs(request.settings)),
        pruning_epochs=tuple(space.rungs(request.settings)),
        fusion_weights=space.fusion_weights(request.settings),
        textures=request.textures,
        device=request.device,
        threads=1,
    )


def trained_again(context: StudyContext, trials: Sequence[TrialResult]) -> list[Ended]:
    """What a category's trials would have reported; states that are not stored are trained."""
    alone = dataclasses.replace(context, fusion_weights=(1.0,))
    benches = [
        (WORKBENCHES.get(context, trial.category, settings), settings)
        for trial in trials
        for settings in [apply_config(context.settings, trial.config)]
    ]
    densities = [
        bench.pipeline.density_maps(
            settings.finetune.joint_epochs, settings.flow.depth, bench.images
        )
        for bench, settings in benches
    ]
    ended = []
    for trial, (bench, settings) in zip(trials, benches, strict=True):
        classifiers = {
            step: bench.pipeline.stable_phase_maps(
                settings.finetune.joint_epochs, step, bench.images
            )
            for step in context.pruning_epochs
            if step <= decay_start(settings.finetune)
        }
        training = sum(
            trial.measured.seconds_by_kind.get(kind, 0.0) for kind in ("trunk", "finetuned")
        )
        ended.append(
            Ended(
                trial.objective or 0.0,
                trial.seconds,
                training / settings.finetune.epochs,
                {
                    step: worth_on_the_way(alone, bench, densities[0], maps)
                    for step, maps in classifiers.items()
                },
                {
                    step: [worth_on_the_way(context, bench, known, maps) for known in densities]
                    for step, maps in classifiers.items()
                },
            )
        )
    return ended


@dataclass(frozen=True)
class Outcome:
    """One order of the trials."""

    stopped: int
    lost_best: bool
    best: float  # objective of those that finished
    saved: float  # share of the seconds


def stopped_after(study: CategoryTrials, number: int, trial: Ended, fuse: bool) -> int | None:
    """The epoch after which a trial is stopped; None where it finishes."""
    density = study.best_densities().get("images")
    if fuse and density is None:
        return None
    for step in sorted(trial.alone):
        worth = trial.fused[step][int(density or 0)] if fuse else trial.alone[step]
        if study.should_prune(number, step, worth):
            return step
    return None


def simulate(ended: Sequence[Ended], order: Sequence[int], fuse: bool) -> Outcome:
    """The trials in an order, one at a time; those far behind are stopped."""
    plan = SearchPlan(
        {"trial": IntDistribution(0, len(ended) - 1)},
        len(ended),
        {"pixel_ap": "maximize"},
        seed=0,
        in_sequence=True,
    )
    study = CategoryTrials(InMemoryStorage(), "simulated", "simulated", plan, ())
    finished, saved = list[int](), 0.0
    for index in order:
        trial = ended[index]
        number, _ = study.begin({"trial": index})
        step = stopped_after(study, number, trial, fuse)
        if step is None:
            finished.append(index)
            measured = Measurements({"pixel_ap": trial.objective}, density=("images", str(index)))
            study.finish(number, measured)
        else:
            saved += trial.left_after(step)
            study.stop(number, Measurements())
    best = max(range(len(ended)), key=lambda i: ended[i].objective)
    return Outcome(
        len(ended) - len(finished),
        best not in finished,
        max(ended[i].objective for i in finished),
        saved / sum(trial.seconds for trial in ended),
    )


def show(ended: Sequence[Ended], orders: int) -> None:
    """Print a line for each rule."""
    best = max(trial.objective for trial in ended)
    top = max(range(len(ended)), key=lambda i: ended[i].objective)
    for name, fuse in (("classifier alone", False), ("fused", True)):
        draw = random.Random(0)
        found = [
            simulate(ended, draw.sample(range(len(ended)), len(ended)), fuse) for _ in range(orders)
        ]
        first = min(step for trial in ended for step in trial.alone)
        reached = [trial for trial in ended if first in trial.alone]
        agreement = spearmanr(
            [t.fused[first][top] if fuse else t.alone[first] for t in reached],
            [t.objective for t in reached],
        ).statistic
        print(
            f"  {name:17} stopped {statistics.mean(o.stopped for o in found):.1f} trials, "
            f"best one lost in {100 * statistics.mean(o.lost_best for o in found):.1f} %, "
            f"objective {1000 * statistics.mean(o.best - best for o in found):+.2f} thousandths, "
            f"seconds saved {100 * statistics.mean(o.saved for o in found):.0f} %, "
            f"rank correlation after {first} epochs {agreement:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a study with --no-stop-hopeless")
    parser.add_argument("--orders", type=int, default=1000, help="random orders of the trials")
    given = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    torch.set_num_threads(1)
    context = read_context(given.run)
    by_category: dict[str, list[TrialResult]] = {}
    for trial in trials_of_study(given.run):
        if trial.status == "finished":
            by_category.setdefault(trial.category, []).append(trial)
    for category, trials in sorted(by_category.items()):
        print(f"{category}: {len(trials)} trials", flush=True)
        show(trained_again(context, trials), given.orders)


if __name__ == "__main__":
    main()
