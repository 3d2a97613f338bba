"""``clsnf clean``."""

from __future__ import annotations

from pathlib import Path

import click

from clsnf.cli.group import main
from clsnf.cli.options import location
from clsnf.core.errors import SettingsError


@main.command(short_help="Free the disk of a study that ended.")
@click.argument("run", type=location)
@click.option(
    "--all-stages", is_flag=True, help="Delete every artifact, also of a study that goes on later."
)
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
def clean(run: Path | str, all_stages: bool, dry_run: bool) -> None:
    """Delete what a study in RUN stored for its trials (stages/) and needs no more.

    Winners, fronts, reports and what they are made from are never touched. Score maps and finetuned
    networks stay, so that the study goes on without delay; what is deleted can be computed anew.
    """
    if isinstance(run, str):
        raise SettingsError(
            f"{run} is a URI: clsnf clean works on a folder. When no study runs there, delete what "
            "is in stages/ with the store's own tools, such as aws s3 rm --recursive."
        )
    from clsnf.study.cleaning import clean_study

    cleaned = clean_study(run.absolute(), all_stages, dry_run)
    for title, sizes in (("deleted", cleaned.freed), ("kept", cleaned.kept)):
        for kind, size in sizes.items():
            click.echo(
                f"{'would be deleted' if dry_run and title == 'deleted' else title}: "
                f"{kind}, {size / 1e6:.1f} MB"
            )
    total = sum(cleaned.freed.values())
    click.echo(f"{total} bytes {'would be' if dry_run else 'were'} freed")
