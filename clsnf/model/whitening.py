"""An invertible linear layer that whitens the features of normal images. A flow can start from it.

The covariance may be local: one for each tile of the map, which suits products that always lie in
the same place. Defard et al. (PaDiM, 2021) estimate one for each position. A tile has more vectors
to estimate it from, and takes less memory.

Legend: B images, N vectors, C channels, P positions (h w), T tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Share of the mean variance that is added to the covariance's diagonal, so that channels without
# variance divide nothing by zero.
_COVARIANCE_FLOOR = 1e-2


class Whitening(nn.Module):
    """The layer z = (x - mean[position]) W[tile of position]; the identity until :meth:`fit`.

    Args:
        channels: C.
        grid: (h, w) of the level's map.
    """

    mean: Tensor
    matrix: Tensor
    log_det: Tensor
    tile_counts: Tensor

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.tiles = (1, 1)
        self.register_buffer("mean", torch.zeros(grid[0] * grid[1], channels))
        self.register_buffer("matrix", torch.eye(channels)[None])
        self.register_buffer("log_det", torch.zeros(1))
        self.register_buffer("tile_counts", torch.tensor(self.tiles))

    @torch.no_grad()
    def fit(self, mean: Tensor, covariances: Tensor, tiles: tuple[int, int] = (1, 1)) -> None:
        """Set the layer from the vectors' statistics.

        Args:
            mean: (P, C), of each position.
            covariances: (T, C, C), of the vectors about that mean; tiles in the order of rows.
            tiles: (rows, columns) of tiles, rows * columns = T. They divide the grid evenly.

        Raises:
            ValueError: the tiles do not fit the grid or the number of covariances.
        """
        if (
            self.grid[0] % tiles[0]
            or self.grid[1] % tiles[1]
            or len(covariances) != tiles[0] * tiles[1]
        ):
            raise ValueError(
                f"{len(covariances)} covariances do not tile a grid of {self.grid} by {tiles}"
            )
        c = covariances.shape[1]
        eye = torch.eye(c, dtype=torch.float64, device=covariances.device)
        covariances = covariances.double()
        floor = _COVARIANCE_FLOOR * covariances.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-12)
        lower = torch.linalg.cholesky(covariances + floor * eye)
        # covariance = L L^T, so z = L^-1 (x - mean) is white; row vectors: z = (x - mean) L^-T.
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        self.tiles = tiles
        self.mean.copy_(mean)
        self.matrix = inverse.transpose(1, 2).contiguous().to(self.mean)
        self.log_det = -lower.diagonal(dim1=1, dim2=2).log().sum(dim=1).to(self.mean)
        self.tile_counts.copy_(torch.tensor(tiles))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, P, C) of whole maps to white ones, float32."""
        return untiled(
            torch.bmm(tiled(features - self.mean, self.grid, self.tiles), self.matrix),
            self.grid,
            self.tiles,
        )

    def of_vectors(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Single vectors (N, C) at positions (N,) to white ones; slower than whole maps."""
        centred = (vectors - self.mean[positions])[:, None]
        return torch.bmm(centred, self.matrix[self.tile_of(positions)])[:, 0]

    def tile_of(self, positions: Tensor) -> Tensor:
        """Positions (N,) to the tiles they lie in (N,)."""
        rows, columns = positions // self.grid[1], positions % self.grid[1]
        row = rows * self.tiles[0] // self.grid[0]
        return row * self.tiles[1] + columns * self.tiles[1] // self.grid[1]

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *rest: Any, **more: Any
    ) -> None:
        # The data decided the number of tiles: take that of the stored layer.
        stored = state_dict.get(f"{prefix}tile_counts")
        if stored is not None and stored.shape == (2,):
            self.tiles = (int(stored[0]), int(stored[1]))
            count = max(1, self.tiles[0] * self.tiles[1])
            if count <= self.grid[0] * self.grid[1]:
                self.matrix = self.matrix.new_empty((count, *self.matrix.shape[1:]))
                self.log_det = self.log_det.new_empty(count)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def choose_tiles(
    grid: tuple[int, int], images: int, channels: int, most: int = 16
) -> tuple[int, int]:
    """The (rows, columns) of tiles that a grid is divided into for local covariances.

    As many as possible, `most` on a side, that divide the grid evenly and hold at least 2 C vectors
    each.
    """

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, min(n, most) + 1) if n % d == 0]

    fine = [
        (rows * columns, -abs(grid[0] // rows - grid[1] // columns), rows, columns)
        for rows in divisors(grid[0])
        for columns in divisors(grid[1])
        if images * (grid[0] // rows) * (grid[1] // columns) >= 2 * channels
    ]
    return max(fine)[2:] if fine else (1, 1)


def tiled(features: Tensor, grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """(B, P, C) to (T, B * P / T, C)."""
    b, p, c = features.shape
    if tiles == (1, 1):
        return features.reshape(1, b * p, c)
    shape = (b, tiles[0], grid[0] // tiles[0], tiles[1], grid[1] // tiles[1], c)
    return features.reshape(shape).permute(1, 3, 0, 2, 4, 5).reshape(tiles[0] * tiles[1], -1, c)


def untiled(rows: Tensor, grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """The inverse of :func:`tiled`."""
    c = rows.shape[2]
    if tiles == (1, 1):
        return rows.reshape(-1, grid[0] * grid[1], c)
    height, width = grid[0] // tiles[0], grid[1] // tiles[1]
    return (
        rows.reshape(tiles[0], tiles[1], -1, height, width, c)
        .permute(2, 0, 3, 1, 4, 5)
        .reshape(-1, grid[0] * grid[1], c)
    )
