"""Operations are counted as published ones are, and no weights are allocated for it."""

import pytest
import timm
import torch

from clsnf.core.config import DetectorSettings, replaced
from clsnf.core.errors import SettingsError
from clsnf.model.flops import BackboneCost, cost_of, count_flops
from clsnf.model.resolve import resolved


@pytest.mark.parametrize(
    ("architecture", "size", "published"),  # billions of multiplications with their additions
    [
        ("resnet18", 224, 1.82),
        ("resnet50", 224, 4.11),
        ("vit_tiny_patch16_224", 224, 1.26),
        ("vit_small_patch14_dinov2", 518, 46.76),
        ("convnext_atto", 224, 0.55),
    ],
)
def test_the_count_for_a_whole_network_is_the_published_one(
    architecture: str, size: int, published: float
) -> None:
    with torch.device("meta"):
        network = timm.create_model(architecture).eval()
    assert count_flops(network, (size, size)) / 2e9 == pytest.approx(published, rel=0.02)


def cost(name: str, size: int, **values: object) -> BackboneCost:
    settings = replaced(DetectorSettings(), {"backbone.name": name, **values})
    return cost_of(resolved(settings).backbone, (size, size))


def test_what_lies_behind_the_deepest_level_costs_nothing() -> None:
    shallow = cost("resnet18", 256, **{"backbone.levels": [1, 2]})
    default = cost("resnet18", 256)
    assert shallow.flops < default.flops
    assert shallow.parameters < default.parameters < 11e6  # ResNet-18 as a whole has 11.7 million
    assert default.grids == ((64, 64), (32, 32), (16, 16))
    assert default.channels == (64, 128, 256)


def test_operations_of_a_convolutional_network_follow_the_area() -> None:
    assert cost("resnet18", 256).flops == 4 * cost("resnet18", 128).flops


def test_a_network_of_many_billions_is_counted_without_its_memory() -> None:
    found = cost("vit_giant_patch14_dinov2", 518)
    assert found.parameters > 5e8
    assert found.flops > 1e12


def test_a_size_that_the_backbone_does_not_take_is_refused() -> None:
    with pytest.raises(SettingsError, match="halonet_h1"):
        cost("halonet_h1", 96)
