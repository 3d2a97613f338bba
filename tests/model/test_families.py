"""Every family of timm's, by its smallest architecture: it trains, saves and reloads bit for bit,
or is refused in one line that says what to do. A few are exported, too.

A family is a module of timm's. Each trial has a process of its own and a time limit, because a
network may take its process with it. Weights are random.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from timm.models import _registry as registry

from clsnf.core.config import DetectorSettings, replaced
from clsnf.model.extractors import own_canvas
from clsnf.serving.try_backbone import BackboneTrial, try_backbone

# The smallest of each family.
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "ens_adv_inception_resnet_v2",
    "inception_v3": "adv_inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "jx_nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
# Architectures that once failed in ways of their own.
OTHERS = (
    "coat_lite_tiny",
    "eva02_tiny_patch14_224",
    "lambda_resnet26t",
    "mixnet_s",
    "mobileone_s0",
    "repvgg_a0",
    "vit_small_patch14_dinov2",
)
TOO_LARGE = {"deepseek_vit", "gemma4_vit"}  # their smallest takes more memory than a test may
NAMES = sorted({name for family, name in SMALLEST.items() if family not in TOO_LARGE} | {*OTHERS})

# Those that CI tries: one of each kind of extractor, and of each fault that there was. The others
# have the mark "sweep".
IN_CI = {
    *OTHERS,
    *("cait_xxs24_224", "coat_tiny", "convit_tiny", "crossvit_tiny_240", "efficientvim_m1"),
    *("efficientvit_m0", "fastvit_t8", "gcvit_xxtiny", "halonet_h1", "hiera_tiny_224"),
    *("legacy_xception", "levit_128s", "test_convnext", "test_efficientnet", "test_resnet"),
    *("test_vit", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "volo_d1_224"),
}

SIZE = 96
TIME_LIMIT = 300.0
# Architectures that do not work at any size, or whose refusal at SIZE is wrong, with a part of what
# is said. One that works has to leave the table.
FAULTS: dict[str, str] = {}


def test_every_family_has_its_smallest_architecture_here() -> None:
    assert set(SMALLEST) == set(registry._module_to_models)
    for family, name in SMALLEST.items():
        assert name in registry._module_to_models[family]


def trial_at(name: str, size: tuple[int, int]) -> BackboneTrial:
    wanted = {"backbone.name": name, "image.height": size[0], "image.width": size[1]}
    settings = replaced(DetectorSettings(), wanted)
    # An export takes as long as all else together: those that once failed stand for it.
    formats = ["torch"] if name in OTHERS else []
    return try_backbone(settings, formats=formats, time_limit=TIME_LIMIT)


def wrong_with(name: str) -> str | None:
    """What is wrong with an architecture; None where it works at SIZE, or at its own size after a
    refusal that says so.
    """
    trial = trial_at(name, (SIZE, SIZE))
    if trial.fault is None:
        return None
    if trial.fault.step != "load" or not trial.fault.refused:
        return trial.fault.reason
    if "--image-size" not in trial.fault.reason:
        return trial.fault.reason
    again = trial_at(name, own_canvas(name))
    return None if again.fault is None else again.fault.reason


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str | None]]]:
    """What is wrong with each architecture that this session asks for: two at a time."""
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_family.__name__
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(wrong_with, name) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in IN_CI else pytest.mark.sweep) for n in NAMES],
)
def test_family(name: str, faults: dict[str, Future[str | None]]) -> None:
    fault = faults[name].result()
    if name in FAULTS:
        assert fault is not None, f"{name} works now: take it out of FAULTS"
        assert FAULTS[name] in fault
    else:
        assert fault is None
