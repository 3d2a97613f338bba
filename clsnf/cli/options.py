"""Options that commands share, and what they stand for: settings, tables of pictures, streams."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clsnf.core.config import STREAMS, DetectorSettings, flattened, from_dict, replaced
from clsnf.core.errors import DataError, SettingsError
from clsnf.core.uris import is_uri
from clsnf.core.yaml import parse_yaml, read_yaml_mapping

if TYPE_CHECKING:
    import pyarrow as pa

    from clsnf.cli.terminal import Terminal
    from clsnf.paper.presets import Preset
    from clsnf.results import DataSource
    from clsnf.streams.choice import StreamChoice

F = TypeVar("F", bound=Callable[..., Any])


def _image_size(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if not all(p.isdecimal() for p in parts) or len(parts) > 2:
        raise click.BadParameter(
            f"{value!r}: give one number, such as 256, or HEIGHTxWIDTH, such as 256x512"
        )
    return int(parts[0]), int(parts[-1])


def _levels(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> list[int | float] | None:
    if value is None:
        return None
    try:
        return [float(part) if "." in part else int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r}: give numbers with commas, such as 1,2,3, or shares of the depth, such as "
            "0.4,0.6,0.8"
        ) from error


def combined(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator for several options, which ``--help`` lists in this order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def image_size_option(default: str) -> Callable[[F], F]:
    """``--image-size``; `default` is what ``--help`` calls the default."""
    return click.option(
        "--image-size",
        callback=_image_size,
        help=f"Size of the network's input: 256, or HEIGHTxWIDTH.  [default: {default}]",
    )


class _Path(click.Path):
    """A path. ``~`` is the home folder, also in ``--out=~/x``, which shells leave as it is."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        return Path(os.fsdecode(super().convert(value, parameter, ctx))).expanduser()


class _Location(click.ParamType):
    """A folder: a path, or as text its URI, such as ``s3://bucket/folder``."""

    name = "path or URI"

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        return str(value) if is_uri(str(value)) else path.convert(value, parameter, ctx)


path = _Path()
location = _Location()
stream_option = click.option(
    "--stream",
    type=click.Choice(STREAMS),
    help=(
        "What loads the pictures: local (this process), ray (workers of a Ray cluster), auto (what "
        "fits). Results are the same.  [default: auto]"
    ),
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
max_bad_option = click.option(
    "--max-bad",
    type=float,
    default=0.01,
    show_default=True,
    help=(
        "Share of the pictures that may be unreadable. They are named and left out; if there are "
        "more, the command ends."
    ),
)
DATA_HELP = (
    "A folder of categories in the layout of MVTec AD, BTAD or VisA (CATEGORY/train/good, "
    "CATEGORY/test/...), a manifest (.jsonl or .manifest), or a pack."
)
check_options = combined(
    click.option(
        "--allow-leak", is_flag=True, help="Go on even if the same picture is in train and test."
    ),
    max_bad_option,
)
picture_options = combined(
    click.option("--data", type=location, help=DATA_HELP),
    click.option(
        "--normals",
        type=path,
        help="A folder of good pictures alone: one category, with the folder's name.",
    ),
    check_options,
)
textures_option = click.option(
    "--textures",
    type=path,
    help=(
        "A folder of pictures, such as DTD, that training defects are filled from. Default: "
        "textures drawn by code."
    ),
)
data_options = combined(picture_options, textures_option)
preset_option = click.option(
    "--preset",
    type=click.Choice(["fast", "paper"]),
    help=(
        "The settings to start from. fast: the defaults; paper: the authors' settings for the "
        "category.  [default: fast]"
    ),
)
setting_options = combined(
    preset_option,
    click.option("--config", type=path, help="A YAML file of settings (see: clsnf settings)."),
    image_size_option("256"),
    click.option(
        "--aspect",
        type=click.Choice(["squeeze", "fit"]),
        help=(
            "squeeze: resize and change the aspect ratio; fit: keep the aspect ratio and pad.  "
            "[default: squeeze]"
        ),
    ),
    click.option("--backbone", help="A timm model name, or demo.  [default: resnet18]"),
    click.option(
        "--levels",
        callback=_levels,
        help=(
            "Feature levels of the backbone: timm's numbers, such as 1,2,3, or shares of its "
            "depth, such as 0.4,0.6,0.8.  [default: what suits it]"
        ),
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="FILE",
        help=(
            "A weights file of the backbone, a folder of files named after their models, such as "
            "resnet18.safetensors, or NAME=FILE, once for each backbone of a search space. "
            "Default: timm's pretrained weights, downloaded."
        ),
    ),
    click.option("--seed", type=int, help="Seed of all that is random.  [default: 0]"),
    click.option(
        "--false-reject-rate",
        type=float,
        help="Share of good products that may be rejected.  [default: 0.01]",
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other setting, such as --set flow.passes=4.",
    ),
    device_option,
)


def settings_of(
    options: Mapping[str, Any],
    categories: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    announce: bool = True,
) -> DetectorSettings:
    """The settings of one detector, with the weights of its backbone.

    Args:
        options: a command's, as click gives them.
        categories: the categories that get these settings, for --preset paper; empty if unknown.
        changes: what a benchmark's variant changes, by dotted name.
        announce: print which settings a preset stands for.

    Raises:
        SettingsError, WeightsError: among others, ``--weights NAME=FILE`` names another model, or
            no such file.
    """
    from clsnf.model.weights_files import check_weights, files_of_models

    settings = settings_to_search(options, categories, changes=changes, announce=announce)
    backbone = settings.backbone
    files = files_of_models(backbone.weights)
    if not files:
        return settings
    check_weights(backbone.weights, [backbone.name])
    return replaced(settings, {"backbone.weights": files[backbone.name]})


def settings_to_search(
    options: Mapping[str, Any],
    categories: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    announce: bool = True,
) -> DetectorSettings:
    """The settings that a command's options stand for; weights may be those of several backbones.

    Later sources override earlier ones: the defaults, `base`, --preset, the file of --config, the
    named options, --set, `changes`.

    Args:
        options: a command's, as click gives them.
        categories: the categories that get these settings, for --preset paper; empty if unknown.
        base: a command's own defaults, by dotted name.
        changes: what a benchmark's variant changes, by dotted name.
        announce: print which settings a preset stands for.
    """
    values = dict(base or {})
    if options.get("preset") == "paper":
        preset, about = paper_preset(categories)
        if announce:
            click.echo(f"preset paper: {about}", err=True)
        values |= preset.overrides
    if options["config"] is not None:
        values |= _values_of_file(options["config"])
    values |= _values_of_options(options)
    for assignment in options["assignments"]:
        values |= _values_of_assignment(assignment)
    return replaced(DetectorSettings(), values | dict(changes or {}))


def _values_of_file(file: Path) -> dict[str, Any]:
    content = read_yaml_mapping(file, "seed: 1")
    try:
        from_dict(DetectorSettings, content)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from error
    return flattened(content)


def _values_of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    height, width = options["image_size"] or (None, None)
    values = {
        "image.height": height,
        "image.width": width,
        "image.aspect": options["aspect"],
        "backbone.name": options["backbone"],
        "backbone.levels": options["levels"],
        "backbone.weights": _weights(options["weights"]),
        "validation.false_reject_rate": options["false_reject_rate"],
        "seed": options["seed"],
    }
    return {name: value for name, value in values.items() if value is not None}


def _weights(given: Sequence[str]) -> str | None:
    """``--weights`` as its setting: a file or folder, or a file for each of several models.

    Raises:
        SettingsError: files with a model's name and without, or two of one model.
    """
    from clsnf.model.weights_files import weights_of_models

    if not given:
        return None
    pairs = [_model_and_file(text) for text in given]
    files = [str(Path(file).expanduser().absolute()) for _, file in pairs]
    models = [model for model, _ in pairs]
    if set(models) == {None}:
        return files[-1]  # the last one counts, as for other options
    if None in models:
        raise SettingsError(
            f"--weights {given[models.index(None)]}: beside NAME=FILE each is one, such as "
            "--weights resnet18=resnet18.safetensors."
        )
    repeated = [model for n, model in enumerate(models) if model in models[:n]]
    if repeated:
        raise SettingsError(f"--weights names two files of {repeated[0]!r}: keep one.")
    return weights_of_models(dict(zip(map(str, models), files, strict=True)))


def _model_and_file(text: str) -> tuple[str | None, str]:
    """``NAME=FILE`` apart; a path may have a ``=`` too."""
    name, equals, file = text.partition("=")
    is_pair = equals and name and "/" not in name and os.sep not in name
    if not is_pair or Path(text).expanduser().exists():
        return None, text
    return name, file


def _values_of_assignment(assignment: str) -> dict[str, Any]:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as flow.passes=4.")
    return flattened({name.strip(): parse_yaml(value, f"--set {name.strip()}")})


def paper_preset(categories: Sequence[str]) -> tuple[Preset, str]:
    """The authors' settings for these categories, and a line that says which they are.

    If their settings for the categories differ, or if they have none for one of them, these are the
    settings that most of their categories share.
    """
    from clsnf.paper.presets import common_preset, presets, sharing

    known, common = presets(), common_preset()
    most = f"it is what most of their categories share ({', '.join(sharing(common))})"
    if not categories:
        return common, f"no category is named: {most}"
    names = ", ".join(categories)
    unknown = [category for category in categories if category not in known]
    if unknown:
        return common, f"the authors have no settings for {', '.join(unknown)}: {most}"
    if len({known[category].recipe for category in categories}) > 1:
        return common, f"the authors' settings for {names} differ, and one base serves all: {most}"
    return known[categories[0]], f"the authors' settings for {names}"


def preset_categories(options: Mapping[str, Any], wanted: str | None) -> list[str]:
    """The categories that a command will read, if its preset depends on them; else none.

    No picture is read. If the data is not valid, :func:`read_tables` says so later.

    Args:
        options: a command's, as click gives them.
        wanted: the names that the user gave, with commas; None or ``all`` for all.
    """
    if options.get("preset") != "paper":
        return []
    if options["normals"] is not None:
        return [options["normals"].absolute().name]
    if wanted is not None and wanted.strip() != "all":
        return names_of(wanted)
    if options["data"] is None:
        return []
    from clsnf.data.sets import list_categories

    return list_categories(options["data"])


def names_of(text: str) -> list[str]:
    """Different names that are separated by commas."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_tables(
    data: Path | str | None, normals: Path | None, categories: str | None
) -> tuple[list[pa.Table], str]:
    """The tables of the categories, and the location that they came from.

    Args:
        data: a data set with several categories, or a pack.
        normals: a folder of good pictures, which is one category; either this or `data`.
        categories: names with commas; None or ``all`` for all.
    """
    source = data_source(data, normals, categories)
    return read_source(source), source.location


def data_source(
    data: Path | str | None, normals: Path | None, categories: str | None
) -> DataSource:
    """Where the images are that a command was given; see :func:`read_tables`."""
    from clsnf.data.sets import list_categories
    from clsnf.results import DataSource

    if data is not None and normals is not None:
        raise SettingsError("Give --data or --normals, not both.")
    if normals is not None:
        if categories is not None:
            raise SettingsError(
                f"--normals is one category, named after its folder: leave {categories!r} out, or "
                "give --data."
            )
        return DataSource(str(normals.absolute()), [normals.absolute().name], normals=True)
    if data is None:
        raise SettingsError("There is no data: give --data FOLDER or --normals FOLDER.")
    wanted = choose_categories(list_categories(data), categories, data)
    return DataSource(data if isinstance(data, str) else str(data.absolute()), wanted)


def read_source(source: DataSource) -> list[pa.Table]:
    """The tables of a source's categories."""
    from clsnf.data.layouts import read_normals
    from clsnf.data.sets import read_category

    place = source.location if is_uri(source.location) else Path(source.location)
    if source.normals:
        return [read_normals(Path(place))]
    return [read_category(place, category) for category in source.categories]


def choose_categories(known: list[str], categories: str | None, data: Path | str) -> list[str]:
    """The categories to read.

    Args:
        known: all categories of the data set.
        categories: names with commas; None or ``all`` for all.
        data: the data set's location, for error messages.

    Raises:
        SettingsError: no category is named.
        DataError: the data set does not have one that is named.
    """
    wanted = names_of(categories or "all")
    found = known if wanted == ["all"] and "all" not in known else wanted
    if not found:
        raise SettingsError(f"{categories!r} names no category: {data} holds {', '.join(known)}.")
    missing = [c for c in found if c not in known]
    if missing:
        raise DataError(f"{data} holds no category {missing[0]!r}: it holds {', '.join(known)}.")
    return found


def read_one_table(data: Path | str | None, normals: Path | None, category: str | None) -> pa.Table:
    """The table of one category; see :func:`read_tables`."""
    tables, origin = read_tables(data, normals, category)
    if len(tables) != 1:
        names = ", ".join(str(table["category"][0].as_py()) for table in tables)
        raise SettingsError(
            f"{origin} holds several categories ({names}): choose one with --category."
        )
    return tables[0]


@contextmanager
def open_stream(
    wanted: str | None, training_images: int | None, settings: DetectorSettings, terminal: Terminal
) -> Iterator[StreamChoice]:
    """Choose a command's stream, and start Ray for the block if the user wants a Ray stream.

    Ray is the cluster of RAY_ADDRESS, or a private one.

    Args:
        wanted: the value of --stream.
        training_images: number of images that training reads again and again; None: no training,
            each image is read once.
        settings: of the detector.
        terminal: gets a line that says which stream was chosen and why.
    """
    from clsnf.streams.choice import StreamChoice, choose_stream

    if wanted != "ray":
        if training_images is None:  # read once: nothing to choose
            yield StreamChoice("local", "")
            return
        choice = choose_stream(wanted or "auto", [training_images], settings.image)
        terminal.line(f"stream: {choice.reason}")
        yield choice
        return
    from clsnf.study.cluster import node_resources, ray_session

    # Without this, Ray prints warnings about its own actor pools.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with ray_session(None, 1 << 30):
        nodes = node_resources()
        cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        # Training needs a core of its own; a detector's scoring only waits for the workers.
        training = training_images is not None
        workers, gpus = max(1, cpus - 1 if training else cpus), 0 if training else gpus
        with_gpus = f" and {gpus} GPUs" if gpus else ""
        terminal.line(f"stream: ray: as asked; {workers} CPUs{with_gpus}")
        yield StreamChoice("ray", "", workers, gpus)


def check_pictures(
    table: pa.Table, allow_leak: bool, max_bad: float, terminal: Terminal
) -> pa.Table:
    """Read every file of a category, print warnings, and return the rows that can be read."""
    from clsnf.data.checks import check_category

    def progress(done: int, total: int) -> None:
        terminal.progress("checking", done, total)

    report = check_category(table, allow_leak=allow_leak, max_bad=max_bad, progress=progress)
    for warning in report.warnings:
        terminal.line(f"warning: {warning}")
    return report.table
