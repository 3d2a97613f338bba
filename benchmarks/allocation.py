"""Where a shared budget of trials goes: rules that pick the next category, and round robin.

    clsnf study --trials 12 --refine 9 --out runs/some      # real histories, of any products
    python benchmarks/allocation.py runs/some               # seconds, on one core

Each category's points are what the study's sweeps measured: its pairs of joint epochs and flow
depth, at every fusion weight. A simulated study draws points from them at random, as the first
trials of a real one, many times over. All rules see the same draws. The tables show the mean over
categories of the best objective, averaged over the simulated studies, with the standard error of
the difference to round robin. Costs come from the study's trials, by what a trial computes anew.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.core.config import StudySettings
from clsnf.results import Measurements, StudySummary, TrialResult, read_result, read_trials
from clsnf.study.allocation import FLOOR, Allocation, growth
from clsnf.study.deadline import Costs, Deadline
from clsnf.study.warm_start import points_of_others

Config = dict[str, Any]


@dataclass(frozen=True)
class Product:
    """A category's measured points, and the mean seconds of a trial by the work that it does."""

    points: list[tuple[Config, float]]
    seconds: Mapping[str, float]


def read_products(run: Path) -> dict[str, Product]:
    """The categories of a finished study."""
    summary = read_result(StudySummary, run / "summary.json")
    trials = read_trials(run / "trials.parquet")
    products = {}
    for category, found in summary.categories.items():
        if found.winner is None:
            continue
        points = [
            (sweep.config | {"fusion_weight": weight}, value)
            for sweep in found.winner.sweeps
            for weight, value in sweep.weights
        ]
        costs, seen = Costs({category: 1}), dict[str, list[float]]()
        for trial in trials:
            if trial.category == category and trial.status == "finished":
                seen.setdefault(costs.work_of(category, trial.config), []).append(trial.seconds)
                costs.add(trial)
        products[category] = Product(points, {w: statistics.mean(s) for w, s in seen.items()})
    return products


def seconds_of(product: Product, work: str) -> float:
    """What a trial takes; the most costly work stands for one that the study did not see."""
    return product.seconds.get(work, max(product.seconds.values()))


# ---- rules ----

Turn = Callable[[Mapping[str, list[float]], Mapping[str, list[float]]], str]


def fair(values: Mapping[str, list[float]], seconds: Mapping[str, list[float]]) -> str:
    """Round robin."""
    return min(values, key=lambda c: len(values[c]))


def last_records(values: Sequence[float]) -> float:
    """The chance of a record among n + 1 exchangeable trials, times the last two records' size."""
    best, sizes = values[0], list[float]()
    for value in values[1:]:
        if value > best:
            sizes.append(value - best)
            best = value
    return statistics.mean(sizes[-2:]) / (len(values) + 1) if sizes else 0.0


def own_curve(values: Sequence[float]) -> float:
    """A study's rule without the other categories, and without an upper end of the objective."""
    return growth(values) / (len(values) + 1)


def top_gap(values: Sequence[float]) -> float:
    """The jackknife's estimate: the best without itself is the second best."""
    second, best = sorted(values)[-2:]
    return (best - second) / len(values)


def by(gain: Callable[[Sequence[float]], float], per_second: bool) -> Turn:
    """After the floor, the category with the highest gain."""

    def turn(values: Mapping[str, list[float]], seconds: Mapping[str, list[float]]) -> str:
        first = fair(values, seconds)
        if len(values[first]) < FLOOR:
            return first
        cost = {c: statistics.mean(seconds[c]) if per_second else 1.0 for c in values}
        return max(values, key=lambda c: gain(values[c]) / cost[c])

    return turn


def of_clsnf(categories: Sequence[str], per_second: bool) -> Turn:
    """What a study does: :class:`clsnf.study.allocation.Allocation`."""
    deadline = Deadline(1e15, Costs(dict.fromkeys(categories, 1)), 1, clock=lambda: 0.0)
    study = StudySettings(trials=None, total_trials=10**9)
    allocation = Allocation(study, deadline if per_second else None)
    known = dict.fromkeys(categories, 0)

    def turn(values: Mapping[str, list[float]], seconds: Mapping[str, list[float]]) -> str:
        for category, number in known.items():
            for at in range(number, len(values[category])):
                measured = Measurements(seconds=seconds[category][at])
                objective = values[category][at]
                allocation.add(
                    TrialResult(category, at, "finished", objective=objective, measured=measured)
                )
            known[category] = len(values[category])
        return allocation.turns(known, dict.fromkeys(known, 0))[0]

    return turn


# ---- simulated studies ----


def simulate(
    products: Mapping[str, Product], turn: Turn, budget: float, seed: int, timed: bool
) -> float:
    """The mean of the best objectives when so many trials, or seconds, are used up."""
    draws = {c: random.Random(f"{seed} {c}") for c in products}
    costs = Costs(dict.fromkeys(products, 1))
    values: dict[str, list[float]] = {c: [] for c in products}
    seconds: dict[str, list[float]] = {c: [] for c in products}
    used = 0.0
    while True:
        category = turn(values, seconds)
        config, value = draws[category].choice(products[category].points)
        taken = seconds_of(products[category], costs.work_of(category, config))
        used += taken if timed else 1
        if used > budget:
            break
        measured = Measurements(seconds=taken)
        number = len(values[category])
        costs.add(TrialResult(category, number, "finished", config=config, measured=measured))
        values[category].append(value)
        seconds[category].append(taken)
    return statistics.mean(max(found, default=0.0) for found in values.values())


def shared(products: Mapping[str, Product], trials: int, seed: int, share: bool) -> float:
    """The mean of the best objectives of so many trials each, with or without shared points."""
    draws = {c: random.Random(f"{seed} {c}") for c in products}
    tried: list[TrialResult] = []
    for number in range(trials):
        before = list(tried)
        for category, product in products.items():
            config, value = draws[category].choice(product.points)
            if share and number in (1, 2):
                own = {str(t.config) for t in before if t.category == category}
                known = {str(point): (point, found) for point, found in product.points}
                for point in points_of_others(before, category):
                    if str(point) in known and str(point) not in own:
                        config, value = known[str(point)]
                        break
            tried.append(TrialResult(category, number, "finished", objective=value, config=config))
    best = [max(t.objective or 0.0 for t in tried if t.category == c) for c in products]
    return statistics.mean(best)


def show(title: str, columns: Mapping[str, list[float]]) -> None:
    """One line a rule: the mean, and the difference to the first rule."""
    first = next(iter(columns.values()))
    print(title)
    for name, found in columns.items():
        difference = [a - b for a, b in zip(found, first, strict=True)]
        error = statistics.stdev(difference) / len(found) ** 0.5
        print(
            f"  {name:28} {statistics.mean(found):.4f}   "
            f"{1000 * statistics.mean(difference):+6.2f} +- {1000 * error:.2f} thousandths"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+", help="folders of finished studies")
    parser.add_argument("--repeats", type=int, default=500, help="simulated studies")
    options = parser.parse_args()
    products = {
        f"{run.name}/{category}": product
        for run in options.run
        for category, product in read_products(run).items()
    }
    for category, product in products.items():
        best = max(value for _, value in product.points)
        costs = ", ".join(f"{work} {s:.1f} s" for work, s in product.seconds.items())
        print(f"{category}: {len(product.points)} points, the best {best:.4f}; {costs}")
    seeds, once = range(options.repeats), len(products)
    whole = sum(seconds_of(p, "training") for p in products.values())
    for timed, budgets in ((False, [5, 8, 15, 30]), (True, [1.5, 2.5, 4, 8])):
        for factor in budgets:
            budget = factor * (whole if timed else once)
            rules: dict[str, Callable[[], Turn]] = {
                "round robin": lambda: fair,
                "clsnf study": lambda timed=timed: of_clsnf(list(products), timed),  # type: ignore[misc]
                "own curve alone": lambda timed=timed: by(own_curve, timed),  # type: ignore[misc]
                "last records": lambda timed=timed: by(last_records, timed),  # type: ignore[misc]
                "gap of the best two": lambda timed=timed: by(top_gap, timed),  # type: ignore[misc]
            }
            unit = "s" if timed else "trials"
            show(
                f"{budget:.0f} {unit} in all",
                {
                    name: [simulate(products, rule(), budget, seed, timed) for seed in seeds]
                    for name, rule in rules.items()
                },
            )
    for trials in (3, 4, 6, 9):
        show(
            f"{trials} trials each",
            {
                name: [shared(products, trials, seed, name != "alone") for seed in seeds]
                for name in ("alone", "with shared points")
            },
        )


if __name__ == "__main__":
    main()
