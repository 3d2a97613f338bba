"""``clsnf data download | pack | verify | synthesize | show``: data sets and synthetic defects."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import Commands, main
from clsnf.cli.options import (
    location,
    max_bad_option,
    path,
    picture_options,
    setting_options,
    textures_option,
)
from clsnf.core.errors import ClsnfError, DataError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

    from clsnf.cli.terminal import Terminal
    from clsnf.core.config import DetectorSettings
    from clsnf.data.images import LoadedImages
    from clsnf.synthesis.object_mask import MaskDecision


@main.group(cls=Commands, short_help="Download and pack data sets; look at synthetic defects.")
def data() -> None:
    """Download public data sets, pack data sets, and look at synthetic defects."""


@data.command(short_help="Download a public data set.")
@click.argument("name", metavar="mvtec|btad|visa|dtd")
@click.option("--root", type=path, required=True, help="The folder to write it to, as ROOT/NAME.")
@click.option("--yes", is_flag=True, help="Do not ask before the download.")
@click.option(
    "--sources",
    type=path,
    help="A YAML file of data sets and mirrors.  [default: the one that ships with clsnf]",
)
def download(name: str, root: Path, yes: bool, sources: Path | None) -> None:
    """Download a public data set, check it and unpack it.

    After an interruption, the same command continues.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.datasets.download import download as fetch
    from clsnf.datasets.download import is_there, read_source

    source = read_source(name, sources)
    terminal = Terminal()
    if is_there(source, root):
        terminal.line(f"{root / source.folder} is there already: nothing to do")
        return
    sizes = [archive.size for archive in source.archives if archive.size is not None]
    size = (
        f"{sum(sizes) / 1e9:.2f} GB"
        if len(sizes) == len(source.archives)
        else "not known before the download starts"
    )
    for line in (
        f"{source.title}, {source.homepage}",
        f"size     {size}",
        f"licence  {source.licence}",
        f"cite     {source.citation}",
    ):
        terminal.line(line)
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("There is no terminal to ask whether to download this: add --yes.")
        if not click.confirm(f"Download it to {root / source.folder}?", err=True):
            raise ClsnfError("Not downloaded.")
    with terminal.live():
        place = fetch(source, root, terminal.line, terminal.progress)
    terminal.line(f"{source.title} is in {place}")


def _split_table(
    options: dict[str, Any], settings: DetectorSettings, terminal: Terminal
) -> pa.Table:
    """The category's checked table, with its training rows split as in a study."""
    from clsnf.data.splits import assign_splits

    table = shared.read_one_table(options["data"], options["normals"], options["category"])
    table = shared.check_pictures(table, options["allow_leak"], options["max_bad"], terminal)
    return assign_splits(table, settings.validation.fraction, settings.seed)


def _loaded(table: pa.Table, settings: DetectorSettings) -> tuple[LoadedImages, MaskDecision]:
    """The normal images of split ``fit`` at the network's input size, and their mask mode."""
    from clsnf.data.images import load_images
    from clsnf.synthesis.object_mask import choose_mask_mode
    from clsnf.training.prepare import rows_of

    fit = load_images(rows_of(table, "fit").sort_by("sha256")["path"].to_pylist(), settings.image)
    return fit, choose_mask_mode(fit.images, settings.defects.object_mask)


@data.command(short_help="Write the synthetic validation set.")
@picture_options
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option(
    "--out", type=path, required=True, help="The folder to write it to, in the layout of MVTec AD."
)
@setting_options
def synthesize(**options: Any) -> None:
    """Write the validation set that a study with the same settings uses for selection.

    --set validation.images_per_family=N is the number of defects of each family. --set
    defects.object_mask=auto|off|dark|bright says where defects may be.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.core.files import check_writable
    from clsnf.synthesis.validation_set import write_validation_set

    settings = shared.settings_of(options)
    check_writable(options["out"], folder=True)
    terminal = Terminal()
    with terminal.live():
        table = _split_table(options, settings, terminal)
        _, decision = _loaded(table, settings)
        terminal.line(f"object mask: {decision.mode} ({decision.reason})")
        written = write_validation_set(
            table,
            options["out"],
            images_per_family=settings.validation.images_per_family,
            seed=settings.seed,
            mask_mode=decision.mode,
            progress=terminal.progress,
        )
    defects = sum(written["label"].to_pylist())
    click.echo(
        f"{options['out']}: {len(written) - defects} normals, {defects} defects; look at "
        "contact_sheet.png"
    )


@data.command(short_help="Draw a sheet of training and validation defects.")
@picture_options
@textures_option
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option("--out", type=path, required=True, help="The PNG to write.")
@setting_options
def show(**options: Any) -> None:
    """Draw a contact sheet of the defects for training, then of those for selection."""
    import tempfile

    import numpy as np

    from clsnf.cli.terminal import Terminal
    from clsnf.core.files import check_writable
    from clsnf.data.images import read_image, write_image
    from clsnf.synthesis.contact_sheet import draw_sheet, write_contact_sheet
    from clsnf.synthesis.training_sheet import training_rows
    from clsnf.synthesis.validation_set import write_validation_set
    from clsnf.training.prepare import texture_bank

    settings = shared.settings_of(options)
    if options["out"].suffix.lower() != ".png":
        raise SettingsError(f"--out is {options['out']}: give a file name that ends with .png.")
    check_writable(options["out"], folder=False)
    terminal = Terminal()
    with terminal.live(), tempfile.TemporaryDirectory() as folder:
        textures = texture_bank(settings, options["textures"])
        table = _split_table(options, settings, terminal)
        fit, decision = _loaded(table, settings)
        training = draw_sheet(
            training_rows(fit, textures, settings.defects, decision.mode, settings.seed)
        )
        few = min(6, settings.validation.images_per_family)  # the first ones of a study's set
        written = write_validation_set(
            table,
            Path(folder) / "set",
            images_per_family=few,
            seed=settings.seed,
            mask_mode=decision.mode,
            progress=terminal.progress,
        )
        write_contact_sheet(written, Path(folder) / "validation.png")
        whole = np.vstack([training, read_image(Path(folder) / "validation.png")])
    options["out"].parent.mkdir(parents=True, exist_ok=True)
    write_image(options["out"], whole)
    click.echo(f"object mask: {decision.mode} ({decision.reason})")
    click.echo(
        f"{options['out']}: each picture, its defect outlined, and the defect enlarged; "
        "training's rows first"
    )


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


@data.command(short_help="Pack a data set into a few large files.")
@click.argument("source", metavar="SRC", type=location)
@click.argument("destination", metavar="DEST", type=location)
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option(
    "--normals",
    is_flag=True,
    help="SRC is a folder of good pictures alone: one category, with the folder's name.",
)
def pack(
    source: Path | str, destination: Path | str, categories: str | None, normals: bool
) -> None:
    """Write the data set SRC as Parquet shards to DEST.

    DEST is a new folder or a URI such as s3://bucket/folder. Every --data accepts a pack in place
    of the folder, with the same results. Pictures are packed unchanged and unchecked; clsnf data
    verify names those that can't be read.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.data.layouts import read_normals
    from clsnf.data.packs import write_pack
    from clsnf.data.sets import list_categories, read_category

    if normals:
        if categories is not None or isinstance(source, str):
            raise SettingsError(
                "--normals is one category, a folder named after it: leave --categories out, and "
                "give a folder."
            )
        chosen = [(source.absolute().name, partial(read_normals, source))]
    else:
        chosen = [
            (name, partial(read_category, source, name))
            for name in shared.choose_categories(list_categories(source), categories, source)
        ]
    terminal = Terminal()
    with terminal.live():
        shards = write_pack(chosen, destination, terminal.progress)
    rows, size = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
    what = (
        f"{_count(len(chosen), 'category', 'categories')}, {rows} pictures, "
        f"{_count(len(shards), 'shard')}"
    )
    click.echo(f"{destination}: {what}, {size / 1e6:.1f} MB")


@data.command(short_help="Check a pack.")
@click.argument("location", metavar="PACK", type=location)
@max_bad_option
def verify(location: Path | str, max_bad: float) -> None:
    """Check a whole pack: sizes and checksums of the shards, and every picture.

    Pictures that can't be read are named.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.data.packs import is_pack, verify_pack

    if not is_pack(location):
        raise DataError(f"{location} is no pack: there is no pack.json; clsnf data pack makes one.")
    terminal = Terminal()
    with terminal.live():
        found = verify_pack(location, terminal.progress)
    for problem in found.unreadable:
        terminal.line(f"warning: {problem}")
    total = sum(found.rows.values())
    if len(found.unreadable) > max_bad * total:
        raise DataError(
            f"{len(found.unreadable)} of {total} pictures in {location} can't be read, more than "
            f"--max-bad {max_bad:g}."
        )
    rows = ", ".join(f"{category} {count}" for category, count in found.rows.items())
    click.echo(
        f"{location}: whole, {_count(found.shards, 'shard')}, {found.bytes / 1e6:.1f} MB; "
        f"pictures: {rows}"
    )
