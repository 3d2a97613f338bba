"""What weights say about themselves: the hub's folders, and metadata of safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import WeightsError
from clsnf.model.backbone import load_backbone
from clsnf.model.weights_files import WeightsFacts, weights_facts, weights_file
from tests.conftest import random_state
from tests.support.backbones import backbone_settings

FACTS = WeightsFacts("resnet10t", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")
CONFIGURATION = {
    "architecture": "resnet10t",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "c3_in1k",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
    },
}


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def hub_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a model's page on the hub."""
    state, folder = random_state("resnet10t"), tmp_path / "resnet10t.c3_in1k"
    folder.mkdir()
    file = folder / request.param
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    return folder


def test_a_folder_of_the_hub_is_read_and_says_what_pictures_it_wants(hub_folder: Path) -> None:
    file = weights_file(BackboneSettings("resnet10t", weights=str(hub_folder)))
    assert file is not None
    assert file.parent == hub_folder
    assert weights_facts(file) == FACTS
    for weights in (hub_folder, file, json.dumps({"resnet10t": str(hub_folder)})):
        load_backbone(backbone_settings("resnet10t", (1, 2), str(weights)), (64, 64))


def test_another_architecture_than_the_folder_s_is_refused_by_name(hub_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights of 'resnet10t', and the backbone is 'resnet1"):
        weights_file(BackboneSettings("resnet18", weights=str(hub_folder)))


def test_a_safetensors_file_may_say_it_in_its_metadata(tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    configuration = json.dumps(CONFIGURATION["pretrained_cfg"])
    metadata = {"architecture": "resnet10t.c3_in1k", "pretrained_cfg": configuration}
    save_file({"a": torch.zeros(1)}, file, metadata)
    assert weights_facts(file) == FACTS


@pytest.mark.parametrize("content", [{"architectures": ["ViTModel"]}, {}, []])
def test_configurations_of_other_programs_say_nothing(content: object, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert weights_facts(tmp_path / "model.safetensors") is None


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json can't be read"):
        weights_facts(tmp_path / "model.safetensors")


def test_a_folder_of_several_models_files_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("resnet10t", "resnet18"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        found = weights_file(BackboneSettings(name, weights=str(tmp_path)))
        assert found == tmp_path / f"{name}.safetensors"
        assert weights_facts(found) is None
