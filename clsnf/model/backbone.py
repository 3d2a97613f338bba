"""The shared feature extractor: any timm architecture that gives feature maps.

Padded convolutions pad by reflection, so that the border of an image does not look like a defect.
The module stays in evaluation mode: batch-norm statistics never change, and only the affine
parameters train. There is no silent fallback: without weights that fit, there is no backbone.

Weights are matched by parameter name. Dots and underscores count as equal, because timm's feature
extractors flatten ``blocks.0`` to ``blocks_0``; a file with a whole classifier's weights fits. timm
resamples tables that depend on the image size, such as a transformer's positions.
"""

from __future__ import annotations

import hashlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, WeightsError
from clsnf.model.architectures import architecture_of
from clsnf.model.layers import slice_strided_convolutions
from clsnf.model.padding import pad_by_reflection
from clsnf.model.weights_files import DEMO, weights_file


@dataclass(frozen=True)
class BackboneInfo:
    """Shape facts of a backbone, enough to build the modules that sit on it."""

    architecture: str
    channels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]  # (h, w) of each level's map at the image size in use


class Backbone(nn.Module):
    """A feature pyramid.

    Args:
        extractor: a module that maps (B, 3, H, W) to a list of feature maps, shallow to deep.
        architecture: its timm name.
        settings: resolved: mean, deviation and joining of levels count.
        canvas: (H, W) of its images.

    Raises:
        SettingsError: the network can't take images of that size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        extractor: nn.Module,
        architecture: str,
        settings: BackboneSettings,
        canvas: tuple[int, int],
    ) -> None:
        super().__init__()
        assert settings.mean is not None, "resolve the settings first"
        assert settings.std is not None, "resolve the settings first"
        self.extractor = extractor
        self._channels_last = getattr(extractor, "output_fmt", None) == "NHWC"  # Swin and its kind
        self._joins = settings.join == "mean"
        self.register_buffer("mean", torch.tensor(settings.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(1, 3, 1, 1), persistent=False)
        pad_by_reflection(extractor)
        slice_strided_convolutions(extractor)
        self.eval()
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, *canvas))
        except (RuntimeError, AssertionError) as error:
            size = "x".join(map(str, canvas))
            raise SettingsError(
                f"Backbone {architecture!r} can't take images of {size} pixels: "
                f"{_first_line(error)}"
            ) from error
        self.info = BackboneInfo(
            architecture,
            tuple(m.shape[1] for m in maps),
            tuple((m.shape[2], m.shape[3]) for m in maps),
        )

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: batch-norm statistics keep their pretrained values."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], to L maps (B, C_l, h_l, w_l), shallow to deep."""
        features: list[Tensor] = self.extractor((images - self.mean) / self.std)
        if self._channels_last:
            features = [level.permute(0, 3, 1, 2) for level in features]
        return joined(features) if self._joins else features


def joined(levels: list[Tensor]) -> list[Tensor]:
    """Levels with one for each shape: the mean of those of equal shape, after each of their vectors
    was standardised.

    The blocks of a transformer write into one stream, whose later states would outweigh the
    earlier ones.

    Args:
        levels: maps (B, C_l, h_l, w_l), shallow to deep.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for level in levels:
        groups.setdefault(tuple(level.shape[1:]), []).append(level)
    return [
        group[0] if len(group) == 1 else torch.stack([standardised(m) for m in group]).mean(dim=0)
        for group in groups.values()
    ]


def standardised(level: Tensor) -> Tensor:
    """A map (B, C, h, w) whose vectors have mean 0 and deviation 1 over their channels."""
    vectors = level.permute(0, 2, 3, 1)
    return F.layer_norm(vectors, vectors.shape[-1:]).permute(0, 3, 1, 2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def empty_backbone(
    settings: BackboneSettings, canvas: tuple[int, int], architecture: str | None = None
) -> Backbone:
    """A backbone with random parameters, for weights that are loaded later.

    Args:
        settings: resolved (:func:`clsnf.model.resolve.resolved`).
        canvas: (H, W) of its images.
        architecture: timm's name; None for that of the settings.

    Raises:
        SettingsError: the model gives no feature maps, or not those levels, or does not take that
            image size.
    """
    architecture = architecture or architecture_of(settings)
    extractor = _extractor(architecture, _levels(settings), canvas, pretrained=False)
    return Backbone(extractor, architecture, settings, canvas)


def _levels(settings: BackboneSettings) -> tuple[int, ...]:
    assert settings.levels is not None, "resolve the settings first"
    return tuple(map(int, settings.levels))


def _extractor(
    architecture: str,
    levels: tuple[int, ...],
    image_size: tuple[int, int],
    pretrained: bool,
    state: dict[str, Tensor] | None = None,
) -> nn.Module:
    """timm's feature extractor; `state` replaces timm's own pretrained weights."""
    import timm

    arguments: dict[str, Any] = {
        "features_only": True,
        "out_indices": levels,
        "pretrained": pretrained,
    }
    if state is not None:
        arguments["pretrained_cfg_overlay"] = {"state_dict": state}
    try:
        # Transformers are built for one image size.
        return timm.create_model(architecture, img_size=image_size, **arguments)
    except TypeError:
        pass  # a convolutional network knows no img_size
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        raise _no_levels(architecture, levels, error) from error
    try:
        return timm.create_model(architecture, **arguments)
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        raise _no_levels(architecture, levels, error) from error


def _no_levels(architecture: str, levels: tuple[int, ...], error: BaseException) -> SettingsError:
    wanted = ",".join(map(str, levels))
    return SettingsError(
        f"Backbone {architecture!r} gives no feature maps for levels {wanted} "
        f"({_first_line(error)}): choose others."
    )


def load_backbone(settings: BackboneSettings, canvas: tuple[int, int]) -> tuple[Backbone, str]:
    """Build the backbone with its pretrained weights.

    Args:
        settings: resolved (:func:`clsnf.model.resolve.resolved`).
        canvas: (H, W) of its images.

    Returns:
        The backbone, and the :func:`fingerprint` of its weights, which does not depend on the file
        that they come from.

    Raises:
        SettingsError: see :func:`architecture_of` and :func:`empty_backbone`.
        WeightsError: the weights are not there, can't be read or fetched, or belong to another
            architecture.
    """
    architecture = architecture_of(settings)
    path = weights_file(settings)
    levels = _levels(settings)
    if path is None:
        extractor = _fetch_pretrained(architecture, levels, canvas)
    else:
        extractor = _filled_extractor(architecture, levels, canvas, path)
    backbone = Backbone(extractor, architecture, settings, canvas)
    return backbone, fingerprint(backbone)


def fingerprint(module: nn.Module) -> str:
    """sha256 over the names, shapes and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _fetch_pretrained(
    architecture: str, levels: tuple[int, ...], image_size: tuple[int, int]
) -> nn.Module:
    import timm

    help_line = (
        f"give a file with --weights FILE (on a machine with internet: "
        'python -c "import timm, safetensors.torch as s; '
        f"s.save_file(timm.create_model('{architecture}', pretrained=True)"
        f".state_dict(), '{architecture}.safetensors')\")"
    )
    if not timm.is_model_pretrained(architecture):
        raise WeightsError(f"timm has no pretrained weights for {architecture!r}: {help_line}.")
    # Before the download: levels that do not exist raise an error of their own.
    _extractor(architecture, levels, image_size, pretrained=False)
    try:
        with _hub_reached_or_offline():
            return _extractor(architecture, levels, image_size, pretrained=True)
    except Exception as error:  # the hub's client raises anything from OSError to its own errors
        cause = type(error.__cause__ or error).__name__
        raise WeightsError(
            f"The pretrained weights of {architecture!r} can't be fetched ({cause}): {help_line}; "
            f"or use --backbone {DEMO} to try things out."
        ) from error


@contextmanager
def _hub_reached_or_offline() -> Iterator[None]:
    """Make the hub's client use its cache alone while the hub can't be reached.

    It would otherwise retry for a minute.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reached(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reached(url: str) -> bool:
    """Whether a server answers at `url`, through the environment's proxy if it names one."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        # The hub's client may know a certificate that Python does not know.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict. Runs no pickled code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickler errors have no common base
        raise WeightsError(
            f"{path} can't be read as weights ({_first_line(error)[:160]}): "
            "give a .safetensors file, or a torch file that holds tensors only."
        ) from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict: expected names with tensors.")
    return state


def _canonical(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.").replace(".", "_")


def _filled_extractor(
    architecture: str, levels: tuple[int, ...], image_size: tuple[int, int], path: Path
) -> nn.Module:
    """An extractor with a file's weights; the file's other weights (deeper stages, the classifier's
    head) are left out.
    """
    extractor = _extractor(architecture, levels, image_size, pretrained=False)
    state = _read_weights(path)
    given = {_canonical(name): value for name, value in state.items()}
    wanted = {_canonical(name) for name in extractor.state_dict()}
    filled, problems, all_there = {}, [], True
    for name, value in extractor.state_dict().items():
        found = given.get(_canonical(name))
        if found is None:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} {tuple(value.shape)} is missing")
                all_there = False
        elif found.shape != value.shape:
            problems.append(f"{name} is {tuple(found.shape)}, not {tuple(value.shape)}")
        else:
            filled[name] = found.to(value.dtype)
    if problems and all_there:
        used = {name: value for name, value in state.items() if _canonical(name) in wanted}
        resampled = _resampled_extractor(architecture, levels, image_size, used)
        if resampled is not None:
            return resampled
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{path} does not fit {architecture!r}: {'; '.join(problems[:3])}{more}. "
            "Give its weights, or choose --backbone and --levels to match."
        )
    extractor.load_state_dict(filled, strict=False)
    return extractor


def _resampled_extractor(
    architecture: str,
    levels: tuple[int, ...],
    image_size: tuple[int, int],
    state: dict[str, Tensor],
) -> nn.Module | None:
    """An extractor that timm fills with weights whose names all fit; None if that fails.

    timm resamples tables that depend on the image size.
    """
    plain = {
        name.removeprefix("module.").removeprefix("model."): value for name, value in state.items()
    }
    try:
        return _extractor(architecture, levels, image_size, pretrained=True, state=plain)
    except SettingsError:  # a shape that does not go with the image size
        return None
