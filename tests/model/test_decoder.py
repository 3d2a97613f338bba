"""The decoder: one logit a pixel from any pyramid, with skips or from the deepest level alone."""

import pytest
import torch
from torch import Tensor

from clsnf.core.config import FinetuneSettings, ImageSettings
from clsnf.model.backbone import Backbone, empty_backbone
from clsnf.model.network import build_decoder
from tests.support.backbones import backbone_settings

SIZE = (64, 96)


@pytest.fixture(scope="module", params=[(1, 2, 3), (2, 4), (3,)], ids=str)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return empty_backbone(backbone_settings("resnet18", request.param), SIZE).eval()


def features_of(backbone: Backbone) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, *grid, generator=generator)
        for c, grid in zip(backbone.info.channels, backbone.info.grids, strict=True)
    ]


@pytest.mark.parametrize("skips", [True, False])
def test_a_pyramid_becomes_one_logit_a_pixel(backbone: Backbone, skips: bool) -> None:
    decoder = build_decoder(
        backbone.info, ImageSettings(*SIZE), FinetuneSettings(skips=skips), seed=0
    ).eval()
    with torch.inference_mode():
        logits = decoder(features_of(backbone))
    assert logits.shape == (2, *SIZE)
    assert logits.isfinite().all()


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_the_deepest_level_alone_feeds_the_decoder(
    backbone: Backbone, skips: bool
) -> None:
    decoder = build_decoder(
        backbone.info, ImageSettings(*SIZE), FinetuneSettings(skips=skips), seed=0
    ).eval()
    features = features_of(backbone)
    with torch.inference_mode():
        before = decoder(features)
        for level in range(len(features)):
            changed = [f + 1 if place == level else f for place, f in enumerate(features)]
            reaches = not torch.equal(decoder(changed), before)
            assert reaches == (skips or level == len(features) - 1), level


def test_skips_change_nothing_but_what_their_blocks_take_in(backbone: Backbone) -> None:
    with_skips, without = (
        build_decoder(
            backbone.info, ImageSettings(*SIZE), FinetuneSettings(skips=skips), seed=0
        ).state_dict()
        for skips in (True, False)
    )
    assert with_skips.keys() == without.keys()
    different = {name for name in without if with_skips[name].shape != without[name].shape}
    steps = len(backbone.info.channels) - 1
    assert different == {
        f"steps.{step}.{part}.0.weight" for step in range(steps) for part in ("reduce", "project")
    }
