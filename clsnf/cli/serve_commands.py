"""``clsnf serve`` and ``clsnf export``: saved detectors behind HTTP, or in other formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clsnf.cli.group import main
from clsnf.cli.options import device_option, path


def _parse_assignments(
    ctx: click.Context, parameter: click.Parameter, assignments: tuple[str, ...]
) -> dict[str, str]:
    given = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"{assignment!r}: give NAME=VALUE, such as batch_size=8")
        given[name.strip()] = text
    return given


@main.command(short_help="Serve saved detectors over HTTP.")
@click.argument("models", type=path)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 for all addresses of this machine.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 for a free one.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(1, 65535),
    help="Answer the Open Inference Protocol over gRPC too, on this port.",
)
@click.option(
    "--open",
    "open_to_all",
    is_flag=True,
    help="Let everybody ask without a token, also beyond this machine.",
)
@click.option(
    "--address", help="A Ray cluster, such as auto. Default: a private Ray on this machine."
)
@click.option(
    "--local",
    is_flag=True,
    help="Serve from this process alone, without Ray: starts in seconds.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    callback=_parse_assignments,
    metavar="NAME=VALUE",
    help="Any setting of docs/serving.md.",
)
@device_option
def serve(
    models: Path,
    host: str,
    port: int,
    grpc_port: int | None,
    open_to_all: bool,
    address: str | None,
    local: bool,
    assignments: dict[str, str],
    device: str,
) -> None:
    """Serve a study's winners, or one detector, over HTTP.

    Programs use the interface below /v1 and /v2, people the page at /.

    MODELS is a study's folder, a folder of saved detectors, or one saved detector.

    The token is read from CLSNF_TOKEN_FILE or CLSNF_TOKEN. Changing thresholds needs it, and asking
    as well where --host is not this machine alone. The paths of certificate and key for HTTPS are
    read from CLSNF_TLS_CERT and CLSNF_TLS_KEY.
    """
    if local and address is not None:
        raise click.UsageError("--local serves without Ray: give it or --address, not both.")
    from clsnf.serving.catalogue import read_catalogue_within
    from clsnf.serving.listening import tls_files
    from clsnf.serving.settings import MiB, ServingSettings
    from clsnf.serving.tokens import Tokens

    arguments: dict[str, Any] = {"device": device} | tls_files() | assignments
    arguments |= {"models": str(models), "host": host, "port": port}
    if grpc_port is not None:
        arguments["grpc_port"] = grpc_port
    if open_to_all:
        arguments["ask_token"] = False
    settings = ServingSettings.from_args(arguments)
    catalogue = read_catalogue_within(Path(settings.models), settings.memory_mb * MiB)
    tokens = Tokens.read(settings.token_file, settings.asking_needs_token)

    from clsnf.core.device import choose_device

    if address is None:
        choose_device(settings.device)
    click.echo(f"{len(catalogue.entries)} models: {', '.join(catalogue.categories)}", err=True)
    for category, cause in catalogue.refused.items():
        click.echo(f"without {category}: {cause}", err=True)
    if tokens.common is None and tokens.admin is None:
        click.echo("no token: thresholds can't be set over HTTP", err=True)

    def report(line: str) -> None:
        click.echo(line, err=True)

    if local:
        from clsnf.serving.local import serve_locally

        serve_locally(settings, report)
    else:
        from clsnf.serving.launcher import serve_until_stopped

        serve_until_stopped(settings, address, report)


@main.command(short_help="Write a detector's network as ONNX or as a torch program.")
@click.argument("model", type=path)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch"]),
    required=True,
    help="onnx, or torch for torch.export.",
)
@click.option("--out", type=path, help="The file to write.  [default: MODEL.onnx or MODEL.pt2]")
@click.option(
    "--pictures",
    type=path,
    multiple=True,
    help="Pictures or folders of the product to compare on as well.",
)
def export(model: Path, kind: str, out: Path | None, pictures: Sequence[Path]) -> None:
    """Write a saved detector's network to one file for other runtimes.

    The command checks that the maps of the file equal the detector's. The network takes pictures on
    its canvas, (N, 3, H, W) uint8; the file's metadata hold size, threshold and category.
    """
    from clsnf.detector import Detector
    from clsnf.detector_folders import find_detector
    from clsnf.evaluation.predict_files import picture_files
    from clsnf.serving.export import FORMATS, export_detector

    files = picture_files(pictures)
    model = find_detector(model)
    detector = Detector.load(model, "cpu")
    file = out or model.with_name(model.name + FORMATS[kind])
    comparison = export_detector(detector, file, kind, files)
    click.echo(
        f"{file}: on {comparison.pictures} pictures its maps, from {comparison.lowest:.3f} to "
        f"{comparison.highest:.3f}, "
        f"differ from the detector's by {comparison.difference:.1e} at most"
    )
