"""``clsnf watch``: pictures of a folder or a camera, judged as they come."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli.group import main
from clsnf.cli.options import combined, device_option, path

if TYPE_CHECKING:
    from clsnf.watching.result import Result

source_options = combined(
    click.option("--recursive", is_flag=True, help="Pictures in the folder's folders too."),
    click.option(
        "--new-only",
        is_flag=True,
        help="Judge no files that are there at the first start; what comes later is judged.",
    ),
    click.option(
        "--polling/--events",
        default=None,
        help=(
            "Look at the folder each second, or wait for the system's events.  [default: "
            "--polling on network shares, where other machines cause no events]"
        ),
    ),
    click.option(
        "--settle",
        type=click.FloatRange(0, 3600),
        metavar="SECONDS",
        help=(
            "How long a file that nobody is known to have closed must not have changed.  "
            "[default: 0.5; 3 on network shares]"
        ),
    ),
    click.option(
        "--max-waiting",
        type=click.IntRange(1),
        default=1000,
        show_default=True,
        help="Pictures of a folder that wait at most; others stay there until there is room.",
    ),
    click.option(
        "--every",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="Of a camera or video: seconds between two frames.  [default: every frame]",
    ),
    click.option(
        "--fps",
        type=click.FloatRange(0, min_open=True),
        help="Of a camera or video: frames a second, instead of --every.",
    ),
)
output_options = combined(
    click.option("--out", metavar="FILE", help="Append results to a .jsonl or .csv file."),
    click.option("--overlays", metavar="FOLDER", help="Write each picture under its heat map."),
    click.option("--sort", metavar="FOLDER", help="Move files to ok/ and ng/ in this folder."),
    click.option(
        "--mqtt",
        metavar="URL",
        help="Publish results on mqtt://USER@HOST:1883/TOPIC; password in CLSNF_MQTT_PASSWORD.",
    ),
    click.option("--webhook", metavar="URL", help="POST each result as JSON."),
    click.option(
        "--modbus",
        metavar="HOST:PORT",
        help="Write verdicts to the coils and registers of a PLC (HOST:502, or HOST:502/UNIT).",
    ),
    click.option(
        "--modbus-base",
        type=click.IntRange(0, 65000),
        default=0,
        show_default=True,
        help="Address of the first coil and of the first register.",
    ),
    click.option(
        "--modbus-pulse",
        type=click.FloatRange(0.02, 60),
        default=0.2,
        show_default=True,
        metavar="SECONDS",
        help="How long the coil of a good product is on.",
    ),
    click.option(
        "--max-spooled",
        type=click.IntRange(1),
        default=100_000,
        show_default=True,
        help="Results that may wait for an output that is away; of more, the oldest are dropped.",
    ),
    click.option(
        "--heartbeat",
        type=click.FloatRange(0.1, 3600),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Seconds between two heartbeats: a line, MQTT's status, Modbus' coil and register.",
    ),
    click.option(
        "--state",
        type=path,
        metavar="FOLDER",
        help=(
            "What is judged and what waits, on a local disk.  [default: .clsnf-watch beside --out, "
            "else here]"
        ),
    ),
    click.option("--quiet", is_flag=True, help="Print no line for each picture."),
)
_TARGETS = ("out", "overlays", "sort", "mqtt", "webhook", "modbus")


@main.command(short_help="Judge pictures of a folder or a camera as they come.")
@click.argument("model", type=path)
@click.argument("source")
@source_options
@output_options
@device_option
def watch(model: Path, source: str, **options: Any) -> None:
    """Judge pictures as they come, until Ctrl-C or SIGTERM.

    MODEL is a saved detector, or a folder that holds one, such as a study of one product. SOURCE is
    a folder, the number of a camera, a stream such as rtsp://USER@HOST/PATH (its password in
    CLSNF_CAMERA_PASSWORD), or a video file. A picture is ok or ng; what can't be judged is ng. No
    result is lost while an output is away, and after a restart no file is judged twice.
    """
    from clsnf.core.errors import SettingsError
    from clsnf.detector_folders import find_detector
    from clsnf.watching.camera import CameraSettings
    from clsnf.watching.folder import FolderSettings
    from clsnf.watching.run import WatchRequest
    from clsnf.watching.run import watch as watch_source

    if options["every"] and options["fps"]:
        raise SettingsError("Give --every or --fps, not both.")
    beside = Path(options["out"]).expanduser().parent if options["out"] else Path()
    request = WatchRequest(
        model=find_detector(model),
        source=source,
        targets={name: options[name] for name in _TARGETS if options[name]},
        state=options["state"] or beside / ".clsnf-watch",
        device=options["device"],
        heartbeat=options["heartbeat"],
        max_spooled=options["max_spooled"],
        folder=FolderSettings(
            recursive=options["recursive"],
            new_only=options["new_only"],
            polling=options["polling"],
            settle=options["settle"],
            max_waiting=options["max_waiting"],
        ),
        camera=CameraSettings(options["every"] or (1 / options["fps"] if options["fps"] else None)),
        modbus_base=options["modbus_base"],
        modbus_pulse=options["modbus_pulse"],
    )

    def show(result: Result) -> None:
        if not options["quiet"]:
            _print(result.line)

    watch_source(request, lambda line: _print(line, err=True), show)


def _print(line: str, err: bool = False) -> None:
    """Print a line. File names need not be valid text, and nobody needs to listen."""
    with suppress(OSError):
        click.echo(line.encode("utf-8", "backslashreplace").decode(), err=err)
