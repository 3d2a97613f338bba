"""Losses of the pixelwise classifier, found by their name (``finetune.loss``).

A loss takes logits (B, H, W) float32, the batch that they are for, the valid pixels (B, H, W) bool
(None: all of them) and the settings. It gives one number, lowest for right logits. Other pixels
(padding) change neither it nor its gradient. To add a loss, write its function here, its line in
:data:`LOSSES`, and its name among the choices in ``config.py``. A contract test runs over all.

Legend: B images, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clsnf.core.config import FinetuneSettings
from clsnf.synthesis.training_defects import DefectBatch

Loss = Callable[[Tensor, DefectBatch, Tensor | None, FinetuneSettings], Tensor]

# Weights of the two classes in the authors' hard loss.
DEFECT_WEIGHT, NORMAL_WEIGHT = 0.9, 0.1
# The best pair of Lin et al., ICCV 2017, section 5.1.
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# Pixels added to both halves of the dice fraction: an image without a defect has none of its own.
DICE_SMOOTHING = 1.0


def soft_targets(batch: DefectBatch, kind: str) -> Tensor:
    """One number for each image's defect region: the mean over its pixels of sigmoid(5 d).

    d is the pixel's difference to the clean image, the mean over the colours, images in [0, 1]:
    |d| for ``absolute``, d itself for ``signed`` (as the authors; a defect that is darker than its
    background then gets a target below one half).

    Returns:
        (B, H, W) float32 in [0, 1]: that number inside the region, 0 outside.
    """
    difference = (batch.images - batch.clean).mean(dim=1)  # (B, H, W)
    if kind == "absolute":
        difference = difference.abs()
    weight = torch.sigmoid(5.0 * difference) * batch.regions
    area = batch.regions.sum(dim=(1, 2)).clamp_min(1)
    level = weight.sum(dim=(1, 2)) / area  # (B,)
    return level[:, None, None] * batch.regions


def soft(
    logits: Tensor, batch: DefectBatch, inside: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Mean binary cross-entropy against :func:`soft_targets`; 0 or more."""
    targets = soft_targets(batch, settings.target)
    return _mean(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), inside)


def hard(
    logits: Tensor, batch: DefectBatch, inside: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Two-class cross-entropy against the region, 0.9 a defect pixel and 0.1 a normal one; 0 or
    more.

    It is a weighted mean: the sum over the pixels is divided by the sum of their weights. Two
    classes with the logits 0 and z equal one logit z, so one map is enough.
    """
    regions = batch.regions.float()
    losses = F.binary_cross_entropy_with_logits(logits, regions, reduction="none")
    return _mean(losses, inside, NORMAL_WEIGHT + (DEFECT_WEIGHT - NORMAL_WEIGHT) * regions)


def regression(
    logits: Tensor, batch: DefectBatch, inside: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Mean L1 distance of the sigmoid map to the change of each pixel; in [0, 1].

    The change of a pixel is the mean over the colours of the absolute difference to the clean
    image, in [0, 1], and 0 outside the region. This is our reading of the authors' "L1 to the clean
    image" for a decoder of one map, which can't show colours.
    """
    # (B, 3, H, W) -> (B, H, W)
    change = (batch.images - batch.clean).abs().mean(dim=1) * batch.regions
    return _mean((torch.sigmoid(logits) - change).abs(), inside)


def focal(
    logits: Tensor, batch: DefectBatch, inside: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Mean focal loss against the region: -alpha_t (1 - p_t)^gamma log p_t; 0 or more.

    Pixels that are already right count little, so training does not overfit what is typical of
    synthetic defects. It is a mean over the pixels. The source divides by the number of positives,
    of which an image here may have none.

    Source: Lin, Goyal, Girshick, He and Dollár, "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    regions = batch.regions.float()
    losses = F.binary_cross_entropy_with_logits(logits, regions, reduction="none")  # -log p_t
    # 1 - p_t, exact also where p_t rounds to 1.
    missed = torch.sigmoid(torch.where(batch.regions, -logits, logits))
    alpha = torch.where(batch.regions, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return _mean(alpha * missed**FOCAL_GAMMA * losses, inside)


def dice(
    logits: Tensor, batch: DefectBatch, inside: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Soft dice loss plus mean binary cross-entropy, both against the region; 0 or more.

    Dice of an image: 1 - (2 sum p g + 1) / (sum p^2 + sum g^2 + 1), p the map and g the region; the
    ones are :data:`DICE_SMOOTHING`. A small defect counts as much as a large one. The cross-entropy
    gives a gradient where the region is empty.

    Source: Milletari, Navab and Ahmadi, "V-Net", 3DV 2016.
    """
    regions = batch.regions.float()
    losses = F.binary_cross_entropy_with_logits(logits, regions, reduction="none")
    maps = torch.sigmoid(logits)
    if inside is not None:
        maps, regions = maps * inside, regions * inside
    shared = (maps * regions).sum(dim=(1, 2))  # (B,)
    sizes = maps.square().sum(dim=(1, 2)) + regions.sum(dim=(1, 2))
    overlap = (2 * shared + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)
    return (1 - overlap).mean() + _mean(losses, inside)


def _mean(losses: Tensor, inside: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over the valid pixels, 0 if there are none; all arguments (B, H, W)."""
    if inside is None and weights is None:
        return losses.mean()
    if weights is None:
        weights = torch.ones_like(losses)
    if inside is not None:
        weights = weights * inside
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


LOSSES: Mapping[str, Loss] = {
    "soft": soft,
    "hard": hard,
    "regression": regression,
    "focal": focal,
    "dice": dice,
}
