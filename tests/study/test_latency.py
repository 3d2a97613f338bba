"""Latencies that a front rests on are measured in turn."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from clsnf.core.config import DetectorSettings, replaced
from clsnf.study.latency import architecture_content, measure_in_turn


class Recorder(nn.Module):
    """Notes its name whenever it runs."""

    def __init__(self, name: str, runs: list[str]) -> None:
        super().__init__()
        self.name, self.runs = name, runs
        self.weight = nn.Parameter(torch.zeros(()))
        self.decoder = SimpleNamespace(image_size=(4, 6))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.shape == (1, 3, 4, 6)
        self.runs.append(self.name)
        return images, images


def test_networks_take_turns_so_that_a_busy_moment_slows_all_of_them() -> None:
    runs: list[str] = []
    found = measure_in_turn([Recorder(name, runs) for name in "abc"])  # type: ignore[misc]
    assert runs == ["a", "b", "c"] * (len(runs) // 3)
    assert len(runs) > 30
    assert len(found) == 3
    assert min(found) > 0


def test_no_network_has_no_latency() -> None:
    assert measure_in_turn([]) == []


def test_the_weight_and_the_epochs_change_no_architecture() -> None:
    base = DetectorSettings()
    known = architecture_content(base)
    same = {"fusion_weight": 0.9, "finetune.joint_epochs": 0, "seed": 4}
    other = {"flow.depth": 0, "backbone.levels": [1, 2], "image.height": 64}
    for name, value in same.items():
        assert architecture_content(replaced(base, {name: value})) == known
    for name, changed in other.items():
        assert architecture_content(replaced(base, {name: changed})) != known
