"""``clsnf study``."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import data_options, location, path, setting_options, stream_option
from clsnf.cli.study_resume import request_to_resume, resume_option, sources_to_resume
from clsnf.core.config import StudySettings, flattened, from_dict, to_dict
from clsnf.core.errors import SettingsError

if TYPE_CHECKING:
    from clsnf.cli.terminal import Terminal
    from clsnf.results import StoredRequest
    from clsnf.study.space import Space


@main.command(short_help="Tune, choose and save a detector for each product.")
@data_options
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option(
    "--out",
    type=location,
    help="The study's folder, or a URI such as s3://BUCKET/FOLDER.  [default: runs/DATE-TIME]",
)
@click.option(
    "--trials",
    type=int,
    help="Trials of each category.  [default: 8; no such limit with another one]",
)
@click.option(
    "--total-trials",
    type=int,
    help="Trials of all categories together: each goes where most is to gain.",
)
@click.option("--hours", type=float, help="End within so many hours, winners included.")
@click.option(
    "--until",
    metavar="TIME",
    help="End by a time of day (06:30), or a date and time (2026-11-28T06:30).",
)
@click.option("--target", type=float, help="A category's search ends at this objective.")
@click.option(
    "--plateau",
    type=int,
    help="A category's search ends after so many trials without an improvement.",
)
@click.option(
    "--share-points/--no-share-points",
    default=None,
    help=(
        "Categories try what is best for others.  [default: only with --total-trials, --hours or "
        "--until]"
    ),
)
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
@click.option(
    "--refine",
    type=int,
    help="Trials of each category whose fusion weight is swept at the end.  [default: 3]",
)
@click.option("--space", type=path, help="A YAML file with the search space (see tune/spaces/).")
@setting_options
@click.option(
    "--address",
    help="A Ray cluster, such as auto. Default, or local: a private Ray on this machine.",
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
@resume_option
@click.option(
    "--reuse/--no-reuse",
    default=None,
    help="Trials share artifacts, or each trains from scratch.  [default: reuse]",
)
@click.option(
    "--regret/--no-regret",
    default=None,
    help="Compare the winner with what an oracle picks on test images.  [default: where cheap]",
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
    help="Folder of an earlier study, whose best trials are tried first, other categories' last.",
)
@click.option(
    "--patience",
    type=float,
    help=(
        "Seconds to wait for a full disk, an object store or the Optuna storage.  [default: 1800]"
    ),
)
@click.option(
    "--trial-timeout",
    type=float,
    help="End a trial that makes no progress for this many seconds; 0: never.  [default: 1800]",
)
@click.option(
    "--mlflow", metavar="URI", help="Send trials and winners to an MLflow server or database too."
)
@click.option("--wandb", metavar="PROJECT", help="Send trials and winners to Weights & Biases too.")
@click.option("--notify", metavar="URL", help="POST the result there as JSON when the study ends.")
def study(**options: Any) -> None:
    """Tune, choose and save a detector for each product, on a Ray cluster or on this machine.

    Without --data or --normals it studies the demo: three products drawn by code, with the small
    backbone that ships with clsnf.

    All categories of a study start from the same settings. With --preset paper these are the
    authors', if the authors have the same settings for all categories; otherwise those that most of
    their categories share. Without --space, --preset paper searches only the fusion weight.

    The exit status is 0 where every category has a winner, 3 where one lacks it, 2 after bad input,
    and 130 or 143 after Ctrl-C or SIGTERM.
    """
    _check_place(options)
    stored = request_to_resume(options)
    demo = stored is None and options["data"] is None and options["normals"] is None
    until = _deadline(options)
    study_settings = _study_settings(options, demo, stored, until is not None)
    categories = shared.preset_categories(options, options["categories"])
    base = _DEMO_SETTINGS if demo else {} if stored is None else _values_of(stored)
    settings = shared.settings_to_search(options, categories, base)
    space = _space(options, stored)
    out = options["out"] or _new_folder()
    out = out if isinstance(out, str) else out.absolute()

    from clsnf.cli.terminal import Terminal

    terminal = Terminal()
    if demo:
        options |= {"data": _write_demo(out, terminal)}
    where = options["data"], options["normals"], options["categories"]
    if stored is None:
        sources = [shared.data_source(*where)]
    else:
        sources = sources_to_resume(stored.sources, *where)
    tables = [table for source in sources for table in shared.read_source(source)]

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
        resume=options["resume"] is not None,
        optuna_storage=options["optuna_storage"],
        warm_start=options["warm_start"],
        until=until,
        mlflow=options["mlflow"],
        wandb=options["wandb"],
        notify=options["notify"],
        sources=sources,
    )
    try:
        with terminal.live():
            shown = space.limited(study_settings)
            reporter = terminal.reporter(settings, request.categories, shown)
            summary = run_study(request, reporter)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"to go on, say clsnf study --resume {shlex.quote(str(out))}"
        ) from interrupt
    terminal.summary(summary, out)
    lacking = [name for name, found in summary.categories.items() if found.winner is None]
    if lacking:
        count = f"{len(lacking)} of {len(summary.categories)}"
        terminal.line(f"error: no winner for {count}: {', '.join(lacking)} (causes: summary.json)")
        sys.exit(_LACKS_WINNERS)


_LACKS_WINNERS = 3  # exit code of a study that ended without a winner for some category
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job

# Options that have the names of their settings.
_STUDY_OPTIONS = (
    "trials",
    "total_trials",
    "target",
    "plateau",
    "share_points",
    "sampler",
    "selection",
    "refine",
    "reuse",
    "regret",
    "stop_hopeless",
    "concurrent_trials",
    "cpus_per_trial",
    "gpus_per_trial",
    "stream",
    "stream_cpus",
    "patience",
    "trial_timeout",
)


def _check_place(options: dict[str, Any]) -> None:
    """Refuse a place for the results that ends with a submitted job.

    A job runs in a copy of its working folder, which Ray deletes.
    """
    if _JOB not in os.environ:
        return
    run = options["resume"] if isinstance(options["resume"], (str, Path)) else None
    out = options["out"] or run
    if out is None:
        raise SettingsError(
            "A submitted job runs in a temporary folder, and its results would be deleted with it: "
            "give --out an absolute path on a disk that all nodes have, or a URI."
        )
    if isinstance(out, Path) and not out.is_absolute():
        raise SettingsError(
            f"A submitted job runs in a temporary folder, and {out} would be deleted with it: give "
            "an absolute path on a disk that all nodes have, or a URI."
        )


def _values_of(stored: StoredRequest) -> dict[str, Any]:
    """The settings of a study by dotted name."""
    return flattened(to_dict(stored.settings))


def _deadline(options: dict[str, Any]) -> float | None:
    """When the study ends, in seconds since the epoch."""
    from clsnf.study.deadline import parse_deadline

    return parse_deadline(options["until"], options["hours"], datetime.now())


def _study_settings(
    options: dict[str, Any], demo: bool, stored: StoredRequest | None, timed: bool
) -> StudySettings:
    """How to search, by a command's options; what they leave open is as in `stored`."""
    given = {name: options[name] for name in _STUDY_OPTIONS if options[name] is not None}
    if options["objectives"] is not None:
        given["objectives"] = [name.strip() for name in options["objectives"].split(",")]
    base: dict[str, Any] = {"trials": _DEMO_TRIALS} if demo else {}
    shared_budget = timed or options["total_trials"]
    if stored is not None:
        base = to_dict(stored.study) | ({"trials": None} if shared_budget else {})
    elif shared_budget:
        base = {"trials": None, "share_points": True}
    return from_dict(StudySettings, base | given, "study")


def _space(options: dict[str, Any], stored: StoredRequest | None) -> Space:
    """The search space of --space, or of the study that goes on.

    With --preset paper it is only the fusion weight by default. The default space would change the
    authors' settings in the first trial already.
    """
    from clsnf.study.space import Space, paper_space, read_space

    if stored is not None and options["space"] is None:
        return Space(stored.space)

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
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
