"""What a backbone costs for one image, counted on PyTorch's meta device: no weights are allocated,
and nothing is computed.

The counts are those of the network that runs: timm leaves out what lies behind the deepest level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clsnf.core.config import BackboneSettings
from clsnf.model.backbone import empty_backbone


@dataclass(frozen=True)
class BackboneCost:
    """What a backbone's forward pass costs for one image.

    Attributes:
        parameters: their number.
        flops: floating-point operations of matrix products and convolutions; a multiplication and
            its addition are two.
        grids: (h, w) of each map.
        channels: of each map.
    """

    parameters: int
    flops: int
    grids: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]


def cost_of(settings: BackboneSettings, canvas: tuple[int, int]) -> BackboneCost:
    """Count a backbone's parameters and operations.

    Args:
        settings: resolved (:func:`clsnf.model.resolve.resolved`).
        canvas: (H, W) of its images.

    Raises:
        SettingsError: the model gives no feature maps, or not those levels, or does not take that
            image size.
    """
    with torch.device("meta"):
        backbone = empty_backbone(settings, canvas)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    info = backbone.info
    return BackboneCost(parameters, count_flops(backbone, canvas), info.grids, info.channels)


def count_flops(network: nn.Module, canvas: tuple[int, int]) -> int:
    """Operations of a forward pass on one image (3, H, W), by a network on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, *canvas, device="meta"))
    return int(counter.get_total_flops())
