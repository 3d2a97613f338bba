"""Flows: what they say is a density, the Gaussian of the data before training, and the same for the
same seed.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor

from clsnf.core.config import FlowSettings
from clsnf.model.flow import LevelFlow, Whitening, position_encoding
from tests.support.authors_reference import encoding as cflow_encoding

GRID = (3, 4)
C = 6
SMALL = FlowSettings(depth=3, condition_dims=8)
by_permutation = pytest.mark.parametrize("permutation", ["soft", "hard"])
by_start = pytest.mark.parametrize("start", ["data", "random"])


def statistics(channels: int = C, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mean for each position (P, C) and a covariance (C, C)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    return 3 * torch.randn(
        GRID[0] * GRID[1], channels, generator=generator
    ), mixing @ mixing.t() / channels + 0.1 * torch.eye(channels)


def vectors(n: int = 7, channels: int = C, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Vectors (N, C) at positions (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, channels, generator=generator), torch.randint(
        0, GRID[0] * GRID[1], (n,), generator=generator
    )


def disturbed(flow: LevelFlow, seed: int = 2) -> LevelFlow:
    """The flow in float64 with all its trained parameters moved, as if it had been trained for
    long.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in flow.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return flow.double()


def one_tile(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0], found[1][None]


def log_prob(flow: LevelFlow, x: Tensor, positions: Tensor) -> Tensor:
    """Log-likelihood per dimension of vectors (N, C) at positions (N,)."""
    return flow.log_prob_of_white(flow.whitening.of_vectors(x, positions), positions)


def latent(flow: LevelFlow, x: Tensor, positions: Tensor) -> Tensor:
    z = flow.whitening.of_vectors(x, positions)
    return z if flow.blocks is None else flow.blocks(z, [flow.encoding[positions]])[0]


# ---- a density ----


@by_permutation
@by_start
@pytest.mark.parametrize("channels", [2, 5, 6])
def test_the_log_determinant_is_that_of_autograd_s_jacobian_sample_by_sample(
    channels: int, start: str, permutation: str
) -> None:
    flow = LevelFlow(
        channels, GRID, dataclasses.replace(SMALL, start=start, permutation=permutation)
    )
    flow.whitening.fit(*one_tile(statistics(channels)))
    disturbed(flow)
    x, positions = vectors(channels=channels)
    x = x.double()
    log_probs = log_prob(flow, x, positions)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, i=i: latent(flow, v[None], positions[i : i + 1])[0], x[i]
        )
        log_det = torch.linalg.slogdet(jacobian).logabsdet
        z = latent(flow, x[i : i + 1], positions[i : i + 1])[0]
        gaussian = -0.5 * (channels * np.log(2 * np.pi) + z.square().sum())
        torch.testing.assert_close(
            log_probs[i].double(), (gaussian + log_det) / channels, rtol=1e-4, atol=1e-4
        )


@by_permutation
def test_freia_s_inverse_brings_the_vectors_back(permutation: str) -> None:
    flow = disturbed(LevelFlow(C, GRID, dataclasses.replace(SMALL, permutation=permutation)))
    x, positions = vectors(50)
    condition = [flow.encoding[positions]]
    assert flow.blocks is not None
    z, log_det = flow.blocks(x.double(), condition)
    back, inverse_log_det = flow.blocks(z, condition, rev=True)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(
        back, x.double(), rtol=1e-5, atol=1e-5
    )  # FrEIA keeps its permutations in float32
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-5, atol=1e-5)


@by_start
def test_the_density_of_a_position_integrates_to_one(start: str) -> None:
    flow = LevelFlow(2, GRID, dataclasses.replace(SMALL, start=start))
    flow.whitening.fit(torch.zeros(12, 2), torch.tensor([[[1.0, 0.3], [0.3, 0.5]]]))
    disturbed(flow, seed=5)
    side = torch.linspace(-40, 40, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.inference_mode():
        density = log_prob(flow, grid, torch.full((len(grid),), 7)).double().mul(2).exp()
    assert float(density.sum()) * float(side[1] - side[0]) ** 2 == pytest.approx(1, abs=0.01)


def test_a_vector_s_density_does_not_depend_on_the_others() -> None:
    flow = disturbed(LevelFlow(C, GRID, SMALL))
    x, positions = vectors()
    alone = torch.cat(
        [log_prob(flow, x[i : i + 1].double(), positions[i : i + 1]) for i in range(len(x))]
    )
    torch.testing.assert_close(log_prob(flow, x.double(), positions), alone)


def test_the_density_depends_on_the_position() -> None:
    flow = disturbed(LevelFlow(C, GRID, SMALL))
    x = torch.ones(12, C, dtype=torch.float64)
    assert len(log_prob(flow, x, torch.arange(12)).unique()) == 12


# ---- the start ----


@by_permutation
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_flow_that_starts_from_the_data_is_their_gaussian_before_training(
    depth: int, permutation: str
) -> None:
    flow = LevelFlow(C, GRID, dataclasses.replace(SMALL, depth=depth, permutation=permutation))
    mean, covariance = statistics()
    flow.whitening.fit(mean, covariance[None])
    x, positions = vectors(40)
    floored = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(C)
    expected = [
        multivariate_normal.logpdf(v, mean[p], floored) / C
        for v, p in zip(x.numpy(), positions, strict=True)
    ]
    torch.testing.assert_close(
        log_prob(flow, x, positions),
        torch.tensor(expected, dtype=torch.float32),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_random_start_is_no_gaussian_and_leaves_the_vectors_unwhitened() -> None:
    flow = LevelFlow(C, GRID, dataclasses.replace(SMALL, start="random"))
    x, positions = vectors(40)
    assert torch.equal(flow.whitening.of_vectors(x, positions), x)
    expected = -0.5 * (np.log(2 * np.pi) + x.square().mean(dim=1))
    assert (log_prob(flow, x, positions) - expected).abs().max() > 1e-3


@given(st.integers(1, 8), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_whitened_vectors_are_white(channels: int, seed: int) -> None:
    mean, covariance = statistics(channels, seed)
    layer = Whitening(channels, GRID)
    layer.fit(mean, covariance[None])
    matrix = layer.matrix[0].double()
    floored = covariance.double() + 0.01 * covariance.diagonal().mean() * torch.eye(channels)
    torch.testing.assert_close(
        matrix.t() @ floored @ matrix,
        torch.eye(channels, dtype=torch.float64),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        layer.log_det[0].double(), torch.linalg.slogdet(matrix).logabsdet, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        layer.of_vectors(mean, torch.arange(len(mean))), torch.zeros_like(mean)
    )


@pytest.mark.parametrize("dead", [1, C])
def test_channels_that_never_vary_do_no_harm(dead: int) -> None:
    mean, covariance = statistics()
    covariance[:dead] = 0
    covariance[:, :dead] = 0
    flow = LevelFlow(C, GRID, dataclasses.replace(SMALL, depth=0))
    flow.whitening.fit(mean, covariance[None])
    x, positions = vectors()
    assert log_prob(flow, x, positions).isfinite().all()


# ---- seeds ----


@by_permutation
def test_the_same_seed_gives_the_same_parameters_and_another_seed_others(permutation: str) -> None:
    given = dataclasses.replace(SMALL, permutation=permutation, start="random")
    one, same, other = (
        LevelFlow(C, GRID, given, generator_seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if name.endswith("w_perm"))
    assert any(not torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


def test_building_a_flow_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    LevelFlow(C, GRID, SMALL, generator_seed=8)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_blocks_of_either_permutation_take_each_other_s_parameters() -> None:
    soft, hard = (
        LevelFlow(C, GRID, dataclasses.replace(SMALL, permutation=kind), generator_seed=1)
        for kind in ("soft", "hard")
    )
    x, positions = vectors()
    hard.load_state_dict(disturbed(soft).state_dict())
    torch.testing.assert_close(
        log_prob(hard.double(), x.double(), positions), log_prob(soft, x.double(), positions)
    )


# ---- positions ----


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8).map(lambda n: 4 * n))
@settings(deadline=None, max_examples=30)
def test_a_position_s_encoding_is_its_column_s_and_its_row_s(h: int, w: int, dims: int) -> None:
    encoding = position_encoding((h, w), dims).view(h, w, dims)
    columns, rows = encoding[..., : dims // 2], encoding[..., dims // 2 :]
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    # n-th of side s: sine and cosine of n, the fastest rate, first
    torch.testing.assert_close(columns[0, :, 0], torch.arange(w).float().sin())
    torch.testing.assert_close(rows[:, 0, 1], torch.arange(h).float().cos())
    torch.testing.assert_close(encoding.square().sum(dim=2), torch.full((h, w), dims / 2))


def test_encodings_of_neighbours_are_alike_and_all_positions_differ() -> None:
    encoding = position_encoding((16, 16), 128)
    assert len(encoding.unique(dim=0)) == 256
    likeness = (encoding @ encoding.t()).view(16, 16, 16, 16)
    assert likeness[8, 8, 8, 9] > likeness[8, 8, 8, 12]
    # It depends on the offset alone: a sum of cosines of the differences.
    torch.testing.assert_close(likeness[2, 3, 5, 7], likeness[10, 4, 13, 8])


@pytest.mark.parametrize(("grid", "dims"), [((3, 4), 8), ((5, 2), 128)])
def test_the_position_encoding_is_cflow_ad_s(grid: tuple[int, int], dims: int) -> None:
    """Entry by entry: imported flows were trained with it."""
    expected = cflow_encoding(dims, *grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            found = position_encoding(grid, dims)[row * grid[1] + column]
            torch.testing.assert_close(found, expected[:, row, column], rtol=0, atol=1e-5)
