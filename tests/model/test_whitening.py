"""Whitening: a Gaussian for each tile, and what is saved is loaded whatever its number of tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor

from clsnf.core.config import FlowSettings
from clsnf.model.flow import LevelFlow
from clsnf.model.whitening import Whitening, choose_tiles, tiled, untiled

GRID = (4, 6)
C = 3


def fitted(tiles: tuple[int, int], seed: int = 0) -> tuple[Whitening, Tensor, Tensor]:
    """A layer with its means (P, C) and covariances (T, C, C)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(tiles[0] * tiles[1], C, C, generator=generator)
    mean, covariances = (
        torch.randn(24, C, generator=generator),
        mixing @ mixing.transpose(1, 2) + 0.2 * torch.eye(C),
    )
    layer = Whitening(C, GRID)
    layer.fit(mean, covariances, tiles)
    return layer, mean, covariances


@pytest.mark.parametrize("tiles", [(1, 1), (2, 2), (4, 3), (4, 6)])
def test_a_flow_of_depth_zero_is_the_gaussian_of_each_position_s_tile(
    tiles: tuple[int, int],
) -> None:
    layer, mean, covariances = fitted(tiles)
    flow = LevelFlow(C, GRID, FlowSettings(depth=0, memory=0))
    flow.whitening = layer
    features = torch.randn(2, 24, C, generator=torch.Generator().manual_seed(1))
    floor = 0.01 * covariances.diagonal(dim1=1, dim2=2).mean() * torch.eye(C)
    found = flow.log_prob(features)
    assert found.shape == (2, *GRID)
    for p in range(24):
        tile = (p // 6) * tiles[0] // 4 * tiles[1] + (p % 6) * tiles[1] // 6
        expected = (
            multivariate_normal.logpdf(features[:, p].numpy(), mean[p], covariances[tile] + floor)
            / C
        )
        torch.testing.assert_close(
            found[:, p // 6, p % 6].double(), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (4, 6)])
def test_single_vectors_and_whole_maps_are_whitened_alike(tiles: tuple[int, int]) -> None:
    layer, _, _ = fitted(tiles)
    features = torch.randn(3, 24, C)
    alone = layer.of_vectors(features.flatten(0, 1), torch.arange(24).repeat(3)).view(3, 24, C)
    torch.testing.assert_close(layer(features), alone, rtol=1e-4, atol=1e-5)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 6]), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_tiling_loses_nothing_and_keeps_a_tile_s_vectors_together(
    rows: int, columns: int, images: int
) -> None:
    features = torch.arange(images * 24 * 2).view(images, 24, 2).float()
    apart = tiled(features, GRID, (rows, columns))
    assert apart.shape == (rows * columns, images * 24 // (rows * columns), 2)
    assert torch.equal(untiled(apart, GRID, (rows, columns)), features)
    layer = Whitening(2, GRID)
    layer.tiles = (rows, columns)
    positions = tiled(torch.arange(24).view(1, 24, 1), GRID, (rows, columns))[:, :, 0]
    assert all((layer.tile_of(inside) == tile).all() for tile, inside in enumerate(positions))


def test_covariances_that_do_not_tile_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="tile"):
        Whitening(C, GRID).fit(torch.zeros(24, C), torch.eye(C).expand(3, C, C), (3, 1))


@given(st.tuples(st.integers(1, 64), st.integers(1, 64)), st.integers(1, 500), st.integers(1, 2048))
def test_chosen_tiles_divide_the_grid_and_hold_enough_vectors(
    grid: tuple[int, int], images: int, channels: int
) -> None:
    rows, columns = choose_tiles(grid, images, channels)
    assert grid[0] % rows == 0
    assert grid[1] % columns == 0
    assert max(rows, columns) <= 16
    if (rows, columns) != (1, 1):
        assert images * (grid[0] // rows) * (grid[1] // columns) >= 2 * channels


def test_few_images_of_many_channels_share_one_covariance() -> None:
    assert choose_tiles((16, 16), 4, 2048) == (1, 1)
    assert choose_tiles((64, 64), 275, 64) == (16, 16)


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3)])
def test_a_state_brings_its_tiles_with_it(tiles: tuple[int, int]) -> None:
    layer, _, _ = fitted(tiles)
    loaded = Whitening(C, GRID)
    loaded.load_state_dict(layer.state_dict())
    features = torch.randn(1, 24, C)
    assert torch.equal(loaded(features), layer(features))


def test_a_state_with_more_tiles_than_positions_does_not_fit() -> None:
    state = Whitening(C, GRID).state_dict() | {"tile_counts": torch.tensor([10**6, 10**6])}
    with pytest.raises(RuntimeError, match="size mismatch for matrix"):
        Whitening(C, GRID).load_state_dict(state | {"matrix": torch.eye(C).expand(7, C, C)})
