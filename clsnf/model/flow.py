"""The density of one level's feature vectors: a conditional normalizing flow of FrEIA coupling blocks.

Source: Gudovskiy et al., CFLOW-AD, WACV 2022, for the conditional flow on positions; Ardizzone et al., FrEIA, for the blocks.

Unusual: a flow can start *from the data*. An invertible first layer takes off the mean of the vector's position and whitens by the
covariance of all vectors, and the last linear layer of every subnet starts at zero, so that before the first training step the flow is
exactly the Gaussian of the features. A flow of depth 0 is that Gaussian. On small machines, where flows are always undertrained, this
is the difference between a flow that is worse than a closed form and one that can only improve on it.

Legend: N vectors, C channels, P positions (h w), D condition.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from clsnf.config import FlowSettings

_COVARIANCE_FLOOR = 1e-2  # share of the mean variance added to the covariance's diagonal: keeps dead channels from dividing by zero


class Whitening(nn.Module):
    """Invertible linear layer z = (x - mean[position]) W; the identity until :meth:`fit`."""

    mean: Tensor
    matrix: Tensor
    log_det: Tensor

    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, channels))
        self.register_buffer("matrix", torch.eye(channels))
        self.register_buffer("log_det", torch.zeros(()))

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the layer from the mean of each position (P, C) and the covariance (C, C) of the vectors about it."""
        channels = covariance.shape[0]
        covariance = covariance.double()
        floor = _COVARIANCE_FLOOR * covariance.diagonal().mean().clamp_min(1e-12)
        lower = torch.linalg.cholesky(covariance + floor * torch.eye(channels, dtype=torch.float64, device=covariance.device))
        # covariance = L L^T, so z = L^-1 (x - mean) is white; row vectors: z = (x - mean) L^-T.
        eye = torch.eye(channels, dtype=torch.float64, device=covariance.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        self.mean.copy_(mean)
        self.matrix.copy_(inverse.t())
        self.log_det.copy_(-lower.diagonal().log().sum())

    def forward(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors (N, C) at positions (N,) to white vectors (N, C)."""
        return (vectors - self.mean[positions]) @ self.matrix


class Subnet(nn.Sequential):
    """Linear(in, 2 in), ReLU, Linear(2 in, out): predicts the coupling's scale and shift."""

    def __init__(self, dims_in: int, dims_out: int) -> None:
        super().__init__(nn.Linear(dims_in, 2 * dims_in), nn.ReLU(), nn.Linear(2 * dims_in, dims_out))

    def start_at_identity(self) -> None:
        """Zero the last layer: the coupling block passes its input through."""
        last = self[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def position_encoding(grid: tuple[int, int], dims: int) -> Tensor:
    """Sine-cosine encoding of row and column.

    The first half of the dimensions encodes the column, the second the row; in each, sines and cosines alternate with wavelengths from
    2 pi to 10000 * 2 pi in geometric progression (Vaswani et al., 2017, in two dimensions as Wang and Liu, 2019).

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


class LevelFlow(nn.Module):
    """The conditional flow of one level.

    Args:
        channels: C.
        grid: (h, w) of the level's map; P = h w.
        settings: depth, start, clamp, permutation, size of the condition.
        generator_seed: decides permutations and initial parameters.
    """

    encoding: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], settings: FlowSettings, generator_seed: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.grid = grid
        self.whitening = Whitening(channels, grid[0] * grid[1])
        self.register_buffer("encoding", position_encoding(grid, settings.condition_dims), persistent=False)
        self.blocks: nn.Module | None = None
        if settings.depth > 0:
            with _seeded(generator_seed), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Soft permutation will take")
                self.blocks = _coupling_blocks(channels, settings)

    def log_prob(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Log-likelihood per dimension.

        Args:
            vectors: (N, C).
            positions: (N,) int64, row * w + column.

        Returns:
            (N,) float32: (C * -0.5 ln 2 pi - 0.5 |z|^2 + log|det J|) / C.
        """
        z = self.whitening(vectors, positions)
        log_det: Tensor = self.whitening.log_det
        if self.blocks is not None:
            z, added = self.blocks(z, [self.encoding[positions]])
            log_det = log_det + added.float()
        z = z.float()
        constant = -0.5 * math.log(2 * math.pi)
        return constant + (log_det - 0.5 * (z * z).sum(dim=1)) / self.channels


def _coupling_blocks(channels: int, settings: FlowSettings) -> nn.Module:
    # FrEIA takes seconds to import; prediction with a classifier alone does not need it.
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
    """Seed torch and NumPy's global generators (FrEIA draws permutations from the latter) and put both back afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)
