"""What a user leaves open follows from the backbone, and a resolved setting stays as it is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from clsnf.core.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneSettings,
    DetectorSettings,
    FlowSettings,
    ImageSettings,
    from_stored,
    key_content,
    to_dict,
)
from clsnf.core.errors import SettingsError
from clsnf.model.architectures import ArchitectureFacts, facts_of, numbers_of_levels
from clsnf.model.backbone import empty_backbone, joined
from clsnf.model.resolve import resolved
from tests.support.backbones import backbone_settings


def settings_of(name: str, size: int = 256, **backbone: object) -> DetectorSettings:
    return DetectorSettings(ImageSettings(size, size), BackboneSettings(name, **backbone))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "levels", "multiple", "join"),
    [
        ("resnet18", (1, 2, 3), 16, "none"),
        ("demo", (1, 2, 3), 16, "none"),
        ("convnext_atto", (0, 1, 2), 16, "none"),
        ("swin_tiny_patch4_window7_224", (0, 1, 2), 16, "none"),
        ("levit_128s", (0,), 16, "none"),  # nothing finer than 16 pixels
        ("vit_tiny_patch16_224", (2, 5, 8), 16, "mean"),
        ("vit_small_patch14_dinov2", (2, 5, 8), 14, "mean"),
    ],
)
def test_levels_and_sizes_suit_the_architecture(
    name: str, levels: tuple[int, ...], multiple: int, join: str
) -> None:
    found = resolved(settings_of(name))
    assert found.backbone.levels == levels
    assert found.backbone.join == join
    assert found.image.multiple == multiple
    assert found.flow.neighbourhood == (1 if join == "mean" else 3)


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("resnet18", IMAGENET_MEAN, "bicubic"),
        ("resnet18.tv_in1k", IMAGENET_MEAN, "bilinear"),  # the tag names the weights
        ("demo", IMAGENET_MEAN, "bilinear"),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), "bicubic"),
        ("vit_base_patch32_clip_224", (0.48145466, 0.4578275, 0.40821073), "bicubic"),
    ],
)
def test_images_are_shown_as_the_weights_know_them(
    name: str, mean: tuple[float, ...], interpolation: str
) -> None:
    found = resolved(settings_of(name))
    assert found.backbone.mean == mean
    assert found.image.interpolation == interpolation


def test_a_file_s_own_word_goes_before_timm_s(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    expects = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    save_file(
        {"x": torch.zeros(1)},
        file,
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": json.dumps(expects)},
    )
    found = resolved(settings_of("vit_tiny_patch16_224", weights=str(file)))
    assert (found.backbone.mean, found.backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.image.interpolation == "bilinear"


def test_what_is_given_is_kept() -> None:
    given_ones = DetectorSettings(
        ImageSettings(interpolation="bilinear", multiple=8),
        BackboneSettings(
            "vit_tiny_patch16_224", (2, 5), join="none", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
        ),
        flow=FlowSettings(neighbourhood=5),
    )
    assert resolved(given_ones) == given_ones
    some = dataclasses.replace(
        given_ones, backbone=dataclasses.replace(given_ones.backbone, std=None)
    )
    assert resolved(some).backbone.mean == (0.1, 0.2, 0.3)
    assert resolved(some).backbone.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "demo"])
def test_resolving_twice_changes_nothing(name: str) -> None:
    once = resolved(settings_of(name))
    assert resolved(once) == once


@given(
    depth=st.integers(1, 48),
    shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6, unique=True),
)
def test_shares_of_the_depth_are_levels_that_exist(depth: int, shares: list[float]) -> None:
    facts = ArchitectureFacts(
        "x", "transformer", (16,) * depth, (8,) * depth, (224, 224), IMAGENET_MEAN, IMAGENET_STD,
        "bicubic",
    )  # fmt: skip
    found = numbers_of_levels(tuple(sorted(shares)), facts)
    assert list(found) == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < depth
    assert numbers_of_levels((1.0,), facts) == (depth - 1,)


def test_levels_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="'resnet18' has levels 0 to 4, not 7"):
        resolved(settings_of("resnet18", levels=(1, 7)))


@pytest.mark.parametrize("levels", [(1, 0.5), (0.5, 0.4), (0.0,), (1.5,), (-1,), ()])
def test_levels_are_numbers_or_shares_and_rise(levels: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="rising order"):
        BackboneSettings(levels=levels)


def test_what_an_earlier_version_could_not_say_is_what_it_did() -> None:
    stored = to_dict(settings_of("vit_tiny_patch16_224", levels=(1, 2, 3)))
    for section, name in (
        ("backbone", "mean"),
        ("backbone", "std"),
        ("backbone", "join"),
        ("image", "interpolation"),
        ("image", "multiple"),
        ("flow", "neighbourhood"),
    ):
        del stored[section][name]
    found = from_stored(stored)
    assert found.backbone.mean == IMAGENET_MEAN
    assert found.backbone.join == "none"
    assert found.image.interpolation == "bilinear"
    assert found.image.size == (256, 256)
    assert resolved(found) == found


def test_a_size_that_does_not_fit_is_padded_and_only_that_changes_the_key() -> None:
    fits, pads = (ImageSettings(s, s, interpolation="bilinear", multiple=14) for s in (252, 256))
    assert (fits.size, pads.size) == ((252, 252), (266, 266))
    assert (fits.may_pad, pads.may_pad) == (False, True)
    assert "multiple" not in key_content(fits)
    assert key_content(pads)["multiple"] == 14


def test_levels_of_one_shape_become_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, finer = (
        torch.randn(2, 5, *grid, generator=generator) for grid in ((3, 4), (3, 4), (6, 8))
    )
    kept, mean = joined([finer, first, second])
    assert kept is finer
    torch.testing.assert_close(mean, (first + second) / 2)


def test_a_transformer_s_joined_band_is_one_level_of_a_network() -> None:
    apart = backbone_settings("vit_tiny_patch16_224", (4, 6, 9))
    together = dataclasses.replace(apart, join="mean")
    assert len(empty_backbone(apart, (64, 96)).info.grids) == 3
    info = empty_backbone(together, (64, 96)).info
    assert info.grids == ((4, 6),)
    assert info.channels == facts_of("vit_tiny_patch16_224").channels[:1]
