"""The root of the command line, and what all commands have in common."""

from __future__ import annotations

import sys
from typing import Any

import click

from clsnf import __version__
from clsnf.core.errors import ClsnfError
from clsnf.core.memory import keep_freed_memory
from clsnf.core.threads import wait_passively


class Command(click.Command):
    """A command that reports errors in one line.

    A :class:`ClsnfError` becomes one line on standard error and exit code 2, Ctrl-C exit code 130.
    """

    def invoke(self, ctx: click.Context) -> Any:
        wait_passively()
        keep_freed_memory()
        try:
            return super().invoke(ctx)
        except ClsnfError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:  # click's own exit code would be 1
            click.echo("interrupted: what was finished is kept", err=True)
            sys.exit(130)


class Commands(click.Group):
    """A group of :class:`Command`."""

    command_class = Command


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
def main() -> None:
    """Find defects in pictures of products after seeing only good ones."""
