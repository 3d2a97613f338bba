"""A detector from a checkpoint of the method's authors: their networks, level constants and a
threshold from normal images.

What maps onto what, and what rests on an assumption, is in ``docs/checkpoints.md``. Unusual:
nothing is taken on trust that the tensors tell themselves (which backbone, which levels, how many
coupling blocks, which permutation); the file's ``args`` are asked only for what no shape shows, and
a value that makes no sense there is passed over with a note. The authors' scores are relative to
the largest one of a test set; here the level constants come from fit images and the threshold from
validation images, as for every detector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
    ValidationSettings,
)
from clsnf.core.errors import CheckpointError, DataError
from clsnf.core.progress import Progress, silent
from clsnf.detector import Detector, Provenance, package_versions, validation_normals
from clsnf.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneInfo,
    architecture_of,
    empty_backbone,
    fingerprint,
)
from clsnf.model.decoder import PixelDecoder
from clsnf.model.flow import LevelFlow, LevelScale, level_vectors
from clsnf.model.network import ScoreNetwork, build_decoder, empty_flows, to_network_input
from clsnf.model.paper_decoder import PaperDecoder
from clsnf.paper.checkpoint_file import Checkpoint, State
from clsnf.training.prepare import PlacedImages, data_fingerprint, place_rows, rows_of

DEFAULT_SIZE = 256
DEFAULT_CLAMP = 1.9
DEFAULT_WEIGHT = 0.25  # the authors' w_fe = 1 on three levels, their value for most categories
MOST_BLOCKS = 64  # of a flow, and
MOST_CONDITION = 4096  # dimensions of its condition: beyond those no flow is meant
DEEPEST = 4  # the encoder's stage that the decoder starts from
_BATCH = 8

# Blocks of the four stages, width of the first 3x3 convolution, whether blocks are bottlenecks:
# torchvision's ResNets.
_RESNETS: dict[tuple[tuple[int, ...], int, bool], str] = {
    ((2, 2, 2, 2), 64, False): "resnet18",
    ((3, 4, 6, 3), 64, False): "resnet34",
    ((3, 4, 6, 3), 64, True): "resnet50",
    ((3, 4, 6, 3), 128, True): "wide_resnet50_2",
    ((3, 4, 23, 3), 64, True): "resnet101",
    ((3, 4, 23, 3), 128, True): "wide_resnet101_2",
    ((3, 8, 36, 3), 64, True): "resnet152",
}


@dataclass
class Imported:
    """The networks of a checkpoint, without what normal images have to say.

    Attributes:
        backbone, decoder, flows: filled; in evaluation mode.
        settings: those that a detector of these networks has.
        files: the sha256 of each file by its name.
        notes: lines for people: what was assumed.
    """

    backbone: Backbone
    decoder: nn.Module
    flows: nn.ModuleList
    settings: DetectorSettings
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


def build_imported(
    checkpoint: Checkpoint,
    *,
    backbone: str | None = None,
    image_size: tuple[int, int] | None = None,
    fusion_weight: float | None = None,
    false_reject_rate: float | None = None,
    seed: int = 0,
) -> Imported:
    """The networks of a checkpoint.

    Args:
        checkpoint: as :func:`clsnf.paper.checkpoint_file.read_checkpoint` gives it.
        backbone: timm's name of the encoder; None for the one that its tensors show.
        image_size: (height, width); None for the one of the file's ``args``.
        fusion_weight: w in [0, 1]; None for the one of the file's ``args``, w_fe / (L + w_fe).
        false_reject_rate: share of normals that the threshold may reject; the default where None.
        seed: decides which normal images validate.

    Raises:
        CheckpointError: the tensors are not those of this backbone with the authors' decoder and
            flows; the first that differs is named.
        SettingsError: no such backbone, or an image size or weight that makes no sense.
    """
    arguments, notes = checkpoint.arguments, list[str]()
    _check_arguments(arguments)
    seen = _architecture(checkpoint.encoder)
    if backbone is None and seen is None:
        raise CheckpointError(
            "The encoder's tensors (layer1.0.conv2.weight and so on) are not those of a ResNet "
            "that is known by its shapes: say which "
            "one of timm's it is with --backbone, such as wide_resnet50_2."
        )
    name = backbone or str(seen)
    hint = (
        f" The encoder is that of {seen}: try --backbone {seen}."
        if seen not in (None, architecture_of(BackboneSettings(name)))
        else ""
    )
    by_level = _flows_by_level(checkpoint, hint)
    levels = tuple(by_level)
    size = image_size or _square(arguments, notes)
    settings = DetectorSettings(
        image=ImageSettings(*size),
        backbone=BackboneSettings(name, levels),
        finetune=FinetuneSettings(decoder="authors"),
        flow=_flow_settings(list(by_level.values()), arguments, notes),
        validation=ValidationSettings()
        if false_reject_rate is None
        else ValidationSettings(false_reject_rate=false_reject_rate),
        fusion_weight=_weight(arguments, len(levels), notes)
        if fusion_weight is None
        else fusion_weight,
        seed=seed,
    )
    architecture = architecture_of(settings.backbone)
    extractor = empty_backbone(architecture, levels, size)
    _fill(extractor.extractor, checkpoint.encoder, "the encoder", architecture, hint, spare=True)
    _check_decoder_kind(checkpoint.decoder, arguments, extractor.info, size)
    decoder = build_decoder(extractor.info, settings.image, settings.finetune, seed=0)
    _fill(decoder, checkpoint.decoder, "the decoder", architecture, hint)
    flows = empty_flows(extractor.info, settings.flow)
    for level, flow in zip(levels, flows, strict=True):
        assert isinstance(flow, LevelFlow)
        assert flow.blocks is not None
        _fill(flow.blocks, by_level[level], f"the flow of stage {level}", architecture, hint)
    return Imported(
        extractor, decoder.eval(), flows.eval(), settings, dict(checkpoint.files), notes
    )


def calibrate_imported(
    imported: Imported, table: pa.Table, device: torch.device, progress: Progress = silent
) -> Detector:
    """The detector of imported networks, with level constants and threshold from a category's
    normal images.

    Args:
        imported: as :func:`build_imported` gives it.
        table: a category, split by :func:`clsnf.data.splits.assign_splits`: level constants come
            from its rows of split ``fit``, the threshold from the normal ones of ``validation``;
            test rows are not looked at.
        device: where to compute.
        progress: told about long work.

    Raises:
        CheckpointError: the networks give values that are not finite.
        DataError, ImageError: there are no images, or some can't be read.
    """
    normals, fit_rows = validation_normals(table), rows_of(table, "fit")
    if len(fit_rows) == 0:
        raise DataError(
            "There are no normal images to take the level constants from: add normal images."
        )
    placed = place_rows(fit_rows.sort_by("sha256"), imported.settings)
    constants = level_constants(
        imported.backbone.to(device), imported.flows.to(device), placed, device, progress
    )
    scales = [LevelScale(c) for c in constants]
    decoder: PixelDecoder = imported.decoder  # type: ignore[assignment]
    fusion = imported.settings.fusion
    network = ScoreNetwork(imported.backbone, decoder, imported.flows, scales, fusion)
    provenance = Provenance(
        category=str(table["category"][0].as_py()),
        architecture=imported.backbone.info.architecture,
        backbone_fingerprint=fingerprint(imported.backbone),
        data_fingerprint=data_fingerprint(fit_rows),
        validation_fingerprint=data_fingerprint(normals),
        object_mask="unknown",
        fit_images=len(fit_rows),
        validation_scores=(),
        versions=package_versions(),
        imported=imported.files,
    )
    return Detector.calibrated(network, imported.settings, provenance, normals, device, progress)


@torch.inference_mode()
def level_constants(
    backbone: Backbone,
    flows: nn.ModuleList,
    placed: PlacedImages,
    device: torch.device,
    progress: Progress = silent,
) -> list[float]:
    """m_l of each level: the largest log-likelihood per dimension over all vectors of the images.

    Raises:
        CheckpointError: one is not finite.
    """
    largest = [-math.inf] * len(flows)
    total = len(placed.images)
    for start in range(0, total, _BATCH):
        batch = to_network_input(placed.images[start : start + _BATCH], device)
        for level, (flow, features) in enumerate(zip(flows, backbone(batch), strict=True)):
            assert isinstance(flow, LevelFlow)
            log_probs = flow.log_prob(level_vectors(features.float(), flow.neighbourhood))
            if not bool(log_probs.isfinite().all()):
                raise CheckpointError(
                    f"The flow of level {level + 1} of {len(flows)} gives log-likelihoods that "
                    "are not finite for normal images: "
                    "the checkpoint's networks do not fit together, or its training had diverged."
                )
            largest[level] = max(largest[level], float(log_probs.max()))
        progress("level constants", min(start + _BATCH, total), total)
    return largest


# ---- what the tensors tell ----


def _stage_channels(encoder: State) -> dict[int, int]:
    """Output channels of each stage of a ResNet's encoder, by its number from 1 on."""
    found: dict[int, tuple[tuple[int, int], int]] = {}
    for name, value in encoder.items():
        match = re.fullmatch(r"layer([1-4])\.(\d{1,3})\.conv([23])\.weight", name)
        if match and value.ndim == 4:
            stage, place = int(match[1]), (int(match[2]), int(match[3]))
            if stage not in found or place > found[stage][0]:
                found[stage] = place, value.shape[0]
    return {stage: channels for stage, (_, channels) in sorted(found.items())}


def _architecture(encoder: State) -> str | None:
    """timm's (and torchvision's) name of the ResNet that these tensors belong to, None where it
    can't be told.
    """
    blocks = tuple(
        len({name.split(".")[1] for name in encoder if name.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    first = encoder.get("layer1.0.conv2.weight")
    if (
        first is None or first.ndim != 4 or first.shape[0] != first.shape[1]
    ):  # a grouped convolution: no ResNet of these
        return None
    return _RESNETS.get((blocks, first.shape[0], "layer1.0.conv3.weight" in encoder))


def _flows_by_level(checkpoint: Checkpoint, hint: str) -> dict[int, State]:
    """Each flow under the number of the encoder's stage that has as many channels, shallow to deep."""
    stages = {channels: stage for stage, channels in _stage_channels(checkpoint.encoder).items()}
    if len(stages) < DEEPEST:
        raise CheckpointError(
            "The encoder's tensors are not those of a ResNet with four stages "
            "(layer1.0.conv2.weight and so on): "
            f"the authors' checkpoints hold torchvision's resnet18 or wide_resnet50_2.{hint}"
        )
    found: dict[int, State] = {}
    for index, flow in enumerate(checkpoint.flows):
        offset = flow.get("module_list.0.global_offset")
        if offset is None or offset.ndim != 2:
            raise CheckpointError(
                f"Flow {index + 1} of {len(checkpoint.flows)} has no module_list.0.global_offset "
                "of shape (1, channels): "
                "it is no SequenceINN of FrEIA's (0.2) AllInOneBlock."
            )
        level = stages.get(offset.shape[1])
        if level is None or level in found:
            known = ", ".join(
                f"{channels} (stage {stage})" for channels, stage in sorted(stages.items())
            )
            problem = (
                "a level that has a flow already"
                if level in found
                else "none of the encoder's levels"
            )
            raise CheckpointError(
                f"Flow {index + 1} of {len(checkpoint.flows)} is for vectors of {offset.shape[1]} "
                f"channels, {problem}: they have {known}."
            )
        found[level] = flow
    if DEEPEST not in found:
        raise CheckpointError(
            f"The flows are of stages {', '.join(map(str, sorted(found)))}: stage {DEEPEST}, "
            "which the decoder starts from, has none. "
            "Only checkpoints whose pool_layers hold 3 can be imported."
        )
    return dict(sorted(found.items()))


def _flow_settings(
    flows: Sequence[State], arguments: Mapping[str, Any], notes: list[str]
) -> FlowSettings:
    depths = [
        len({name.split(".")[1] for name in flow if name.startswith("module_list.")})
        for flow in flows
    ]
    if len(set(depths)) > 1 or depths[0] > MOST_BLOCKS:
        raise CheckpointError(
            f"The flows have {', '.join(map(str, depths))} coupling blocks: all must have as "
            f"many, {MOST_BLOCKS} at most."
        )
    first = flows[0].get("module_list.0.subnet.0.weight")
    if first is None or first.ndim != 2:
        raise CheckpointError(
            "The first flow's module_list.0.subnet.0.weight is missing or no matrix: it is no "
            "flow of CFLOW-AD's shape."
        )
    channels = flows[0]["module_list.0.global_offset"].shape[1]
    condition = first.shape[1] - (channels - channels // 2)
    if not 0 < condition <= MOST_CONDITION or condition % 4:
        raise CheckpointError(
            f"The first flow's module_list.0.subnet.0.weight has the shape {tuple(first.shape)}: "
            f"that leaves {condition} dimensions for "
            f"the condition, which must be a multiple of 4 from 4 to {MOST_CONDITION} (the "
            "authors: 128)."
        )
    hard = all(
        _is_shuffle(value)
        for flow in flows
        for name, value in flow.items()
        if name.endswith("w_perm")
    )
    clamp = _number(arguments.get("clamp_alpha"))
    if clamp is None or not 0 < clamp < math.inf:
        clamp = DEFAULT_CLAMP
        notes.append(
            "the file does not say the flows' clamp (clamp_alpha): the authors' default, "
            f"{DEFAULT_CLAMP}, is taken"
        )
    return FlowSettings(
        neighbourhood=1,
        memory=0,
        depth=depths[0],
        start="random",
        clamp=clamp,
        permutation="hard" if hard else "soft",
        condition_dims=condition,
    )


def _is_shuffle(matrix: Tensor) -> bool:
    return bool(((matrix == 0) | (matrix == 1)).all())


# ---- what only the arguments tell ----


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _square(arguments: Mapping[str, Any], notes: list[str]) -> tuple[int, int]:
    side = arguments.get("input_size")
    if isinstance(side, bool) or not isinstance(side, int):
        notes.append(
            f"the file does not say the image size (input_size): {DEFAULT_SIZE} is taken (or give "
            "--image-size)"
        )
        side = DEFAULT_SIZE
    return side, side


def _weight(arguments: Mapping[str, Any], levels: int, notes: list[str]) -> float:
    """w = w_fe / (L + w_fe). The authors' program gets w_fe when it tests, so files of training
    runs hold its default, 0.
    """
    w_fe = _number(arguments.get("w_fe"))
    if w_fe is not None and 0 < w_fe < math.inf:
        weight = w_fe / (levels + w_fe)
        notes.append(f"fusion weight {weight:.4g}: the file's w_fe {w_fe:g} on {levels} levels")
        return weight
    said = f"w_fe {w_fe:g}" if w_fe is not None else "no w_fe"
    notes.append(
        f"fusion weight {DEFAULT_WEIGHT}, the default, because the file says {said} (or give "
        "--fusion-weight)"
    )
    return DEFAULT_WEIGHT


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what no tensor shows and what would make every score wrong."""
    for name, needed in (("norm_mean", IMAGENET_MEAN), ("norm_std", IMAGENET_STD)):
        given = arguments.get(name)
        if not isinstance(given, (list, tuple)) or any(_number(v) is None for v in given):
            continue  # not said: the authors know no other
        if len(given) != 3 or any(
            abs(float(a) - b) > 1e-6 for a, b in zip(given, needed, strict=True)
        ):
            raise CheckpointError(
                f"The network was trained on images scaled with {name} {list(given)}: only "
                f"ImageNet's, {list(needed)}, fit."
            )


def _check_decoder_kind(
    decoder: State, arguments: Mapping[str, Any], info: BackboneInfo, image_size: tuple[int, int]
) -> None:
    """Say what two known kinds of other decoders are, before their shapes do."""
    last = decoder.get("conv2.weight")
    if last is not None and last.ndim == 4 and last.shape[0] in (2, 3):
        trained = arguments.get("loss_type")
        said = f" (loss_type {trained})" if isinstance(trained, str) else ""
        raise CheckpointError(
            f"The decoder's conv2.weight {tuple(last.shape)} gives {last.shape[0]} maps{said}: "
            "only soft targets, which give one map "
            "(loss_type smooth_cls), can be imported."
        )
    with torch.device("meta"):  # shapes alone
        built, bare = (
            PaperDecoder(info.channels, info.grids, image_size, skips=skips)
            for skips in (True, False)
        )
    if not _has_shapes_of(decoder, built) and _has_shapes_of(decoder, bare):
        raise CheckpointError(
            "The decoder was trained without skip connections (skip_connection no): such "
            "checkpoints can't be imported."
        )


def _has_shapes_of(given: State, module: nn.Module) -> bool:
    wanted = {
        name: value.shape
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return all(name in given and given[name].shape == shape for name, shape in wanted.items())


# ---- filling ----


def _fill(
    module: nn.Module, given: State, what: str, architecture: str, hint: str, spare: bool = False
) -> None:
    """Load tensors by name; every one must be there, in its shape and finite, and, unless `spare`,
    none be left over.
    """
    filled = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):  # counts training steps; older files have none
            filled[name] = value
            continue
        found = given.get(name)
        wanted = f"{architecture} needs {tuple(value.shape)}"
        if found is None:
            raise CheckpointError(f"{what.capitalize()} has no {name}; {wanted}.{hint}")
        if found.shape != value.shape:
            raise CheckpointError(
                f"{what.capitalize()}'s {name} has the shape {tuple(found.shape)}; {wanted}.{hint}"
            )
        if not found.is_floating_point():
            raise CheckpointError(
                f"{what.capitalize()}'s {name} holds {str(found.dtype).removeprefix('torch.')}, "
                "not floating-point numbers."
            )
        filled[name] = found.to(value.dtype)
        if not bool(filled[name].isfinite().all()):
            raise CheckpointError(
                f"{what.capitalize()}'s {name} holds values that are not finite: its training had "
                "diverged."
            )
    more = [
        name for name in given if name not in filled and not name.endswith("num_batches_tracked")
    ]
    if more and not spare:
        raise CheckpointError(
            f"{what.capitalize()} has {more[0]} {tuple(given[more[0]].shape)}, which that of "
            f"{architecture} has not.{hint}"
        )
    module.load_state_dict(filled)
