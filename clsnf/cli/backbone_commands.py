"""``clsnf backbones``: timm's architectures that can serve, what they cost, a trial of one."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clsnf.cli.group import main
from clsnf.cli.options import image_size_option, path
from clsnf.core.config import IMAGENET_MEAN, IMAGENET_STD, DetectorSettings, replaced
from clsnf.core.errors import SettingsError

if TYPE_CHECKING:
    from clsnf.model.backbone_list import ListedBackbone
    from clsnf.serving.try_backbone import TrialStep

_COLUMNS = "{:<44} {:<11} {:<12} {:<16} {:<15} {:>9} {:>9}  {}"


@main.command(short_help="timm's backbones and what they cost; a trial of one.")
@click.argument("pattern", required=False)
@image_size_option("256")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per backbone.")
@click.option(
    "--check",
    metavar="NAME",
    help="Try this backbone: load, train, save, reload and export it, in a process of its own.",
)
@click.option(
    "--weights", type=path, help="With --check: its weights file.  [default: random weights]"
)
def backbones(
    pattern: str | None,
    image_size: tuple[int, int] | None,
    as_json: bool,
    check: str | None,
    weights: Path | None,
) -> None:
    """List timm's architectures that can serve as backbones.

    PATTERN is a part of their names, or a glob such as 'vit_*dinov2'; without it, all are listed,
    which takes minutes. Parameters and operations are those of the network up to the deepest of its
    default levels, for one image; a multiplication and its addition are two operations. MiB are
    those of the weights in float32.
    """
    if check is None and weights is not None:
        raise SettingsError("--weights goes with --check NAME.")
    if check is not None and (pattern is not None or as_json):
        raise SettingsError("--check NAME tries one backbone: leave PATTERN and --json out.")
    settings = DetectorSettings()
    if image_size is not None:
        height, width = image_size
        settings = replaced(settings, {"image.height": height, "image.width": width})
    if check is not None:
        _check(check, weights, settings)
        return
    _list(pattern, (settings.image.height, settings.image.width), as_json)


def _list(pattern: str | None, size: tuple[int, int], as_json: bool) -> None:
    from clsnf.cli.terminal import Terminal
    from clsnf.model.backbone_list import list_backbones, names_like

    names = names_like(pattern)
    terminal = Terminal()
    if not as_json:
        click.echo(
            _COLUMNS.format(
                "name",
                "kind",
                "strides",
                "channels",
                "sizes",
                "millions",
                "GFLOPs",
                "mean, deviation",
            ).rstrip()
        )
    unfit = 0
    with terminal.live():
        for done, row in enumerate(list_backbones(names, size, os.cpu_count() or 1), 1):
            terminal.progress("backbones", done, len(names))
            if row is None:
                unfit += 1
            else:
                click.echo(json.dumps(dataclasses.asdict(row)) if as_json else _line(row))
    if unfit:
        terminal.line(f"{unfit} of {len(names)} give no feature maps and are left out")


def _line(row: ListedBackbone) -> str:
    expects = "ImageNet's"
    if (row.mean, row.std) != (IMAGENET_MEAN, IMAGENET_STD):
        expects = f"{_short(row.mean)}, {_short(row.std)}"
    canvas = "x".join(map(str, row.canvas))
    return _COLUMNS.format(
        row.name,
        row.kind,
        ",".join(map(str, row.strides)),
        ",".join(map(str, row.channels)),
        f"{canvas} alone" if row.multiple is None else f"multiples of {row.multiple}",
        f"{row.parameters / 1e6:.1f}",
        f"{row.flops / 1e9:.1f}",
        expects,
    )


def _short(values: tuple[float, ...]) -> str:
    """Three values, or one where they are equal."""
    shown = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:.3g}" for value in shown)


def _check(name: str, weights: Path | None, settings: DetectorSettings) -> None:
    from clsnf.model.architectures import architecture_of
    from clsnf.model.weights_files import weights_file
    from clsnf.serving.try_backbone import try_backbone

    values = {"backbone.name": name, "backbone.weights": None if weights is None else str(weights)}
    settings = replaced(settings, values)
    architecture_of(settings.backbone)  # raises what bad input deserves
    weights_file(settings.backbone)

    def show(step: TrialStep) -> None:
        found = f"  {step.found}" if step.found else ""
        click.echo(
            f"{step.name:<9} ok {step.seconds:7.1f} s  {step.peak_bytes / 2**20:6.0f} MiB{found}"
        )

    trial = try_backbone(settings, on_step=show)
    if trial.fault is None:
        click.echo(f"{name} works")
        return
    verdict = "refused" if trial.fault.refused else "failed"
    click.echo(f"{trial.fault.step:<9} {verdict}: {trial.fault.reason}")
    sys.exit(1)
