"""``clsnf study``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import data_options, location, path, setting_options, stream_option
from clsnf.core.config import StudySettings, from_dict
from clsnf.core.errors import ClsnfError, SettingsError

if TYPE_CHECKING:
    from clsnf.cli.terminal import Terminal
    from clsnf.study.space import Space


@main.command(short_help="Tune, choose and save a detector for each product.")
@data_options
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option(
    "--out",
    type=location,
    help="The study's folder, or a URI such as s3://BUCKET/FOLDER.  [default: runs/DATE-TIME]",
)
@click.option("--trials", type=int, help="Trials of each category.  [default: 8]")
@click.option(
    "--objectives",
    help=(
        "The metric to maximise on validation defects. Several, with commas, give a Pareto front: "
        "pixel_ap,latency.  [default: pixel_ap]"
    ),
)
@click.option(
    "--sampler",
    help=(
        "What suggests trials: tpe, gp, cmaes, random, or a class of your own, "
        "package.module:Class.  [default: tpe]"
    ),
)
@click.option(
    "--selection",
    help="How the winner is chosen: mean, worst, leave_one_out, rank.  [default: mean]",
)
@click.option("--space", type=path, help="A YAML file with the search space (see tune/spaces/).")
@setting_options
@click.option(
    "--address", help="A Ray cluster, such as auto. Default: a private Ray on this machine."
)
@click.option(
    "--concurrent-trials", type=int, help="Trials at the same time.  [default: as many as fit]"
)
@click.option(
    "--cpus-per-trial", type=int, help="CPU cores of a trial.  [default: an equal share, 4 at most]"
)
@click.option(
    "--gpus-per-trial", type=float, help="GPUs of a trial, such as 1 or 0.25.  [default: 0]"
)
@stream_option
@click.option(
    "--stream-cpus",
    type=int,
    help="CPU cores of a trial's ray stream, reserved together with the trial.  [default: 1]",
)
@click.option("--resume", is_flag=True, help="Continue the study in --out.")
@click.option(
    "--reuse/--no-reuse",
    default=None,
    help="Trials share artifacts, or each trains from scratch.  [default: reuse]",
)
@click.option(
    "--stop-hopeless/--no-stop-hopeless",
    default=None,
    help="Stop running trials that are far behind the others.  [default: stop]",
)
@click.option(
    "--optuna-storage",
    help="A file or URL for the Optuna studies.  [default: optuna.journal in --out]",
)
@click.option(
    "--warm-start",
    type=path,
    help="Folder of an earlier study, whose best trials are tried first.",
)
@click.option("--mlflow", metavar="URI", help="Log trials to an MLflow server as well.")
@click.option("--wandb", metavar="PROJECT", help="Log trials to Weights & Biases as well.")
def study(**options: Any) -> None:
    """Tune, choose and save a detector for each product, on a Ray cluster or on this machine.

    Without --data or --normals it studies the demo: three products drawn by code, with the small
    backbone that ships with clsnf.

    All categories of a study start from the same settings. With --preset paper these are the
    authors', if the authors have the same settings for all categories; otherwise those that most of
    their categories share. Without --space, --preset paper searches only the fusion weight.
    """
    if options["resume"] and options["out"] is None:
        raise SettingsError("--resume goes on with the study in a folder: name it with --out.")
    demo = options["data"] is None and options["normals"] is None
    study_settings = _study_settings(options, demo)
    categories = shared.preset_categories(options, options["categories"])
    settings = shared.settings_of(options, categories, _DEMO_SETTINGS if demo else None)
    space = _space(options)
    out = options["out"] or _new_folder()
    out = out if isinstance(out, str) else out.absolute()

    from clsnf.cli.terminal import Terminal

    terminal = Terminal()
    if demo:
        options |= {"data": _write_demo(out, terminal)}
    tables, origin = shared.read_tables(options["data"], options["normals"], options["categories"])

    from clsnf.study.request import StudyRequest
    from clsnf.study.run import run_study

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
        max_bad=options["max_bad"],
        resume=options["resume"],
        optuna_storage=options["optuna_storage"],
        warm_start=options["warm_start"],
        mlflow=options["mlflow"],
        wandb=options["wandb"],
        origin=origin,
    )
    try:
        with terminal.live():
            trials = space.most_trials(study_settings.trials)
            reporter = terminal.reporter(
                settings, request.categories, trials, study_settings.objective
            )
            summary = run_study(request, reporter)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"to go on, say the same again with --out {shlex.quote(str(out))} --resume"
        ) from interrupt
    terminal.summary(summary, out)
    if all(found.winner is None for found in summary.categories.values()):
        raise ClsnfError(f"No category has a winner: the causes are in summary.json in {out}.")


# Options that have the names of their settings.
_STUDY_OPTIONS = (
    "trials",
    "sampler",
    "selection",
    "reuse",
    "stop_hopeless",
    "concurrent_trials",
    "cpus_per_trial",
    "gpus_per_trial",
    "stream",
    "stream_cpus",
)


def _study_settings(options: dict[str, Any], demo: bool) -> StudySettings:
    given = {name: options[name] for name in _STUDY_OPTIONS if options[name] is not None}
    if options["objectives"] is not None:
        given["objectives"] = [name.strip() for name in options["objectives"].split(",")]
    return from_dict(StudySettings, ({"trials": _DEMO_TRIALS} if demo else {}) | given, "study")


def _space(options: dict[str, Any]) -> Space:
    """The search space of --space; with --preset paper only the fusion weight by default.

    The default space would change the authors' settings in the first trial already.
    """
    from clsnf.study.space import paper_space, read_space

    if options["preset"] == "paper" and options["space"] is None:
        return paper_space()
    return read_space(options["space"])


def _write_demo(out: Path | str, terminal: Terminal) -> Path:
    """Write the demo's pictures beside the study's folder; the folder that they are in."""
    from clsnf.datasets.demo import write_demo

    data = (Path("runs").absolute() if isinstance(out, str) else out.parent) / "demo-data"
    terminal.line(f"demo: three products drawn by code, in {data}")
    write_demo(data)
    return data


_DEMO_TRIALS = 3
_DEMO_SETTINGS: dict[str, Any] = {
    "backbone.name": "demo",
    "image.height": 160,
    "image.width": 160,
    "validation.fraction": 0.25,
    # The small backbone needs a longer training of the decoder. Chosen on the demo's validation
    # defects.
    "finetune.frozen_epochs": 16,
}


def _new_folder() -> Path:
    from datetime import datetime

    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
