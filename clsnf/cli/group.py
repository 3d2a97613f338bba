"""The root of the command line, and what all commands have in common."""

from __future__ import annotations

import sys
from typing import Any

import click

from clsnf import __version__
from clsnf.core.errors import ClsnfError
from clsnf.core.memory import keep_freed_memory
from clsnf.core.sigterm import heed_sigterm
from clsnf.core.threads import wait_passively


class Command(click.Command):
    """A command that reports errors in one line.

    A :class:`ClsnfError` becomes one line on standard error and exit code 2, Ctrl-C exit code 130,
    SIGTERM exit code 143.
    """

    def invoke(self, ctx: click.Context) -> Any:
        wait_passively()
        keep_freed_memory()
        with heed_sigterm() as sigterm:
            try:
                return super().invoke(ctx)
            except ClsnfError as error:
                click.echo(f"error: {error}", err=True)
                sys.exit(2)
            except KeyboardInterrupt as interrupt:  # click's own exit code would be 1
                to_go_on = f"; {interrupt}" if str(interrupt) else ""
                click.echo(f"interrupted: what was finished is kept{to_go_on}", err=True)
                sys.exit(143 if sigterm.came else 130)


class Commands(click.Group):
    """A group of :class:`Command`."""

    command_class = Command


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
def main() -> None:
    """Find defects in pictures of products after seeing only good ones."""
