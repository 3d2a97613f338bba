"""Weights files: of timm, of the hub and of the original repositories, at other sizes than their
pretraining's; and one right line for every file that does not fit.
"""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, WeightsError
from clsnf.model.backbone import architecture_of, load_backbone
from clsnf.model.backbone_weights import filled_extractor
from tests.conftest import random_state
from tests.support.backbones import backbone_settings

State = dict[str, Tensor]
SMALL = (96, 64)


def filled(architecture: str, file: Path, size: tuple[int, int], levels: Any = (1, 2)) -> nn.Module:
    return filled_extractor(architecture, levels, size, file)


def saved(state: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def assert_same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def refused(architecture: str, file: Path, size: tuple[int, int], levels: Any = (1, 2)) -> str:
    with pytest.raises((WeightsError, SettingsError)) as caught:
        filled(architecture, file, size, levels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("vit_small_patch14_dinov2", (98, 70)),
        ("vit_small_patch14_reg4_dinov2", (98, 70)),
        ("vit_small_patch16_dinov3", SMALL),
        ("eva02_tiny_patch14_224", (98, 70)),
        ("deit3_small_patch16_224", SMALL),
        ("vit_xsmall_patch16_clip_224", SMALL),
        ("swinv2_cr_tiny_224", (64, 96)),
        ("maxvit_rmlp_pico_rw_256", (128, 64)),
        ("vit_relpos_small_patch16_224", SMALL),
    ],
)
def test_a_transformer_without_a_classifier_loads_at_another_size(
    architecture: str, size: tuple[int, int], tmp_path: Path
) -> None:
    state = random_state(architecture)
    extractor = filled(architecture, saved(state, tmp_path / "w.safetensors"), size).eval()
    assert_same(extractor, filled(architecture, saved(state, tmp_path / "w.pth"), size))
    with torch.inference_mode():
        maps = extractor(torch.rand(1, 3, *size))
    assert len(maps) == 2
    assert all(level.std() > 0 for level in maps)


def test_positions_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    state = random_state("vit_small_patch14_dinov2")
    file = saved(state, tmp_path / "w.safetensors")
    extractor = filled("vit_small_patch14_dinov2", file, (98, 70))
    expected = resample_abs_pos_embed(state["pos_embed"], [7, 5], [37, 37], num_prefix_tokens=1)
    assert torch.equal(extractor.state_dict()["model.pos_embed"], expected)


def facebook_dinov2(state: State) -> Any:
    return state | {"mask_token": torch.zeros(1, 384)}


def facebook_dinov2_with_registers(state: State) -> Any:
    state = dict(state)
    state["register_tokens"] = state.pop("reg_token")
    first = torch.zeros(1, 1, 384)
    return state | {"pos_embed": torch.cat([first, state["pos_embed"]], 1), "mask_token": first[0]}


def facebook_dinov3(state: State) -> Any:
    back = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    named = {re.sub("|".join(back), lambda m: back[m[0]], k): v for k, v in state.items()}
    return named | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}


def mae(state: State) -> Any:
    import argparse

    decoder = {"decoder_embed.weight": torch.zeros(8, 192), "mask_token": torch.zeros(1, 1, 8)}
    kept = {name: value for name, value in state.items() if not name.startswith("head")}
    return {"model": kept | decoder, "args": argparse.Namespace(lr=1.0), "epoch": 799}


def dino(state: State) -> Any:
    kept = {name: value for name, value in state.items() if not name.startswith("head")}
    head = {"head.last_layer.weight": torch.zeros(4, 4)}
    teacher = {f"backbone.{name}": value for name, value in kept.items()} | head
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 300}


_OPENAI = [
    ("patch_embed.proj", "conv1"),
    ("pos_embed", "positional_embedding"),
    ("blocks.", "transformer.resblocks."),
    ("norm_pre", "ln_pre"),
    (".norm1", ".ln_1"),
    (".norm2", ".ln_2"),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]


def openai_clip(state: State) -> Any:
    made = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    for name, value in state.items():
        if name.startswith("head"):
            continue
        if name == "cls_token":
            name, value = "class_embedding", value[0, 0]
        elif name == "pos_embed":
            value = value[0]
        elif name.startswith("norm."):
            name = name.replace("norm.", "ln_post.")
        for mine, theirs in _OPENAI:
            name = name.replace(mine, theirs)
        made[f"visual.{name}"] = value
    return made


def openclip_trunk(state: State) -> Any:
    return {f"visual.trunk.{name}": value for name, value in state.items()}


def eva02_repository(state: State) -> Any:
    back = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    named = {}
    for name, value in state.items():
        for mine, theirs in back.items():
            name = name.replace(mine, theirs)
        named[name.replace("mlp.norm", "mlp.ffn_ln")] = value
    return {"module": named}


def microsoft_swin(state: State) -> Any:
    def theirs(name: str) -> str:
        name = re.sub(
            r"layers.(\d+).downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )
        return name.replace("head.fc.", "head.")

    indices = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49).long()}
    return {"model": {theirs(name): value for name, value in state.items()} | indices}


def facebook_convnext(state: State) -> Any:
    def theirs(name: str) -> str:
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        return name.replace("head.fc", "head")

    linear = {n: v.flatten(1) if ".mlp.fc" in n and v.ndim == 4 else v for n, v in state.items()}
    return {"model": {theirs(name): value for name, value in linear.items()}}


def facebook_deit3(state: State) -> Any:
    named = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in state.items()}
    return {"model": named}


@pytest.mark.parametrize(
    ("architecture", "size", "original"),
    [
        ("vit_small_patch14_dinov2", (98, 70), facebook_dinov2),
        ("vit_small_patch14_reg4_dinov2", (98, 70), facebook_dinov2_with_registers),
        ("vit_small_patch16_dinov3", SMALL, facebook_dinov3),
        ("vit_tiny_patch16_224", SMALL, mae),
        ("vit_tiny_patch16_224", SMALL, dino),
        ("vit_xsmall_patch16_clip_224", SMALL, openai_clip),
        ("vit_tiny_patch16_224", SMALL, openclip_trunk),
        ("eva02_tiny_patch14_224", (98, 70), eva02_repository),
        ("swin_tiny_patch4_window7_224", SMALL, microsoft_swin),
        ("convnext_atto", SMALL, facebook_convnext),
        ("deit3_small_patch16_224", SMALL, facebook_deit3),
    ],
)
def test_files_of_the_original_repositories_load_as_timm_s(
    architecture: str,
    size: tuple[int, int],
    original: Callable[[State], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = random_state(architecture)
    expected = filled(architecture, saved(state, tmp_path / "w.safetensors"), size)
    found = filled(architecture, saved(original(state), tmp_path / "original.pth"), size)
    assert_same(found, expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "prefix",
    ["module.", "backbone.", "model.", "teacher.backbone.", "encoder.", "visual.", "body.", "x.y."],
)
def test_a_prefix_of_a_wrapper_is_read_over(prefix: str, tmp_path: Path) -> None:
    state = random_state("convnext_atto")
    file = saved({f"{prefix}{n}": v for n, v in state.items()}, tmp_path / "w.safetensors")
    if prefix == "x.y.":  # no wrapper that anyone uses
        assert "stem_0.weight (40, 3, 4, 4) is missing" in refused("convnext_atto", file, SMALL)
        return
    expected = filled("convnext_atto", saved(state, tmp_path / "plain.pth"), SMALL)
    assert_same(filled("convnext_atto", file, SMALL), expected)


@pytest.mark.parametrize("architecture", ["legacy_xception", "vit_tiny_patch16_224", "resnet18"])
def test_extractors_of_each_kind_take_timm_s_file_and_their_own(
    architecture: str, tmp_path: Path
) -> None:
    state = random_state(architecture)
    extractor = filled(architecture, saved(state, tmp_path / "w.safetensors"), (224, 224))
    for name, value in extractor.state_dict().items():
        whole = name.removeprefix("body.").removeprefix("model.")
        assert torch.equal(value, state[whole]), name
    own = saved(extractor.state_dict(), tmp_path / "own.pth")
    assert_same(filled(architecture, own, (224, 224)), extractor)


def test_deeper_stages_and_the_classifier_may_be_absent(tmp_path: Path) -> None:
    state = {n: v for n, v in random_state("resnet18").items() if n[:6] not in ("layer4", "fc.wei")}
    file = saved(state, tmp_path / "w.safetensors")
    filled("resnet18", file, SMALL, (1, 2, 3))
    text = refused("resnet18", file, SMALL, (2, 3, 4))
    assert "layer4.0.conv1.weight (512, 256, 3, 3) is missing" in text
    assert "It fits levels 0 to 3" in text


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        pytest.param("cait_xxs24_224", 224, marks=pytest.mark.slow),
        pytest.param("convit_tiny", 224, marks=pytest.mark.slow),
        ("crossvit_9_240", 240),
        ("hiera_tiny_224", 224),
        ("gcvit_xxtiny", 224),
        ("gmixer_24_224", 224),
        ("pit_ti_224", 224),
        ("nest_tiny", 224),
        ("levit_128s", 224),
    ],
)
def test_an_architecture_of_one_size_says_so_and_does_not_blame_the_file(
    architecture: str, own: int, tmp_path: Path
) -> None:
    file = saved(random_state(architecture), tmp_path / "w.safetensors")
    text = refused(architecture, file, (256, 256))
    assert f"'{architecture}' is fixed to {own}x{own} pixels, not 256x256" in text
    assert f"--image-size {own}" in text
    filled(architecture, file, (own, own))


def test_a_size_that_patches_do_not_cover_brings_the_nearest_two(tmp_path: Path) -> None:
    from clsnf.model.extractors import size_error, sizes_near, takes

    assert sizes_near("vit_small_patch14_dinov2", (1, 2), (256, 256)) == ((252, 252), (266, 266))
    assert not takes("vit_small_patch14_dinov2", (1, 2), (256, 256))
    assert takes("vit_small_patch14_dinov2", (1, 2), (252, 280))
    text = str(size_error("vit_small_patch14_dinov2", (1, 2), (256, 256)))
    assert text.endswith("are of 252x252 and 266x266: give --image-size 252 or 266.")


def test_levels_that_are_not_there_bring_those_that_are(tmp_path: Path) -> None:
    file = saved(random_state("resnet18"), tmp_path / "w.safetensors")
    text = refused("resnet18", file, SMALL, (1, 7))
    assert "no feature maps for levels 1,7: it has levels 0 to 4, choose --levels" in text


def test_a_tiny_file_of_a_giant_model_costs_no_memory(tmp_path: Path) -> None:
    file = saved({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "w.safetensors")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from clsnf.core.errors import WeightsError\n"
        "from clsnf.model.backbone_weights import filled_extractor\n"
        "import timm; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: filled_extractor('vit_giant_patch14_dinov2', (10, 20), (224, 224), Path(sys.argv[1]))"
        "\nexcept WeightsError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    text, grown = done.stdout.strip().splitlines()
    assert "does not fit 'vit_giant_patch14_dinov2'" in text
    assert int(grown) < 500  # MiB; the network has 4000


@pytest.mark.parametrize("form", ["model", "checkpoint", "torchscript"])
def test_a_pickled_model_is_refused_with_the_command_that_makes_a_safe_file(
    form: str, tmp_path: Path
) -> None:
    import timm

    model = timm.create_model("resnet10t").eval()
    file = tmp_path / "pickled.pth"
    if form == "torchscript":
        torch.jit.trace(model, torch.zeros(1, 3, 64, 64)).save(str(file))
    else:
        torch.save(model if form == "model" else {"model": model, "epoch": 3}, file)
    text = refused("resnet10t", file, SMALL)
    assert "holds pickled objects, which run code" in text
    command = text[text.index('python -c "') + len('python -c "') : text.rindex('"')]
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
    safe = saved(model.state_dict(), tmp_path / "expected.pth")
    made = filled("resnet10t", tmp_path / "pickled.safetensors", SMALL)
    assert_same(made, filled("resnet10t", safe, SMALL))


def test_a_pickle_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plain.pkl"
    file.write_bytes(pickle.dumps({"a": object()}))
    assert "can't be read as weights" in refused("resnet18", file, SMALL)


def test_a_name_with_a_tag_takes_a_file_and_an_unknown_tag_brings_the_nearest(
    tmp_path: Path,
) -> None:
    state = random_state("vit_small_patch16_224")
    state = {name: value for name, value in state.items() if not name.startswith("head")}
    file = saved(state, tmp_path / "w.safetensors")
    settings = backbone_settings("vit_small_patch16_224.dino", (1, 2), str(file))
    assert load_backbone(settings, SMALL)[0].info.channels == (384, 384)
    with pytest.raises(SettingsError, match=r"no weights .*Did you mean 'vit_small_patch16_224"):
        architecture_of(BackboneSettings("vit_small_patch16_224.dinoo"))
