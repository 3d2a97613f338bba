"""``clsnf train | calibrate | predict | evaluate | settings``: one detector, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import (
    DATA_HELP,
    check_options,
    data_options,
    device_option,
    location,
    max_bad_option,
    path,
    preset_option,
    setting_options,
    stream_option,
)
from clsnf.core.errors import DataError, SettingsError


@main.command(short_help="Train one detector, without Ray.")
@data_options
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option("--out", type=path, required=True, help="The folder to save the detector to.")
@click.option(
    "--work",
    type=path,
    help="A folder for finished artifacts, from which an interrupted training continues.",
)
@stream_option
@setting_options
def train(**options: Any) -> None:
    """Train one detector on good pictures and save it.

    Its threshold comes from good pictures that training does not see.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.core.files import check_writable
    from clsnf.data.splits import assign_splits
    from clsnf.detector import Detector
    from clsnf.training.prepare import check_ingredients, rows_of

    settings = shared.settings_of(options, shared.preset_categories(options, options["category"]))
    Detector.check_folder(options["out"])
    check_writable(options["out"], folder=True)
    found = shared.read_one_table(options["data"], options["normals"], options["category"])
    terminal = Terminal()
    with terminal.live():
        check_ingredients(settings, options["textures"], options["device"])
        read = shared.check_pictures(found, options["allow_leak"], options["max_bad"], terminal)
        table = assign_splits(read, settings.validation.fraction, settings.seed)
        terminal.backbone(settings)
        with shared.open_stream(
            options["stream"], len(rows_of(table, "fit")), settings, terminal
        ) as stream:
            detector = Detector.fit(
                table,
                settings,
                textures=options["textures"],
                work=options["work"],
                device=options["device"],
                progress=terminal.progress,
                stream=stream,
            )
    detector.save(options["out"])
    terminal.trained(detector, options["out"])


@main.command(short_help="Choose a detector's threshold again.")
@click.argument("model", type=path)
@click.option(
    "--normals",
    type=path,
    help="Good pictures that training did not see.  [default: those of the present threshold]",
)
@click.option(
    "--false-reject-rate",
    type=float,
    help="Share of good products that may be rejected.  [default: the detector's present one]",
)
@click.option("--out", type=path, help="The folder to save the detector to.  [default: MODEL]")
@max_bad_option
@device_option
def calibrate(
    model: Path,
    normals: Path | None,
    false_reject_rate: float | None,
    out: Path | None,
    max_bad: float,
    device: str,
) -> None:
    """Choose a saved detector's threshold again.

    Give another false-reject rate, other good pictures, or both. Nothing is trained, and scores do
    not change. Pictures of defects are not used: a threshold that is fitted to known defects
    promises nothing for others.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.core.files import check_writable
    from clsnf.detector import Detector
    from clsnf.detector_folders import find_detector

    if normals is None and false_reject_rate is None:
        raise SettingsError("Say what changes: --false-reject-rate, --normals, or both.")
    model = find_detector(model)
    detector = Detector.load(model, device)
    place = Detector.check_folder(out or model)
    check_writable(place, folder=True)
    before = detector.threshold
    terminal = Terminal()
    with terminal.live():
        table = None
        if normals is not None:
            table = shared.read_one_table(None, normals, None)
            table = shared.check_pictures(table, False, max_bad, terminal)
        detector.calibrate(table, false_reject_rate=false_reject_rate, progress=terminal.progress)
    detector.save(place)
    terminal.calibrated(detector, before, place)


@main.command(short_help="Score pictures.")
@click.argument("model", type=path)
@click.argument("images", type=path, nargs=-1, required=True)
@click.option("--category", help="Whose detector, where MODEL holds several.")
@click.option("--out", type=path, help="A folder for heat maps and overlays as PNG.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON per picture, not a table."
)
@max_bad_option
@stream_option
@device_option
def predict(
    model: Path,
    images: Sequence[Path],
    category: str | None,
    out: Path | None,
    as_json: bool,
    max_bad: float,
    stream: str | None,
    device: str,
) -> None:
    """Score pictures (files or folders) with a saved detector.

    MODEL is its folder, or a study's folder or its winners with --category.
    """
    from clsnf.cli.terminal import Terminal
    from clsnf.detector import Detector
    from clsnf.detector_folders import find_detector
    from clsnf.evaluation.predict_files import picture_files, predict_files

    files = picture_files(images)
    detector = Detector.load(find_detector(model, category), device)
    terminal = Terminal()
    with shared.open_stream(stream, None, detector.settings, terminal) as choice:
        found = predict_files(detector, files, out, max_bad=max_bad, stream=choice)
        if as_json:
            for record in found:
                click.echo(json.dumps(record.to_plain()))
            return
        with terminal.live():
            records = []
            for record in found:
                records.append(record)
                terminal.progress("predict", len(records), len(files))
    terminal.predictions(records, detector.threshold.value)


@main.command(short_help="Metrics of a detector on labelled pictures.")
@click.argument("model", type=path)
@click.option("--data", type=location, required=True, help=DATA_HELP)
@click.option("--category", help="Which category.  [default: the one the detector was trained on]")
@click.option("--json", "json_file", type=path, help="A file for all metrics and scores.")
@check_options
@stream_option
@device_option
def evaluate(
    model: Path,
    data: Path | str,
    category: str | None,
    json_file: Path | None,
    allow_leak: bool,
    max_bad: float,
    stream: str | None,
    device: str,
) -> None:
    """Score the test pictures of a category and compare the scores with the labels."""
    from clsnf.cli.terminal import Terminal
    from clsnf.core.files import check_writable
    from clsnf.detector import Detector
    from clsnf.detector_file import DESCRIPTION
    from clsnf.detector_folders import find_detector
    from clsnf.evaluation.evaluate import evaluate_detector
    from clsnf.results import write_result
    from clsnf.training.prepare import rows_of

    # Of a single detector, the category is that of the data alone.
    place = model if (model / DESCRIPTION).is_file() else find_detector(model, category)
    detector = Detector.load(place, device)
    if json_file is not None:
        check_writable(json_file, folder=False)
    table = shared.read_one_table(data, None, category or detector.provenance.category)
    if len(rows_of(table, "test")) == 0:
        raise DataError(
            f"{data} has no test pictures for {table['category'][0].as_py()!r}: there is nothing "
            "to evaluate on."
        )
    terminal = Terminal()
    with terminal.live():
        test = rows_of(shared.check_pictures(table, allow_leak, max_bad, terminal), "test")
        with shared.open_stream(stream, None, detector.settings, terminal) as choice:
            result = evaluate_detector(detector, test, terminal.progress, stream=choice)
    if json_file is not None:
        write_result(json_file, result)
    terminal.metrics(result)


@main.command(short_help="All settings with their defaults.")
@preset_option
@click.option("--category", help="The category that --preset paper is for.")
def settings(preset: str | None, category: str | None) -> None:
    """List all settings with their defaults, or with a preset's values, as YAML for --config."""
    from clsnf.core.config import DetectorSettings
    from clsnf.core.settings_yaml import settings_yaml

    shown = DetectorSettings()
    if preset == "paper":
        found, about = shared.paper_preset([] if category is None else [category])
        click.echo(f"preset paper: {about}", err=True)
        shown = found.settings
    click.echo(settings_yaml(shown), nl=False)
