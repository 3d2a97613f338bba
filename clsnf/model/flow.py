"""The density of one level's feature vectors: a conditional normalizing flow of coupling blocks.

Sources: Gudovskiy et al., CFLOW-AD, WACV 2022, for a flow that is conditional on positions;
Ardizzone et al., FrEIA, for the blocks.

Unusual: a flow can start from the data. An invertible first layer (:mod:`clsnf.model.whitening`)
subtracts the mean of the vector's position and whitens with the vectors' covariance. The last
linear layer of every subnet starts at zero. Before the first training step, the flow is therefore
exactly the Gaussian of the features; a flow of depth 0 stays that Gaussian. Short training, as on
small machines, can leave a flow that starts at random worse than this closed form.

Legend: B images, N vectors, C channels, P positions (h w), D condition.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.core.config import FlowSettings
from clsnf.model.memory_bank import MemoryBank
from clsnf.model.padding import reflect_pad
from clsnf.model.whitening import Whitening


class Subnet(nn.Sequential):
    """Linear(in, 2 in), ReLU, Linear(2 in, out): predicts the coupling's scale and shift."""

    def __init__(self, dims_in: int, dims_out: int) -> None:
        super().__init__(
            nn.Linear(dims_in, 2 * dims_in), nn.ReLU(), nn.Linear(2 * dims_in, dims_out)
        )

    def start_at_identity(self) -> None:
        """Zero the last layer: the coupling block passes its input through."""
        last = self[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def position_encoding(grid: tuple[int, int], dims: int) -> Tensor:
    """Sine-cosine encoding of row and column.

    The first half of the dimensions encodes the column, the second the row; in each, sines and
    cosines alternate with wavelengths from 2 pi to 10000 * 2 pi in geometric progression (Vaswani
    et al., 2017, in two dimensions as Wang and Liu, 2019).

    Returns:
        (h * w, dims) float32, row by row.
    """
    h, w = grid
    quarter = dims // 4
    rates = torch.exp(torch.arange(quarter) * (-math.log(10000.0) / quarter))

    def encode(size: int) -> Tensor:
        angles = torch.arange(size)[:, None] * rates  # (size, dims / 4)
        return torch.stack([angles.sin(), angles.cos()], dim=2).reshape(size, 2 * quarter)

    columns = encode(w)[None].expand(h, w, 2 * quarter)
    rows = encode(h)[:, None].expand(h, w, 2 * quarter)
    return torch.cat([columns, rows], dim=2).reshape(h * w, dims)


class LevelScale(NamedTuple):
    """What a level's log-likelihoods are compared with; both numbers come from training vectors.

    Attributes:
        constant: m, the log-likelihood per dimension of what is entirely normal.
        steepness: how fast the relative likelihood falls below it: exp(steepness (log p - m)).
    """

    constant: float
    steepness: float = 1.0


def level_vectors(level: Tensor, neighbourhood: int) -> Tensor:
    """The vectors of a level's map, each the mean over its neighbourhood.

    Args:
        level: (B, C, h, w).
        neighbourhood: side of the square of cells, odd; 1 for the cell alone. At its border, the
            map is padded by reflection.

    Returns:
        (B, P, C).
    """
    if neighbourhood > 1:
        p, q = (min(neighbourhood // 2, size - 1) for size in level.shape[2:])
        level = F.avg_pool2d(reflect_pad(level, p, q), (2 * p + 1, 2 * q + 1), stride=1)
    return level.flatten(2).transpose(1, 2)


class LevelFlow(nn.Module):
    """What is normal at one level: a conditional flow and, if the settings say so, a memory bank.

    Args:
        channels: C.
        grid: (h, w) of the level's map; P = h w.
        settings: depth, start, clamp, permutation, size of the condition, size of the memory bank.
        generator_seed: decides permutations and initial parameters.
    """

    encoding: Tensor

    def __init__(
        self, channels: int, grid: tuple[int, int], settings: FlowSettings, generator_seed: int = 0
    ) -> None:
        super().__init__()
        self.channels = channels
        self.grid = grid
        self.neighbourhood = settings.side
        self.whitening = Whitening(channels, grid)
        self.memory = MemoryBank(settings.memory, channels) if settings.memory else None
        self.register_buffer(
            "encoding", position_encoding(grid, settings.condition_dims), persistent=False
        )
        self.blocks: nn.Module | None = None
        if settings.depth > 0:
            with _seeded(generator_seed), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Soft permutation will take")
                self.blocks = _coupling_blocks(channels, settings)

    def log_prob(self, features: Tensor) -> Tensor:
        """Log-likelihood per dimension of whole maps: features (B, P, C) to (B, h, w) float32."""
        b, p, c = features.shape
        positions = torch.arange(p, device=features.device).repeat(b)
        return self.log_prob_of_white(self.whitening(features).reshape(b * p, c), positions).view(
            b, *self.grid
        )

    def relative_likelihood(
        self, features: Tensor, scale: LevelScale, remembered: Tensor | None = None
    ) -> Tensor:
        """How normal each vector is: exp(steepness (log p - m)).

        With a memory bank it is the mean of that and the bank's likelihood.

        Args:
            features: (B, P, C).
            scale: m and the steepness, from the training vectors.
            remembered: (B, P), what the bank gives for these features; None to ask it.

        Returns:
            (B, h, w) float32 in [0, 1].
        """
        likelihood = torch.exp(
            scale.steepness * (self.log_prob(features) - scale.constant).clamp_max(0.0)
        )
        if self.memory is None:
            return likelihood
        if remembered is None:
            remembered = self.memory(features)
        return (likelihood + remembered.view_as(likelihood)) / 2

    def log_prob_of_white(self, white: Tensor, positions: Tensor) -> Tensor:
        """Log-likelihood per dimension of vectors that the whitening layer gave.

        Args:
            white: (N, C).
            positions: (N,) int64, row * w + column of each vector.

        Returns:
            (N,) float32: (C * -0.5 ln 2 pi - 0.5 |z|^2 + log|det J|) / C, the whitening's part of
            the determinant included.
        """
        z = white
        log_det = self.whitening.log_det[self.whitening.tile_of(positions)]
        if self.blocks is not None:
            z, added = self.blocks(z, [self.encoding[positions]])
            log_det = log_det + added.float()
        z = z.float()
        constant = -0.5 * math.log(2 * math.pi)
        return constant + (log_det - 0.5 * (z * z).sum(dim=1)) / self.channels


def _coupling_blocks(channels: int, settings: FlowSettings) -> nn.Module:
    # Imported here: FrEIA takes seconds to import, and flows of depth 0 do not need it.
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    blocks = SequenceINN(channels)
    for _ in range(settings.depth):
        blocks.append(
            AllInOneBlock,
            cond=0,
            cond_shape=(settings.condition_dims,),
            subnet_constructor=Subnet,
            affine_clamping=settings.clamp,
            global_affine_type="SOFTPLUS",
            permute_soft=settings.permutation == "soft",
        )
    if settings.start == "data":
        for block in blocks.modules():
            if isinstance(block, Subnet):
                block.start_at_identity()
    return blocks


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch and NumPy, and restore both afterwards.

    FrEIA draws permutations from NumPy's.
    """
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)
