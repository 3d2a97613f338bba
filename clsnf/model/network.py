"""The whole network of a detector: one pass over an image gives both score maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clsnf.core.config import FinetuneSettings, FlowSettings, Fusion, ImageSettings
from clsnf.core.pixels import to_floats
from clsnf.model.backbone import Backbone, BackboneInfo
from clsnf.model.decoder import Decoder, PixelDecoder
from clsnf.model.flow import LevelFlow, LevelScale, level_vectors
from clsnf.model.layers import to_channels_last
from clsnf.model.paper_decoder import PaperDecoder
from clsnf.model.score_maps import Scores, density_map, fuse_scores


def to_network_input(images: Tensor, device: torch.device) -> Tensor:
    """Images as the network takes them: float32 in [0, 1], on `device`, channels last.

    Args:
        images: (B, 3, H, W) uint8, RGB.
    """
    return to_floats(images.to(device)).contiguous(memory_format=torch.channels_last)


def build_decoder(
    info: BackboneInfo, image: ImageSettings, settings: FinetuneSettings, seed: int
) -> PixelDecoder:
    """A decoder with initial parameters drawn from `seed`, whatever else has drawn random numbers
    before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder: PixelDecoder
        if settings.decoder == "authors":
            decoder = PaperDecoder(info.channels, info.grids, image.size, skips=settings.skips)
        else:
            decoder = Decoder(
                info.channels, info.grids, image.size, settings.decoder_width, settings.skips
            )
    return to_channels_last(decoder)


def build_flows(info: BackboneInfo, settings: FlowSettings, seed: int) -> nn.ModuleList:
    """One flow a level with initial parameters drawn from `seed`."""
    return nn.ModuleList(
        LevelFlow(c, grid, settings, generator_seed=seed * 1009 + level)
        for level, (c, grid) in enumerate(zip(info.channels, info.grids, strict=True))
    )


def empty_flows(info: BackboneInfo, settings: FlowSettings) -> nn.ModuleList:
    """Flows whose parameters are about to be loaded.

    Soft permutations take seconds to draw where there are many channels; both kinds are matrices of
    the same shape.
    """
    return build_flows(info, dataclasses.replace(settings, permutation="hard"), seed=0)


class ScoreNetwork(nn.Module):
    """Backbone, decoder and flows of L levels, and how their maps are fused.

    Args:
        backbone: the shared feature extractor, finetuned.
        decoder: the pixelwise classifier's decoder.
        flows: L flows, shallow to deep.
        scales: of each level (see :meth:`clsnf.model.flow.LevelFlow.relative_likelihood`).
        fusion: how :meth:`score` makes one map of both.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: PixelDecoder,
        flows: nn.ModuleList,
        scales: Sequence[LevelScale],
        fusion: Fusion,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.flows = flows
        self.scales = list(scales)
        self.fusion = fusion

    @torch.inference_mode()
    def score(self, images: Tensor, valid: Tensor | None = None) -> Scores:
        """Fused maps and image scores, on the network's device.

        Args:
            images: (B, 3, H, W) uint8, RGB, placed on the canvas (see
                :func:`clsnf.data.images.place`); on any device.
            valid: (B, H, W) bool, False where a pixel is padding; None where none is.
        """
        device = next(self.parameters()).device
        valid = None if valid is None else valid.to(device)
        density, classifier = self(to_network_input(images, device), valid)
        return fuse_scores(density, classifier, self.fusion, valid)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both score maps.

        Args:
            images: (B, 3, H, W), RGB in [0, 1].
            valid: (B, H, W) bool, False where a pixel is padding; None where none is.

        Returns:
            The density's map and the classifier's map, both (B, H, W) float32 in [0, 1]. Their
            values on padding mean nothing.
        """
        features = self.backbone(images)
        classifier = torch.sigmoid(self.decoder(features).float())
        likelihoods = []
        # Distances and determinants are differences of large numbers: in mixed precision they stay
        # float32.
        with torch.autocast(images.device.type, enabled=False):
            for flow, scale, level in zip(self.flows, self.scales, features, strict=True):
                assert isinstance(flow, LevelFlow)
                likelihoods.append(
                    flow.relative_likelihood(
                        level_vectors(level.float(), flow.neighbourhood), scale
                    )
                )
            return density_map(likelihoods, self.decoder.image_size, valid), classifier
