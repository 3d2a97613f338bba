"""The pixelwise classifier's decoder: a feature pyramid to one logit map at the image's size.

From the deepest level up, each step is a bicubic upsampling, the next level as a skip (or none),
and a residual bottleneck block. Two convolutions then lead to full resolution. The width falls with
the stride, down to 8 channels at full resolution, where a decoder takes most of its time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.model.padding import ReflectConv2d
from clsnf.model.resample import resample

_PRIOR = 0.02  # the share of defect pixels that an untrained decoder predicts


class ConvNorm(nn.Sequential):
    """Convolution with reflect padding, then batch norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__(
            ReflectConv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels_out),
        )


class Bottleneck(nn.Module):
    """Residual bottleneck: 1x1 to half the width, 3x3, 1x1 to the width; (B, C_in, h, w) to (B,
    C_out, h, w).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        middle = channels_out // 2
        self.reduce = ConvNorm(channels_in, middle, 1)
        self.spatial = ConvNorm(middle, middle, 3)
        self.expand = ConvNorm(middle, channels_out, 1)
        self.project = ConvNorm(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x))
        y = F.relu(self.spatial(y))
        return F.relu(self.expand(y) + self.project(x))


class PixelDecoder(nn.Module):
    """Base of the decoders: L maps (B, C_l, h_l, w_l), shallow to deep, to logits (B, H, W).

    Args:
        image_size: (H, W) of the logit map.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = (image_size[0], image_size[1])


class Decoder(PixelDecoder):
    """Feature pyramid to logit map.

    Args:
        channels: C_l of each level, shallow to deep.
        grids: (h, w) of each level.
        image_size: (H, W) of the logit map.
        width: largest number of channels.
        skips: False leaves out the features of all levels but the deepest; their grids and channels
            still decide sizes and widths.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
        width: int = 128,
        skips: bool = True,
    ) -> None:
        super().__init__(image_size)
        self.skips = skips
        self.grids = list(grids)
        widths = [max(16, min(width, c // 2)) for c in channels]
        self.deepest = Bottleneck(channels[-1], widths[-1])
        self.steps = nn.ModuleList(
            Bottleneck(widths[level + 1] + (channels[level] if skips else 0), widths[level])
            for level in reversed(range(len(channels) - 1))
        )
        # A size between the shallowest level and the image, so that the full-resolution part can be
        # narrow.
        h, w = grids[0]
        self.halfway = (max(h, self.image_size[0] // 2), max(w, self.image_size[1] // 2))
        self.middle = ConvNorm(widths[0], 16, 3)
        self.last = ConvNorm(16, 8, 3)
        self.head = ReflectConv2d(8, 1, 3, padding=1)
        # Defects are rare. Start from their share instead of one half, or hundreds of steps go into
        # learning the bias (Lin et al., Focal Loss, ICCV 2017).
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """L maps (B, C_l, h_l, w_l), shallow to deep, to logits (B, H, W)."""
        x = self.deepest(features[-1])
        for step, skip in zip(self.steps, reversed(features[:-1]), strict=True):
            x = resample(x, (skip.shape[2], skip.shape[3]))
            x = step(torch.cat([x, skip.to(x.dtype)], dim=1) if self.skips else x)
        x = F.relu(self.middle(resample(x, self.halfway)))
        x = F.relu(self.last(resample(x, self.image_size)))
        logits: Tensor = self.head(x)
        return logits[:, 0]
