"""The authors' decoder, a mirrored ResNet: for their checkpoints, and to train as they do.

It is many times the size of :mod:`clsnf.model.decoder`. Source: S. Oh and J. Kim, IEEE Access 12
(2024). Their public code (MIT) says what the paper leaves open: a stage upsamples before its
blocks; the skip comes before the upsampled map in the concatenation; a ReLU follows each of the two
first convolutions; their decoder for ResNet-18 has another shape than the one for Wide ResNet-50-2
(see ``BASIC`` and ``BOTTLENECK``).

Modules have the authors' names, so that their state dicts fit.

Where they say nothing, this is our choice: other backbones take ``BASIC`` up to 512 channels in the
deepest level and ``BOTTLENECK`` beyond; a level whose size is that of no stage is resampled for the
nearest one; without skips the widths stay the same (their decoder for Wide ResNet-50-2 can't run
without skips, because its shapes do not fit together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.model.decoder import PixelDecoder
from clsnf.model.padding import ReflectConv2d
from clsnf.model.resample import resample

_STAGES = 4


@dataclass(frozen=True)
class Shape:
    """One of the two decoders that the authors built.

    Attributes:
        blocks: residual blocks of each stage.
        planes: each stage's planes; its width is ``planes * expansion``.
        expansion: 2 for bottleneck blocks, whose 3x3 convolution is twice the planes wide as well;
            1 for basic blocks.
        entry: output channels of the two first convolutions as shares of the deepest level's
            channels.
        upsampling: ``bicubic`` or ``bilinear``.
    """

    blocks: tuple[int, int, int, int]
    planes: tuple[int, int, int, int]
    expansion: int
    entry: tuple[float, float]
    upsampling: str


# For Wide ResNet-50-2 and for ResNet-18.
BOTTLENECK = Shape((3, 6, 4, 3), (128, 64, 32, 16), 2, (0.5, 0.5), "bicubic")
BASIC = Shape((2, 2, 1, 1), (256, 128, 64, 32), 1, (0.5, 1.0), "bilinear")


def shape_for(channels: int) -> Shape:
    """The decoder for a deepest level of this many channels.

    ResNet-18 has 512, Wide ResNet-50-2 has 2048.
    """
    return BASIC if channels <= 512 else BOTTLENECK


class BottleneckBlock(nn.Module):
    """Residual block: 1x1, 3x3 and 1x1 convolution; (B, C_in, h, w) to (B, 2 planes, h, w)."""

    def __init__(self, channels_in: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(channels_in, 2 * planes, 1), nn.BatchNorm2d(2 * planes)
        self.conv2, self.bn2 = _convolution(2 * planes, 2 * planes, 3), nn.BatchNorm2d(2 * planes)
        self.conv3, self.bn3 = _convolution(2 * planes, 2 * planes, 1), nn.BatchNorm2d(2 * planes)
        self.downsample = _shortcut(channels_in, 2 * planes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; (B, C_in, h, w) to (B, planes, h, w)."""

    def __init__(self, channels_in: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(channels_in, planes, 3), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = _shortcut(channels_in, planes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class PaperDecoder(PixelDecoder):
    """Feature pyramid to logit map, as the authors'.

    Two 1x1 convolutions on the deepest level; four stages at 1/16, 1/8, 1/4 and 1/2 of the image's
    size, each an upsampling, the concatenation of the levels of that size, and residual blocks; a
    last upsampling and two 3x3 convolutions. No convolution has a bias; all pad by reflection. For
    Wide ResNet-50-2 with stages 2, 3 and 4 at 256 x 256, channels at each size:

        8: 2048, nin 1024
        16: 1024 + 1024 (stage 3), uplayer1 256
        32: 512 (stage 2) + 256, uplayer2 128
        64: 128, uplayer3 64
        128: 64, uplayer4 32
        256: 32, conv1 8, conv2 1

    Args:
        channels: C_l of each level, shallow to deep.
        grids: (h, w) of each level.
        image_size: (H, W) of the logit map, multiples of 32.
        skips: True: stages see the encoder's levels; False: only the deepest level is used.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
        skips: bool = True,
    ) -> None:
        super().__init__(image_size)
        self.shape = shape = shape_for(channels[-1])
        h, w = self.image_size
        self.sizes = [(h >> power, w >> power) for power in range(_STAGES, 0, -1)]
        self.skip_levels = _skip_levels(grids, self.sizes) if skips else [[] for _ in self.sizes]
        first, second = (int(channels[-1] * share) for share in shape.entry)
        self.nin = nn.Sequential(
            _convolution(channels[-1], first, 1),
            nn.ReLU(inplace=True),
            _convolution(first, second, 1),
            nn.ReLU(inplace=True),
        )
        width, stages = second, []
        for number, planes, levels in zip(
            shape.blocks, shape.planes, self.skip_levels, strict=True
        ):
            stages.append(
                _stage(shape, width + sum(channels[level] for level in levels), planes, number)
            )
            width = planes * shape.expansion
        self.uplayer1, self.uplayer2, self.uplayer3, self.uplayer4 = stages
        narrow = shape.planes[0] // 16
        self.conv1, self.bn1 = _convolution(width, narrow, 3), nn.BatchNorm2d(narrow)
        self.conv2 = _convolution(narrow, 1, 3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """L maps (B, C_l, h_l, w_l), shallow to deep, to logits (B, H, W)."""
        how = self.shape.upsampling
        x = self.nin(features[-1])
        stages = (self.uplayer1, self.uplayer2, self.uplayer3, self.uplayer4)
        for stage, size, levels in zip(stages, self.sizes, self.skip_levels, strict=True):
            x = resample(x, size, how)
            skips = [resample(features[level], size, how).to(x.dtype) for level in levels]
            x = stage(torch.cat([*skips, x], dim=1))
        x = F.relu(self.bn1(self.conv1(resample(x, self.image_size, how))))
        logits: Tensor = self.conv2(x)
        return logits[:, 0]


def _convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return ReflectConv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)


def _shortcut(channels_in: int, channels_out: int) -> nn.Module:
    if channels_in == channels_out:
        return nn.Identity()  # no parameters, no entry in the state dict
    return nn.Sequential(_convolution(channels_in, channels_out, 1), nn.BatchNorm2d(channels_out))


def _stage(shape: Shape, channels_in: int, planes: int, blocks: int) -> nn.Sequential:
    block = BottleneckBlock if shape.expansion == 2 else BasicBlock
    inner = planes * shape.expansion
    return nn.Sequential(
        block(channels_in, planes), *(block(inner, planes) for _ in range(1, blocks))
    )


def _skip_levels(
    grids: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """For each stage the levels whose height is nearest to its own, as a ratio.

    The deepest level is left out.
    """
    chosen: list[list[int]] = [[] for _ in sizes]
    for level, (h, _) in enumerate(grids[:-1]):
        distances = [abs(math.log(h / size[0])) for size in sizes]
        chosen[distances.index(min(distances))].append(level)
    return chosen
