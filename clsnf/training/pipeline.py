"""One category from images to score maps: a chain of artifacts that runs share.

    data + backbone + seed -> stable phase up to epoch t -> finetuned after E joint epochs
    -> flows of depth D -> score maps of images

Every method looks its artifact up by content and computes it only where it is missing (see
:mod:`clsnf.training.artifacts`). What stands last in the chain is cheapest to change: another depth
trains new flows alone, and another fusion weight trains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from clsnf.core.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    Fusion,
    key_content,
    to_dict,
)
from clsnf.core.device import training_dtype
from clsnf.core.hashing import content_key
from clsnf.core.progress import Progress, silent
from clsnf.model.backbone import Backbone, BackboneInfo, empty_backbone, fingerprint
from clsnf.model.decoder import PixelDecoder
from clsnf.model.flow import LevelFlow, LevelScale
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
from clsnf.training.density import (
    extract_features,
    extract_features_and_maps,
    fit_flows,
    level_likelihoods,
    memory_likelihoods,
    start_flows,
)
from clsnf.training.finetune import (
    STABLE_PHASE,
    Finetuner,
    decay_start,
    stable_phase_content,
    train_stable_phase,
    without_prefix,
)

_BATCH = 16
DENSITY_MAPS = "density_maps"  # a kind of artifact


@dataclass(frozen=True)
class PlacedImages:
    """Images in memory, placed on the network's canvas.

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
    """Images from a stream, placed on the network's canvas.

    Args:
        stream: brings them.
        key: as that of :class:`PlacedImages`. Where images come from changes no result, so it is no
            part of the key.
    """

    def __init__(self, stream: Stream, key: str) -> None:
        self.stream = stream
        self.key = key

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


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a category is trained on.

    Attributes:
        fit: normal images.
        mask_mode: where defects may lie: ``off``, ``dark`` or ``bright`` products (see
            :mod:`clsnf.synthesis.object_mask`).
        textures: (T, 3, H, W) uint8, of the images' size, to make defects from.
        textures_key: hash of their content.
    """

    fit: Images
    mask_mode: str
    textures: Tensor
    textures_key: str
    _donors: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def donor_indices(self) -> Tensor:
        """Indices of the fit images that fill other images' defects."""
        height, width = self.textures.shape[2:]
        return donor_indices(len(self.fit.stream), (height, width))

    def donors(self, device: torch.device) -> Tensor:
        """The fit images that fill other images' defects, (K, 3, H, W) uint8; read once."""
        if device not in self._donors:
            self._donors[device] = self.fit.stream.load_shared(self.donor_indices, device)
        return self._donors[device]


# Features of the fit images, and of others, that stay in memory beside the last ones.
_FEATURE_BYTES = 256 << 20


class FeatureCache:
    """Features in memory: of the fit images and of others, the most recently used sets.

    Flows of every depth need the same features. A set of features takes 2 N P C bytes a level. As
    many sets stay as 256 MiB hold, for the fit images and for others alike.

    Args:
        backbones: number of backbones whose features of the fit images stay in memory, however
            large they are.
    """

    def __init__(self, backbones: int = 1) -> None:
        self._backbones = backbones
        self._of_fit_images: dict[str, list[Tensor]] = {}
        self._of_other_images: dict[str, list[Tensor]] = {}

    def resize(self, backbones: int) -> None:
        """Keep features of the fit images under this many backbones at least from now on."""
        self._backbones = backbones

    def of_fit_images(self, key: str, extract: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Features of the fit images; `key` says under which backbone."""
        return _get_bounded(self._of_fit_images, self._backbones, key, extract)

    def of_other_images(self, key: str, extract: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Features of other images; `key` says of which, and under which backbone."""
        return _get_bounded(self._of_other_images, 1, key, extract)


def _get_bounded(
    kept: dict[str, list[Tensor]], least: int, key: str, extract: Callable[[], list[Tensor]]
) -> list[Tensor]:
    if key in kept:
        kept[key] = kept.pop(key)  # the last one now
        return kept[key]
    largest = max((sum(level.nbytes for level in levels) for levels in kept.values()), default=0)
    most = max(least, _FEATURE_BYTES // max(1, largest))
    while len(kept) >= most:  # free the oldest before the new ones fill the memory
        del kept[next(iter(kept))]
    kept[key] = extract()
    return kept[key]


class CategoryPipeline:
    """Artifacts of one category.

    Args:
        settings: all settings; each method gets ``finetune.joint_epochs`` and ``flow.depth`` anew.
        backbone: with its pretrained weights; copied, never changed.
        data: what to train on.
        store: finds and keeps artifacts.
        device: where to compute.
        progress: called with the progress of long work.
        feature_cache: shared with other pipelines of the same category; None for a new one.
    """

    def __init__(
        self,
        settings: DetectorSettings,
        backbone: Backbone,
        data: TrainingData,
        store: ArtifactStore,
        device: torch.device,
        progress: Progress = silent,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        self.settings = settings
        self.pretrained = backbone
        self.data = data
        self.store = store
        self.device = device
        self.progress = progress
        self.feature_cache = FeatureCache() if feature_cache is None else feature_cache

    def with_settings(self, settings: DetectorSettings) -> CategoryPipeline:
        """The same category under other settings; both pipelines share the features in memory.

        The settings of images, backbone and object mask must be the same.
        """
        return CategoryPipeline(
            settings,
            self.pretrained,
            self.data,
            self.store,
            self.device,
            self.progress,
            self.feature_cache,
        )

    @property
    def fit(self) -> Images:
        """The normal images to train on."""
        return self.data.fit

    @property
    def info(self) -> BackboneInfo:
        """Shape facts of the backbone."""
        return self.pretrained.info

    @cached_property
    def _root_content(self) -> dict[str, Any]:
        """What every artifact of this category depends on."""
        return {
            "fit": self.fit.key,
            "image": key_content(self.settings.image),
            "backbone": fingerprint(self.pretrained),
            **backbone_content(self.settings.backbone),
            "seed": self.settings.seed,
            "arithmetic": f"{self.device.type} {training_dtype(self.device)}",
        }

    def _finetune(self, joint_epochs: int) -> FinetuneSettings:
        return dataclasses.replace(self.settings.finetune, joint_epochs=joint_epochs)

    def _flow(self, depth: int) -> FlowSettings:
        return dataclasses.replace(self.settings.flow, depth=depth)

    def _stable_phase_content(self, joint_epochs: int, epoch: int) -> dict[str, Any]:
        """What decides a run with `joint_epochs` after `epoch` epochs of the stable phase."""
        content = self._root_content | {
            "finetune": stable_phase_content(self._finetune(joint_epochs), epoch),
            "defects": to_dict(self.settings.defects),
            "polarity": self.data.mask_mode,  # its name in the keys of stored artifacts
            "textures": self.data.textures_key,
        }
        donors = len(self.data.donor_indices)
        return content if donors == len(self.fit.stream) else content | {"donors": donors}

    def _finetuned_content(self, joint_epochs: int) -> dict[str, Any]:
        epochs = self._finetune(joint_epochs).epochs
        return self._stable_phase_content(joint_epochs, epochs) | {
            "joint_epochs": joint_epochs,
            "decay_epochs": self.settings.finetune.decay_epochs,
        }

    def _flow_content(self, joint_epochs: int, depth: int) -> dict[str, Any]:
        return self._backbone_content(joint_epochs) | {"flow": to_dict(self._flow(depth))}

    def _backbone_content(self, joint_epochs: int) -> dict[str, Any]:
        """What the backbone depends on; where it does not train, on no setting of stage one."""
        trains = self._finetune(joint_epochs).trains_backbone
        return self._finetuned_content(joint_epochs) if trains else self._root_content

    def _new_finetuner(self, settings: FinetuneSettings) -> Finetuner:
        maker = DefectMaker(
            self.settings.defects,
            self.data.textures.to(self.device),
            self.data.donors(self.device),
        )
        return Finetuner(
            self._copy_of_backbone(),
            build_decoder(self.info, self.settings.image, settings, self.settings.seed),
            self.fit.stream,
            DefectRecipe(maker, self.data.mask_mode),
            settings,
            self.settings.seed,
            self.device,
        )

    def _copy_of_backbone(self) -> Backbone:
        copy = empty_backbone(self.settings.backbone, self.settings.image.size)
        copy.load_state_dict(self.pretrained.state_dict())
        return copy

    def finetuned(
        self, joint_epochs: int, joint_epochs_choices: Collection[int] = ()
    ) -> tuple[Backbone, PixelDecoder]:
        """Backbone and decoder after `joint_epochs` epochs, in evaluation mode on the device.

        Args:
            joint_epochs: with 0 the backbone keeps its pretrained weights, and the decoder
                alone trains.
            joint_epochs_choices: other numbers of joint epochs that runs may ask for. The stable
                phase is stored where their decay starts. With the schedule ``cosine``, runs share
                nothing, and these are ignored.
        """
        compute = partial(self._finetune_to_the_end, joint_epochs, joint_epochs_choices)
        artifact = self.store.get("finetuned", self._finetuned_content(joint_epochs), compute)
        if self.settings.finetune.schedule == "cosine":
            # The run is whole, and no other run resumes from its stored epochs.
            for epoch in range(1, decay_start(self._finetune(joint_epochs)) + 1):
                self.store.drop(STABLE_PHASE, self._stable_phase_point(joint_epochs, epoch))
        return self._classifier_of(artifact, joint_epochs)

    def _stable_phase_point(self, joint_epochs: int, epoch: int) -> dict[str, Any]:
        return self._stable_phase_content(joint_epochs, epoch) | {"epoch": epoch}

    def _snapshot_point(self, joint_epochs: int, epoch: int) -> dict[str, Any]:
        return self._finetuned_content(joint_epochs) | {"epoch": epoch}

    def _stable_phase(
        self, joint_epochs: int, until: int, decay_starts: Collection[int] = ()
    ) -> Finetuner:
        return train_stable_phase(
            partial(self._new_finetuner, self._finetune(joint_epochs)),
            self.store,
            partial(self._stable_phase_point, joint_epochs),
            until,
            decay_starts,
            self.progress,
        )

    def _finetune_to_the_end(
        self, joint_epochs: int, joint_epochs_choices: Collection[int] = (), snapshots: bool = False
    ) -> Artifact:
        settings = self._finetune(joint_epochs)
        start = decay_start(settings)
        others = [] if settings.schedule == "cosine" else joint_epochs_choices
        finetuner = self._stable_phase(
            joint_epochs, start, [decay_start(self._finetune(other)) for other in others]
        )

        def store_snapshot(epoch: int) -> None:
            if snapshots and epoch >= settings.frozen_epochs:
                self.store.get(
                    "snapshots",
                    self._snapshot_point(joint_epochs, epoch),
                    lambda: _weights_of(finetuner),
                )

        finetuner.run(settings.epochs, start, self.progress, before_epoch=store_snapshot)
        return _weights_of(finetuner)

    def get_on_stable_phase(
        self,
        kind: str,
        joint_epochs: int,
        step: int,
        content: dict[str, Any],
        compute: Callable[[], Artifact],
    ) -> Artifact:
        """An artifact of a caller's own that depends on the stable phase at epoch `step`.

        Args:
            kind: of artifact.
            joint_epochs: joint epochs of the run.
            step: epochs of the stable phase.
            content: what else decides the artifact.
            compute: makes it where it is missing.
        """
        return self.store.get(kind, self._stable_phase_point(joint_epochs, step) | content, compute)

    def stable_phase_maps(self, joint_epochs: int, step: int, images: PlacedImages) -> Tensor:
        """The classifier's maps of images (N, H, W) after `step` epochs of the stable phase."""
        finetuner = self._stable_phase(joint_epochs, step)
        return classifier_maps(
            finetuner.backbone.eval(), finetuner.decoder.eval(), images.images, self.device
        )

    def _snapshot_epochs(self, joint_epochs: int) -> range:
        """The joint epochs among those in which the learning rate decays."""
        settings = self._finetune(joint_epochs)
        return range(max(decay_start(settings), settings.frozen_epochs), settings.epochs)

    def finetune_with_snapshots(self, joint_epochs: int) -> None:
        """As :meth:`finetuned`; stores the classifier after each of the last joint epochs too."""
        keys = [
            self.store.key(self._snapshot_point(joint_epochs, epoch))
            for epoch in self._snapshot_epochs(joint_epochs)
        ]
        if any(self.store.find("snapshots", key) is None for key in keys):
            # One pass over the decay stores all of them.
            end = self._finetune_to_the_end(joint_epochs, snapshots=True)
            self.store.get("finetuned", self._finetuned_content(joint_epochs), lambda: end)

    def _classifier_of(
        self, artifact: Artifact, joint_epochs: int
    ) -> tuple[Backbone, PixelDecoder]:
        backbone = self._copy_of_backbone()
        backbone.load_state_dict(without_prefix(artifact.tensors, "backbone."))
        decoder = build_decoder(
            self.info, self.settings.image, self._finetune(joint_epochs), self.settings.seed
        )
        decoder.load_state_dict(without_prefix(artifact.tensors, "decoder."))
        return backbone.to(self.device), decoder.to(self.device).eval()

    def _backbone(self, joint_epochs: int) -> Backbone:
        trains = self._finetune(joint_epochs).trains_backbone
        return self.finetuned(joint_epochs)[0] if trains else self._copy_of_backbone()

    def features(
        self, joint_epochs: int, images: Images, with_classifier: bool = False
    ) -> list[Tensor]:
        """Features of images under the backbone after `joint_epochs` epochs.

        Args:
            joint_epochs: of the backbone.
            images: which ones.
            with_classifier: where the backbone must run, let the same pass give the classifier's
                maps of these images, and store them.

        Returns:
            For each level (N, P, C) on the CPU. :attr:`feature_cache` keeps the last ones.
        """
        neighbourhood = self.settings.flow.side

        def extract() -> list[Tensor]:
            content = self._classifier_content(joint_epochs, images)
            if with_classifier and not self._is_stored("classifier_maps", content):
                features, maps = extract_features_and_maps(
                    *self.finetuned(joint_epochs),
                    images.stream,
                    self.device,
                    neighbourhood,
                    self.progress,
                )
                self.store.get("classifier_maps", content, lambda: Artifact({"map": maps}, {}))
                return features
            return extract_features(
                self._backbone(joint_epochs),
                images.stream,
                self.device,
                neighbourhood,
                self.progress,
            )

        key = content_key([self._backbone_content(joint_epochs), neighbourhood])
        if images.key == self.fit.key:
            return self.feature_cache.of_fit_images(key, extract)
        return self.feature_cache.of_other_images(f"{key} {images.key}", extract)

    def flows(self, joint_epochs: int, depth: int) -> tuple[torch.nn.ModuleList, list[LevelScale]]:
        """Flows of `depth` blocks on the backbone after `joint_epochs` epochs, and their scales."""
        settings = self._flow(depth)

        def compute() -> Artifact:
            flows = build_flows(self.info, settings, self.settings.seed)
            flows.load_state_dict(self._flow_start(joint_epochs).tensors, strict=False)
            features = self.features(joint_epochs, self.fit)
            scales, curves = fit_flows(
                flows,
                features,
                self.fit.valid,
                settings,
                self.settings.seed,
                self.device,
                self.progress,
            )
            return Artifact(dict(flows.state_dict()), {"scales": scales, "losses": curves})

        artifact = self.store.get("flows", self._flow_content(joint_epochs, depth), compute)
        flows = empty_flows(self.info, settings)
        flows.load_state_dict(artifact.tensors)
        scales = [LevelScale(*scale) for scale in artifact.facts["scales"]]
        return flows.to(self.device).eval(), scales

    def _flow_start(self, joint_epochs: int) -> Artifact:
        """Whitening layers and memory banks, which flows of every depth on this backbone share."""
        flow = self.settings.flow

        def compute() -> Artifact:
            flows = empty_flows(
                self.info, dataclasses.replace(flow, depth=0 if flow.start == "data" else 1)
            )
            features = self.features(joint_epochs, self.fit)
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

        return self.store.get("flow_starts", self._flow_start_content(joint_epochs), compute)

    def _flow_start_content(self, joint_epochs: int) -> dict[str, Any]:
        flow = self.settings.flow
        given = {
            "start": flow.start,
            "covariance": flow.covariance,
            "neighbourhood": flow.side,
            "memory": flow.memory,
        }
        return self._backbone_content(joint_epochs) | {"flow_start": given}

    def losses(self, joint_epochs: int, depth: int) -> dict[str, Any]:
        """Learning curves of a finished run: ``finetuning``, one loss per epoch, and ``flows``, one
        curve per level.
        """
        finetuned = self.store.find(
            "finetuned", self.store.key(self._finetuned_content(joint_epochs))
        )
        flows = self.store.find("flows", self.store.key(self._flow_content(joint_epochs, depth)))
        return {
            "finetuning": finetuned.facts["losses"] if finetuned else [],
            "flows": flows.facts["losses"] if flows else [],
        }

    def network(self, joint_epochs: int, depth: int, fusion: Fusion | None = None) -> ScoreNetwork:
        """The whole network of a run, in evaluation mode on the device.

        Args:
            joint_epochs, depth: joint epochs, and blocks of each flow.
            fusion: how it makes one map of both; None for what the settings say.
        """
        backbone, decoder = self.finetuned(joint_epochs)
        flows, scales = self.flows(joint_epochs, depth)
        fusion = self.settings.fusion if fusion is None else fusion
        return ScoreNetwork(backbone, decoder, flows, scales, fusion).eval()

    def maps(self, joint_epochs: int, depth: int, images: PlacedImages) -> ScoreMaps:
        """Both score maps of images. They are stored, so another fusion weight costs a weighted
        sum.
        """
        density = self.density_maps(joint_epochs, depth, images, with_classifier=True)
        return ScoreMaps(
            density, self.classifier_maps(joint_epochs, images), self.settings.smoothing
        )

    def get_on_maps(
        self,
        kind: str,
        joint_epochs: int,
        depth: int,
        images: PlacedImages,
        content: dict[str, Any],
        compute: Callable[[], Artifact],
    ) -> Artifact:
        """An artifact of a caller's own that depends on both score maps of images.

        Args:
            kind: of artifact.
            joint_epochs, depth, images: of the maps, see :meth:`maps`.
            content: what else decides the artifact.
            compute: makes it where it is missing.
        """
        maps = self._density_content(joint_epochs, depth, images) | {
            "classifier": self._finetuned_content(joint_epochs),
            "smoothing": self.settings.smoothing,
        }
        return self.store.get(kind, maps | content, compute)

    def _density_content(
        self, joint_epochs: int, depth: int, images: PlacedImages
    ) -> dict[str, Any]:
        return self._flow_content(joint_epochs, depth) | {"images": images.key}

    def density_key(self, joint_epochs: int, depth: int, images: PlacedImages) -> str:
        """The key of :meth:`density_maps` in the store."""
        return self.store.key(self._density_content(joint_epochs, depth, images))

    def stored_density_maps(self, key: str) -> Tensor | None:
        """The density's maps with a key (:meth:`density_key`); None where they are not stored."""
        found = self.store.find(DENSITY_MAPS, key)
        return None if found is None else found.tensors["map"]

    def density_maps(
        self, joint_epochs: int, depth: int, images: PlacedImages, with_classifier: bool = False
    ) -> Tensor:
        """The density's maps of images (N, H, W), by flows of `depth` blocks on the backbone after
        `joint_epochs` epochs.

        With `with_classifier`, as in :meth:`features`.
        """

        def compute() -> Artifact:
            flows, scales = self.flows(joint_epochs, depth)
            features = self.features(joint_epochs, images, with_classifier)
            remembered = self._memory_likelihoods(joint_epochs, flows, features, images)
            likelihoods = [
                level_likelihoods(flow, scale, level, self.device, near)  # type: ignore[arg-type]
                for flow, scale, level, near in zip(
                    flows, scales, features, remembered, strict=True
                )
            ]
            return Artifact(
                {"map": density_map(likelihoods, self.settings.image.size, images.valid)}, {}
            )

        return self.store.get(
            DENSITY_MAPS,
            self._density_content(joint_epochs, depth, images),
            compute,
        ).tensors["map"]

    def _memory_likelihoods(
        self,
        joint_epochs: int,
        flows: torch.nn.ModuleList,
        features: list[Tensor],
        images: PlacedImages,
    ) -> list[Tensor] | list[None]:
        """What the memory banks give for images, (N, P) a level: the same at every depth."""
        if not self.settings.flow.memory:
            return [None] * len(features)

        def compute() -> Artifact:
            found = {}
            for level, (flow, vectors) in enumerate(zip(flows, features, strict=True)):
                assert isinstance(flow, LevelFlow)
                assert flow.memory is not None
                found[f"level{level}"] = memory_likelihoods(flow.memory, vectors, self.device)
            return Artifact(found, {})

        content = self._flow_start_content(joint_epochs) | {"images": images.key}
        tensors = self.store.get("memory_likelihoods", content, compute).tensors
        return [tensors[f"level{level}"] for level in range(len(features))]

    def classifier_maps(self, joint_epochs: int, images: PlacedImages) -> Tensor:
        """The classifier's maps of images (N, H, W) after `joint_epochs` epochs."""

        def compute() -> Artifact:
            return Artifact(
                {"map": classifier_maps(*self.finetuned(joint_epochs), images.images, self.device)},
                {},
            )

        content = self._classifier_content(joint_epochs, images)
        return self.store.get("classifier_maps", content, compute).tensors["map"]

    def _is_stored(self, kind: str, content: dict[str, Any]) -> bool:
        return self.store.find(kind, self.store.key(content)) is not None

    def _classifier_content(self, joint_epochs: int, images: Images) -> dict[str, Any]:
        return self._finetuned_content(joint_epochs) | {"images": images.key}

    def classifier_maps_by_epoch(
        self, joint_epochs: int, images: PlacedImages
    ) -> dict[int, Tensor]:
        """The classifier's maps of images (N, H, W) after each of a run's last joint epochs.

        Returns:
            Number of joint epochs -> maps, for the epochs in which the learning rate decays, up to
            `joint_epochs`.
        """
        frozen = self.settings.finetune.frozen_epochs
        result = {
            epoch - frozen: self._snapshot_maps(joint_epochs, epoch, images)
            for epoch in self._snapshot_epochs(joint_epochs)
        }
        result[joint_epochs] = self.classifier_maps(joint_epochs, images)
        return result

    def _snapshot_maps(self, joint_epochs: int, epoch: int, images: PlacedImages) -> Tensor:
        """The classifier's maps after `epoch` of all epochs of a run with `joint_epochs`."""
        point = self._snapshot_point(joint_epochs, epoch)

        def compute() -> Artifact:
            self.finetune_with_snapshots(joint_epochs)
            snapshot = self.store.find("snapshots", self.store.key(point))
            assert snapshot is not None
            backbone, decoder = self._classifier_of(snapshot, joint_epochs)
            maps = classifier_maps(backbone, decoder, images.images, self.device)
            return Artifact({"map": maps}, {})

        content = point | {"images": images.key}
        return self.store.get("classifier_maps", content, compute).tensors["map"]


def backbone_content(settings: BackboneSettings) -> dict[str, Any]:
    """What decides a backbone's features beside its weights, for keys.

    Settings that came later are left out where they change nothing.
    """
    content: dict[str, Any] = {"levels": list(settings.level_numbers)}
    if settings.join != "none":
        content["join"] = settings.join
    if (settings.mean, settings.std) != (IMAGENET_MEAN, IMAGENET_STD):
        content |= {"mean": settings.mean, "std": settings.std}
    return content


_DONOR_BYTES = 256 << 20


def donor_indices(n: int, size: tuple[int, int]) -> Tensor:
    """Indices of the fit images, N in all, that fill other images' defects.

    All of them, or as many as 256 MiB hold, evenly spread. The limit is the same on every machine,
    because the choice of images decides the defects.
    """
    most = max(2, _DONOR_BYTES // (3 * size[0] * size[1]))
    if n <= most:
        return torch.arange(n)
    return torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()


def _weights_of(finetuner: Finetuner) -> Artifact:
    """The state of a finetuner without its optimizer."""
    state = finetuner.state()
    tensors = {
        name: value for name, value in state.tensors.items() if not name.startswith("optimizer.")
    }
    return Artifact(tensors, state.facts)


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
