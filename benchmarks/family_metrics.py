"""What sorting the normals once saves: metrics of defect families, together and one by one.

    python benchmarks/family_metrics.py
    python benchmarks/family_metrics.py --size 256 --weights 21

The maps are drawn: no training, no files. Both ways must agree to the last bit. Seconds are of one
core's work, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clsnf.core.memory import keep_freed_memory
from clsnf.evaluation.selection import ValidationLabels, family_metrics, scores_at
from clsnf.metrics import PixelSample, evaluate
from clsnf.model.score_maps import Scores
from clsnf.results import Metrics
from clsnf.training.pipeline import ScoreMaps

NAMES = (("pixel_ap",), ("pixel_ap", "pixel_auroc", "image_auroc"), ("aupimo",))


def drawn(given: argparse.Namespace) -> tuple[ScoreMaps, ValidationLabels]:
    """Score maps of normals and defects, as a detector that is right more often than not has."""
    rng = np.random.default_rng(0)
    families = [f"family {i}" for i in range(given.families) for _ in range(given.per_family)]
    names = ("good",) * given.normals + tuple(families)
    masks = np.zeros((len(names), given.size, given.size), bool)
    side = given.size // 8
    for mask in masks[given.normals :]:
        x, y = rng.integers(0, given.size - side, 2)
        mask[x : x + side, y : y + side] = True
    density, classifier = (
        torch.from_numpy(np.clip(rng.beta(*shape, masks.shape) + gain * masks, 0, 1))
        for shape, gain in (((1, 6), 0.3), ((0.5, 9), 0.5))
    )
    return ScoreMaps(density.float(), classifier.float()), ValidationLabels(names, masks, None)


def one_by_one(answers: Scores, labels: ValidationLabels, names: tuple[str, ...]) -> Any:
    """Each family's metrics on their own: the normals are sorted for each."""
    scores, maps = answers.scores.numpy(), answers.maps.numpy()
    is_defect = ~labels.is_normal
    return {
        family: evaluate(
            scores[chosen],
            is_defect[chosen],
            [PixelSample(maps[i], labels.masks[i]) for i in chosen],
            names,
        )
        for family, chosen in labels.by_family().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--normals", type=int, default=60)
    parser.add_argument("--families", type=int, default=8)
    parser.add_argument("--per-family", type=int, default=12)
    parser.add_argument("--weights", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers of a study do
    maps, labels = drawn(given)
    assert labels.pixels  # worked through once for a category

    def seconds(
        count: Callable[[Scores, ValidationLabels, tuple[str, ...]], Any], names: tuple[str, ...]
    ) -> tuple[float, list[dict[str, Metrics]]]:
        started = time.process_time()
        found = [
            count(scores_at(maps, float(weight), None), labels, names)
            for weight in np.linspace(0, 1, given.weights)
        ]
        return (time.process_time() - started) / given.weights, found

    print(
        f"{given.families} families x {given.per_family}, {given.normals} normals, {given.size} px"
    )
    for names in NAMES:
        (before, expected), (now, found) = (
            seconds(one_by_one, names),
            seconds(family_metrics, names),
        )
        same = "the same" if expected == found else "DIFFERENT"
        print(
            f"{', '.join(names):40} one by one {before:.3f} s a weight, together {now:.3f} s: "
            f"{before / now:.1f} times, metrics {same}"
        )


if __name__ == "__main__":
    main()
