"""Pretrained weights: from a file, or through timm from its hub.

Weights are matched by parameter name. Dots and underscores count as equal, because timm's feature
extractors flatten ``blocks.0`` to ``blocks_0``; a file with a whole classifier's weights fits. timm
resamples tables that depend on the image size, such as a transformer's positions.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from clsnf.core.errors import SettingsError, WeightsError, first_line
from clsnf.model.extractors import build_extractor
from clsnf.model.weights_files import DEMO


def fetch_pretrained(
    architecture: str, levels: tuple[int, ...], canvas: tuple[int, int]
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
    build_extractor(architecture, levels, canvas)
    try:
        with _hub_reached_or_offline():
            return build_extractor(architecture, levels, canvas, pretrained=True)
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
            f"{path} can't be read as weights ({first_line(error)[:160]}): "
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


def filled_extractor(
    architecture: str, levels: tuple[int, ...], canvas: tuple[int, int], path: Path
) -> nn.Module:
    """An extractor with a file's weights; the file's other weights (deeper stages, the classifier's
    head) are left out.
    """
    extractor = build_extractor(architecture, levels, canvas)
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
        resampled = _resampled_extractor(architecture, levels, canvas, used)
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
    canvas: tuple[int, int],
    state: dict[str, Tensor],
) -> nn.Module | None:
    """An extractor that timm fills with weights whose names all fit; None if that fails.

    timm resamples tables that depend on the image size.
    """
    plain = {
        name.removeprefix("module.").removeprefix("model."): value for name, value in state.items()
    }
    try:
        overlay = {"state_dict": plain}
        return build_extractor(
            architecture, levels, canvas, pretrained=True, pretrained_cfg_overlay=overlay
        )
    except SettingsError:  # a shape that does not go with the image size
        return None
