"""The command line, ``clsnf COMMAND``: one module for each group of commands.

Only the settings are imported before a command runs, so that ``--help`` answers quickly.
"""

from clsnf.cli import (
    backbone_commands,
    benchmark_commands,
    clean_commands,
    data_commands,
    detector_commands,
    import_commands,
    report_commands,
    serve_commands,
    study_commands,
    watch_commands,
)
from clsnf.cli.group import main
from clsnf.cli.report_commands import report
from clsnf.cli.study_commands import study

__all__ = [
    "backbone_commands",
    "benchmark_commands",
    "clean_commands",
    "data_commands",
    "detector_commands",
    "import_commands",
    "main",
    "report",
    "report_commands",
    "serve_commands",
    "study",
    "study_commands",
    "watch_commands",
]
