"""Stage two: features as the backbone gives them, statistics by hand, flows that learn, constants
that are quantiles.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clsnf.core.config import FlowSettings
from clsnf.core.errors import TrainingError
from clsnf.core.progress import Progress, silent
from clsnf.model.backbone import Backbone
from clsnf.model.flow import LevelFlow
from clsnf.streams.stream import MemoryStream
from clsnf.training.density import (
    extract_features,
    feature_statistics,
    fit_flow,
    fit_flows,
    level_log_probs,
    level_scale,
    start_flow,
    start_flows,
    valid_vectors,
)
from tests.support.backbones import backbone_settings

CPU = torch.device("cpu")
GRID = (4, 5)
P = 20
SMALL = FlowSettings(
    depth=2, condition_dims=8, vectors_per_step=64, passes=6, covariance="shared", memory=8
)


class Scaled(nn.Module):
    """An extractor whose maps are known: strided copies of the image, the second level times a
    factor.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[:, :, ::4, ::4], self.factor * images[:, :2, ::8, ::8]]


def backbone(factor: float = 1.0) -> Backbone:
    return Backbone(Scaled(factor), "scaled", backbone_settings("scaled", (1, 2)), (32, 64))


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---- features ----


def test_features_are_the_backbone_s_row_by_row_for_any_number_of_images() -> None:
    shown, told = images(19), []
    levels = extract_features(
        backbone(),
        MemoryStream(shown),
        CPU,
        1,
        lambda task, done, total: told.append((task, done, total)),
        "looking",
    )
    assert [tuple(level.shape) for level in levels] == [(19, 8 * 16, 3), (19, 4 * 8, 2)]
    assert [level.dtype for level in levels] == [torch.float16] * 2
    with torch.inference_mode():
        expected = backbone()(shown.float() / 255)
    for level, maps in zip(levels, expected, strict=True):
        torch.testing.assert_close(
            level.float(), maps.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-3
        )
    assert told[-1] == ("looking", 19, 19)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_level_that_half_precision_can_t_hold_is_kept_in_single() -> None:
    shown = images(20)
    shown[:17] = 120  # close to the mean: small features, until the second batch
    shown[18] = 255
    levels = extract_features(backbone(factor=5e4), MemoryStream(shown), CPU)
    assert [level.dtype for level in levels] == [torch.float16, torch.float32]
    with torch.inference_mode():
        expected = backbone(factor=5e4)(shown.float() / 255)[1].flatten(2).transpose(1, 2)
    assert expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(levels[1], expected, rtol=1e-3, atol=1)


def train(
    flow: LevelFlow,
    features: Tensor,
    valid: Tensor | None,
    settings: FlowSettings,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    task: str = "flow",
) -> list[float]:
    """Start and fit."""
    start_flow(flow, features, valid, settings, seed, device)
    return fit_flow(flow, features, valid, settings, seed, device, progress, task)


def test_features_can_be_trained_on() -> None:
    """They are made in inference mode, whose tensors autograd refuses."""
    flow = LevelFlow(3, (8, 16), dataclasses.replace(SMALL, passes=0.1))
    assert train(
        flow,
        extract_features(backbone(), MemoryStream(images(3)), CPU)[0],
        None,
        SMALL,
        seed=0,
        device=CPU,
    )


# ---- statistics ----


def normal_features(n: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    """(N, P, C): a mean for each position, correlated noise about it."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 0.7]])[:channels, :channels]
    places = 5 * torch.randn(P, channels, generator=generator)
    return places + torch.randn(n, P, channels, generator=generator) @ mixing


def test_with_many_images_the_statistics_are_plain_means_and_covariances() -> None:
    features = normal_features(4000)
    mean, covariance = feature_statistics(features, None, GRID)
    torch.testing.assert_close(mean, features.mean(dim=0), rtol=0, atol=0.02)
    rows = (features - features.mean(dim=0)).flatten(0, 1)
    torch.testing.assert_close(covariance[0], rows.t() @ rows / len(rows), rtol=1e-3, atol=1e-3)


def by_hand(features: Tensor) -> Tensor:
    """The shrunk means of a 1 x 2 grid without padding, written out for one channel."""
    n = len(features)
    means = features.mean(dim=0)[:, 0]
    within = ((features[..., 0] - means) ** 2).mean(dim=0)
    noise = float((within / n).mean())
    between = float(((means - means.mean()) ** 2).mean())
    share = min(1.0, noise / between)
    return (
        1 - share
    ) * means + share * means.mean()  # both positions lie in each other's 5 x 5 neighbourhood


@given(st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=2, max_size=6))
@settings(deadline=None)
def test_the_mean_of_a_position_is_drawn_to_its_neighbours_by_the_share_of_noise(
    values: list[list[float]],
) -> None:
    features = torch.tensor(values)[:, :, None]
    means = features.mean(dim=0)
    if float((means - means.mean()).square().mean()) < 1e-6:
        return  # all positions alike: nothing to draw
    mean, covariance = feature_statistics(features, None, (1, 2))
    torch.testing.assert_close(mean[:, 0], by_hand(features), rtol=1e-3, atol=1e-3)
    expected = (features[..., 0] - by_hand(features)).square().mean()
    torch.testing.assert_close(covariance[0, 0, 0], expected, rtol=1e-3, atol=1e-3)


def test_vectors_of_padding_count_for_nothing() -> None:
    features = normal_features(30)
    valid = torch.ones(30, P, dtype=torch.bool)
    valid[:10, :5] = False  # some images have padding at the first row
    changed = torch.where(valid[..., None], features, torch.tensor(1e4))
    for found, expected in zip(
        feature_statistics(changed, valid, GRID),
        feature_statistics(features * valid[..., None], valid, GRID),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    mean, _ = feature_statistics(features, valid, GRID)
    torch.testing.assert_close(mean[0], features[10:, 0].mean(dim=0), rtol=0, atol=0.15)


def test_positions_that_no_image_shows_leave_the_others_alone_and_take_their_neighbours_mean() -> (
    None
):
    features = normal_features(8) + 100
    valid = torch.ones(8, P, dtype=torch.bool)
    valid[:, :5] = False  # the first row is padding in all of them
    mean, covariance = feature_statistics(features, valid, GRID)
    below, covariance_below = feature_statistics(features[:, 5:], None, (3, 5))
    torch.testing.assert_close(mean[5:], below, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(covariance, covariance_below, rtol=1e-3, atol=1e-3)
    assert (mean[:5] - 100).abs().max() < 20
    assert (
        feature_statistics(features, torch.zeros(8, P, dtype=torch.bool), GRID)[0].isfinite().all()
    )


def test_pixels_become_vectors_where_their_cell_shows_the_image() -> None:
    assert valid_vectors(None, GRID) is None
    valid = torch.zeros(2, 16, 20, dtype=torch.bool)
    valid[0] = True
    valid[1, 6:, :] = True  # cells of 4 x 4: the second row of cells is half image
    found = valid_vectors(valid, GRID)
    assert found is not None
    assert found.view(2, *GRID)[:, :, 0].tolist() == [[True] * 4, [False, True, True, True]]


@pytest.mark.parametrize("tiles", [(1, 1), (2, 5), (4, 1), (4, 5)])
def test_a_tile_has_the_covariance_of_its_own_vectors_drawn_to_the_shared_one(
    tiles: tuple[int, int],
) -> None:
    features = normal_features(500)
    features[:, : P // 2] *= 3  # the upper half varies more
    mean, covariances = feature_statistics(features, None, GRID, tiles)
    assert covariances.shape == (tiles[0] * tiles[1], 3, 3)
    maps = (features - mean).view(500, *GRID, 3)
    height, width = GRID[0] // tiles[0], GRID[1] // tiles[1]
    rows = maps.reshape(-1, 3)
    shared = rows.t() @ rows / len(rows)
    for index, found in enumerate(covariances):
        top, left = index // tiles[1] * height, index % tiles[1] * width
        inside = maps[:, top : top + height, left : left + width].reshape(-1, 3)
        expected = (
            shared
            if len(covariances) == 1
            else (inside.t() @ inside + 3 * shared) / (len(inside) + 3)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_tile_that_no_image_shows_has_the_shared_covariance() -> None:
    features = normal_features(50)
    valid = torch.ones(50, P, dtype=torch.bool)
    valid[:, :5] = False
    _, covariances = feature_statistics(features, valid, GRID, (4, 1))
    torch.testing.assert_close(covariances[0], feature_statistics(features, valid, GRID)[1][0])


# ---- training ----


def test_training_lowers_the_loss_and_raises_the_likelihood() -> None:
    features = normal_features(100).square()  # far from Gaussian
    flow = LevelFlow(3, GRID, SMALL)
    flow.whitening.fit(*feature_statistics(features, None, GRID))
    before = level_log_probs(flow, features, CPU).mean()
    losses = train(LevelFlow(3, GRID, SMALL), features, None, SMALL, seed=0, device=CPU)
    trained = LevelFlow(3, GRID, SMALL)
    train(trained, features, None, SMALL, seed=0, device=CPU)
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert level_log_probs(trained, features, CPU).mean() > before


def test_a_random_start_learns_too() -> None:
    settings = dataclasses.replace(SMALL, start="random", passes=20, learning_rate=3e-3)
    losses = train(
        LevelFlow(3, GRID, settings), normal_features(100), None, settings, seed=0, device=CPU
    )
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_training_is_the_same_for_the_same_seed_bit_for_bit() -> None:
    features = normal_features(20)
    flows = [LevelFlow(3, GRID, SMALL, generator_seed=1) for _ in range(3)]
    curves = [
        train(flow, features, None, SMALL, seed=seed, device=CPU)
        for flow, seed in zip(flows, (5, 5, 6), strict=True)
    ]
    assert curves[0] == curves[1] != curves[2]
    states = [flow.state_dict() for flow in flows]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_training_sees_each_vector_as_often_as_it_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    features = normal_features(16)  # 320 vectors, 64 a step
    losses = train(
        LevelFlow(3, GRID, SMALL),
        features,
        None,
        SMALL,
        0,
        CPU,
        lambda *report: told.append(report),
        "flow",
    )
    assert told[-1] == ("flow", 30, 30)  # 6 passes of 5 steps
    assert len(losses) == 30
    assert train(
        LevelFlow(3, GRID, SMALL), features, None, dataclasses.replace(SMALL, passes=0.2), 0, CPU
    )


def test_training_never_looks_at_padding() -> None:
    features = normal_features(16)
    valid = torch.ones(16, P, dtype=torch.bool)
    valid[:, 12:] = False
    flows = [LevelFlow(3, GRID, SMALL, generator_seed=1) for _ in range(2)]
    changed = torch.where(valid[..., None], features, torch.tensor(1e3))
    for flow, given_features in zip(flows, (features, changed), strict=True):
        train(flow, given_features, valid, SMALL, seed=0, device=CPU)
    states = [flow.state_dict() for flow in flows]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_gaussian_has_nothing_to_train() -> None:
    settings = dataclasses.replace(SMALL, depth=0)
    flow = LevelFlow(3, GRID, settings)
    assert train(flow, normal_features(), None, settings, seed=0, device=CPU) == []
    assert not torch.equal(flow.whitening.matrix, torch.eye(3))


@pytest.mark.parametrize("start", ["data", "random"])
def test_features_that_are_not_finite_stop_training_with_one_line(start: str) -> None:
    features = normal_features(20)
    features[3, 2, 1] = math.nan
    settings = dataclasses.replace(SMALL, start=start)
    with pytest.raises(TrainingError) as caught:
        train(LevelFlow(3, GRID, settings), features, None, settings, seed=0, device=CPU)
    assert "\n" not in str(caught.value)


def test_a_learning_rate_that_is_too_high_stops_training_with_the_mend() -> None:
    settings = dataclasses.replace(SMALL, learning_rate=1e30, passes=20)
    with pytest.raises(TrainingError, match=r"lower flow\.learning_rate"):
        train(LevelFlow(3, GRID, settings), normal_features(50), None, settings, seed=0, device=CPU)


# ---- constants ----


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60), st.floats(0.5, 1))
@settings(deadline=None)
def test_a_level_s_constant_is_a_quantile_that_occurs(values: list[float], quantile: float) -> None:
    log_probs = torch.tensor(values).view(-1, 1, 1)
    constant, steepness = level_scale(
        log_probs, None, dataclasses.replace(SMALL, level_quantile=quantile)
    )
    assert steepness == 1
    assert constant in values
    below = sum(value <= constant for value in values)
    assert below >= quantile * len(values) - 1e-6
    assert sum(value < constant for value in values) <= quantile * len(values) + 1e-6


def test_a_quantile_of_one_is_the_largest_outside_padding() -> None:
    log_probs = torch.tensor([[[1.0, 5.0], [3.0, 2.0]]])
    assert level_scale(log_probs, None, SMALL).constant == 5.0
    assert level_scale(log_probs, torch.tensor([[True, False, True, True]]), SMALL).constant == 3.0


@given(st.floats(0.1, 50), st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_tails_make_levels_of_any_spread_say_the_same(spread: float, place: float) -> None:
    """The relative likelihood is 1 at the median and 1/2 where the rarest thousandth begins."""
    values = torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0)).double()
    constant, steepness = level_scale(
        spread * values + place, None, dataclasses.replace(SMALL, levels="tails")
    )
    ranked = (spread * values + place).flatten().sort().values
    p = torch.exp(steepness * (ranked - constant).clamp_max(0))
    assert float(p[5000]) == pytest.approx(1)
    assert float(p[9]) == pytest.approx(0.5, rel=1e-6)


def test_levels_that_never_vary_have_a_scale() -> None:
    assert math.isfinite(
        level_scale(
            torch.zeros(1, 4, 4), None, dataclasses.replace(SMALL, levels="tails")
        ).steepness
    )


def test_all_levels_are_trained_and_no_training_vector_exceeds_its_constant() -> None:
    features = [normal_features(20), normal_features(20, seed=1)[:, :6].contiguous()]
    flows = nn.ModuleList([LevelFlow(3, GRID, SMALL), LevelFlow(3, (2, 3), SMALL)])
    valid = torch.ones(20, 16, 20, dtype=torch.bool)
    valid[:10, :, 15:] = False
    start_flows(flows, features, valid, SMALL, seed=3, device=CPU)
    scales, curves = fit_flows(flows, features, valid, SMALL, seed=3, device=CPU)
    assert len(scales) == len(curves) == 2
    for flow, vectors, scale in zip(flows, features, scales, strict=True):
        assert isinstance(flow, LevelFlow)
        inside = valid_vectors(valid, flow.grid)
        assert inside is not None
        assert level_log_probs(flow, vectors, CPU).flatten()[
            inside.flatten()
        ].max() == pytest.approx(scale.constant)
