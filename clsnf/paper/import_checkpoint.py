"""A detector from a checkpoint of the method's authors.

The networks are theirs; level constants and threshold come from normal images.
``docs/checkpoints.md`` says what corresponds to what, and which assumptions are made.

The tensors decide whatever they show: the backbone, the levels, the number of coupling blocks, the
permutation. The file's ``args`` decide only what no shape shows; a value there that makes no sense
is ignored, and a note says so. The authors' scores are relative to the largest one of a test set;
here the level constants come from fit images and the threshold from validation images, as for every
detector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from clsnf.core.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
    replaced,
)
from clsnf.core.errors import CheckpointError, DataError
from clsnf.core.progress import Progress, silent
from clsnf.detector import Detector, Provenance, package_versions, validation_normals
from clsnf.model.backbone import (
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
from clsnf.model.resolve import resolved
from clsnf.paper.checkpoint_file import Checkpoint, State
from clsnf.training.prepare import PlacedImages, data_fingerprint, place_rows, rows_of

DEFAULT_SIZE = 256
DEFAULT_CLAMP = 1.9
DEFAULT_WEIGHT = 0.25  # the authors' w_fe = 1 on three levels, their value for most categories
MOST_BLOCKS = 64  # coupling blocks of a flow; a file with more is damaged or something else
MOST_CONDITION = 4096  # dimensions of a flow's condition; the same
DEEPEST = 4  # the encoder's level that the decoder starts from
_BATCH = 8

# torchvision's ResNets by the numbers of blocks of their four levels, the width of the first 3x3
# convolution, and whether the blocks are bottlenecks.
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
    """The networks of a checkpoint, still without level constants and threshold.

    Attributes:
        backbone, decoder, flows: with the checkpoint's parameters, in evaluation mode.
        settings: of a detector with these networks.
        files: the sha256 of each file by its name.
        notes: one line for each assumption that was made.
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
    """Build the networks of a checkpoint.

    Args:
        checkpoint: from :func:`clsnf.paper.checkpoint_file.read_checkpoint`.
        backbone: timm's name of the encoder; None: the one that the tensors show.
        image_size: (height, width); None: the one in the file's ``args``.
        fusion_weight: w in [0, 1]; None: w_fe / (L + w_fe) with w_fe from the file's ``args``.
        false_reject_rate: share of normals that the threshold may reject; None: the default.
        seed: decides which normal images are for validation.

    Raises:
        CheckpointError: the tensors do not belong to this backbone, or to the authors' decoder and
            flows; the message names the first tensor that differs.
        SettingsError: there is no such backbone, or the image size or a share is not valid.
    """
    arguments, notes = checkpoint.arguments, list[str]()
    _check_arguments(arguments)
    name, hint = _backbone_name(checkpoint.encoder, backbone)
    by_level = _flows_by_level(checkpoint, hint)
    settings = DetectorSettings(
        image=ImageSettings(*(image_size or _square(arguments, notes)), interpolation="bilinear"),
        backbone=BackboneSettings(name, tuple(by_level), mean=IMAGENET_MEAN, std=IMAGENET_STD),
        finetune=FinetuneSettings(decoder="authors"),
        flow=_flow_settings(list(by_level.values()), arguments, notes),
        seed=seed,
    )
    if fusion_weight is None:
        fusion_weight = _weight(arguments, len(by_level), notes)
    values: dict[str, Any] = {"fusion_weight": fusion_weight}
    if false_reject_rate is not None:
        values["validation.false_reject_rate"] = false_reject_rate
    settings = resolved(replaced(settings, values))
    networks = _fill_networks(checkpoint, by_level, settings, hint)
    return Imported(*networks, settings, dict(checkpoint.files), notes)


def _fill_networks(
    checkpoint: Checkpoint, by_level: Mapping[int, State], settings: DetectorSettings, hint: str
) -> tuple[Backbone, nn.Module, nn.ModuleList]:
    """Backbone, decoder and flows with the checkpoint's parameters, in evaluation mode."""
    architecture = architecture_of(settings.backbone)
    fill = partial(_fill, architecture=architecture, hint=hint)
    backbone = empty_backbone(settings.backbone, settings.image.size)
    fill(backbone.extractor, checkpoint.encoder, "the encoder", spare=True)
    _check_decoder_kind(
        checkpoint.decoder, checkpoint.arguments, backbone.info, settings.image.size
    )
    decoder = build_decoder(backbone.info, settings.image, settings.finetune, seed=0)
    fill(decoder, checkpoint.decoder, "the decoder")
    flows = empty_flows(backbone.info, settings.flow)
    for level, flow in zip(by_level, flows, strict=True):
        assert isinstance(flow, LevelFlow)
        assert flow.blocks is not None
        fill(flow.blocks, by_level[level], f"the flow of level {level}")
    return backbone, decoder.eval(), flows.eval()


def calibrate_imported(
    imported: Imported, table: pa.Table, device: torch.device, progress: Progress = silent
) -> Detector:
    """A detector of imported networks; normal images give level constants and threshold.

    Args:
        imported: from :func:`build_imported`.
        table: a category, split by :func:`clsnf.data.splits.assign_splits`. Level constants come
            from the rows of split ``fit``, the threshold from the normal rows of ``validation``;
            test rows are not read.
        device: to compute on.
        progress: called after every step.

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
        CheckpointError: a log-likelihood is not finite.
    """
    largest = [-math.inf] * len(flows)
    total = len(placed.images)
    for start in range(0, total, _BATCH):
        batch = to_network_input(placed.images[start : start + _BATCH], device)
        for index, (flow, features) in enumerate(zip(flows, backbone(batch), strict=True)):
            assert isinstance(flow, LevelFlow)
            log_probs = flow.log_prob(level_vectors(features.float(), flow.neighbourhood))
            if not bool(log_probs.isfinite().all()):
                raise CheckpointError(
                    f"Flow {index + 1} of {len(flows)} gives log-likelihoods that are not finite "
                    "for normal images: the checkpoint's networks do not fit together, or its "
                    "training had diverged."
                )
            largest[index] = max(largest[index], float(log_probs.max()))
        progress("level constants", min(start + _BATCH, total), total)
    return largest


# ---- what the tensors show ----


def _backbone_name(encoder: State, given: str | None) -> tuple[str, str]:
    """timm's name of the encoder, and a hint for errors if the tensors show another one.

    Args:
        encoder: tensors by name.
        given: the name that the user gave; None: the one that the tensors show.
    """
    shown = _architecture(encoder)
    name = given or shown
    if name is None:
        raise CheckpointError(
            "The encoder's tensors (layer1.0.conv2.weight and so on) are not those of a ResNet "
            "that is known by its shapes: say which one of timm's it is with --backbone, such as "
            "wide_resnet50_2."
        )
    if shown in (None, architecture_of(BackboneSettings(name))):
        return name, ""
    return name, f" The encoder is that of {shown}: try --backbone {shown}."


def _level_channels(encoder: State) -> dict[int, int]:
    """Output channels of each level of a ResNet: the width of the level's last convolution."""
    found: dict[int, tuple[tuple[int, int], int]] = {}
    for name, value in encoder.items():
        match = re.fullmatch(r"layer([1-4])\.(\d{1,3})\.conv([23])\.weight", name)
        if match and value.ndim == 4:
            level, position = int(match[1]), (int(match[2]), int(match[3]))
            if level not in found or position > found[level][0]:
                found[level] = position, value.shape[0]
    return {level: channels for level, (_, channels) in sorted(found.items())}


def _architecture(encoder: State) -> str | None:
    """timm's name (and torchvision's) of the ResNet with these tensors; None if it is unknown."""
    blocks = tuple(
        len({name.split(".")[1] for name in encoder if name.startswith(f"layer{level}.")})
        for level in range(1, 5)
    )
    first = encoder.get("layer1.0.conv2.weight")
    # The known ResNets have no grouped convolutions, whose shape[1] is smaller.
    if first is None or first.ndim != 4 or first.shape[0] != first.shape[1]:
        return None
    return _RESNETS.get((blocks, first.shape[0], "layer1.0.conv3.weight" in encoder))


def _flows_by_level(checkpoint: Checkpoint, hint: str) -> dict[int, State]:
    """Each flow by its level, shallow to deep: the encoder's level with as many channels."""
    levels = {channels: level for level, channels in _level_channels(checkpoint.encoder).items()}
    if len(levels) < DEEPEST:
        raise CheckpointError(
            "The encoder's tensors are not those of a ResNet with four levels "
            "(layer1.0.conv2.weight and so on): the authors' checkpoints hold torchvision's "
            f"resnet18 or wide_resnet50_2.{hint}"
        )
    found: dict[int, State] = {}
    for index, flow in enumerate(checkpoint.flows):
        offset = flow.get("module_list.0.global_offset")
        if offset is None or offset.ndim != 2:
            raise CheckpointError(
                f"Flow {index + 1} of {len(checkpoint.flows)} has no module_list.0.global_offset "
                "of shape (1, channels): it is no SequenceINN of FrEIA's (0.2) AllInOneBlock."
            )
        level = levels.get(offset.shape[1])
        if level is None or level in found:
            known = ", ".join(f"{channels} (level {n})" for channels, n in sorted(levels.items()))
            problem = "none of the encoder's levels"
            if level in found:
                problem = "a level that has a flow already"
            raise CheckpointError(
                f"Flow {index + 1} of {len(checkpoint.flows)} is for vectors of {offset.shape[1]} "
                f"channels, {problem}: they have {known}."
            )
        found[level] = flow
    if DEEPEST not in found:
        raise CheckpointError(
            f"The flows are of levels {', '.join(map(str, sorted(found)))}: level {DEEPEST}, "
            "which the decoder starts from, has none. Only checkpoints whose pool_layers hold 3 "
            "can be imported."
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
            f"that leaves {condition} dimensions for the condition, which must be a multiple of 4 "
            f"from 4 to {MOST_CONDITION} (the authors: 128)."
        )
    permutations = [
        value for flow in flows for name, value in flow.items() if name.endswith("w_perm")
    ]
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
        permutation="hard" if all(map(_is_shuffle, permutations)) else "soft",
        condition_dims=condition,
    )


def _is_shuffle(matrix: Tensor) -> bool:
    return bool(((matrix == 0) | (matrix == 1)).all())


# ---- what only the arguments show ----


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
    """w = w_fe / (L + w_fe).

    The authors give w_fe when they test. Files of training runs hold its default, 0, which counts
    as not given.
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
    """Refuse a normalisation of the images that no tensor shows and that changes every score."""
    for name, needed in (("norm_mean", IMAGENET_MEAN), ("norm_std", IMAGENET_STD)):
        given = arguments.get(name)
        if not isinstance(given, (list, tuple)) or any(_number(v) is None for v in given):
            continue  # not given: the authors have no other
        pairs = zip(given, needed, strict=False)
        if len(given) != 3 or any(abs(float(a) - b) > 1e-6 for a, b in pairs):
            raise CheckpointError(
                f"The network was trained on images scaled with {name} {list(given)}: only "
                f"ImageNet's, {list(needed)}, fit."
            )


def _check_decoder_kind(
    decoder: State, arguments: Mapping[str, Any], info: BackboneInfo, image_size: tuple[int, int]
) -> None:
    """Refuse two known kinds of other decoders with a clearer message than that of shapes."""
    last = decoder.get("conv2.weight")
    if last is not None and last.ndim == 4 and last.shape[0] in (2, 3):
        trained = arguments.get("loss_type")
        said = f" (loss_type {trained})" if isinstance(trained, str) else ""
        raise CheckpointError(
            f"The decoder's conv2.weight {tuple(last.shape)} gives {last.shape[0]} maps{said}: "
            "only soft targets, which give one map (loss_type smooth_cls), can be imported."
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
    """Load the tensors `given` into `module`, by name.

    Every tensor must be there, with the right shape and finite. Unless `spare`, there may be no
    others.

    Args:
        module: to fill.
        given: tensors by name.
        what: what error messages call the module.
        architecture: the backbone's, for error messages.
        hint: the end of error messages about shapes.
        spare: whether other tensors are ignored.
    """
    what = what.capitalize()
    filled = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):  # a counter of steps; older files have none
            filled[name] = value
            continue
        found = given.get(name)
        wanted = f"{architecture} needs {tuple(value.shape)}"
        if found is None:
            raise CheckpointError(f"{what} has no {name}; {wanted}.{hint}")
        if found.shape != value.shape:
            raise CheckpointError(
                f"{what}'s {name} has the shape {tuple(found.shape)}; {wanted}.{hint}"
            )
        if not found.is_floating_point():
            raise CheckpointError(
                f"{what}'s {name} holds {str(found.dtype).removeprefix('torch.')}, "
                "not floating-point numbers."
            )
        filled[name] = found.to(value.dtype)
        if not bool(filled[name].isfinite().all()):
            raise CheckpointError(
                f"{what}'s {name} holds values that are not finite: its training had diverged."
            )
    more = [
        name for name in given if name not in filled and not name.endswith("num_batches_tracked")
    ]
    if more and not spare:
        raise CheckpointError(
            f"{what} has {more[0]} {tuple(given[more[0]].shape)}, which that of "
            f"{architecture} has not.{hint}"
        )
    module.load_state_dict(filled)
