"""Which weights file belongs to a backbone.

The setting ``backbone.weights`` is the file of one backbone, a folder of files that are named after
their models, or a file for each of several models, as a text of JSON
(``{"resnet18": "/a.safetensors"}``, see :func:`weights_of_models`). A folder may also be a copy of
a model's page on the hub: its ``config.json`` says which model it is, and what pictures it wants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, WeightsError

DEMO = "demo"
HUB_CONFIGURATION = "config.json"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightsFacts:
    """What weights say about themselves; None where they don't say it."""

    architecture: str  # timm's name, without a tag
    mean: tuple[float, ...] | None  # of each colour channel, in [0, 1]
    std: tuple[float, ...] | None
    interpolation: str | None  # how pictures were resized, such as bicubic


def demo_assets() -> tuple[dict[str, Any], Path]:
    """Facts of the backbone that ships with clsnf, and its weights file."""
    folder = Path(str(resources.files("clsnf") / "assets"))
    facts: dict[str, Any] = json.loads((folder / "demo_backbone.json").read_text())
    return facts, folder / "demo_backbone.safetensors"


def weights_of_models(files: Mapping[str, str]) -> str:
    """Model -> weights file, as the setting has it."""
    return json.dumps(dict(sorted(files.items())))


def files_of_models(weights: str | None) -> dict[str, str]:
    """The opposite of :func:`weights_of_models`; empty where the setting is something else."""
    if weights is None or not weights.startswith("{"):
        return {}
    try:
        found = json.loads(weights)
    except ValueError:  # a file whose name begins so
        return {}
    return {str(name): str(file) for name, file in found.items()}


def weights_file(settings: BackboneSettings) -> Path | None:
    """The weights file that these settings name, None for timm's pretrained weights.

    Of a folder it is the file that is named after the model, such as ``resnet18.safetensors``.

    Raises:
        WeightsError: the file is not there, or this model has none.
    """
    files, weights = files_of_models(settings.weights), settings.weights
    if files:
        if settings.name not in files:
            if settings.name == DEMO:
                return demo_assets()[1]
            raise WeightsError(
                f"--weights names files of {', '.join(files)}, and none of {settings.name!r}: give "
                f"--weights {settings.name}=FILE too."
            )
        weights = files[settings.name]
    if weights is not None:
        path = Path(weights).expanduser()
        if path.is_dir() and not files:
            path = _file_in(path, settings.name)
        elif path.is_dir():
            path = _hub_file(path) or path
        if not path.is_file():
            raise WeightsError(
                f"There is no weights file {path}: give a .safetensors, .pth, .pt or .bin file of "
                f"{settings.name!r}."
            )
        _check_architecture(path, settings.name)
        return path
    return demo_assets()[1] if settings.name == DEMO else None


def weights_facts(path: Path) -> WeightsFacts | None:
    """What a weights file says about itself, None if nothing.

    A file of the hub has a ``config.json`` beside it; a .safetensors file may have ``architecture``
    and ``pretrained_cfg`` (JSON) in its metadata.

    Raises:
        WeightsError: the ``config.json`` is damaged.
    """
    content: Any = _safetensors_metadata(path) if path.suffix == ".safetensors" else {}
    beside = path.parent / HUB_CONFIGURATION
    if "architecture" not in content and path.name in HUB_FILES and beside.is_file():
        try:
            content = json.loads(beside.read_text())
        except (ValueError, OSError) as error:
            raise WeightsError(f"{beside} can't be read ({error}): fetch it again.") from error
    try:
        architecture = str(content["architecture"])
        found = content.get("pretrained_cfg") or {}
        found = json.loads(found) if isinstance(found, str) else found
        return WeightsFacts(
            architecture.partition(".")[0],
            _numbers(found.get("mean")),
            _numbers(found.get("std")),
            found.get("interpolation"),
        )
    except (KeyError, TypeError, ValueError, AttributeError):  # a configuration of other programs
        return None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _safetensors_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}  # who reads the tensors says what is wrong with the file


def _check_architecture(path: Path, name: str) -> None:
    """Refuse weights that say that they are of another architecture."""
    facts = weights_facts(path)
    asked = demo_assets()[0]["architecture"] if name == DEMO else name.partition(".")[0]
    if facts is not None and facts.architecture != asked:
        raise WeightsError(
            f"{path} has the weights of {facts.architecture!r}, and the backbone is {name!r}: give "
            f"--backbone {facts.architecture}, or other --weights."
        )


def _hub_file(folder: Path) -> Path | None:
    """The weights of a folder that is a copy of a model's page on the hub."""
    if not (folder / HUB_CONFIGURATION).is_file():
        return None
    return next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)


def _file_in(folder: Path, name: str) -> Path:
    """The file of a model in a folder of weights; the demo backbone brings its own along."""
    for stem in (name, name.partition(".")[0]):  # timm's name may have a tag: resnet18.a1_in1k
        for suffix in (".safetensors", ".pth", ".pt", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    of_the_hub = _hub_file(folder)
    if of_the_hub is not None:
        return of_the_hub
    if name == DEMO:
        return demo_assets()[1]
    raise WeightsError(
        f"The weights folder {folder} holds no file of {name!r}: put {name}.safetensors (or .pth, "
        ".pt, .bin) into it."
    )


def check_weights(weights: str | None, models: Sequence[str]) -> None:
    """Refuse weights that can't be those of all models, or that are of others.

    Args:
        weights: the setting.
        models: the backbones of a search space, or one.

    Raises:
        SettingsError: one file for several models, or a file for a model that is none of them.
        WeightsError: see :func:`weights_file`.
    """
    files = files_of_models(weights)
    others = [name for name in files if name not in models]
    if others:
        there = "the backbone is" if len(models) == 1 else "the backbones are"
        raise SettingsError(
            f"--weights names a file of {others[0]!r}, and {there} {', '.join(models)}: leave it "
            "out, or name the backbone as --backbone or the search space does."
        )
    is_one_file = weights is not None and not files and not Path(weights).expanduser().is_dir()
    if len(models) > 1 and is_one_file:
        raise SettingsError(
            f"The search space's backbone.name has {len(models)} backbones "
            f"({', '.join(models)}), and --weights is one file, {weights}, which fits one of them: "
            "give a file for each with --weights NAME=FILE, or a folder of files that are named "
            "after their models, leave --weights out to use timm's pretrained weights, or search "
            "one backbone."
        )
    for name in models if files else ():
        weights_file(BackboneSettings(name, weights=weights))
