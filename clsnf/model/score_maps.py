"""From log-likelihoods and logits to score maps: METHOD section 5.

Unusual: every constant here comes from training data. The largest log-likelihood of a level is that of the *training* vectors, never of
the images in question, so that a score means the same tomorrow and for one picture as for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsnf.model.resample import resample


def density_map(log_probs: Sequence[Tensor], constants: Sequence[float], image_size: tuple[int, int]) -> Tensor:
    """The flows' anomaly map.

    Args:
        log_probs: for each of L levels (B, h_l, w_l), log-likelihood per dimension.
        constants: m_l, the largest log-likelihood per dimension of the level's training vectors.
        image_size: (H, W).

    Returns:
        (B, H, W) float32 in [0, 1]: the mean over the levels of 1 - exp(log p_l - m_l), each upsampled bilinearly with aligned corners.
    """
    total = torch.zeros((), device=log_probs[0].device)
    for log_prob, constant in zip(log_probs, constants, strict=True):
        likelihood = torch.exp((log_prob.float() - constant).clamp_max(0.0))
        total = total + 1.0 - resample(likelihood[:, None], image_size, "bilinear")[:, 0]
    return (total / len(log_probs)).clamp(0.0, 1.0)


def fuse(density: Tensor, classifier: Tensor, weight: float) -> Tensor:
    """Fused map (1 - w) a_nf + w a_cls; all maps (B, H, W) in [0, 1], w in [0, 1]."""
    return (1.0 - weight) * density + weight * classifier


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
