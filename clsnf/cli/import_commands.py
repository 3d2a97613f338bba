"""``clsnf import-checkpoint``: a detector from a checkpoint of the method's authors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import (
    DATA_HELP,
    check_options,
    device_option,
    image_size_option,
    location,
    path,
)
from clsnf.core.errors import SettingsError


@main.command(
    "import-checkpoint", short_help="A detector from a checkpoint of the method's authors."
)
@click.argument("files", type=path, nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--backbone",
    help="The encoder's name in timm, such as wide_resnet50_2.  [default: from its tensors]",
)
@click.option("--out", type=path, required=True, help="The folder to save the detector to.")
@click.option("--data", type=location, help=DATA_HELP)
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option(
    "--normals",
    type=path,
    help="A folder of good pictures alone, if possible not those that trained the checkpoint.",
)
@image_size_option("from the checkpoint")
@click.option(
    "--fusion-weight",
    type=float,
    help="Share of the classifier's map, in [0, 1].  [default: from the files' w_fe, or 0.25]",
)
@click.option(
    "--false-reject-rate",
    type=float,
    help="Share of good products that may be rejected.  [default: 0.01]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the split into fit and validation pictures.",
)
@check_options
@device_option
def import_checkpoint(
    files: Sequence[Path],
    backbone: str | None,
    out: Path,
    data: Path | str | None,
    category: str | None,
    normals: Path | None,
    image_size: tuple[int, int] | None,
    fusion_weight: float | None,
    false_reject_rate: float | None,
    seed: int,
    allow_leak: bool,
    max_bad: float,
    device: str,
) -> None:
    """Save a detector with the networks of a checkpoint of the authors.

    FILE... are both files of a product (fe_only_*.pt and nf_only_*.pt), or one file with
    everything. The level constants and the threshold, which the files do not hold, come from good
    pictures.
    """
    if data is None and normals is None:
        raise SettingsError(
            "An imported network needs good pictures, because its level constants and its "
            "threshold are in no checkpoint: give --normals FOLDER, or --data FOLDER --category "
            "NAME."
        )
    from clsnf.cli.terminal import Terminal
    from clsnf.core.device import choose_device
    from clsnf.core.files import check_writable
    from clsnf.data.splits import assign_splits
    from clsnf.detector import Detector
    from clsnf.paper.checkpoint_file import read_checkpoint
    from clsnf.paper.import_checkpoint import build_imported, calibrate_imported

    Detector.check_folder(out)
    check_writable(out, folder=True)
    chosen = choose_device(device)
    read = shared.read_one_table(data, normals, category)
    imported = build_imported(
        read_checkpoint(files),
        backbone=backbone,
        image_size=image_size,
        fusion_weight=fusion_weight,
        false_reject_rate=false_reject_rate,
        seed=seed,
    )
    terminal = Terminal()
    with terminal.live():
        table = shared.check_pictures(read, allow_leak, max_bad, terminal)
        table = assign_splits(table, imported.settings.validation.fraction, seed)
        for note in imported.notes:
            terminal.line(f"note: {note}")
        terminal.line(
            "note: if the checkpoint was trained on these good pictures, it rejects more good "
            "products than its threshold promises: give others with --normals if you can"
        )
        detector = calibrate_imported(imported, table, chosen, terminal.progress)
    detector.save(out)
    terminal.trained(detector, out)
