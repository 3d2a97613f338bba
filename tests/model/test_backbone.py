"""Backbones: weights of every family find their place by name, and nothing ever falls back to
random ones.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import Tensor, nn

from clsnf.core.config import IMAGENET_MEAN, IMAGENET_STD, BackboneSettings
from clsnf.core.errors import SettingsError, WeightsError
from clsnf.model.backbone import (
    Backbone,
    architecture_of,
    empty_backbone,
    fingerprint,
    load_backbone,
)
from clsnf.model.padding import pad_by_reflection
from tests.conftest import random_state
from tests.support.backbones import backbone_settings

LEVELS = (1, 2)
SIZE = (128, 96)
FAMILIES = (
    "resnet18",
    "regnetx_002",
    "tf_mobilenetv3_small_minimal_100",  # pads to "same" in its own way
    "convnext_atto",
    "vit_tiny_patch16_224",  # a position for each patch: a table that goes with the image size
    "swin_tiny_patch4_window7_224",  # maps come as (B, h, w, C)
)


def timm_s_own(architecture: str, state: dict[str, Tensor]) -> nn.Module:
    """timm's extractor with these weights, put in by timm."""
    arguments: dict[str, Any] = {
        "features_only": True,
        "out_indices": LEVELS,
        "pretrained": True,
        "pretrained_cfg_overlay": {"state_dict": dict(state)},
    }
    try:
        extractor: nn.Module = timm.create_model(architecture, img_size=SIZE, **arguments)
    except TypeError:
        extractor = timm.create_model(architecture, **arguments)
    pad_by_reflection(extractor)
    return extractor.eval()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_s_features_are_timm_s_for_the_same_weights(
    architecture: str, tmp_path: Path
) -> None:
    state = random_state(architecture)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    backbone, _ = load_backbone(backbone_settings(architecture, LEVELS, str(path)), SIZE)
    reference = timm_s_own(architecture, state)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    normalised = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    with torch.inference_mode():
        mine, theirs = backbone(images), reference(normalised)
    for level, (feature, expected) in enumerate(zip(mine, theirs, strict=True)):
        channels = reference.feature_info.channels()[level]  # type: ignore[union-attr, operator]
        if expected.shape[1] != channels:
            expected = expected.permute(0, 3, 1, 2)
        assert feature.shape[:2] == (2, channels)
        assert feature.std() > 0
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
        assert backbone.info.channels[level] == channels
        assert backbone.info.grids[level] == tuple(feature.shape[2:])


@pytest.mark.parametrize("form", ["plain", "state_dict", "module", "ema"])
def test_torch_files_in_the_usual_forms_are_read(
    form: str, tmp_path: Path, resnet18_weights: Path
) -> None:
    state = random_state("resnet18")
    content: Any = {
        "plain": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "module": {"model": {f"module.{name}": value for name, value in state.items()}},
        "ema": {"state_dict_ema": state},
    }[form]
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    _, expected = load_backbone(backbone_settings("resnet18", LEVELS, str(resnet18_weights)), SIZE)
    _, found = load_backbone(backbone_settings("resnet18", LEVELS, str(path)), SIZE)
    assert found == expected


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    torch.save({"conv1.weight": torch.zeros(1), "extra": Trap(sprung)}, path)
    with pytest.raises(WeightsError, match="can't be read as weights") as caught:
        load_backbone(backbone_settings("resnet18", LEVELS, str(path)), SIZE)
    assert not sprung.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def refused(settings: BackboneSettings, size: tuple[int, int] = SIZE) -> str:
    """The one line with which weights are refused."""
    with pytest.raises(WeightsError) as caught:
        load_backbone(settings, size)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights at all", None],
    ids=["empty", "text", "folder of tensors in a list"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_hold_no_weights_are_refused(
    content: bytes | None, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    if content is None:
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(content)
    assert str(path) in refused(backbone_settings("resnet18", LEVELS, str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    text = refused(backbone_settings("resnet18", LEVELS, str(path)))
    assert str(path) in text
    assert "'resnet18'" in text


def test_weights_of_another_architecture_name_the_first_names_that_are_missing(
    resnet18_weights: Path,
) -> None:
    text = refused(backbone_settings("convnext_atto", LEVELS, str(resnet18_weights)))
    assert str(resnet18_weights) in text
    assert "'convnext_atto'" in text
    assert "stem_0.weight (40, 3, 4, 4) is missing" in text
    assert "more" in text


def test_weights_of_another_width_name_the_first_shapes_that_differ(resnet18_weights: Path) -> None:
    text = refused(backbone_settings("resnet50", LEVELS, str(resnet18_weights)))
    assert "layer1.0.conv1.weight is (64, 64, 3, 3), not (64, 64, 1, 1)" in text


def test_shapes_that_no_resampling_mends_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_file(random_state("vit_tiny_patch16_224"), path)
    text = refused(backbone_settings("vit_small_patch16_224", LEVELS, str(path)))
    assert "is (1, 1, 192), not (1, 1, 384)" in text


def test_weights_that_timm_does_not_have_and_no_file_gives_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nameless = next(
        name
        for name in timm.list_models()
        if not timm.is_model_pretrained(name) and name.startswith("resnet")
    )
    text = refused(backbone_settings(nameless, LEVELS))
    assert "no pretrained weights" in text
    assert "--weights FILE" in text


def test_a_hub_that_can_t_be_reached_is_said_at_once_with_the_way_to_bring_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    text = refused(backbone_settings("resnet18", LEVELS))
    assert waited == []
    assert "can't be fetched" in text
    assert "--weights FILE" in text
    assert "timm.create_model('resnet18', pretrained=True)" in text
    assert "demo" in text
    assert hub.HF_HUB_OFFLINE is False


def test_levels_that_are_not_there_are_not_blamed_on_the_hub() -> None:
    with pytest.raises(SettingsError, match=r"'resnet18' gives no feature maps for levels 1,7"):
        load_backbone(backbone_settings("resnet18", (1, 7)), SIZE)


@pytest.mark.parametrize("levels", [(7,), (1, 9)])
def test_levels_that_are_not_there_are_named(levels: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="gives no feature maps for levels") as caught:
        empty_backbone(backbone_settings("resnet18", levels), SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"), [("resnet81", "Did you mean 'resnet"), ("x!", "Valid: ")]
)
def test_an_unknown_name_brings_the_nearest(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match="There is no timm model") as caught:
        architecture_of(BackboneSettings(name))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_levels_smaller_than_their_kernels_are_padded(size: tuple[int, int]) -> None:
    backbone = empty_backbone(backbone_settings("convnext_atto", (1, 2)), size)
    assert backbone.info.grids[1] == (size[0] // 16, size[1] // 16)


def norms(backbone: Backbone) -> list[nn.BatchNorm2d]:
    return [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_batch_norm_statistics_never_move_while_its_weights_train(resnet18_weights: Path) -> None:
    backbone, before = load_backbone(
        backbone_settings("resnet18", LEVELS, str(resnet18_weights)), SIZE
    )
    backbone.train()
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    assert norms(backbone)
    features = backbone(torch.rand(2, 3, *SIZE))
    sum(level.square().sum() for level in features).backward()
    assert fingerprint(backbone) == before
    for layer in norms(backbone):
        assert not layer.training
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().sum() > 0
        assert layer.bias.grad is not None


def test_one_image_s_features_do_not_depend_on_the_others(resnet18_weights: Path) -> None:
    backbone, _ = load_backbone(backbone_settings("resnet18", LEVELS, str(resnet18_weights)), SIZE)
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for together, alone in zip(backbone.train()(images), backbone(images[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_that_of_the_weights_not_of_the_file_or_memory_format(
    resnet18_weights: Path, tmp_path: Path
) -> None:
    settings = backbone_settings("resnet18", LEVELS, str(resnet18_weights))
    backbone, found = load_backbone(settings, SIZE)
    assert fingerprint(backbone.to(memory_format=torch.channels_last)) == found
    other = tmp_path / "other.safetensors"
    save_file(random_state("resnet18", seed=1), other)
    assert load_backbone(backbone_settings("resnet18", LEVELS, str(other)), SIZE)[1] != found
    copy = empty_backbone(backbone_settings("resnet18", LEVELS), SIZE)
    assert fingerprint(copy) != found
    copy.load_state_dict(backbone.state_dict())
    assert fingerprint(copy) == found
