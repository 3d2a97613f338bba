"""The whole network of a detector: one look at an image gives both maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clsnf.config import FinetuneSettings, FlowSettings, ImageSettings
from clsnf.model.backbone import Backbone, BackboneInfo
from clsnf.model.decoder import Decoder
from clsnf.model.flow import LevelFlow
from clsnf.model.score_maps import density_map


def build_decoder(info: BackboneInfo, image: ImageSettings, settings: FinetuneSettings, seed: int) -> Decoder:
    """A decoder with initial parameters drawn from `seed`, whatever else has drawn random numbers before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(info.channels, info.grids, image.size, settings.decoder_width)
    return decoder.to(memory_format=torch.channels_last)


def build_flows(info: BackboneInfo, settings: FlowSettings, seed: int) -> nn.ModuleList:
    """One flow a level with initial parameters drawn from `seed`."""
    return nn.ModuleList(
        LevelFlow(c, grid, settings, generator_seed=seed * 1009 + level)
        for level, (c, grid) in enumerate(zip(info.channels, info.grids, strict=True))
    )


def empty_flows(info: BackboneInfo, settings: FlowSettings) -> nn.ModuleList:
    """Flows whose parameters are about to be loaded.

    Soft permutations take seconds to draw where there are many channels; both kinds are matrices of the same shape.
    """
    return build_flows(info, dataclasses.replace(settings, permutation="hard"), seed=0)


def log_probs_of(flow: LevelFlow, features: Tensor) -> Tensor:
    """Log-likelihood per dimension of a level's map: features (B, P, C) to (B, h, w) float32."""
    b, p, c = features.shape
    positions = torch.arange(p, device=features.device).repeat(b)
    log_probs = flow.log_prob(features.reshape(b * p, c).float(), positions)
    return log_probs.view(b, *flow.grid)


class ScoreNetwork(nn.Module):
    """Backbone, decoder and flows; L levels.

    Args:
        backbone: the shared extractor, as stage one left it.
        decoder: the pixelwise classifier's decoder.
        flows: L flows, shallow to deep.
        constants: m_l of each level (see :func:`clsnf.model.score_maps.density_map`).
    """

    def __init__(self, backbone: Backbone, decoder: Decoder, flows: nn.ModuleList, constants: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.flows = flows
        self.constants = [float(c) for c in constants]

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both score maps.

        Args:
            images: (B, 3, H, W), RGB in [0, 1].
            valid: (B, H, W) bool, False where a pixel is padding; None where none is.

        Returns:
            The density map and the classifier's map, both (B, H, W) float32 in [0, 1]; what they hold on padding means nothing.
        """
        features = self.backbone(images)
        classifier = torch.sigmoid(self.decoder(features).float())
        log_probs = []
        for flow, level in zip(self.flows, features, strict=True):
            assert isinstance(flow, LevelFlow)
            log_probs.append(log_probs_of(flow, level.flatten(2).transpose(1, 2)))  # (B, C, h, w) -> (B, P, C)
        return density_map(log_probs, self.constants, self.decoder.image_size, valid), classifier
