"""From likelihoods and the classifier's map to fused maps and image scores (METHOD, section 5).

Every constant comes from training data. A level's largest log-likelihood, for example, is that of
the training vectors, never that of the images to score. An image's score therefore does not depend
on the images that are scored together with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clsnf.core.config import Fusion
from clsnf.model.padding import reflect_pad
from clsnf.model.resample import resample


class Scores(NamedTuple):
    """Answers for B images.

    Attributes:
        maps: (B, H, W) float32 in [0, 1], the fused maps; 0 on padding.
        scores: (B,) float32 in [0, 1], the image scores.
    """

    maps: Tensor
    scores: Tensor


def valid_cells(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells of a level's map that show the image.

    Args:
        valid: (B, H, W) bool, False where a pixel is padding.
        grid: (h, w).

    Returns:
        (B, h, w) bool: where at least half of a cell is no padding, or, on an image too thin for
        that, most of what there is.
    """
    share = F.adaptive_avg_pool2d(valid[:, None].float(), grid)[:, 0]
    return share >= share.amax(dim=(1, 2), keepdim=True).clamp_max(0.5)


def density_map(
    likelihoods: Sequence[Tensor], image_size: tuple[int, int], valid: Tensor | None = None
) -> Tensor:
    """The density's anomaly map.

    Args:
        likelihoods: for each of L levels (B, h_l, w_l) in [0, 1], relative to the most normal (see
            :meth:`clsnf.model.flow.LevelFlow.relative_likelihood`).
        image_size: (H, W).
        valid: (B, H, W) bool, False where a pixel is padding, a rectangle of True in each image;
            None where none is. Cells of padding were never trained on: they take the value of the
            nearest cell of the image, so that they move no score inside it.

    Returns:
        (B, H, W) float32 in [0, 1]: the mean over the levels of one minus the likelihood, each
        upsampled bilinearly with aligned corners.
    """
    total = torch.zeros((), device=likelihoods[0].device)
    for likelihood in likelihoods:
        if valid is not None:
            likelihood = _spread(
                likelihood, valid_cells(valid, (likelihood.shape[1], likelihood.shape[2]))
            )
        total = total + 1.0 - resample(likelihood[:, None], image_size, "bilinear")[:, 0]
    return (total / len(likelihoods)).clamp(0.0, 1.0)


def _spread(maps: Tensor, inside: Tensor) -> Tensor:
    """Maps (B, h, w) in which every cell outside the rectangle `inside` (B, h, w) repeats the
    nearest one in it.
    """
    batch = torch.arange(maps.shape[0], device=maps.device)[
        :, None, None
    ]  # not len(): it would fix an exported network's N
    rows, columns = _nearest_inside(inside.any(dim=2)), _nearest_inside(inside.any(dim=1))
    return maps[batch, rows[:, :, None], columns[:, None, :]]


def _nearest_inside(inside: Tensor) -> Tensor:
    """For each place of rows (B, n) with one run of True the index (B, n) of the nearest True."""
    places = torch.arange(inside.shape[1], device=inside.device)
    first = inside.int().argmax(dim=1, keepdim=True)  # of equals, the first
    return places[None].clamp(first, first + inside.sum(dim=1, keepdim=True) - 1)


def fuse(density: Tensor, classifier: Tensor, weight: float, smoothing: float = 0.0) -> Tensor:
    """Fused map (1 - w) a_nf + w a_cls.

    Args:
        density, classifier: (B, H, W) in [0, 1].
        weight: w in [0, 1].
        smoothing: sigma in pixels of a Gaussian that goes over the fused map; 0 for none.

    Returns:
        (B, H, W) in [0, 1].
    """
    fused = (1.0 - weight) * density + weight * classifier
    return gaussian_smooth(fused, smoothing) if smoothing > 0 else fused


def fuse_scores(
    density: Tensor, classifier: Tensor, fusion: Fusion, valid: Tensor | None = None
) -> Scores:
    """Fused maps and image scores from both score maps.

    Args:
        density, classifier: (B, H, W) in [0, 1].
        fusion: the weights of the map and of the score, and the smoothing.
        valid: (B, H, W) bool, False where a pixel is padding; None where none is.
    """
    maps = fuse(density, classifier, fusion.fusion_weight, fusion.smoothing)
    scored = maps
    if fusion.image_weight != fusion.fusion_weight:
        scored = fuse(density, classifier, fusion.image_weight, fusion.smoothing)
    return Scores(maps if valid is None else maps * valid, image_scores(scored, valid))


def gaussian_smooth(maps: Tensor, sigma: float) -> Tensor:
    """Maps (B, H, W) under a Gaussian of `sigma` pixels, cut at three sigma, continued by
    reflection.
    """
    radius = min(max(1, round(3 * sigma)), min(maps.shape[1:]) - 1)
    places = torch.arange(-radius, radius + 1, device=maps.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps.dtype)
    padded = reflect_pad(maps[:, None], radius, radius)
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def image_scores(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Image score: the largest value of the map, padding left out.

    Args:
        maps: (B, H, W).
        valid: (B, H, W) bool, False where a pixel is padding; None where none is.

    Returns:
        (B,).
    """
    if valid is not None:
        maps = maps.masked_fill(~valid, -torch.inf)
    return maps.flatten(1).amax(dim=1)
