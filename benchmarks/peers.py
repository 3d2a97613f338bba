"""PatchCore and PaDiM with the same backbone, images and metrics as this project, for comparison.

    python benchmarks/peers.py --data DIR --category NAME --weights resnet18.safetensors

Both are written from their papers, with the settings given there. The coreset is chosen by the same
greedy rule as this project's memory bank. No setting was changed after the test images were seen.

- PatchCore (Roth et al., CVPR 2022): levels 2 and 3, means over 3 x 3 cells, the deeper level
  resized to the shallower, a coreset of 1 % of all training vectors, distance to the nearest one;
  image score re-weighted by the 9 nearest neighbours of the nearest one; maps smoothed, sigma 4.
- PaDiM (Defard et al., ICPR 2021): levels 1 to 3, resized to the first, 100 random channels, a
  Gaussian at each position (0.01 on the diagonal), Mahalanobis distance; maps smoothed, sigma 4;
  the image score is the largest value.

Both are fitted on all normal training images, because they need no validation images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from clsnf.core.config import BackboneSettings, DetectorSettings, ImageSettings
from clsnf.data.layouts import read_category
from clsnf.data.splits import TEST
from clsnf.evaluation.evaluate import metrics_of_maps
from clsnf.model.backbone import load_backbone
from clsnf.model.memory_bank import cover
from clsnf.model.resample import resample
from clsnf.model.resolve import resolved
from clsnf.model.score_maps import gaussian_smooth
from clsnf.streams.stream import MemoryStream
from clsnf.training.density import extract_features
from clsnf.training.prepare import place_rows, rows_of

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "au_pro")
CPU = torch.device("cpu")


def stacked(levels: list[torch.Tensor], grids: list[tuple[int, int]]) -> torch.Tensor:
    """Levels (N, P_l, C_l) at the first one's grid, channels joined: (N, P, C)."""
    parts = [levels[0].float()]
    for level, grid in zip(levels[1:], grids[1:], strict=True):
        maps = level.float().transpose(1, 2).unflatten(2, grid)
        parts.append(F.interpolate(maps, size=grids[0], mode="bilinear").flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=2)


def patchcore(fit: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (N, P) and image scores (N,) of test vectors (N, P, C)."""
    vectors = fit.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    projected = vectors @ (torch.randn(vectors.shape[1], 128, generator=generator) / 128**0.5)
    coreset = vectors[cover(projected, len(vectors) // 100)]
    distances, scores = [], []
    for image in test:
        found, nearest = torch.cdist(image, coreset).min(dim=1)
        worst = found.argmax()
        to_coreset = torch.cdist(coreset[nearest[worst]][None], coreset)[0]
        neighbours = to_coreset.topk(9, largest=False).indices
        to_neighbours = torch.cdist(image[worst][None], coreset[neighbours])[0]
        weight = 1 - torch.softmax(to_neighbours, dim=0)[0]
        distances.append(found)
        scores.append(weight * found[worst])
    return torch.stack(distances), torch.stack(scores)


def padim(fit: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distances (N, P) of test vectors (N, P, C)."""
    chosen = torch.randperm(fit.shape[2], generator=torch.Generator().manual_seed(0))[:100]
    fit, test = fit[:, :, chosen], test[:, :, chosen]
    mean = fit.mean(dim=0)
    result = torch.empty(test.shape[:2])
    for start in range(0, fit.shape[1], 64):
        part = slice(start, start + 64)
        centred = (fit[:, part] - mean[part]).transpose(0, 1)  # (P, N, C)
        covariance = centred.transpose(1, 2) @ centred / (len(fit) - 1) + 0.01 * torch.eye(100)
        solved = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance),
            (test[:, part] - mean[part]).permute(1, 2, 0),
            upper=False,
        )
        result[:, part] = solved.square().sum(dim=1).sqrt().t()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="PatchCore and PaDiM on a category.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--category", required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights")
    parser.add_argument("--image-size", type=int, default=256)
    options = parser.parse_args()
    image = ImageSettings(options.image_size, options.image_size)
    settings = resolved(
        DetectorSettings(image, BackboneSettings(options.backbone, weights=options.weights))
    )
    table = read_category(options.data, options.category)
    fit = place_rows(rows_of(table, "fit"), settings)
    test = place_rows(rows_of(table, TEST), settings)
    rows = rows_of(table, TEST).to_pylist()
    for name, levels, neighbourhood in (("patchcore", (2, 3), 3), ("padim", (1, 2, 3), 1)):
        started = time.perf_counter()
        backbone, _ = load_backbone(
            dataclasses.replace(settings.backbone, levels=levels), settings.image.size
        )
        grids = list(backbone.info.grids)
        fit_vectors, test_vectors = (
            stacked(extract_features(backbone, MemoryStream(images), CPU, neighbourhood), grids)
            for images in (fit.images, test.images)
        )
        scores = None
        if name == "patchcore":
            distances, scores = patchcore(fit_vectors, test_vectors)
        else:
            distances = padim(fit_vectors, test_vectors)
        upsampled = resample(distances.view(-1, 1, *grids[0]), image.size, "bilinear")
        maps = gaussian_smooth(upsampled[:, 0], 4.0)
        scores = maps.flatten(1).amax(dim=1) if scores is None else scores
        metrics = metrics_of_maps(rows, maps.numpy(), scores.numpy(), image, METRICS)
        rounded = {metric: round(value, 4) for metric, value in metrics.items()}
        seconds = round(time.perf_counter() - started)
        line = {"peer": name, "category": options.category, **rounded, "seconds": seconds}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
