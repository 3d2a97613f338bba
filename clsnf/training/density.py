"""Stage two: flows learn the density of the finetuned features of normal images.

The backbone computes the features of each image once. They stay in memory as float16, or in a
temporary file where they would fill it, and flows of every depth read them from there. A flow that
starts from the data first takes the mean of each position and the covariance in closed form.

Legend: N images, P positions of a level, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.core.config import FlowSettings
from clsnf.core.device import autocast
from clsnf.core.errors import TrainingError
from clsnf.core.memory import allocate_tensor
from clsnf.core.progress import Progress, silent
from clsnf.model.backbone import Backbone
from clsnf.model.decoder import PixelDecoder
from clsnf.model.flow import LevelFlow, LevelScale, level_vectors
from clsnf.model.layers import to_channels_last
from clsnf.model.memory_bank import MemoryBank
from clsnf.model.network import to_network_input
from clsnf.model.score_maps import valid_cells
from clsnf.model.whitening import choose_tiles, tiled
from clsnf.streams.stream import Arrays, ImageBatch, MakeWorker, Stream, consecutive

_BATCH = 16


class FeatureWorker:
    """Extracts features where a stream computes: ``level0`` and so on, (B, P, C) float32.

    With a decoder, the same pass gives the classifier's map too: ``classifier``, (B, H, W) float32
    in [0, 1].

    Args:
        backbone: moved to `device`.
        neighbourhood: as in :func:`clsnf.model.flow.level_vectors`.
        decoder: the classifier's, moved to `device`; None for features alone.
        device: where to compute.
    """

    def __init__(
        self,
        backbone: Backbone,
        neighbourhood: int,
        decoder: PixelDecoder | None,
        device: torch.device,
    ) -> None:
        self._decoder = None if decoder is None else decoder.to(device).eval()
        self._backbone = to_channels_last(backbone.to(device))
        self._neighbourhood = neighbourhood
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> dict[str, np.ndarray]:
        features = self._backbone(to_network_input(batch.images, self._device))
        found = {}
        for level, values in enumerate(features):
            rows = level_vectors(values.float(), self._neighbourhood)
            found[f"level{level}"] = rows.cpu().numpy()
        if self._decoder is not None:
            found["classifier"] = torch.sigmoid(self._decoder(features).float()).cpu().numpy()
        return found


def extract_features(
    backbone: Backbone,
    stream: Stream,
    device: torch.device,
    neighbourhood: int = 1,
    progress: Progress = silent,
    task: str = "features",
) -> list[Tensor]:
    """Features of all images.

    Args:
        backbone: the extractor; moved to `device`.
        stream: of N images. If it has workers, they extract with copies of the backbone.
        device: where this process computes.
        neighbourhood: as in :func:`clsnf.model.flow.level_vectors`.
        progress: called after every batch.
        task: the name of this work in `progress`.

    Returns:
        For each level (N, P, C) on the CPU: float16, or float32 if float16 can't hold the values;
        in a temporary file if they would fill the memory.
    """
    levels: list[Tensor] = []
    work = partial(FeatureWorker, backbone, neighbourhood, None)
    for _ in _collect_features(levels, work, stream, device, progress, task):
        pass
    return levels


def extract_features_and_maps(
    backbone: Backbone,
    decoder: PixelDecoder,
    stream: Stream,
    device: torch.device,
    neighbourhood: int = 1,
    progress: Progress = silent,
) -> tuple[list[Tensor], Tensor]:
    """As :func:`extract_features`, and the classifier's maps of the same pass.

    Args:
        decoder: the classifier's, finetuned together with `backbone`.

    Returns:
        The features, and the maps (N, H, W), float32 in [0, 1] on the CPU.
    """
    levels: list[Tensor] = []
    work = partial(FeatureWorker, backbone, neighbourhood, decoder)
    maps = [
        torch.from_numpy(found["classifier"])
        for found in _collect_features(levels, work, stream, device, progress, "features")
    ]
    return levels, torch.cat(maps)


def _collect_features(
    levels: list[Tensor],
    work: MakeWorker,
    stream: Stream,
    device: torch.device,
    progress: Progress,
    task: str,
) -> Iterator[Arrays]:
    """Fill `levels`, and yield what the worker found for each batch."""
    n, start = len(stream), 0
    for found in stream.map_batches(work, consecutive(n, _BATCH), device):
        for level in range(sum(name.startswith("level") for name in found)):
            rows = torch.from_numpy(found[f"level{level}"])
            if start == 0:
                levels.append(allocate_tensor((n, *rows.shape[1:]), torch.float16))
            if (
                levels[level].dtype == torch.float16
                and float(rows.abs().max()) > torch.finfo(torch.float16).max
            ):
                levels[level] = allocate_tensor(levels[level].shape, torch.float32).copy_(
                    levels[level]
                )
            levels[level][start : start + len(rows)] = rows.to(levels[level].dtype)
        start += len(rows)
        progress(task, start, n)
        yield found


def valid_vectors(valid: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """Valid pixels (N, H, W) bool to vectors (N, P) bool: True for cells that show the image."""
    if valid is None:
        return None
    if valid.stride(0) == 0:  # one for all images
        return valid_cells(valid[:1], grid).flatten(1).expand(len(valid), -1)
    return torch.cat([valid_cells(some, grid).flatten(1) for some in valid.split(256)])


@torch.no_grad()
def feature_statistics(
    features: Tensor, valid: Tensor | None, grid: tuple[int, int], tiles: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Mean of each position, and covariance about it in each tile of the map.

    With few images the mean of a position is noisy. It is therefore shrunk towards the mean over
    its neighbourhood, by the share of noise in the spread between positions (an empirical Bayes
    estimate for each channel; James and Stein, 1961). A position that no image shows takes the mean
    over its neighbourhood. A tile's covariance is shrunk towards that of the whole map, as if the
    tile held C more vectors of the whole map (the mean under an inverse Wishart prior; Chen, 1979).

    Args:
        features: (N, P, C).
        valid: (N, P) bool, False for vectors of padding; None where none is.
        grid: (h, w) of the level; P = h w.
        tiles: rows and columns of tiles, T in all. They divide the grid evenly.

    Returns:
        mean (P, C) and covariances (T, C, C), float32.
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
    # Variance over the images, for each position.
    within = (squares / count.clamp_min(1) - mean**2).clamp_min(0)
    shown = count[:, 0] > 0
    noise = (within / count)[shown].mean(dim=0)  # variance of a mean over the images
    between = (mean - overall)[shown].pow(2).mean(dim=0)
    share = (noise / between.clamp_min(1e-12)).clamp(0, 1)  # (C,)
    smooth = _neighbourhood_mean(total, count, overall, grid)
    mean = torch.where(count > 0, (1 - share) * mean + share * smooth, smooth)

    products = torch.zeros(tiles[0] * tiles[1], c, c, dtype=torch.float64)
    for start in range(0, n, 8):
        rows = tiled(
            (features[start : start + 8].float() - mean) * weights[start : start + 8, :, None],
            grid,
            tiles,
        )
        products += torch.bmm(rows.transpose(1, 2), rows).double()
    counts = tiled(weights[:, :, None], grid, tiles).sum(dim=1, dtype=torch.float64)
    counts = counts[:, :, None]  # (T, 1, 1)
    shared = products.sum(dim=0) / counts.sum().clamp_min(1)
    prior = 0 if len(products) == 1 else c
    return mean, ((products + prior * shared) / (counts + prior).clamp_min(1)).float()


def _neighbourhood_mean(
    total: Tensor, count: Tensor, overall: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Mean over the vectors of 5 x 5 positions.

    Args:
        total, count: sum (P, C) and number (P, 1) of the vectors of each position.
        overall: (C,), the mean where there are no vectors.
    """

    def around(values: Tensor) -> Tensor:
        maps = values.t().reshape(1, -1, *grid)
        return F.avg_pool2d(maps, 5, stride=1, padding=2, count_include_pad=False).flatten(2)[0].t()

    vectors = around(count)
    return torch.where(vectors > 0, around(total) / vectors.clamp_min(1e-6), overall)


def start_flow(
    flow: LevelFlow,
    features: Tensor,
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
) -> None:
    """Set the whitening layer and the memory bank of one level, which have a closed form.

    Args:
        flow: as built, of any depth; changed in place and moved to `device`.
        features: (N, P, C) on the CPU.
        valid: (N, P) bool, False for vectors of padding; None where none is.
        settings: of the flow.
        seed: decides the memory bank's candidates.
        device: where to compute.

    Raises:
        TrainingError: the features are not finite.
    """
    flow.to(device)
    if settings.start == "data":
        tiles = (
            (1, 1)
            if settings.covariance == "shared"
            else choose_tiles(flow.grid, len(features), flow.channels)
        )
        mean, covariances = feature_statistics(features, valid, flow.grid, tiles)
        if not bool(covariances.isfinite().all()):
            raise TrainingError(
                "The backbone's features are not finite: give other weights, or lower "
                "finetune.learning_rate."
            )
        flow.whitening.fit(mean.to(device), covariances.to(device), tiles)
    if flow.memory is not None:
        flow.memory.fit(features.flatten(0, 1), _rows(features, valid), seed)


def _rows(features: Tensor, valid: Tensor | None) -> Tensor:
    """Indices of the vectors that are no padding, among all N P."""
    return (
        torch.arange(features.shape[0] * features.shape[1])
        if valid is None
        else valid.flatten().nonzero()[:, 0]
    )


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
        flow: after :func:`start_flow`; moved to `device`.
        features: (N, P, C) on the CPU.
        valid: (N, P) bool, False for vectors of padding; None where none is.
        settings: of the flow.
        seed: decides the order of the vectors.
        device: where to compute.
        progress: called after each fiftieth of the steps.
        task: the name of this work in `progress`.

    Returns:
        The mean loss of each fiftieth of the steps: -logsigmoid(log p), log p per dimension.

    Raises:
        TrainingError: the loss is not finite.
    """
    flow.to(device)
    rows = _rows(features, valid)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    steps = math.ceil(settings.passes * len(rows) / settings.vectors_per_step)
    if not parameters or steps == 0:
        return []
    vectors = _whitened(flow, features, device).flatten(0, 1)  # (N P, C)
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
            log_prob = flow.log_prob_of_white(batch, positions)
        loss = -F.logsigmoid(log_prob).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        running += loss.item()
        if (step + 1) % report == 0 or step + 1 == steps:
            if not math.isfinite(running):
                raise TrainingError(
                    f"The loss of a flow became {running} in step {step + 1}: lower "
                    "flow.learning_rate."
                )
            losses.append(running / ((step % report) + 1))
            running = 0.0
            progress(task, step + 1, steps)
    return losses


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate as a share: a linear rise over `warmup`, then a cosine to 1e-3."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, steps - rise)
    return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def _whitened(flow: LevelFlow, features: Tensor, device: torch.device) -> Tensor:
    """Features (N, P, C) after the whitening layer, in their own type, on the CPU.

    Training then need not whiten them in every pass.
    """
    white = allocate_tensor(features.shape, features.dtype)
    largest = torch.finfo(features.dtype).max
    for start in range(0, len(features), _BATCH):
        rows = flow.whitening(features[start : start + _BATCH].to(device).float())
        white[start : start + _BATCH] = rows.clamp(-largest, largest).to(features.dtype)
    return white


def _over_batches(
    function: Callable[[Tensor], Tensor], features: Tensor, device: torch.device
) -> Tensor:
    with torch.inference_mode():
        return torch.cat(
            [
                function(features[i : i + _BATCH].to(device).float()).cpu()
                for i in range(0, len(features), _BATCH)
            ]
        )


def level_log_probs(flow: LevelFlow, features: Tensor, device: torch.device) -> Tensor:
    """Features (N, P, C) to log-likelihoods per dimension (N, h, w), float32 on the CPU."""
    return _over_batches(flow.to(device).eval().log_prob, features, device)


def level_likelihoods(
    flow: LevelFlow,
    scale: LevelScale,
    features: Tensor,
    device: torch.device,
    remembered: Tensor | None = None,
) -> Tensor:
    """Relative likelihoods (N, h, w), float32 in [0, 1] on the CPU.

    Args:
        flow, scale: of the level.
        features: (N, P, C).
        device: where to compute.
        remembered: (N, P), what :func:`memory_likelihoods` gives for the same features; None for
            a flow without a memory bank, or to compute them.
    """
    flow.to(device).eval()
    with torch.inference_mode():
        return torch.cat(
            [
                flow.relative_likelihood(
                    features[i : i + _BATCH].to(device).float(),
                    scale,
                    None if remembered is None else remembered[i : i + _BATCH].to(device),
                ).cpu()
                for i in range(0, len(features), _BATCH)
            ]
        )


def memory_likelihoods(memory: MemoryBank, features: Tensor, device: torch.device) -> Tensor:
    """What a level's memory bank gives for features (N, P, C): (N, P) float32 on the CPU.

    It depends on no block of the flow, so flows of every depth share it.
    """
    return _over_batches(memory.to(device), features, device)


# With levels="tails", this share of the training vectors has a relative likelihood of one half or
# less.
_TAIL = 1e-3


def level_scale(log_probs: Tensor, valid: Tensor | None, settings: FlowSettings) -> LevelScale:
    """What a level's log-likelihoods are compared with.

    With ``levels="mean"``, m is the ``level_quantile`` of the log-likelihoods (1: the largest), and
    the steepness is 1. With ``levels="tails"``, m is their median, and the relative likelihood is
    one half where the rarest thousandth begins. Values that are equally rare then count equally on
    all levels.

    Args:
        log_probs: (N, h, w), of the training vectors, per dimension.
        valid: (N, P) bool, False for vectors of padding; None where none is.
        settings: of the flow.
    """
    values = log_probs.flatten() if valid is None else log_probs.flatten()[valid.flatten()]

    def quantile(share: float) -> float:
        return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)

    if settings.levels == "mean":
        return LevelScale(quantile(settings.level_quantile))
    median = quantile(0.5)
    return LevelScale(median, math.log(2) / max(median - quantile(_TAIL), 1e-6))


def start_flows(
    flows: nn.ModuleList,
    features: Sequence[Tensor],
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> None:
    """:func:`start_flow` for every level, with `valid` (N, H, W) of pixels."""
    for level, (flow, vectors) in enumerate(zip(flows, features, strict=True)):
        assert isinstance(flow, LevelFlow)
        progress("statistics and memory", level, len(features))
        start_flow(
            flow, vectors, valid_vectors(valid, flow.grid), settings, seed * 31 + level, device
        )
    progress("statistics and memory", len(features), len(features))


def fit_flows(
    flows: nn.ModuleList,
    features: Sequence[Tensor],
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> tuple[list[LevelScale], list[list[float]]]:
    """Train every level's flow in place: :func:`fit_flow` after :func:`start_flows`.

    Args:
        features: for each level (N, P, C).
        valid: (N, H, W) bool, False where a pixel is padding; None where none is.

    Returns:
        For each level its scale, and its loss curve.
    """
    scales, curves = [], []
    for level, (flow, vectors) in enumerate(zip(flows, features, strict=True)):
        assert isinstance(flow, LevelFlow)
        inside = valid_vectors(valid, flow.grid)
        task = f"flow of level {level + 1} of {len(features)}"
        curves.append(
            fit_flow(flow, vectors, inside, settings, seed * 31 + level, device, progress, task)
        )
        scales.append(level_scale(level_log_probs(flow, vectors, device), inside, settings))
    return scales, curves
