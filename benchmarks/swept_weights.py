"""Fusion weights that every trial sweeps, against weights that the sampler draws, trial for trial.

    clsnf study --trials 9 --out runs/nine      # the default space: all nine points of each product
    python benchmarks/swept_weights.py runs/nine

The trials of such a study know the objective of every point at every weight, so studies of both
kinds can be replayed many times without training:

- drawn: TPE suggests weight, epochs and depth; at the end the weight is swept on the maps of the
  best three pairs of epochs and depth, as earlier versions did;
- swept: TPE suggests epochs and depth, and each trial is worth its best weight.

Both run with the study's own code for suggestions, which never tries a point twice.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna import logging
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import InMemoryStorage

from clsnf.results import Measurements, trials_of_study
from clsnf.study.stored_request import read_request
from clsnf.study.trials import CategoryTrials, SearchPlan, without_fusion_weight

Point = tuple[Any, ...]  # values of the names that are searched beside the weight
WEIGHT = "weight"  # its name in a replay: to a study, a fusion weight is no value to draw
SWEPT_AT_THE_END = 3


@dataclass
class Product:
    """All points of a category.

    Attributes:
        first: the point that every study tries first, the settings as they stand, by name.
        weight: the settings' own.
        sweeps: point -> weight -> objective.
    """

    first: dict[str, Any]
    weight: float
    sweeps: dict[Point, dict[float, float]] = field(default_factory=dict)

    def point(self, values: Mapping[str, Any]) -> Point:
        """The values of the searched settings, by the order of their names."""
        return tuple(values[name] for name in sorted(self.first))

    def best(self, point: Point) -> float:
        """The objective at the point's best weight."""
        return max(self.sweeps[point].values())

    def at(self, point: Point, weight: float) -> float:
        """The objective at the swept weight that is nearest."""
        sweep = self.sweeps[point]
        return sweep[min(sweep, key=lambda swept: abs(swept - weight))]

    def ranges(self) -> dict[str, BaseDistribution]:
        """What a study searches beside the weight."""
        columns = zip(*self.sweeps, strict=True)
        return {
            name: CategoricalDistribution(sorted(set(column)))
            for name, column in zip(sorted(self.first), columns, strict=True)
        }


def read_products(run: Path) -> dict[str, Product]:
    """The categories of a study, with the sweeps of their trials."""
    weight = read_request(run).settings.fusion_weight
    products: dict[str, Product] = {}
    for trial in sorted(trials_of_study(run), key=lambda trial: trial.number):
        if trial.status == "finished":
            values = without_fusion_weight(trial.config)
            product = products.setdefault(trial.category, Product(values, weight))
            product.sweeps[product.point(values)] = dict(trial.measured.sweep)
    return products


def replay(product: Product, trials: int, seed: int, draw_weight: bool) -> list[float]:
    """The objective of the winner after each number of trials up to `trials`."""
    ranges, first = product.ranges(), dict(product.first)
    if draw_weight:
        ranges[WEIGHT], first[WEIGHT] = FloatDistribution(0.0, 1.0), product.weight
    plan = SearchPlan(ranges, len(product.sweeps), {"pixel_ap": "maximize"}, seed, in_sequence=True)
    study = CategoryTrials(InMemoryStorage(), "replayed", "replayed", plan, [first])
    seen: dict[Point, float] = {}
    winners = list[float]()
    for _ in range(trials):
        number, values = study.begin()
        point = product.point(values)
        value = product.at(point, values[WEIGHT]) if draw_weight else product.best(point)
        study.finish(number, Measurements({"pixel_ap": value}))
        seen[point] = max(value, seen.get(point, 0.0))
        finalists = sorted(seen, key=seen.__getitem__, reverse=True)[:SWEPT_AT_THE_END]
        winners.append(max(product.best(finalist) for finalist in finalists))
    return winners


def needed(curve: Sequence[float], target: float) -> int | None:
    """Number of trials after which a curve of means reaches a target; None where it does not."""
    return next((n for n, value in enumerate(curve, 1) if value >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a study that used its space up")
    parser.add_argument("--trials", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--most", type=int, default=24, help="trials with drawn weights")
    given = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    for category, product in sorted(read_products(given.run).items()):
        best = max(map(product.best, product.sweeps))
        print(f"{category}: {len(product.sweeps)} points, the best is worth {best:.4f}")
        drawn, swept = (
            [replay(product, trials, seed, draw_weight) for seed in range(given.seeds)]
            for draw_weight, trials in (
                (True, given.most),
                (False, min(max(given.trials), len(product.sweeps))),
            )
        )
        means = {
            name: [statistics.mean(column) for column in zip(*curves, strict=True)]
            for name, curves in (("drawn", drawn), ("swept", swept))
        }
        for trials in given.trials:
            target = means["swept"][trials - 1]
            reached = needed(means["drawn"], target)
            print(
                f"  {trials} trials: drawn {means['drawn'][trials - 1]:.4f}, swept {target:.4f}; "
                f"drawn weights need {reached or f'more than {given.most}'} trials for that",
                flush=True,
            )


if __name__ == "__main__":
    main()
