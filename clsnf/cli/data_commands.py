"""``clsnf data download | synthesize | show``: public data sets, and a look at what training and selection see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import Commands, main
from clsnf.cli.options import path, picture_options, setting_options, textures_option
from clsnf.errors import ClsnfError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

    from clsnf.config import DetectorSettings
    from clsnf.data.foreground import ForegroundDecision
    from clsnf.data.images import LoadedImages
    from clsnf.terminal import Terminal


@main.group(cls=Commands, short_help="Get data sets; look at synthetic defects.")
def data() -> None:
    """Get public data sets, and look at the defects that training and selection use."""


@data.command(short_help="Get a public data set.")
@click.argument("name", metavar="mvtec|btad|visa|dtd")
@click.option("--root", type=path, required=True, help="The folder to put it into, as ROOT/NAME.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--sources", type=path, help="A YAML file of data sets and mirrors.  [default: the one that ships with clsnf]")
def download(name: str, root: Path, yes: bool, sources: Path | None) -> None:
    """Download a public data set, check it and unpack it. Give the command again to go on after an interruption."""
    from clsnf.data.download import download as fetch
    from clsnf.data.download import is_there, read_source
    from clsnf.terminal import Terminal

    source = read_source(name, sources)
    terminal = Terminal()
    if is_there(source, root):
        terminal.line(f"{root / source.folder} is there already: nothing to do")
        return
    sizes = [archive.size for archive in source.archives if archive.size is not None]
    size = f"{sum(sizes) / 1e9:.2f} GB" if len(sizes) == len(source.archives) else "not known before the download starts"
    for line in (
        f"{source.title}, {source.homepage}",
        f"size     {size}",
        f"licence  {source.licence}",
        f"cite     {source.citation}",
    ):
        terminal.line(line)
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("There is no terminal to ask on whether to download this: add --yes.")
        if not click.confirm(f"Download it to {root / source.folder}?", err=True):
            raise ClsnfError("Not downloaded.")
    with terminal.live():
        place = fetch(source, root, terminal.line, terminal.progress)
    terminal.line(f"{source.title} is in {place}")


def _split_table(options: dict[str, Any], settings: DetectorSettings, terminal: Terminal) -> pa.Table:
    """The category's checked table with its training rows split as a study would."""
    from clsnf.data.splits import assign_splits

    table = shared.read_one_table(options["data"], options["normals"], options["category"])
    shared.check_pictures(table, options["allow_leak"], terminal)
    return assign_splits(table, settings.validation.fraction, settings.seed)


def _loaded(table: pa.Table, settings: DetectorSettings) -> tuple[LoadedImages, ForegroundDecision]:
    """The normals to fit on the network's canvas, and the decision on the object mask that they lead to."""
    from clsnf.data.foreground import chosen_polarity
    from clsnf.data.images import load_images
    from clsnf.training.prepare import rows_of

    fit = load_images(rows_of(table, "fit").sort_by("sha256")["path"].to_pylist(), settings.image)
    return fit, chosen_polarity(fit.images, settings.defects.object_mask)


@data.command(short_help="Write the synthetic validation set.")
@picture_options
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option("--out", type=path, required=True, help="The folder to write it to, in MVTec AD's layout.")
@setting_options
def synthesize(**options: Any) -> None:
    """Write the validation set that a study with the same settings selects on.

    The number of defects is --set validation.images_per_family=N, where they may lie --set defects.object_mask=auto|off|dark|bright.
    """
    from clsnf.data.validation_set import write_validation_set
    from clsnf.fingerprint import check_place
    from clsnf.terminal import Terminal

    settings = shared.settings_of(options)
    check_place(options["out"], folder=True)
    terminal = Terminal()
    with terminal.live():
        table = _split_table(options, settings, terminal)
        _, decision = _loaded(table, settings)
        terminal.line(f"object mask: {decision.kind} ({decision.reason})")
        written = write_validation_set(
            table,
            options["out"],
            images_per_family=settings.validation.images_per_family,
            seed=settings.seed,
            polarity=decision.kind,
            progress=terminal.progress,
        )
    defects = sum(written["label"].to_pylist())
    click.echo(f"{options['out']}: {len(written) - defects} normals, {defects} defects; look at contact_sheet.png")


@data.command(short_help="Draw a sheet of training and validation defects.")
@picture_options
@textures_option
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option("--out", type=path, required=True, help="The PNG to write.")
@setting_options
def show(**options: Any) -> None:
    """Draw a contact sheet of what training sees, then of what selection sees, kind by kind."""
    import tempfile

    import numpy as np

    from clsnf.data.contact_sheet import contact_sheet, page
    from clsnf.data.images import read_image, write_image
    from clsnf.data.training_look import training_bands
    from clsnf.data.validation_set import write_validation_set
    from clsnf.fingerprint import check_place
    from clsnf.terminal import Terminal
    from clsnf.training.prepare import texture_bank

    settings = shared.settings_of(options)
    if options["out"].suffix.lower() != ".png":
        raise SettingsError(f"--out is {options['out']}: give a file name that ends with .png.")
    check_place(options["out"], folder=False)
    terminal = Terminal()
    with terminal.live(), tempfile.TemporaryDirectory() as folder:
        textures = texture_bank(settings, options["textures"])
        table = _split_table(options, settings, terminal)
        fit, decision = _loaded(table, settings)
        training = page(training_bands(fit, textures, settings.defects, decision.kind, settings.seed))
        few = min(6, settings.validation.images_per_family)  # the first of those that a study makes
        written = write_validation_set(
            table,
            Path(folder) / "set",
            images_per_family=few,
            seed=settings.seed,
            polarity=decision.kind,
            progress=terminal.progress,
        )
        contact_sheet(written, Path(folder) / "validation.png")
        whole = np.vstack([training, read_image(Path(folder) / "validation.png")])
    options["out"].parent.mkdir(parents=True, exist_ok=True)
    write_image(options["out"], whole)
    click.echo(f"object mask: {decision.kind} ({decision.reason})")
    click.echo(f"{options['out']}: each picture, its defect outlined, and the defect enlarged; training's rows first")
