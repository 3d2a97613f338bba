"""The authors' decoder: the same maps as a plain reference with the same parameters, and trainable
like the compact one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
)
from clsnf.core.errors import SettingsError
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.detector import Detector
from clsnf.model.backbone import BackboneInfo, empty_backbone, fingerprint
from clsnf.model.network import build_decoder
from clsnf.model.paper_decoder import BASIC, BOTTLENECK, PaperDecoder, shape_for
from clsnf.training.prepare import rows_of
from tests.support.authors_reference import Reference, WideDecoder, liven
from tests.support.backbones import backbone_settings
from tests.support.small_data import TINY, write_category

RESNET18 = (128, 256, 512)


def grids_of(
    size: tuple[int, int], strides: tuple[int, ...] = (8, 16, 32)
) -> list[tuple[int, int]]:
    return [(size[0] // stride, size[1] // stride) for stride in strides]


def features_of(
    channels: tuple[int, ...], grids: list[tuple[int, int]], batch: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, h, w, generator=generator).relu()
        for c, (h, w) in zip(channels, grids, strict=True)
    ]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_with_the_reference_s_parameters_it_gives_the_reference_s_map(
    size: tuple[int, int], skips: bool
) -> None:
    reference = Reference(skips=skips, depth=1).decoder
    decoder = PaperDecoder(RESNET18, grids_of(size), size, skips=skips).eval()
    decoder.load_state_dict(reference.state_dict())  # the same names, none left over
    features = features_of(RESNET18, grids_of(size))
    with torch.no_grad():
        expected = reference([None, *features])[:, 0]
        found = torch.sigmoid(decoder(features))
    assert found.shape == (2, *size)
    assert expected.std() > 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_wide_decoder_gives_the_reference_s_map() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = WideDecoder().eval()
        liven(reference, 0.7, 1.2)
    channels = (512, 1024, 2048)
    decoder = PaperDecoder(channels, grids_of((64, 64)), (64, 64)).eval()
    decoder.load_state_dict(reference.state_dict())
    features = features_of(channels, grids_of((64, 64)), batch=1)
    with torch.no_grad():
        expected = reference([None, *features])[:, 0]
        found = torch.sigmoid(decoder(features))
    assert expected.std() > 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_each_backbone_of_the_authors_takes_its_own_decoder() -> None:
    assert shape_for(512) is BASIC
    assert shape_for(2048) is BOTTLENECK


def test_skips_are_what_the_stages_see_and_nothing_else() -> None:
    grids = grids_of((64, 64))
    features = features_of(RESNET18, grids)
    changed = [features[0] + 1, features[1] + 1, features[2]]
    for skips in (True, False):
        decoder = PaperDecoder(RESNET18, grids, (64, 64), skips=skips).eval()
        assert torch.equal(decoder(features), decoder(changed)) is not skips


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((8, 16, 32), [[1], [0], [], []]),
        ((4, 8, 16, 32), [[2], [1], [0], []]),
        (
            (4, 8, 16),
            [[], [1], [0], []],
        ),  # the deepest level is no skip, also where it has a stage's size
        ((2, 32), [[], [], [], [0]]),
        ((16, 16, 16), [[0, 1], [], [], []]),  # a plain vision transformer
        ((14, 14), [[0], [], [], []]),  # no stage's size: the nearest one
        ((32,), [[], [], [], []]),
    ],
)
def test_a_level_joins_the_stage_of_its_size(
    strides: tuple[int, ...], expected: list[list[int]]
) -> None:
    channels, grids = tuple(8 * (i + 1) for i in range(len(strides))), grids_of((224, 224), strides)
    decoder = PaperDecoder(channels, grids, (224, 224)).eval()
    assert decoder.skip_levels == expected
    with torch.no_grad():
        assert decoder(features_of(channels, grids, batch=1)).shape == (1, 224, 224)


def test_every_parameter_learns() -> None:
    decoder = PaperDecoder(RESNET18, grids_of((64, 64)), (64, 64)).train()
    decoder(features_of(RESNET18, grids_of((64, 64)))).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def built(seed: int = 0, **settings: Any) -> torch.nn.Module:
    info = BackboneInfo("resnet18", RESNET18, tuple(grids_of((64, 64))))
    return build_decoder(info, ImageSettings(64, 64), FinetuneSettings(**settings), seed)


def test_the_setting_chooses_the_decoder_and_the_seed_its_parameters() -> None:
    assert not isinstance(built(), PaperDecoder)
    one, same, other = (built(seed, decoder="authors") for seed in (0, 0, 1))
    assert isinstance(one, PaperDecoder)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_an_unknown_decoder_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'authors'"):
        FinetuneSettings(decoder="author")


def test_it_sits_on_other_backbones_too() -> None:
    backbone = empty_backbone(backbone_settings("mobilenetv3_small_050", (1, 2, 3, 4)), (96, 96))
    decoder = PaperDecoder(backbone.info.channels, backbone.info.grids, (96, 96)).eval()
    with torch.no_grad():
        assert decoder(backbone(torch.rand(1, 3, 96, 96))).shape == (1, 96, 96)


def test_a_detector_trains_saves_and_loads_with_it(resnet18_weights: Path, tmp_path: Path) -> None:
    table = assign_splits(
        read_category(write_category(tmp_path / "data" / "plate", train=8).parent, "plate"),
        0.4,
        seed=0,
    )
    part = {
        name.partition(".")[2]: value
        for name, value in TINY.items()
        if name.startswith("finetune.")
    }
    settings = DetectorSettings(
        image=ImageSettings(64, 64),
        backbone=BackboneSettings("resnet18", (1, 2), str(resnet18_weights)),
        finetune=FinetuneSettings(decoder="authors", **part),
        flow=FlowSettings(depth=0),
    )
    detector = Detector.fit(table, settings, device="cpu")
    detector.save(tmp_path / "model")
    again = Detector.load(tmp_path / "model", "cpu")
    assert isinstance(again.network.decoder, PaperDecoder)
    untrained = built_for(detector)
    assert (
        fingerprint(again.network.decoder)
        == fingerprint(detector.network.decoder)
        != fingerprint(untrained)
    )
    paths = rows_of(table, "test")["path"].to_pylist()
    np.testing.assert_allclose(again.predict(paths).maps, detector.predict(paths).maps, atol=1e-6)


def built_for(detector: Detector) -> torch.nn.Module:
    """The decoder that training started from."""
    settings = detector.settings
    return build_decoder(
        detector.network.backbone.info, settings.image, settings.finetune, settings.seed
    )
