"""Which weights file belongs to a backbone.

The setting ``backbone.weights`` is the file of one backbone, a folder of files that are named after
their models, or a file for each of several models, as a text of JSON
(``{"resnet18": "/a.safetensors"}``, see :func:`weights_of_models`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, WeightsError

DEMO = "demo"


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
            return _file_in(path, settings.name)
        if not path.is_file():
            raise WeightsError(
                f"There is no weights file {path}: give a .safetensors, .pth, .pt or .bin file of "
                f"{settings.name!r}."
            )
        return path
    return demo_assets()[1] if settings.name == DEMO else None


def _file_in(folder: Path, name: str) -> Path | None:
    """The file of a model in a folder of weights; the demo backbone brings its own along."""
    for stem in (name, name.partition(".")[0]):  # timm's name may have a tag: resnet18.a1_in1k
        for suffix in (".safetensors", ".pth", ".pt", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
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
