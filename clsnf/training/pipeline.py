"""One category from images to maps, as a chain of stages that runs of different settings share.

    data + backbone + seed -> trunk at epoch t -> finetuned at epoch E -> flows of depth D -> maps of the validation images

Every method looks its stage up by content and computes it only where nobody has; see :mod:`clsnf.training.stages`. What a caller changes
last (the flow's depth, then the fusion weight, which needs no training at all) is therefore the cheapest to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clsnf.config import DetectorSettings, FinetuneSettings, FlowSettings, to_dict
from clsnf.data.defects import DefectMaker
from clsnf.data.foreground import object_masks
from clsnf.device import training_dtype
from clsnf.model.backbone import Backbone, BackboneInfo, empty_backbone, fingerprint
from clsnf.model.decoder import Decoder
from clsnf.model.network import ScoreNetwork, build_decoder, build_flows, empty_flows
from clsnf.model.score_maps import density_map
from clsnf.progress import Progress, silent
from clsnf.training.density import extract_features, fit_flows, level_log_probs
from clsnf.training.finetune import Finetuner, leaving_point, part, train_trunk, trunk_content
from clsnf.training.stages import Stage, StageStore

_BATCH = 16


@dataclass(frozen=True)
class PlacedImages:
    """Images on the network's canvas.

    Attributes:
        images: (N, 3, H, W) uint8.
        valid: (N, H, W) bool, False where a pixel is padding; None where none is.
        key: hash of the files' contents and of how they were placed.
    """

    images: Tensor
    valid: Tensor | None
    key: str


@dataclass(frozen=True)
class ScoreMaps:
    """Both maps of the same images, (N, H, W) float32 in [0, 1]."""

    density: Tensor
    classifier: Tensor


class CategoryPipeline:
    """Stages of one category.

    Args:
        settings: all settings; ``finetune.joint_epochs`` and ``flow.depth`` are given anew to each method.
        backbone: with its pretrained weights; copied, never changed.
        fit: normal images to train on.
        polarity: where defects may lie: ``off``, ``dark`` or ``bright`` products (see :mod:`clsnf.data.foreground`).
        textures: (T, 3, H, W) uint8 sources of synthetic defects.
        textures_key: hash of their content.
        store: where stages lie.
        device: where to compute.
        progress: told about long work.
    """

    def __init__(
        self,
        settings: DetectorSettings,
        backbone: Backbone,
        fit: PlacedImages,
        polarity: str,
        textures: Tensor,
        textures_key: str,
        store: StageStore,
        device: torch.device,
        progress: Progress = silent,
    ) -> None:
        self.settings, self.pretrained, self.fit = settings, backbone, fit
        self.polarity, self.textures, self.textures_key = polarity, textures, textures_key
        self.store, self.device, self.progress = store, device, progress
        self._features: tuple[tuple[int, str], list[Tensor]] | None = None

    @property
    def info(self) -> BackboneInfo:
        """Shape facts of the backbone."""
        return self.pretrained.info

    @cached_property
    def _root_content(self) -> dict[str, Any]:
        """What every stage of this category rests on."""
        return {
            "fit": self.fit.key,
            "image": to_dict(self.settings.image),
            "backbone": fingerprint(self.pretrained),
            "levels": list(self.settings.backbone.levels),
            "seed": self.settings.seed,
            "arithmetic": f"{self.device.type} {training_dtype(self.device)}",
        }

    def _finetune(self, epochs: int) -> FinetuneSettings:
        return dataclasses.replace(self.settings.finetune, joint_epochs=epochs)

    def _flow(self, depth: int) -> FlowSettings:
        return dataclasses.replace(self.settings.flow, depth=depth)

    @property
    def _trunk_content(self) -> dict[str, Any]:
        return self._root_content | {
            "finetune": trunk_content(self.settings.finetune),
            "defects": to_dict(self.settings.defects),
            "polarity": self.polarity,
            "textures": self.textures_key,
        }

    def _finetuned_content(self, epochs: int) -> dict[str, Any]:
        return self._trunk_content | {"joint_epochs": epochs, "decay_epochs": self.settings.finetune.decay_epochs}

    def _flow_content(self, epochs: int, depth: int) -> dict[str, Any]:
        # A backbone that was never finetuned depends on no defect: its flows are the same whatever stage one does.
        backbone = self._finetuned_content(epochs) if epochs else self._root_content
        return backbone | {"flow": to_dict(self._flow(depth))}

    def _new_finetuner(self) -> Finetuner:
        backbone = self._copy_of_backbone()
        masks = None if self.polarity == "off" else object_masks(self.fit.images, self.polarity)
        if self.fit.valid is not None:
            masks = self.fit.valid if masks is None else masks & self.fit.valid
        maker = DefectMaker(self.settings.defects, self.textures.to(self.device), self.fit.images.to(self.device))
        decoder = build_decoder(self.info, self.settings.image, self.settings.finetune, self.settings.seed)
        return Finetuner(
            backbone,
            decoder,
            self.fit.images,
            self.fit.valid,
            masks,
            maker,
            self.settings.finetune,
            self.settings.seed,
            self.device,
        )

    def _copy_of_backbone(self) -> Backbone:
        copy = empty_backbone(self.info.architecture, self.settings.backbone.levels, self.settings.image.size)
        copy.load_state_dict(self.pretrained.state_dict())
        return copy

    def finetuned(self, epochs: int, stops: Collection[int] = ()) -> tuple[Backbone, Decoder]:
        """Backbone and decoder after `epochs` joint epochs, in evaluation mode on the device.

        Args:
            epochs: joint epochs; 0 leaves the backbone as it is and trains the decoder alone.
            stops: other numbers of joint epochs that somebody will ask for: the trunk is stored where they leave it.
        """
        settings = self._finetune(epochs)

        def compute() -> Stage:
            leave = leaving_point(settings)
            finetuner = train_trunk(
                self._new_finetuner,
                self.store,
                lambda epoch: self._trunk_content | {"epoch": epoch},
                leave,
                [leaving_point(self._finetune(e)) for e in stops],
                self.progress,
            )
            finetuner.run(settings.epochs, decay_from=leave, progress=self.progress)
            whole = finetuner.stage()
            weights = {name: value for name, value in whole.tensors.items() if not name.startswith("optimizer.")}
            return Stage(weights, whole.facts)

        stage = self.store.get("finetuned", self._finetuned_content(epochs), compute)
        backbone = self._copy_of_backbone()
        backbone.load_state_dict(part(stage.tensors, "backbone."))
        decoder = build_decoder(self.info, self.settings.image, settings, self.settings.seed)
        decoder.load_state_dict(part(stage.tensors, "decoder."))
        return backbone.to(self.device), decoder.to(self.device).eval()

    def _backbone(self, epochs: int) -> Backbone:
        return self.finetuned(epochs)[0] if epochs else self._copy_of_backbone()

    def features(self, epochs: int, images: PlacedImages) -> list[Tensor]:
        """Features of images under the backbone after `epochs` joint epochs, for each level (N, P, C) on the CPU.

        The last answer is kept, because the flows of every depth want the same features of the fit images.
        """
        wanted = (epochs, images.key)
        if images.key != self.fit.key:
            return extract_features(self._backbone(epochs), images.images, self.device, self.progress)
        if self._features is None or self._features[0] != wanted:
            self._features = None  # free the old ones before the new ones fill the memory
            self._features = (wanted, extract_features(self._backbone(epochs), images.images, self.device, self.progress))
        return self._features[1]

    def flows(self, epochs: int, depth: int) -> tuple[torch.nn.ModuleList, list[float]]:
        """The flows of `depth` blocks on the backbone after `epochs` joint epochs, and their level constants."""
        settings = self._flow(depth)

        def compute() -> Stage:
            flows = build_flows(self.info, settings, self.settings.seed)
            features = self.features(epochs, self.fit)
            constants, curves = fit_flows(flows, features, self.fit.valid, settings, self.settings.seed, self.device, self.progress)
            return Stage(dict(flows.state_dict()), {"constants": constants, "losses": curves})

        stage = self.store.get("flows", self._flow_content(epochs, depth), compute)
        flows = empty_flows(self.info, settings)
        flows.load_state_dict(stage.tensors)
        return flows.to(self.device).eval(), list(stage.facts["constants"])

    def network(self, epochs: int, depth: int) -> ScoreNetwork:
        """The whole network of a run, in evaluation mode on the device."""
        backbone, decoder = self.finetuned(epochs)
        flows, constants = self.flows(epochs, depth)
        return ScoreNetwork(backbone, decoder, flows, constants).eval()

    def maps(self, epochs: int, depth: int, images: PlacedImages) -> ScoreMaps:
        """Both score maps of images: stored, so that any fusion weight costs no more than a weighted sum."""

        def density() -> Stage:
            flows, constants = self.flows(epochs, depth)
            features = self.features(epochs, images)
            log_probs = [level_log_probs(flow, level, self.device) for flow, level in zip(flows, features, strict=True)]  # type: ignore[arg-type]
            return Stage({"map": density_map(log_probs, constants, self.settings.image.size, images.valid)}, {})

        def classifier() -> Stage:
            return Stage({"map": classifier_maps(*self.finetuned(epochs), images.images, self.device)}, {})

        shown = {"images": images.key}
        return ScoreMaps(
            self.store.get("density_maps", self._flow_content(epochs, depth) | shown, density).tensors["map"],
            self.store.get("classifier_maps", self._finetuned_content(epochs) | shown, classifier).tensors["map"],
        )


@torch.inference_mode()
def classifier_maps(backbone: Backbone, decoder: Decoder, images: Tensor, device: torch.device) -> Tensor:
    """The classifier's map of uint8 images (N, 3, H, W): (N, H, W) float32 in [0, 1] on the CPU."""
    maps = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH].to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        maps.append(torch.sigmoid(decoder(backbone(batch)).float()).cpu())
    return torch.cat(maps)
