"""The command line: ``clsnf study | train | predict | evaluate | settings``.

Unusual: nothing but the settings is imported before a command runs, so that ``--help`` answers at once. Errors a user can mend are one line
on standard error with exit code 2; Ctrl-C ends with 130.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clsnf import __version__
from clsnf.config import DetectorSettings, StudySettings, from_dict, to_dict
from clsnf.errors import ClsnfError, DataError, SettingsError
from clsnf.threads import wait_patiently
from clsnf.yaml_reading import parse_yaml, read_yaml_mapping

if TYPE_CHECKING:
    import pyarrow as pa

    from clsnf.terminal import Terminal

F = TypeVar("F", bound=Callable[..., Any])


class _Command(click.Command):
    """A command whose errors are one line: a :class:`ClsnfError` becomes exit code 2, Ctrl-C exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        wait_patiently()
        try:
            return super().invoke(ctx)
        except ClsnfError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:  # here, because click would end with 1
            click.echo("interrupted: what was finished is kept", err=True)
            sys.exit(130)


class _Commands(click.Group):
    """A group of such commands."""

    command_class = _Command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Find defects in pictures of products after seeing only good ones."""


# ---- options that commands share ----


def _image_size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if not all(p.isdecimal() for p in parts) or len(parts) > 2:
        raise click.BadParameter(f"{value!r}: give one number, such as 256, or HEIGHTxWIDTH, such as 256x512")
    return int(parts[0]), int(parts[-1])


def _levels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: give numbers with commas, such as 1,2,3") from error


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class _Path(click.Path):
    """A path; ~ is the home folder also where a shell leaves it, as in --out=~/x."""

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(os.fsdecode(super().convert(value, parameter, ctx))).expanduser()


_path = _Path()
_data_options = _options(
    click.option(
        "--data", type=_path, help="A folder of categories in MVTec AD's or BTAD's layout: CATEGORY/train/good, CATEGORY/test/..."
    ),
    click.option("--normals", type=_path, help="A folder of good pictures alone: one category, named after the folder."),
    click.option(
        "--textures", type=_path, help="A folder of pictures to make training defects from (such as DTD). Default: drawn by code."
    ),
    click.option("--allow-leak", is_flag=True, help="Go on although the same picture is in train and test."),
)
_setting_options = _options(
    click.option("--config", type=_path, help="A YAML file of settings (see: clsnf settings)."),
    click.option("--image-size", callback=_image_size, help="Size of the network's input: 256, or HEIGHTxWIDTH.  [default: 256]"),
    click.option(
        "--aspect", type=click.Choice(["squeeze", "fit"]), help="squeeze: resize whatever the shape; fit: keep the shape and pad."
    ),
    click.option("--backbone", help="A timm model name, or demo.  [default: resnet18]"),
    click.option("--levels", callback=_levels, help="Feature stages of the backbone.  [default: 1,2,3]"),
    click.option(
        "--weights",
        type=_path,
        help="A weights file of the backbone. Default: timm's pretrained weights, where they can be fetched.",
    ),
    click.option("--seed", type=int, help="Seed of everything random.  [default: 0]"),
    click.option("--false-reject-rate", type=float, help="Share of good products that may be rejected.  [default: 0.01]"),
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting, such as --set flow.passes=4."
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
)


def _settings(options: dict[str, Any], base: dict[str, Any] | None = None) -> DetectorSettings:
    """Settings from the defaults, a YAML file, the named options and --set, each over the one before."""
    content = to_dict(DetectorSettings())
    _merge(content, base or {})
    if options["config"] is not None:
        from_file = read_yaml_mapping(options["config"], "seed: 1")
        try:
            from_dict(DetectorSettings, from_file)
        except SettingsError as error:
            raise SettingsError(f"{options['config']}: {error}") from error
        _merge(content, from_file)
    size = options["image_size"] or (None, None)
    named = {
        ("image", "height"): size[0],
        ("image", "width"): size[1],
        ("image", "aspect"): options["aspect"],
        ("backbone", "name"): options["backbone"],
        ("backbone", "levels"): options["levels"],
        ("backbone", "weights"): None if options["weights"] is None else str(options["weights"].absolute()),
        ("validation", "false_reject_rate"): options["false_reject_rate"],
    }
    for (section, name), value in named.items():
        if value is not None:
            content[section][name] = value
    if options["seed"] is not None:
        content["seed"] = options["seed"]
    for assignment in options["assignments"]:
        _assign(content, assignment)
    return from_dict(DetectorSettings, content)


def _merge(content: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(content.get(name), dict) and isinstance(value, dict):
            _merge(content[name], value)
        else:
            content[name] = value  # unknown names are refused when the settings are built


def _assign(content: dict[str, Any], assignment: str) -> None:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as flow.passes=4.")
    new: Any = parse_yaml(value, f"--set {name.strip()}")
    for part in reversed(name.strip().split(".")):
        new = {part: new}
    _merge(content, new)


def _tables(data: Path | None, normals: Path | None, categories: str | None) -> tuple[list[pa.Table], str]:
    """The categories' tables and where they came from."""
    from clsnf.data.layouts import list_categories, read_category, read_normals

    if data is not None and normals is not None:
        raise SettingsError("Give --data or --normals, not both.")
    if normals is not None:
        if categories is not None:
            raise SettingsError(f"--normals is one category, named after its folder: leave {categories!r} out, or give --data.")
        return [read_normals(normals)], str(normals.absolute())
    if data is None:
        raise SettingsError("There is no data: give --data FOLDER or --normals FOLDER.")
    known = list_categories(data)
    asked = [c.strip() for c in (categories or "all").split(",") if c.strip()]
    chosen = known if asked == ["all"] and "all" not in known else list(dict.fromkeys(asked))
    if not chosen:
        raise SettingsError(f"{categories!r} names no category: {data} holds {', '.join(known)}.")
    missing = [c for c in chosen if c not in known]
    if missing:
        raise DataError(f"{data} holds no category {missing[0]!r}: it holds {', '.join(known)}.")
    return [read_category(data, category) for category in chosen], str(data.absolute())


def _one_table(data: Path | None, normals: Path | None, category: str | None) -> pa.Table:
    tables, origin = _tables(data, normals, category)
    if len(tables) != 1:
        names = ", ".join(str(table["category"][0].as_py()) for table in tables)
        raise SettingsError(f"{origin} holds several categories ({names}): choose one with --category.")
    return tables[0]


def _check(table: pa.Table, allow_leak: bool, terminal: Terminal) -> None:
    """Read every file of a category once; what is doubtful is shown."""
    from clsnf.data.checks import check_category

    report = check_category(table, allow_leak=allow_leak, progress=lambda done, total: terminal.progress("checking", done, total))
    for warning in report.warnings:
        terminal.line(f"warning: {warning}")


# ---- commands ----


@main.command(short_help="Tune, choose and save a detector for each product.")
@_data_options
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option("--out", type=_path, help="The study's folder.  [default: runs/DATE-TIME]")
@click.option("--trials", type=int, help="Trials of each category.  [default: 8]")
@click.option("--objective", help="The figure to raise on validation defects.  [default: pixel_ap]")
@click.option("--space", type=_path, help="A YAML file of what to search (see tune/spaces/).")
@_setting_options
@click.option("--address", help="A Ray cluster, such as auto. Default: a private Ray on this machine.")
@click.option("--concurrent-trials", type=int, help="Trials at once.  [default: as many as fit]")
@click.option("--cpus-per-trial", type=int, help="CPU cores of a trial.  [default: an even share, 4 at most]")
@click.option("--gpus-per-trial", type=float, help="GPUs of a trial, such as 1 or 0.25.  [default: 0]")
@click.option("--resume", is_flag=True, help="Go on with the study in --out.")
def study(**options: Any) -> None:
    """Tune, choose and save a detector for each product, on a Ray cluster or on this machine.

    Without --data or --normals it studies the demo: three products drawn by code, with the small backbone that ships with clsnf.
    """
    from clsnf.terminal import Terminal

    given = {
        name: options[name]
        for name in ("trials", "objective", "concurrent_trials", "cpus_per_trial", "gpus_per_trial")
        if options[name] is not None
    }
    if options["resume"] and options["out"] is None:
        raise SettingsError("--resume goes on with the study in a folder: name it with --out.")
    demo = options["data"] is None and options["normals"] is None
    if demo:
        given = {"trials": 3} | given
    study_settings = from_dict(StudySettings, given, "study")
    settings = _settings(options, _DEMO_SETTINGS if demo else None)

    from clsnf.study.space import read_space

    space = read_space(options["space"])
    out = (options["out"] or _new_run()).absolute()
    terminal = Terminal()
    if demo:
        from clsnf.data.demo import write_demo

        data = out.parent / "demo-data"
        terminal.line(f"demo: three products drawn by code, in {data}")
        write_demo(data)
        tables, origin = _tables(data, None, options["categories"])
    else:
        tables, origin = _tables(options["data"], options["normals"], options["categories"])

    from clsnf.study.study import StudyRequest, run_study

    request = StudyRequest(
        tables=tables,
        out=out,
        settings=settings,
        study=study_settings,
        space=space,
        textures=options["textures"],
        device=options["device"],
        address=options["address"],
        allow_leak=options["allow_leak"],
        resume=options["resume"],
        origin=origin,
    )
    with terminal.live():
        summary = run_study(request, terminal.reporter(settings, study_settings.trials * len(tables)))
    terminal.summary(summary, out)
    if all("winner" not in found for found in summary["categories"].values()):
        raise ClsnfError(f"No category has a winner: the causes are in {out / 'summary.json'}.")


_DEMO_SETTINGS: dict[str, Any] = {
    "backbone": {"name": "demo"},
    "image": {"height": 160, "width": 160},
    "validation": {"fraction": 0.25},
    # A small backbone from drawings needs more of the decoder; chosen on the demo's validation defects.
    "finetune": {"frozen_epochs": 16},
}


def _new_run() -> Path:
    from datetime import datetime

    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


@main.command(short_help="Train one detector, without Ray.")
@_data_options
@click.option("--category", help="Which category of --data.  [default: the only one]")
@click.option("--out", type=_path, required=True, help="The folder to save the detector to.")
@click.option("--work", type=_path, help="A folder for finished stages: interrupted training goes on from there.")
@_setting_options
def train(**options: Any) -> None:
    """Train one detector on good pictures, take its threshold from held-out good pictures, and save it."""
    from clsnf.data.splits import assign_splits
    from clsnf.detector import Detector
    from clsnf.fingerprint import check_place
    from clsnf.terminal import Terminal
    from clsnf.training.prepare import check_ingredients

    settings = _settings(options)
    Detector.check_folder(options["out"])
    check_place(options["out"], folder=True)
    read = _one_table(options["data"], options["normals"], options["category"])
    terminal = Terminal()
    with terminal.live():
        check_ingredients(settings, options["textures"], options["device"])
        _check(read, options["allow_leak"], terminal)
        table = assign_splits(read, settings.validation.fraction, settings.seed)
        terminal.backbone(settings)
        detector = Detector.fit(
            table,
            settings,
            textures=options["textures"],
            work=options["work"],
            device=options["device"],
            progress=terminal.progress,
        )
    detector.save(options["out"])
    terminal.trained(detector, options["out"])


@main.command(short_help="Score pictures.")
@click.argument("model", type=_path)
@click.argument("images", type=_path, nargs=-1, required=True)
@click.option("--out", type=_path, help="A folder for heat maps and overlays as PNG.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON a picture instead of a table.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
def predict(model: Path, images: Sequence[Path], out: Path | None, as_json: bool, device: str) -> None:
    """Score pictures (files or folders) with a saved detector."""
    from clsnf.detector import Detector
    from clsnf.prediction import picture_files, predict_files
    from clsnf.terminal import Terminal

    files = picture_files(images)
    detector = Detector.load(model, device)
    terminal = Terminal()
    if as_json:
        for record in predict_files(detector, files, out):
            click.echo(json.dumps(record))
    else:
        with terminal.live():
            records = []
            for record in predict_files(detector, files, out):
                records.append(record)
                terminal.progress("predict", len(records), len(files))
        terminal.predictions(records, detector.threshold.value)


@main.command(short_help="Figures of a detector on labelled pictures.")
@click.argument("model", type=_path)
@click.option("--data", type=_path, required=True, help="A folder of categories in MVTec AD's or BTAD's layout.")
@click.option("--category", help="Which category.  [default: the one the detector was trained on]")
@click.option("--json", "json_file", type=_path, help="A file for all figures and scores.")
@click.option("--allow-leak", is_flag=True, help="Go on although the same picture is in train and test.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
def evaluate(model: Path, data: Path, category: str | None, json_file: Path | None, allow_leak: bool, device: str) -> None:
    """Score the test pictures of a category and compare with their labels."""
    from clsnf.detector import Detector
    from clsnf.evaluation import evaluate_detector
    from clsnf.fingerprint import check_place, write_json
    from clsnf.terminal import Terminal
    from clsnf.training.prepare import rows_of

    detector = Detector.load(model, device)
    if json_file is not None:
        check_place(json_file, folder=False)
    table = _one_table(data, None, category or detector.provenance.category)
    test = rows_of(table, "test")
    if len(test) == 0:
        raise DataError(f"{data} has no test pictures for {table['category'][0].as_py()!r}: there is nothing to evaluate on.")
    terminal = Terminal()
    with terminal.live():
        _check(table, allow_leak, terminal)
        result = evaluate_detector(detector, test, terminal.progress)
    if json_file is not None:
        write_json(json_file, result)
    terminal.figures(result)


@main.command(short_help="All settings with their defaults.")
def settings() -> None:
    """List all settings with their defaults, as YAML for --config."""
    from clsnf.settings_text import settings_text

    click.echo(settings_text(), nl=False)
