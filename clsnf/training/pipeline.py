"""One category from images to maps, as a chain of stages that runs of different settings share.

    data + backbone + seed -> trunk at epoch t -> finetuned at epoch E -> flows of depth D -> maps
    of the validation images

Every method looks its stage up by content and computes it only where nobody has; see
:mod:`clsnf.training.artifacts`. What a caller changes last (the flow's depth, then the fusion
weight, which needs no training at all) is therefore the cheapest to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from clsnf.core.config import DetectorSettings, FinetuneSettings, FlowSettings, Fusion, to_dict
from clsnf.core.device import training_dtype
from clsnf.core.hashing import content_key
from clsnf.core.progress import Progress, silent
from clsnf.model.backbone import Backbone, BackboneInfo, empty_backbone, fingerprint
from clsnf.model.decoder import PixelDecoder
from clsnf.model.flow import LevelScale
from clsnf.model.network import (
    ScoreNetwork,
    build_decoder,
    build_flows,
    empty_flows,
    to_network_input,
)
from clsnf.model.score_maps import Scores, density_map, fuse, fuse_scores
from clsnf.streams.stream import DefectRecipe, MemoryStream, Stream
from clsnf.synthesis.training_defects import DefectMaker
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.density import extract_features, fit_flows, level_likelihoods, start_flows
from clsnf.training.finetune import Finetuner, decay_start, part, train_trunk, trunk_content

_BATCH = 16


@dataclass(frozen=True)
class PlacedImages:
    """Images that lie in memory, on the network's canvas.

    Attributes:
        images: (N, 3, H, W) uint8.
        valid: (N, H, W) bool, False where a pixel is padding; None where none is.
        key: hash of the files' contents and of how they were placed.
    """

    images: Tensor
    valid: Tensor | None
    key: str

    @cached_property
    def stream(self) -> Stream:
        """The images batch by batch."""
        return MemoryStream(self.images, self.valid)


class StreamedImages:
    """Images that come from a stream, on the network's canvas.

    Args:
        stream: brings them.
        key: as that of :class:`PlacedImages`: a stream changes no figure.
    """

    def __init__(self, stream: Stream, key: str) -> None:
        self.stream, self.key = stream, key

    @cached_property
    def valid(self) -> Tensor | None:
        """(N, H, W) bool, False where a pixel is padding; None where none is."""
        return self.stream.valid


Images = PlacedImages | StreamedImages


@dataclass(frozen=True)
class ScoreMaps:
    """Both score maps of the same images, and the smoothing of the map they are fused to.

    Attributes:
        density, classifier: (N, H, W) float32 in [0, 1], on the CPU.
        smoothing: sigma in pixels of a Gaussian over the fused map; 0 for none.
    """

    density: Tensor
    classifier: Tensor
    smoothing: float = 0.0

    def fused(self, weight: float) -> Tensor:
        """The fused map of fusion weight `weight`, (N, H, W)."""
        return fuse(self.density, self.classifier, weight, self.smoothing)

    def scores(self, fusion: Fusion, valid: Tensor | None = None) -> Scores:
        """Fused maps and image scores of these images.

        Args:
            fusion: weights and smoothing; its own smoothing counts, not that of these maps.
            valid: (N, H, W) bool, False where a pixel is padding; None where none is.
        """
        return fuse_scores(self.density, self.classifier, fusion, valid)


class CategoryPipeline:
    """Stages of one category.

    Args:
        settings: all settings; ``finetune.joint_epochs`` and ``flow.depth`` are given anew to each
            method.
        backbone: with its pretrained weights; copied, never changed.
        fit: normal images to train on.
        polarity: where defects may lie: ``off``, ``dark`` or ``bright`` products (see
            :mod:`clsnf.synthesis.object_mask`).
        textures: (T, 3, H, W) uint8 sources of synthetic defects.
        textures_key: hash of their content.
        store: where stages lie.
        device: where to compute.
        progress: told about long work.

    Attributes:
        most_features: of how many backbones the fit images' features stay in memory (N * P * C * 2
            bytes a level each).
    """

    def __init__(
        self,
        settings: DetectorSettings,
        backbone: Backbone,
        fit: Images,
        mask_mode: str,
        textures: Tensor,
        textures_key: str,
        store: ArtifactStore,
        device: torch.device,
        progress: Progress = silent,
    ) -> None:
        self.settings, self.pretrained, self.fit = settings, backbone, fit
        self.mask_mode, self.textures, self.textures_key = mask_mode, textures, textures_key
        self.store, self.device, self.progress = store, device, progress
        self._donors: Tensor | None = None
        self._features: dict[str, list[Tensor]] = {}
        self._other_features: tuple[tuple[str, str], list[Tensor]] | None = None
        self.most_features = 1

    def with_settings(self, settings: DetectorSettings) -> CategoryPipeline:
        """The same category under other settings; those of images, backbone and where defects may
        lie must be the same.
        """
        other = copy(self)  # the features that are in memory are for both
        other.settings = settings
        other.__dict__.pop("_root_content", None)
        return other

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

    def _trunk_content(self, epochs: int) -> dict[str, Any]:
        content = self._root_content | {
            "finetune": trunk_content(self._finetune(epochs)),
            "defects": to_dict(self.settings.defects),
            "polarity": self.mask_mode,
            "textures": self.textures_key,
        }
        n = len(self.fit.stream)
        donors = len(donor_indices(n, self.settings.image.size))
        return content if donors == n else content | {"donors": donors}

    def _finetuned_content(self, epochs: int) -> dict[str, Any]:
        return self._trunk_content(epochs) | {
            "joint_epochs": epochs,
            "decay_epochs": self.settings.finetune.decay_epochs,
        }

    def _flow_content(self, epochs: int, depth: int) -> dict[str, Any]:
        # A backbone that was never finetuned depends on no defect: its flows are the same whatever
        # stage one does.
        backbone = self._finetuned_content(epochs) if epochs else self._root_content
        return backbone | {"flow": to_dict(self._flow(depth))}

    def _new_finetuner(self, settings: FinetuneSettings) -> Finetuner:
        backbone = self._copy_of_backbone()
        if self._donors is None:
            chosen = donor_indices(len(self.fit.stream), self.settings.image.size)
            self._donors = self.fit.stream.load_shared(chosen, self.device)
        maker = DefectMaker(self.settings.defects, self.textures.to(self.device), self._donors)
        decoder = build_decoder(self.info, self.settings.image, settings, self.settings.seed)
        return Finetuner(
            backbone,
            decoder,
            self.fit.stream,
            DefectRecipe(maker, self.mask_mode),
            settings,
            self.settings.seed,
            self.device,
        )

    def _copy_of_backbone(self) -> Backbone:
        copy = empty_backbone(
            self.info.architecture, self.settings.backbone.levels, self.settings.image.size
        )
        copy.load_state_dict(self.pretrained.state_dict())
        return copy

    def finetuned(self, epochs: int, stops: Collection[int] = ()) -> tuple[Backbone, PixelDecoder]:
        """Backbone and decoder after `epochs` joint epochs, in evaluation mode on the device.

        Args:
            epochs: joint epochs; 0 leaves the backbone as it is and trains the decoder alone.
            stops: other numbers of joint epochs that somebody will ask for: the trunk is stored
                where they leave it. A cosine has no trunk, and so no use for them.
        """
        compute = partial(self._finetune_to_the_end, epochs, stops)
        stage = self.store.get("finetuned", self._finetuned_content(epochs), compute)
        if (
            self.settings.finetune.schedule == "cosine"
        ):  # now that the run is whole, nobody else will go on from a point on its way
            for epoch in range(1, decay_start(self._finetune(epochs)) + 1):
                self.store.drop("trunk", self._trunk_point(epochs, epoch))
        return self._classifier_of(stage, epochs)

    def _trunk_point(self, epochs: int, epoch: int) -> dict[str, Any]:
        return self._trunk_content(epochs) | {"epoch": epoch}

    def _snapshot_point(self, epochs: int, epoch: int) -> dict[str, Any]:
        return self._finetuned_content(epochs) | {"epoch": epoch}

    def _finetune_to_the_end(
        self, epochs: int, stops: Collection[int] = (), snapshots: bool = False
    ) -> Artifact:
        settings = self._finetune(epochs)
        leave = decay_start(settings)
        finetuner = train_trunk(
            partial(self._new_finetuner, settings),
            self.store,
            partial(self._trunk_point, epochs),
            leave,
            [decay_start(self._finetune(e)) for e in stops] if settings.schedule == "wsd" else [],
            self.progress,
        )

        def keep(epoch: int) -> None:
            if snapshots and epoch >= settings.frozen_epochs:
                self.store.get(
                    "snapshots", self._snapshot_point(epochs, epoch), lambda: _weights_of(finetuner)
                )

        finetuner.run(settings.epochs, decay_from=leave, progress=self.progress, before_epoch=keep)
        return _weights_of(finetuner)

    def on_trunk(
        self,
        kind: str,
        epochs: int,
        step: int,
        content: dict[str, Any],
        compute: Callable[[], Artifact],
    ) -> Artifact:
        """A stage that rests on the trunk at epoch `step` of a run of `epochs` joint epochs and on
        `content`.
        """
        return self.store.get(kind, self._trunk_point(epochs, step) | content, compute)

    def trunk_maps(self, epochs: int, step: int, images: PlacedImages) -> Tensor:
        """The classifier's maps of images (N, H, W) as it is on the trunk after `step` epochs,
        before its learning rate falls.
        """
        make = partial(self._new_finetuner, self._finetune(epochs))
        finetuner = train_trunk(
            make, self.store, partial(self._trunk_point, epochs), step, progress=self.progress
        )
        return classifier_maps(
            finetuner.backbone.eval(), finetuner.decoder.eval(), images.images, self.device
        )

    def _snapshot_epochs(self, epochs: int) -> range:
        """The epochs in which the learning rate falls to its end, as far as they are joint ones."""
        settings = self._finetune(epochs)
        return range(max(decay_start(settings), settings.frozen_epochs), settings.epochs)

    def finetune_with_snapshots(self, epochs: int) -> None:
        """Train to the end as :meth:`finetuned` does, and keep what the classifier was after each
        of the last joint epochs.
        """
        points = [
            self.store.key(self._snapshot_point(epochs, epoch))
            for epoch in self._snapshot_epochs(epochs)
        ]
        if any(
            self.store.find("snapshots", point) is None for point in points
        ):  # one pass of the run's end stores all of them
            end = self._finetune_to_the_end(epochs, snapshots=True)
            self.store.get("finetuned", self._finetuned_content(epochs), lambda: end)

    def _classifier_of(self, stage: Artifact, epochs: int) -> tuple[Backbone, PixelDecoder]:
        backbone = self._copy_of_backbone()
        backbone.load_state_dict(part(stage.tensors, "backbone."))
        decoder = build_decoder(
            self.info, self.settings.image, self._finetune(epochs), self.settings.seed
        )
        decoder.load_state_dict(part(stage.tensors, "decoder."))
        return backbone.to(self.device), decoder.to(self.device).eval()

    def _backbone(self, epochs: int) -> Backbone:
        return self.finetuned(epochs)[0] if epochs else self._copy_of_backbone()

    def features(self, epochs: int, images: Images) -> list[Tensor]:
        """Features of images under the backbone after `epochs` joint epochs, for each level (N, P,
        C) on the CPU.

        The last answers are kept, because the flows of every depth want the same: for the fit
        images, and one for others.
        """
        neighbourhood = self.settings.flow.neighbourhood

        def extract() -> list[Tensor]:
            return extract_features(
                self._backbone(epochs), images.stream, self.device, neighbourhood, self.progress
            )

        backbone = self._finetuned_content(epochs) if epochs else self._root_content
        wanted = content_key([backbone, neighbourhood])
        if images.key != self.fit.key:
            if self._other_features is None or self._other_features[0] != (wanted, images.key):
                self._other_features = None
                self._other_features = ((wanted, images.key), extract())
            return self._other_features[1]
        if wanted not in self._features:
            while len(self._features) >= self.most_features:
                del self._features[
                    next(iter(self._features))
                ]  # free the old ones before the new ones fill the memory
            self._features[wanted] = extract()
        return self._features[wanted]

    def flows(self, epochs: int, depth: int) -> tuple[torch.nn.ModuleList, list[LevelScale]]:
        """The flows of `depth` blocks on the backbone after `epochs` joint epochs, and their
        levels' scales.
        """
        settings = self._flow(depth)

        def compute() -> Artifact:
            flows = build_flows(self.info, settings, self.settings.seed)
            flows.load_state_dict(self._flow_start(epochs).tensors, strict=False)
            features = self.features(epochs, self.fit)
            scales, curves = fit_flows(
                flows,
                features,
                self.fit.valid,
                settings,
                self.settings.seed,
                self.device,
                self.progress,
                started=True,
            )
            return Artifact(dict(flows.state_dict()), {"scales": scales, "losses": curves})

        stage = self.store.get("flows", self._flow_content(epochs, depth), compute)
        flows = empty_flows(self.info, settings)
        flows.load_state_dict(stage.tensors)
        return flows.to(self.device).eval(), [LevelScale(*scale) for scale in stage.facts["scales"]]

    def _flow_start(self, epochs: int) -> Artifact:
        """What flows of every depth on the backbone after `epochs` joint epochs begin with:
        whitening layers and memories.
        """
        flow = self.settings.flow
        given = {
            "start": flow.start,
            "covariance": flow.covariance,
            "neighbourhood": flow.neighbourhood,
            "memory": flow.memory,
        }

        def compute() -> Artifact:
            flows = empty_flows(
                self.info, dataclasses.replace(flow, depth=0 if flow.start == "data" else 1)
            )
            features = self.features(epochs, self.fit)
            start_flows(
                flows,
                features,
                self.fit.valid,
                flow,
                self.settings.seed,
                self.device,
                self.progress,
            )
            state = flows.state_dict()
            return Artifact(
                {name: value for name, value in state.items() if ".blocks." not in name}, {}
            )

        backbone = self._finetuned_content(epochs) if epochs else self._root_content
        return self.store.get("flow_starts", backbone | {"flow_start": given}, compute)

    def losses(self, epochs: int, depth: int) -> dict[str, Any]:
        """Learning curves of the finished run: ``finetuning``, the loss of every epoch, and
        ``flows``, for each level its curve.
        """
        finetuned = self.store.find("finetuned", self.store.key(self._finetuned_content(epochs)))
        flows = self.store.find("flows", self.store.key(self._flow_content(epochs, depth)))
        return {
            "finetuning": finetuned.facts["losses"] if finetuned else [],
            "flows": flows.facts["losses"] if flows else [],
        }

    def network(self, epochs: int, depth: int, fusion: Fusion | None = None) -> ScoreNetwork:
        """The whole network of a run, in evaluation mode on the device.

        Args:
            epochs, depth: joint epochs, and blocks of each flow.
            fusion: how it makes one map of both; None for what the settings say.
        """
        backbone, decoder = self.finetuned(epochs)
        flows, scales = self.flows(epochs, depth)
        fusion = self.settings.fusion if fusion is None else fusion
        return ScoreNetwork(backbone, decoder, flows, scales, fusion).eval()

    def maps(self, epochs: int, depth: int, images: PlacedImages) -> ScoreMaps:
        """Both score maps of images: stored, so that any fusion weight costs no more than a
        weighted sum.
        """
        density, classifier = (
            self.density_maps(epochs, depth, images),
            self.classifier_maps(epochs, images),
        )
        return ScoreMaps(density, classifier, self.settings.smoothing)

    def density_maps(self, epochs: int, depth: int, images: PlacedImages) -> Tensor:
        """The density's map of images (N, H, W): flows of `depth` blocks on the backbone after
        `epochs` joint epochs.
        """

        def compute() -> Artifact:
            flows, scales = self.flows(epochs, depth)
            features = self.features(epochs, images)
            likelihoods = [
                level_likelihoods(flow, scale, level, self.device)  # type: ignore[arg-type]
                for flow, scale, level in zip(flows, scales, features, strict=True)
            ]
            return Artifact(
                {"map": density_map(likelihoods, self.settings.image.size, images.valid)}, {}
            )

        return self.store.get(
            "density_maps", self._flow_content(epochs, depth) | {"images": images.key}, compute
        ).tensors["map"]

    def classifier_maps(self, epochs: int, images: PlacedImages) -> Tensor:
        """The classifier's map of images (N, H, W), after `epochs` joint epochs."""

        def compute() -> Artifact:
            return Artifact(
                {"map": classifier_maps(*self.finetuned(epochs), images.images, self.device)}, {}
            )

        content = self._finetuned_content(epochs) | {"images": images.key}
        return self.store.get("classifier_maps", content, compute).tensors["map"]

    def classifier_maps_on_the_way(self, epochs: int, images: PlacedImages) -> dict[int, Tensor]:
        """The classifier's maps of images (N, H, W) after each of a run's last joint epochs, as it
        was then.

        Returns:
            Number of joint epochs -> maps, the last one (`epochs`) included: those epochs in which
            the learning rate falls to its end.
        """
        result = {}
        for epoch in self._snapshot_epochs(epochs):
            point = self._snapshot_point(epochs, epoch)

            def compute(point: dict[str, Any] = point) -> Artifact:
                self.finetune_with_snapshots(epochs)
                stage = self.store.find("snapshots", self.store.key(point))
                assert stage is not None
                return Artifact(
                    {
                        "map": classifier_maps(
                            *self._classifier_of(stage, epochs), images.images, self.device
                        )
                    },
                    {},
                )

            content = point | {"images": images.key}
            result[epoch - self.settings.finetune.frozen_epochs] = self.store.get(
                "classifier_maps", content, compute
            ).tensors["map"]
        result[epochs] = self.classifier_maps(epochs, images)
        return result


_DONOR_BYTES = 256 << 20


def donor_indices(n: int, size: tuple[int, int]) -> Tensor:
    """Which of N fit images fill other images' defects: all, or as many as 256 MiB hold, evenly
    spread over them.

    How many decides defects, and so does not depend on the machine's memory.
    """
    most = max(2, _DONOR_BYTES // (3 * size[0] * size[1]))
    return (
        torch.arange(n)
        if n <= most
        else torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()
    )


def _weights_of(finetuner: Finetuner) -> Artifact:
    """What a trained classifier is, without what training would need to go on."""
    whole = finetuner.stage()
    return Artifact(
        {name: value for name, value in whole.tensors.items() if not name.startswith("optimizer.")},
        whole.facts,
    )


@torch.inference_mode()
def classifier_maps(
    backbone: Backbone, decoder: PixelDecoder, images: Tensor, device: torch.device
) -> Tensor:
    """The classifier's map of uint8 images (N, 3, H, W): (N, H, W) float32 in [0, 1] on the CPU."""
    maps = []
    for start in range(0, len(images), _BATCH):
        batch = to_network_input(images[start : start + _BATCH], device)
        maps.append(torch.sigmoid(decoder(backbone(batch)).float()).cpu())
    return torch.cat(maps)
