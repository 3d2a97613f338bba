"""Stage two: flows learn the density of the finetuned features of normal images.

Unusual: the backbone looks at each image once. Its features stay in memory as float16, one row a vector, and every epoch of every flow
reads from there. A flow that starts from the data first takes the mean of each position and the covariance in closed form.

Legend: N images, P positions of a level, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.config import FlowSettings
from clsnf.device import autocast
from clsnf.errors import TrainingError
from clsnf.model.backbone import Backbone
from clsnf.model.flow import LevelFlow
from clsnf.model.network import log_probs_of
from clsnf.model.score_maps import valid_cells
from clsnf.progress import Progress, silent

_BATCH = 16


@torch.inference_mode()
def extract_features(
    backbone: Backbone, images: Tensor, device: torch.device, progress: Progress = silent, task: str = "features"
) -> list[Tensor]:
    """Features of all images.

    Args:
        backbone: the extractor; moved to `device`.
        images: (N, 3, H, W) uint8.

    Returns:
        For each level (N, P, C), on the CPU: float16, or float32 where float16 can't hold the values.
    """
    backbone.to(device).to(memory_format=torch.channels_last)
    levels: list[Tensor] = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH].to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        for level, features in enumerate(backbone(batch)):
            rows = features.flatten(2).transpose(1, 2).float().cpu()  # (B, C, h, w) -> (B, P, C)
            if start == 0:
                levels.append(torch.empty((len(images), *rows.shape[1:]), dtype=torch.float16))
            if levels[level].dtype == torch.float16 and float(rows.abs().max()) > torch.finfo(torch.float16).max:
                levels[level] = levels[level].float()
            levels[level][start : start + len(rows)] = rows.to(levels[level].dtype)
        progress(task, min(start + _BATCH, len(images)), len(images))
    return levels


def valid_vectors(valid: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """(N, H, W) bool of pixels to (N, P) bool of vectors: those of cells that show the image."""
    return None if valid is None else valid_cells(valid, grid).flatten(1)


@torch.no_grad()
def feature_statistics(features: Tensor, valid: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean of each position and covariance about it.

    With few images the mean of a position is noisy. It is therefore drawn towards the mean over its neighbourhood's positions by how
    much of the spread between positions is noise (an empirical Bayes estimate, channel by channel; James and Stein, 1961). A position
    that no image shows takes the mean over its neighbourhood.

    Args:
        features: (N, P, C).
        valid: (N, P) bool or None.

    Returns:
        mean (P, C) and covariance (C, C), float32.
    """
    n, p, c = features.shape
    weights = torch.ones(n, p) if valid is None else valid.float()
    count = weights.sum(dim=0)[:, None]  # (P, 1)
    total, squares = torch.zeros(p, c), torch.zeros(p, c)
    for image, weight in zip(features, weights, strict=True):
        rows = image.float() * weight[:, None]
        total += rows
        squares += rows * image.float()
    overall = total.sum(dim=0) / count.sum().clamp_min(1)
    mean = torch.where(count > 0, total / count.clamp_min(1), overall)
    within = (squares / count.clamp_min(1) - mean**2).clamp_min(0)  # variance over images, position by position
    shown = count[:, 0] > 0
    noise = (within / count)[shown].mean(dim=0)  # variance of a mean over the images
    between = (mean - overall)[shown].pow(2).mean(dim=0)
    share = (noise / between.clamp_min(1e-12)).clamp(0, 1)  # (C,)
    smooth = _neighbourhood_mean(total, count, overall, grid)
    mean = torch.where(count > 0, (1 - share) * mean + share * smooth, smooth)

    covariance = torch.zeros(c, c, dtype=torch.float64)
    for start in range(0, n, 8):
        rows = (features[start : start + 8].float() - mean) * weights[start : start + 8, :, None]
        rows = rows.reshape(-1, c)
        covariance += (rows.t() @ rows).double()
    return mean, (covariance / weights.sum().clamp_min(1)).float()


def _neighbourhood_mean(total: Tensor, count: Tensor, overall: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the vectors of 5 x 5 positions, from their sums (P, C) and numbers (P, 1); `overall` (C,) where there are none."""

    def around(values: Tensor) -> Tensor:
        maps = values.t().reshape(1, -1, *grid)
        return F.avg_pool2d(maps, 5, stride=1, padding=2, count_include_pad=False).flatten(2)[0].t()

    vectors = around(count)
    return torch.where(vectors > 0, around(total) / vectors.clamp_min(1e-6), overall)


def fit_flow(
    flow: LevelFlow,
    features: Tensor,
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    task: str = "flow",
) -> list[float]:
    """Train one level's flow in place on the features of normal images.

    Args:
        flow: as built; moved to `device`.
        features: (N, P, C) on the CPU.
        valid: (N, P) bool, False for vectors of padding; None where none is.
        seed: decides the order of the vectors.

    Returns:
        The loss after each fiftieth of the steps: mean of -logsigmoid(log p), log p per dimension.

    Raises:
        TrainingError: the loss is not finite.
    """
    if settings.start == "data":
        mean, covariance = feature_statistics(features, valid, flow.grid)
        if not bool(covariance.isfinite().all()):
            raise TrainingError("The backbone's features are not finite: give other weights, or lower finetune.learning_rate.")
        flow.whitening.fit(mean, covariance)
    flow.to(device)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    rows = torch.arange(features.shape[0] * features.shape[1]) if valid is None else valid.flatten().nonzero()[:, 0]
    steps = math.ceil(settings.passes * len(rows) / settings.vectors_per_step)
    if not parameters or steps == 0:
        return []
    vectors = features.flatten(0, 1)  # (N P, C), a view
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order = rows[torch.randperm(len(rows), generator=generator)]
    report = max(1, steps // 50)
    losses, running, place = [], 0.0, 0
    for step in range(steps):
        if place >= len(order):
            order, place = rows[torch.randperm(len(rows), generator=generator)], 0
        chosen = order[place : place + settings.vectors_per_step]
        place += settings.vectors_per_step
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, steps, settings.warmup)
        batch = vectors[chosen].to(device).float()
        positions = (chosen % features.shape[1]).to(device)
        with autocast(device):
            log_prob = flow.log_prob(batch, positions)
        loss = -F.logsigmoid(log_prob).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        running += loss.item()
        if (step + 1) % report == 0 or step + 1 == steps:
            if not math.isfinite(running):
                raise TrainingError(f"The loss of a flow became {running} in step {step + 1}: lower flow.learning_rate.")
            losses.append(running / ((step % report) + 1))
            running = 0.0
            progress(task, step + 1, steps)
    return losses


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first share `warmup` of the steps, then a cosine to 1e-3 of the start."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, steps - rise)
    return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def level_log_probs(flow: LevelFlow, features: Tensor, device: torch.device) -> Tensor:
    """Log-likelihood per dimension of all positions: features (N, P, C) to (N, h, w) float32 on the CPU."""
    flow.to(device).eval()
    chunks = [log_probs_of(flow, features[i : i + _BATCH].to(device)).cpu() for i in range(0, len(features), _BATCH)]
    return torch.cat(chunks)


def level_constant(log_probs: Tensor, valid: Tensor | None, quantile: float) -> float:
    """m_l: a high quantile (1: the largest) of the training vectors' log-likelihoods (N, h, w)."""
    values = log_probs.flatten() if valid is None else log_probs.flatten()[valid.flatten()]
    if quantile >= 1:
        return float(values.max())
    rank = max(1, math.ceil(quantile * len(values)))
    return float(values.kthvalue(rank).values)


def fit_flows(
    flows: nn.ModuleList,
    features: Sequence[Tensor],
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> tuple[list[float], list[list[float]]]:
    """Train every level's flow in place.

    Args:
        features: for each level (N, P, C).
        valid: (N, H, W) bool of pixels, or None.

    Returns:
        The level constants, and the loss curves.
    """
    constants, curves = [], []
    for level, (flow, vectors) in enumerate(zip(flows, features, strict=True)):
        assert isinstance(flow, LevelFlow)
        inside = valid_vectors(valid, flow.grid)
        task = f"flow of level {level + 1} of {len(features)}"
        curves.append(fit_flow(flow, vectors, inside, settings, seed * 31 + level, device, progress, task))
        constants.append(level_constant(level_log_probs(flow, vectors, device), inside, settings.level_quantile))
    return constants, curves
