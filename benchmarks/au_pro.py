"""Exact pixel metrics of a large test set: time and peak memory, compared with scikit-learn.

    python benchmarks/au_pro.py                                        # 120 maps of 1024 x 1024
    python benchmarks/au_pro.py --images 12 --size 256 --subset 4      # seconds

Maps of 256 x 256 are made from a seed and upsampled when they are read, as in an evaluation. Every
third image is normal, the others have up to four round defects. scikit-learn gets a part of the
images. Each row runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice

import cv2
import numpy as np
from sklearn.metrics import average_precision_score

from clsnf.metrics import METRICS, LazySamples, PixelSample, evaluate

SMALL = 256
PIXEL_METRICS = [name for name, metric in METRICS.items() if metric.kind == "pixel"]


def make_sample(size: int, index: int) -> PixelSample:
    """Map and mask (size, size) of image `index`: smooth noise, with higher scores on defects."""
    rng = np.random.default_rng(index)
    noise = cv2.GaussianBlur(rng.standard_normal((SMALL, SMALL), dtype=np.float32), (0, 0), 4)
    mask = np.zeros((size, size), np.uint8)
    raised = np.zeros((SMALL, SMALL), np.float32)
    for _ in range(0 if index % 3 == 0 else int(rng.integers(1, 5))):
        centre = rng.uniform(0.1, 0.9, 2)
        radius = rng.uniform(0.02, 0.1)
        cv2.circle(mask, (centre * size).astype(int).tolist(), int(radius * size), 1, thickness=-1)
        cv2.circle(
            raised, (centre * SMALL).astype(int).tolist(), int(radius * SMALL), 0.3, thickness=-1
        )
    scores = 0.5 + noise + cv2.GaussianBlur(raised, (0, 0), 5)
    score_map = np.asarray(
        cv2.resize(scores, (size, size), interpolation=cv2.INTER_LINEAR), np.float32
    )
    return PixelSample(score_map, mask.astype(bool))


def make_samples(size: int, count: int) -> LazySamples:
    return LazySamples(partial(make_sample, size), count)


def read_twice(size: int, count: int) -> dict[str, float]:
    samples = make_samples(size, count)
    pixels = sum(int(sample.mask.sum()) for _ in range(2) for sample in samples) // 2
    return {"defect pixels": pixels / (count * size * size)}


def ours(size: int, count: int, names: list[str]) -> dict[str, float]:
    labels = [int(index % 3 != 0) for index in range(count)]
    return evaluate(labels, labels, make_samples(size, count), names)


def scikit_learn(size: int, count: int) -> dict[str, float]:
    samples = list(make_samples(size, count))
    truth = np.concatenate([sample.mask.ravel() for sample in samples])
    scores = np.concatenate([sample.score_map.ravel() for sample in samples])
    return {"pixel_ap": float(average_precision_score(truth, scores))}


def measured(work: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float, float]:
    """Results, seconds, and the process's peak memory in GiB, imports included."""
    start = time.perf_counter()
    results = work()
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, else KiB
    return results, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=120, help="maps in the test set")
    parser.add_argument(
        "--size", type=int, default=1024, help="height and width of maps and masks in pixels"
    )
    parser.add_argument("--subset", type=int, default=20, help="images that scikit-learn gets too")
    options = parser.parse_args()

    size, images, subset = options.size, options.images, min(options.subset, options.images)
    rows: list[tuple[str, int, Callable[[], dict[str, float]]]] = [
        ("making and reading the maps twice", images, partial(read_twice, size, images)),
        (
            f"all {len(PIXEL_METRICS)} pixel metrics",
            images,
            partial(ours, size, images, PIXEL_METRICS),
        ),
        ("AU-PRO alone", images, partial(ours, size, images, ["au_pro"])),
        ("pixel AP alone", subset, partial(ours, size, subset, ["pixel_ap"])),
        ("scikit-learn's pixel AP", subset, partial(scikit_learn, size, subset)),
    ]
    print(f"maps of {size} x {size}")
    print(f"{'what':<36}{'images':>8}{'seconds':>10}{'peak GiB':>10}  metrics")
    results = []
    for what, count, work in rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            metrics, seconds, peak = pool.submit(measured, work).result()
        results.append((metrics, seconds, peak))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in islice(metrics.items(), 8))
        print(f"{what:<36}{count:>8}{seconds:>10.1f}{peak:>10.2f}  {shown}", flush=True)
    (own, own_seconds, own_peak), (theirs, their_seconds, their_peak) = results[-2:]
    print(
        f"scikit-learn / ours on the same {subset} images: time {their_seconds / own_seconds:.2f}, "
        f"peak memory {their_peak / own_peak:.2f}; pixel AP differs by "
        f"{abs(own['pixel_ap'] - theirs['pixel_ap']):.1e}"
    )


if __name__ == "__main__":
    main()
