"""A backbone's layers, as timm divides its networks, under the names of its feature extractors."""

import pytest
import torch
from torch import nn

from clsnf.model.backbone import Backbone, empty_backbone
from clsnf.model.layer_groups import network_layers
from tests.support.backbones import backbone_settings


def layers_of(architecture: str, levels: tuple[int, ...], size: int = 64) -> list[list[str]]:
    """The names of each layer's parameters, without what the extractor puts before them."""
    backbone = empty_backbone(backbone_settings(architecture, levels), (size, size))
    names = {p: name for name, p in backbone.extractor.named_parameters()}
    layers = network_layers(backbone, torch.rand(1, 3, size, size))
    return [
        [names[p].removeprefix("model.").removeprefix("body.") for p in layer] for layer in layers
    ]


def test_a_transformer_has_a_stem_and_its_blocks_as_far_as_the_deepest_level() -> None:
    stem, *blocks = layers_of("vit_tiny_patch16_224", (1, 3))
    patches = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(stem) == {"cls_token", "pos_embed"} | patches
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        assert len(block) == 12
        assert all(name.startswith(f"blocks.{number}.") for name in block)


@pytest.mark.parametrize(
    ("architecture", "token"),
    [
        ("vit_small_patch14_reg4_dinov2", "reg_token"),  # timm puts it behind the last block
        ("vit_xsmall_patch16_clip_224", "norm_pre.weight"),  # timm puts it into the last block
    ],
)
def test_what_stands_before_the_first_block_is_in_the_stem(architecture: str, token: str) -> None:
    stem, first, second = layers_of(architecture, (0, 1), 112)
    assert token in stem
    assert all(name.startswith("blocks.0.") for name in first)
    assert all(name.startswith("blocks.1.") for name in second)


@pytest.mark.parametrize(
    ("architecture", "levels", "first", "last", "number"),
    [
        ("resnet18", (1, 2), "conv1", "layer2.1", 5),
        ("convnext_atto", (0, 1), "stem_0", "stages_1.blocks.1", 5),  # flattened names
        ("densenet121", (1, 2), "features_conv0", "features_denseblock2.denselayer12", 19),
        ("swin_tiny_patch4_window7_224", (0, 1), "patch_embed", "layers_1.blocks.1", 5),
        ("legacy_xception", (1, 2), "conv1", "block2", 3),  # the body keeps its deeper blocks
    ],
)
def test_layers_are_found_under_the_names_of_every_kind_of_extractor(
    architecture: str, levels: tuple[int, ...], first: str, last: str, number: int
) -> None:
    layers = layers_of(architecture, levels, 224 if "swin" in architecture else 64)
    assert len(layers) == number
    assert layers[0][0].startswith(first)
    assert layers[-1][-1].startswith(last)
    names = [name for layer in layers for name in layer]
    assert len(names) == len(set(names))


def test_where_timm_knows_no_layers_twelve_tensors_are_one() -> None:
    layers = layers_of("pit_ti_224", (0, 1), 224)
    assert {len(layer) for layer in layers[:-1]} == {12}
    assert layers[0][0].startswith(("patch_embed", "pos_embed"))


def test_parameters_without_a_name_that_timm_knows_join_the_layer_before_them() -> None:
    class Wrapped(nn.Module):
        def __init__(self, extractor: nn.Module) -> None:
            super().__init__()
            self.model, self.neck = extractor, nn.Conv2d(128, 8, 1)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [self.neck(self.model(images)[-1])]

    settings = backbone_settings("resnet18", (1, 2))
    wrapped = Wrapped(empty_backbone(settings, (64, 64)).extractor)
    backbone = Backbone(wrapped, "resnet18", settings, (64, 64))
    backbone.requires_grad_(False)
    layers = network_layers(backbone, torch.rand(1, 3, 64, 64))
    assert len(layers) == 5
    assert any(parameter is wrapped.neck.weight for parameter in layers[-1])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
