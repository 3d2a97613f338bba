"""Layers that PyTorch can't train as they are take another way, with the same results."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clsnf.model.architectures import facts_of
from clsnf.model.backbone import empty_backbone
from clsnf.model.layers import SlicingConv2d, slice_strided_convolutions, to_channels_last
from tests.support.backbones import backbone_settings


@pytest.mark.parametrize("stride", [2, (2, 1), 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_a_slicing_convolution_gives_torch_s_values_and_gradients(
    stride: int | tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(3, 8, 1, stride).double()
    mine = SlicingConv2d.like(theirs)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = mine(a), theirs(b)
    torch.testing.assert_close(y, z)
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, [a, *mine.parameters()], weights)
    expected = torch.autograd.grad(z, [b, *theirs.parameters()], weights)
    torch.testing.assert_close(found, expected)


def test_only_layers_that_onednn_breaks_are_replaced_and_their_parameters_stay() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 13, 1, 2),
        nn.Conv2d(13, 32, 1, 2, bias=False),
        nn.Conv2d(32, 12, 1, 2),
        nn.Conv2d(12, 12, 1, 2, groups=12),
        nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 8, 3, 2),
    )
    before = dict(net.named_parameters())
    slice_strided_convolutions(net.eval())
    assert [type(layer) for layer in net] == [SlicingConv2d] * 2 + [nn.Conv2d] * 4
    assert all(after is before[name] for name, after in net.named_parameters())
    assert not any(layer.training for layer in net)


@pytest.mark.parametrize("architecture", ["levit_128s", "tiny_vit_5m_224", "efficientvit_m0"])
def test_attention_biases_follow_their_weights(architecture: str) -> None:
    facts = facts_of(architecture)
    backbone = empty_backbone(backbone_settings(architecture, (0, 1)), facts.input_size).eval()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.ones_(norm.weight)  # some start at 0, which would hide the attention
    image = torch.rand(1, 3, *facts.input_size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second step goes through a graph of its own
        backbone(image)[1].sum().backward()
    biases = {name: p for name, p in backbone.named_parameters() if "attention_biases" in name}
    assert biases
    assert all(p.grad is not None for p in biases.values())
    with torch.no_grad():
        before = backbone(image)[1]
        for bias in biases.values():
            bias.add_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(backbone(image)[1], before)


_GRADIENT = """
import sys, torch
from torch import nn
from clsnf.model.layers import slice_strided_convolutions, to_channels_last
channels = int(sys.argv[1])
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(channels, 16, 1, 2, bias=False))
slice_strided_convolutions(net)
to_channels_last(net)
for _ in range(5):
    x = torch.randn(16, channels, 128, 128).contiguous(memory_format=torch.channels_last)
    net.zero_grad()
    net(x).sum().backward()
    expected = x[:, :, ::2, ::2].sum((0, 2, 3)).expand(16, channels)
    torch.testing.assert_close(net[0].weight.grad[:, :, 0, 0], expected, rtol=1e-3, atol=0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 3, 4, 7, 8, 12, 15, 16, 17])
def test_no_number_of_channels_kills_the_process(channels: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GRADIENT, str(channels)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def test_tensors_of_rank_five_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3))
    net.register_buffer("table", torch.rand(1, 3, 4, 5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    to_channels_last(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name in ("0.weight", "table"):
        assert net.state_dict()[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("repvgg_a0", 128),  # strided 1x1 convolutions on few channels
        ("fastvit_t8", 128),
        ("mobileone_s0", 128),
        ("coat_lite_tiny", 64),  # layers that share their parameters
        ("lambda_resnet26t", 128),  # kernels of rank 5
        ("edgenext_xx_small", 64),  # kernels larger than the map
    ],
)
def test_a_backbone_trains_saves_loads_and_exports(
    architecture: str, size: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.support.one_backbone", architecture, str(size)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
