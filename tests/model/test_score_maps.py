"""Score maps: in the unit interval, from training constants, the same whoever else is scored."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsnf.core.config import FinetuneSettings, FlowSettings, Fusion, ImageSettings
from clsnf.model.backbone import Backbone, empty_backbone
from clsnf.model.decoder import Decoder, PixelDecoder
from clsnf.model.flow import LevelFlow, LevelScale, level_vectors
from clsnf.model.network import ScoreNetwork, build_decoder, build_flows, to_network_input
from clsnf.model.score_maps import (
    density_map,
    fuse,
    fuse_scores,
    gaussian_smooth,
    image_scores,
    valid_cells,
)
from tests.support.backbones import backbone_settings

SIZE = (64, 96)
GRIDS = ((16, 24), (8, 12))


def likelihoods(n: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, h, w, generator=generator) for h, w in GRIDS]


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_density_maps_are_in_the_unit_interval(seed: int) -> None:
    maps = density_map(likelihoods(seed=seed), SIZE)
    assert maps.shape == (3, *SIZE)
    assert maps.dtype == torch.float32
    assert ((maps >= 0) & (maps <= 1)).all()


def test_the_density_map_is_the_mean_over_levels_of_one_minus_p() -> None:
    levels = likelihoods()
    expected = torch.zeros(3, *SIZE)
    for p in levels:
        expected += (
            1 - F.interpolate(p[:, None], size=SIZE, mode="bilinear", align_corners=True)[:, 0]
        )
    torch.testing.assert_close(density_map(levels, SIZE), expected / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steepness", [0.5, 1.0, 7.0])
def test_a_vector_as_likely_as_the_constant_is_normal_and_one_far_below_is_not(
    steepness: float,
) -> None:
    flow = LevelFlow(2, (1, 3), FlowSettings(depth=0, memory=0))
    at = torch.tensor(
        [[[0.0, 0.0], [1.0, 1.0], [1e3, 0.0]]]
    )  # log p per dimension: c, c - 0.5, next to nothing
    constant = float(flow.log_prob(at)[0, 0, 0])
    p = flow.relative_likelihood(at, LevelScale(constant, steepness))
    assert p[0, 0].tolist() == pytest.approx([1.0, math.exp(-0.5 * steepness), 0.0])
    assert torch.equal(
        flow.relative_likelihood(at, LevelScale(constant - 1e6, steepness)), torch.ones(1, 1, 3)
    )


def test_a_memory_is_half_of_the_likelihood() -> None:
    flow = LevelFlow(2, (1, 2), FlowSettings(depth=0, memory=1))
    assert flow.memory is not None
    flow.memory.vectors[:] = torch.tensor([[3.0, 4.0]])
    flow.memory.width.fill_(5.0)
    p = flow.relative_likelihood(
        torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), LevelScale(1e3)
    )  # the flow's own part is nothing
    assert p[0, 0].tolist() == pytest.approx(
        [0.25, 0.5]
    )  # one half at the kernel's width, one at a perfect match


@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
def test_a_vector_is_the_mean_over_its_neighbourhood(neighbourhood: int) -> None:
    level = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    r = neighbourhood // 2
    around = (
        F.pad(level, (r, r, r, r), mode="reflect")
        .unfold(2, neighbourhood, 1)
        .unfold(3, neighbourhood, 1)
        .mean(dim=(4, 5))
    )
    torch.testing.assert_close(
        level_vectors(level, neighbourhood), around.flatten(2).transpose(1, 2)
    )


def test_a_neighbourhood_larger_than_the_map_is_the_map() -> None:
    assert level_vectors(torch.rand(1, 3, 1, 2), 5).shape == (1, 2, 3)


@given(st.floats(0.3, 6))
@settings(deadline=None, max_examples=20)
def test_smoothing_leaves_an_even_map_alone_and_keeps_the_unit_interval(sigma: float) -> None:
    torch.testing.assert_close(
        gaussian_smooth(torch.full((1, 20, 30), 0.7), sigma), torch.full((1, 20, 30), 0.7)
    )
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    smoothed = gaussian_smooth(point, sigma)
    assert smoothed.sum() == pytest.approx(1, abs=1e-4)
    assert smoothed[0, 20, 20] == smoothed.max() < 1
    density, classifier = torch.rand(2, 2, 20, 20)
    assert torch.equal(
        fuse(density, classifier, 0.3, sigma),
        gaussian_smooth(fuse(density, classifier, 0.3), sigma),
    )


@given(st.floats(0, 1))
def test_fused_maps_lie_between_the_two(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    density, classifier = (
        torch.rand(2, 4, 4, generator=generator),
        torch.rand(2, 4, 4, generator=generator),
    )
    fused = fuse(density, classifier, weight)
    torch.testing.assert_close(fused, (1 - weight) * density + weight * classifier)
    assert ((fused >= 0) & (fused <= 1)).all()


def test_a_weight_of_zero_is_the_density_and_of_one_the_classifier() -> None:
    density, classifier = torch.rand(1, 2, 2), torch.rand(1, 2, 2)
    assert torch.equal(fuse(density, classifier, 0.0), density)
    assert torch.equal(fuse(density, classifier, 1.0), classifier)


def test_an_image_s_score_is_the_largest_value_outside_its_padding() -> None:
    maps = torch.tensor([[[0.1, 0.9], [0.2, 0.3]], [[0.5, 0.4], [0.6, 0.0]]])
    valid = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    assert image_scores(maps).tolist() == pytest.approx([0.9, 0.6])
    assert image_scores(maps, valid).tolist() == pytest.approx([0.3, 0.6])


@pytest.mark.parametrize("smoothing", [0.0, 1.5])
@pytest.mark.parametrize("score_weight", [None, 0.3, 0.8])
def test_maps_and_scores_are_fused_each_by_its_own_weight(
    score_weight: float | None, smoothing: float
) -> None:
    density, classifier = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 8, 9, dtype=torch.bool)
    valid[1:, :4] = False
    fusion = Fusion(0.3, score_weight, smoothing)
    found = fuse_scores(density, classifier, fusion, valid)
    assert torch.equal(found.maps, fuse(density, classifier, 0.3, smoothing) * valid)
    scored = fuse(density, classifier, 0.3 if score_weight is None else score_weight, smoothing)
    assert torch.equal(found.scores, image_scores(scored, valid))
    whole = fuse_scores(density, classifier, fusion)
    assert torch.equal(whole.maps, fuse(density, classifier, 0.3, smoothing))
    assert torch.equal(whole.scores, image_scores(scored))


# ---- padding ----


def box(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """(1, H, W) bool: an image at these rows and columns of the canvas."""
    valid = torch.zeros(1, *SIZE, dtype=torch.bool)
    valid[:, rows[0] : rows[1], columns[0] : columns[1]] = True
    return valid


BOXES = torch.cat(
    [box((0, 64), (0, 96)), box((20, 44), (0, 96)), box((0, 64), (30, 31)), box((30, 35), (0, 96))]
)


def test_a_cell_counts_where_at_least_half_of_it_is_image() -> None:
    cells = valid_cells(
        box((4, 58), (0, 96)), GRIDS[1]
    )  # cells of 8 x 8: rows 0 and 7 are covered by 4 and by 2 of 8
    assert cells.shape == (1, *GRIDS[1])
    assert cells[0, :, 0].tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("rows", [(30, 32), (30, 35), (29, 35)])
def test_an_image_thinner_than_half_a_cell_keeps_the_cells_that_show_most_of_it(
    rows: tuple[int, int],
) -> None:
    cells = valid_cells(
        box(rows, (0, 96)), (4, 6)
    )  # cells of 16 x 16, a border between rows 31 and 32
    assert cells.any()
    assert cells[0].all(dim=1).sum() in (1, 2)


def test_what_lies_in_the_padding_moves_no_score_inside_the_image() -> None:
    levels = likelihoods(4)
    cells = [valid_cells(BOXES, grid) for grid in GRIDS]
    changed = [
        level.where(inside, torch.tensor(1.0)) for level, inside in zip(levels, cells, strict=True)
    ]
    expected, found = (density_map(given, SIZE, BOXES) for given in (levels, changed))
    assert torch.equal(found[BOXES], expected[BOXES])
    assert expected[BOXES].max() < 1
    assert not torch.equal(found, density_map(changed, SIZE))


def test_an_even_likelihood_scores_evenly_up_to_the_border_of_the_image() -> None:
    levels = [
        torch.full((4, *grid), 0.3).masked_fill(~valid_cells(BOXES, grid), 0) for grid in GRIDS
    ]
    maps = density_map(levels, SIZE, BOXES)
    torch.testing.assert_close(maps[BOXES], torch.full_like(maps[BOXES], 0.7))


def test_an_image_without_padding_scores_as_if_none_had_any() -> None:
    levels = likelihoods(4)
    assert torch.equal(density_map(levels, SIZE, BOXES)[0], density_map(levels, SIZE)[0])


# ---- the whole network ----


@pytest.fixture(scope="module")
def network() -> ScoreNetwork:
    torch.manual_seed(0)
    backbone = empty_backbone(backbone_settings("resnet18", (1, 2)), SIZE)
    decoder = build_decoder(
        backbone.info, ImageSettings(*SIZE), FinetuneSettings(decoder_width=16), seed=1
    )
    flows = build_flows(backbone.info, FlowSettings(depth=2, condition_dims=16, memory=10), seed=2)
    images = torch.rand(4, 3, *SIZE)
    with torch.inference_mode():
        scales = []
        for flow, level in zip(flows, backbone(images), strict=True):
            assert isinstance(flow, LevelFlow)
            vectors = level_vectors(level, flow.neighbourhood)
            assert flow.memory is not None
            flow.memory.fit(
                vectors.flatten(0, 1), torch.arange(vectors.shape[0] * vectors.shape[1]), seed=0
            )
            scales.append(LevelScale(float(flow.log_prob(vectors).max())))
    return ScoreNetwork(backbone, decoder, flows, scales, Fusion(0.25)).eval()


def test_the_network_gives_both_maps_at_the_image_s_size(network: ScoreNetwork) -> None:
    with torch.inference_mode():
        density, classifier = network(torch.rand(2, 3, *SIZE))
    for maps in (density, classifier):
        assert maps.shape == (2, *SIZE)
        assert maps.dtype == torch.float32
        assert ((maps >= 0) & (maps <= 1)).all()


def test_the_network_scores_images_as_its_maps_are_fused(network: ScoreNetwork) -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=generator)
    found = network.score(images, BOXES[:2])
    with torch.inference_mode():
        density, classifier = network(to_network_input(images, torch.device("cpu")), BOXES[:2])
        expected = fuse_scores(density, classifier, network.fusion, BOXES[:2])
    assert torch.equal(found.maps, expected.maps)
    assert torch.equal(found.scores, expected.scores)
    assert bool((found.maps[~BOXES[:2]] == 0).all())


def test_the_network_s_input_is_float_in_the_unit_interval_channels_last() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    floats = to_network_input(images, torch.device("cpu"))
    assert torch.equal(floats, images.float() / 255)
    assert floats.is_contiguous(memory_format=torch.channels_last)


def test_an_image_s_maps_do_not_depend_on_the_images_that_come_with_it(
    network: ScoreNetwork,
) -> None:
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    images[0] = 0  # far from anything: must not move the others
    with torch.inference_mode():
        together = network(images)
        for i in range(3):
            for maps, alone in zip(together, network(images[i : i + 1]), strict=True):
                torch.testing.assert_close(maps[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def decoders_of(seeds: tuple[int, ...], backbone: Backbone) -> list[PixelDecoder]:
    return [
        build_decoder(backbone.info, ImageSettings(*SIZE), FinetuneSettings(decoder_width=16), seed)
        for seed in seeds
    ]


def test_decoders_and_flows_are_drawn_from_their_seed_alone(network: ScoreNetwork) -> None:
    torch.manual_seed(77)
    one, same, other = (
        decoder.state_dict() for decoder in decoders_of((5, 5, 6), network.backbone)
    )
    drawn = torch.rand(3)
    torch.manual_seed(77)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    flows = build_flows(
        network.backbone.info, FlowSettings(depth=1, start="random", condition_dims=8), seed=5
    )
    again = build_flows(
        network.backbone.info, FlowSettings(depth=1, start="random", condition_dims=8), seed=5
    )
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in flows.state_dict().items()
    )


@pytest.mark.parametrize(
    ("grids", "size"),
    [
        (((16, 16), (8, 8), (4, 4)), (64, 64)),
        (((8, 24), (4, 12)), (32, 96)),  # a long product
        (((5, 5), (3, 3)), (64, 96)),  # sides that do not divide
        (((4, 4), (4, 4)), (64, 64)),  # a transformer's levels are of one size
        (((64, 64),), (64, 64)),  # a single level as large as the image
    ],
)
def test_the_decoder_gives_the_image_s_size_from_any_pyramid(
    grids: tuple[tuple[int, int], ...], size: tuple[int, int]
) -> None:
    channels = [24 * (level + 1) for level in range(len(grids))]
    decoder = Decoder(channels, grids, size, width=32)
    features = [torch.rand(2, c, *grid) for c, grid in zip(channels, grids, strict=True)]
    assert decoder(features).shape == (2, *size)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(features).shape == (2, *size)
