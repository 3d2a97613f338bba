"""Pretrained weights: from a file, or through timm from its hub.

A file may be timm's, the hub's, or of a model's original repository: timm's converter of the
architecture reads each of them, and resamples tables that depend on the image size, such as a
transformer's positions. Names may lie under a wrapper's prefix. What is not used may be absent:
deeper stages, the classifier.

A file is compared with the network on the meta device first, so that one that does not fit costs no
memory for the network.
"""

from __future__ import annotations

import argparse
import pickle
import ssl
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from clsnf.core.errors import WeightsError, first_line
from clsnf.model.extractors import (
    Canvas,
    State,
    build_extractor,
    build_for_states,
    misfits,
    own_canvas,
    size_error,
    takes,
)
from clsnf.model.weights_files import DEMO

# Where training programs keep the state dict in their checkpoints.
_CONTAINERS = (
    "state_dict",
    "model",
    "state_dict_ema",
    "model_ema",
    "teacher",
    "target_encoder",
    "encoder",
    "module",
    "model_state",
)
# What training programs wrap networks in: the first parts of their names.
_WRAPPERS = (
    *("module", "_orig_mod", "model", "backbone", "teacher", "student", "ema", "encoder"),
    *("visual", "trunk", "image_encoder", "vision_model", "vision_tower", "net", "network"),
    *("body", "base_model", "base_encoder"),
)


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
    # Before the download: levels and sizes that do not exist raise errors of their own.
    build_extractor(architecture, levels, canvas)
    if not takes(architecture, levels, canvas):
        raise size_error(architecture, levels, canvas)
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


def filled_extractor(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, path: Path
) -> nn.Module:
    """An extractor with a file's weights; the file's other weights (deeper stages, the classifier's
    head) are left out.

    Raises:
        SettingsError: see :func:`~clsnf.model.extractors.build_extractor`.
        WeightsError: the file can't be read, or holds the weights of another model.
    """
    state = read_weights(path)
    forms = [_without_prefix(state, prefix) for prefix in _prefixes(state)]
    with torch.device("meta"):
        extractor, found = _best_form(architecture, levels, canvas, forms)
    problems = misfits(extractor, found)
    if problems:
        raise _misfit_error(architecture, levels, canvas, path, forms, problems)
    extractor, found = _best_form(architecture, levels, canvas, forms)
    extractor.load_state_dict(found, strict=False)  # batch norms' counters may be absent
    return extractor


def read_weights(path: Path) -> State:
    """Read a state dict. Runs no pickled code.

    Raises:
        WeightsError: the file can't be read, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            raise pickle.UnpicklingError("a TorchScript archive, which weights_only refuses")
        # Checkpoints of training programs often hold their arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickler errors have no common base
        raise WeightsError(_unreadable(path, error)) from error
    for key in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = content if isinstance(content, dict) else {}
    state = {name: v for name, v in state.items() if isinstance(name, str)}
    state = {name: v for name, v in state.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no state dict: expected names with tensors.")
    return state


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file can't be read; of a pickled model, the command that makes a file that can."""
    safe = path.with_suffix(".safetensors").name
    load = ""
    if _is_torchscript(path):
        load = f"torch.jit.load('{path.name}', 'cpu').state_dict()"
    elif isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        load = f"torch.load('{path.name}', 'cpu', weights_only=False)"
    if not load:
        return (
            f"{path} can't be read as weights ({first_line(error)[:160]}): "
            "give a .safetensors file, or a torch file that holds tensors only."
        )
    return (
        f"{path} can't be read as weights: it holds pickled objects, which run code when they are "
        f'loaded. If you trust it, make a safe file of it: python -c "import torch, '
        f"safetensors.torch as s; m = {load}; m = m.get('state_dict', m.get('model', m)) if "
        "isinstance(m, dict) else m; m = m if isinstance(m, dict) else m.state_dict(); "
        "s.save_file({k: v.clone().contiguous() for k, v in m.items() if torch.is_tensor(v)}, "
        f"'{safe}')\""
    )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _prefixes(state: State) -> list[str]:
    """The chains of wrappers that names begin with, "" first, longer ones after shorter ones."""
    found = {""}
    for name in state:
        chain = ""
        for part in name.split(".")[:-1]:
            if part not in _WRAPPERS:
                break
            chain += f"{part}."
            found.add(chain)
    # The teacher of self-supervised training is what its authors publish.
    return sorted(found, key=lambda chain: ("student" in chain, chain.count("."), chain))


def _without_prefix(state: State, prefix: str) -> State:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _best_form(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, forms: list[State]
) -> tuple[nn.Module, State]:
    """The extractor, and of all forms of a state the one that fits it best."""
    extractor, found = build_for_states(architecture, levels, canvas, forms)
    found += [_by_name(extractor, form) for form in forms]
    return extractor, min(found, key=lambda state: len(misfits(extractor, state)))


def _by_name(extractor: nn.Module, state: State) -> State:
    """A state that was saved from an extractor, not from a whole network.

    Dots and underscores count as equal: extractors flatten ``blocks.0`` to ``blocks_0``.
    """
    given = {name.replace(".", "_"): value for name, value in state.items()}
    names = {name: name.replace(".", "_") for name in extractor.state_dict()}
    return {name: given[plain] for name, plain in names.items() if plain in given}


def _misfit_error(
    architecture: str,
    levels: tuple[int, ...],
    canvas: Canvas,
    path: Path,
    forms: list[State],
    problems: list[str],
) -> Exception:
    """What to say of a file that does not fill an extractor: size, levels, or another model."""

    def fits(levels: tuple[int, ...], canvas: Canvas) -> bool:
        with torch.device("meta"):
            return not misfits(*_best_form(architecture, levels, canvas, forms))

    own = own_canvas(architecture)
    if canvas != own and not takes(architecture, levels, canvas) and fits(levels, own):
        return size_error(architecture, levels, canvas)
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    text = f"{path} does not fit {architecture!r}: {'; '.join(problems[:3])}{more}. "
    if fits((0,), canvas):  # another model's file does not
        deepest = next(level for level in reversed(range(max(levels))) if fits((level,), canvas))
        return WeightsError(
            f"{text}It fits levels 0 to {deepest}: give --levels among them, or a file of the "
            "whole network."
        )
    return WeightsError(f"{text}Give its weights, or choose --backbone and --levels to match.")
