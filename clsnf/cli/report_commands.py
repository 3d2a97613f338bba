"""``clsnf report``."""

from __future__ import annotations

from pathlib import Path

import click

from clsnf.cli.group import main
from clsnf.cli.options import path
from clsnf.core.errors import SettingsError


@main.command(short_help="Write a study's report, or compare studies.")
@click.argument("runs", type=path, nargs=-1, required=True)
@click.option(
    "--compare", is_flag=True, help="Write how the other studies differ from the first one."
)
@click.option(
    "--out",
    type=path,
    help="A folder for the report.  [default: RUN/report, or comparison in the last RUN]",
)
def report(runs: tuple[Path, ...], compare: bool, out: Path | None) -> None:
    """Write a study's report: one HTML page, and its tables as CSV and Markdown.

    The page can be opened from disk and printed. RUN is a study's folder. If the study is still
    running or failed in parts, the report shows the results so far.
    """
    from clsnf.cli.terminal import Terminal

    terminal = Terminal()
    if compare:
        if len(runs) < 2:
            raise SettingsError(
                "--compare needs two studies or more: clsnf report --compare RUN RUN."
            )
        from clsnf.reporting.compare import build_comparison

        with terminal.live():
            terminal.compared(build_comparison(list(runs), out))
        return
    if len(runs) > 1:
        raise SettingsError("Several studies need --compare; without it, give one.")
    from clsnf.reporting.build import build_report

    with terminal.live():
        built = build_report(runs[0], out, terminal.progress)
    terminal.reported(built)
