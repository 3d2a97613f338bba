"""Options that commands share, and what they become: settings and tables of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clsnf.core.config import STREAMS, DetectorSettings, from_dict, to_dict
from clsnf.core.errors import DataError, SettingsError
from clsnf.core.uris import is_uri
from clsnf.core.yaml import parse_yaml, read_yaml_mapping

if TYPE_CHECKING:
    import pyarrow as pa

    from clsnf.cli.terminal import Terminal
    from clsnf.paper.presets import Preset
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


def _levels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: give numbers with commas, such as 1,2,3") from error


def combined(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def image_size_option(default: str) -> Callable[[F], F]:
    return click.option(
        "--image-size",
        callback=_image_size,
        help=f"Size of the network's input: 256, or HEIGHTxWIDTH.  [default: {default}]",
    )


class _Path(click.Path):
    """A path; ~ is the home folder also where a shell leaves it, as in --out=~/x."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        return Path(os.fsdecode(super().convert(value, parameter, ctx))).expanduser()


class _Location(click.ParamType):
    """A folder as a path, or the URI of one, such as s3://bucket/folder, as text."""

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
    help="What brings the pictures: local (this process), ray (workers of a Ray cluster), auto (what fits). It changes no figure.  "
    "[default: auto]",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
max_bad_option = click.option(
    "--max-bad",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of the pictures that may be unreadable: they are left out and named; more end the command.",
)
check_options = combined(
    click.option(
        "--allow-leak", is_flag=True, help="Go on although the same picture is in train and test."
    ),
    max_bad_option,
)
picture_options = combined(
    click.option(
        "--data",
        type=location,
        help="A folder of categories in MVTec AD's, BTAD's or VisA's layout (CATEGORY/train/good, CATEGORY/test/...), or a pack.",
    ),
    click.option(
        "--normals",
        type=path,
        help="A folder of good pictures alone: one category, named after the folder.",
    ),
    check_options,
)
textures_option = click.option(
    "--textures",
    type=path,
    help="A folder of pictures to make training defects from (such as DTD). Default: drawn by code.",
)
data_options = combined(picture_options, textures_option)
preset_option = click.option(
    "--preset",
    type=click.Choice(["fast", "paper"]),
    help="Where settings start from. fast: the defaults; paper: the authors' for the category.  [default: fast]",
)
setting_options = combined(
    preset_option,
    click.option("--config", type=path, help="A YAML file of settings (see: clsnf settings)."),
    image_size_option("256"),
    click.option(
        "--aspect",
        type=click.Choice(["squeeze", "fit"]),
        help="squeeze: resize whatever the shape; fit: keep the shape and pad.",
    ),
    click.option("--backbone", help="A timm model name, or demo.  [default: resnet18]"),
    click.option(
        "--levels", callback=_levels, help="Feature stages of the backbone.  [default: 1,2,3]"
    ),
    click.option(
        "--weights",
        type=path,
        help="A weights file of the backbone. Default: timm's pretrained weights, where they can be fetched.",
    ),
    click.option("--seed", type=int, help="Seed of everything random.  [default: 0]"),
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
    options: dict[str, Any],
    category: str | Sequence[str] | None = None,
    base: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    tell: bool = True,
) -> DetectorSettings:
    """Settings from the defaults, `base`, --preset, a YAML file, the named options, --set and
    `changes`, each over the one before.

    Args:
        options: a command's, as click gives them.
        category: the category, or all that get these settings, for presets that depend on it; None
            where it is not known.
        base: a command's own defaults.
        changes: what a variant of the settings has its way in.
        tell: say which settings a preset stands for.
    """
    content = to_dict(DetectorSettings())
    _merge(content, base or {})
    if options.get("preset") == "paper":
        preset, about = paper_preset([category] if isinstance(category, str) else category or [])
        if tell:
            click.echo(f"preset paper: {about}", err=True)
        _merge(content, preset.overrides)
    if options["config"] is not None:
        from_file = read_yaml_mapping(options["config"], "seed: 1")
        try:
            from_dict(DetectorSettings, from_file)
        except SettingsError as error:
            raise SettingsError(f"{options['config']}: {error}") from error
        _merge(content, from_file)
    size = options["image_size"] or (None, None)
    named = {
        ("image", "height"): size[0],
        ("image", "width"): size[1],
        ("image", "aspect"): options["aspect"],
        ("backbone", "name"): options["backbone"],
        ("backbone", "levels"): options["levels"],
        ("backbone", "weights"): None
        if options["weights"] is None
        else str(options["weights"].absolute()),
        ("validation", "false_reject_rate"): options["false_reject_rate"],
    }
    for (section, name), value in named.items():
        if value is not None:
            content[section][name] = value
    if options["seed"] is not None:
        content["seed"] = options["seed"]
    for assignment in options["assignments"]:
        _assign(content, assignment)
    _merge(content, changes or {})
    return from_dict(DetectorSettings, content)


def paper_preset(categories: Sequence[str]) -> tuple[Preset, str]:
    """The authors' settings that fit all of these categories, and a line for people that says which
    they are.

    Where their settings for the categories differ, or they have none, those that most of their
    categories share.
    """
    from clsnf.paper.presets import common_preset, presets, sharing

    known, common = presets(), common_preset()
    most = f"it is what most of their categories share ({', '.join(sharing(common))})"
    if not categories:
        return common, f"no category is named: {most}"
    strange = [category for category in categories if category not in known]
    if strange:
        return common, f"the authors have no settings for {', '.join(strange)}: {most}"
    if len({known[category].recipe for category in categories}) > 1:
        return (
            common,
            f"the authors' settings for {', '.join(categories)} differ, and one base serves them all: {most}",
        )
    return known[categories[0]], f"the authors' settings for {', '.join(categories)}"


def preset_categories(options: dict[str, Any], asked: str | None) -> list[str]:
    """Names of the categories that a command is about to read, for a preset that depends on them;
    empty where none does.

    No picture is read; what is wrong with the data is left for :func:`read_tables` to say.
    """
    if options.get("preset") != "paper":
        return []
    if options["normals"] is not None:
        return [options["normals"].absolute().name]
    if asked is not None and asked.strip() != "all":
        return list(dict.fromkeys(c.strip() for c in asked.split(",") if c.strip()))
    if options["data"] is None:
        return []
    from clsnf.data.sets import list_categories

    return list_categories(options["data"])


def _merge(content: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(content.get(name), dict) and isinstance(value, dict):
            _merge(content[name], value)
        else:
            content[name] = value  # unknown names are refused when the settings are built


def _assign(content: dict[str, Any], assignment: str) -> None:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as flow.passes=4.")
    new: Any = parse_yaml(value, f"--set {name.strip()}")
    for part in reversed(name.strip().split(".")):
        new = {part: new}
    _merge(content, new)


def read_tables(
    data: Path | str | None, normals: Path | None, categories: str | None
) -> tuple[list[pa.Table], str]:
    """The categories' tables and where they came from."""
    from clsnf.data.layouts import read_normals
    from clsnf.data.sets import list_categories, read_category

    if data is not None and normals is not None:
        raise SettingsError("Give --data or --normals, not both.")
    if normals is not None:
        if categories is not None:
            raise SettingsError(
                f"--normals is one category, named after its folder: leave {categories!r} out, or give --data."
            )
        return [read_normals(normals)], str(normals.absolute())
    if data is None:
        raise SettingsError("There is no data: give --data FOLDER or --normals FOLDER.")
    wanted = chosen(list_categories(data), categories, data)
    return [read_category(data, category) for category in wanted], data if isinstance(
        data, str
    ) else str(data.absolute())


def chosen(known: list[str], categories: str | None, data: Path | str) -> list[str]:
    """The categories that are asked for, names with commas, of those that are known in `data`; all
    where nothing is said.
    """
    asked = [c.strip() for c in (categories or "all").split(",") if c.strip()]
    found = known if asked == ["all"] and "all" not in known else list(dict.fromkeys(asked))
    if not found:
        raise SettingsError(f"{categories!r} names no category: {data} holds {', '.join(known)}.")
    missing = [c for c in found if c not in known]
    if missing:
        raise DataError(f"{data} holds no category {missing[0]!r}: it holds {', '.join(known)}.")
    return found


def read_one_table(data: Path | str | None, normals: Path | None, category: str | None) -> pa.Table:
    tables, origin = read_tables(data, normals, category)
    if len(tables) != 1:
        names = ", ".join(str(table["category"][0].as_py()) for table in tables)
        raise SettingsError(
            f"{origin} holds several categories ({names}): choose one with --category."
        )
    return tables[0]


@contextmanager
def opened_stream(
    wanted: str | None, trained: int | None, settings: DetectorSettings, terminal: Terminal
) -> Iterator[StreamChoice]:
    """What brings pictures to a command, while the block runs; a Ray of its own, or RAY_ADDRESS's,
    where that is asked for.

    Args:
        wanted: what --stream says.
        trained: number of pictures that are gone over and over; None where each is needed once.
    """
    from clsnf.streams.choice import StreamChoice, choose_stream

    if wanted != "ray":
        if trained is None:  # there is nothing to choose
            yield StreamChoice("local", "")
            return
        choice = choose_stream(wanted or "auto", [trained], settings.image)
        terminal.line(f"stream: {choice.reason}")
        yield choice
        return
    from clsnf.study.cluster import node_resources, ray_session

    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # Ray would warn of its own pools of actors, whatever they are
    with ray_session(None, 1 << 30):
        nodes = node_resources()
        cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        # Whoever trains computes too; whoever asks a detector only waits for the workers.
        workers = max(1, cpus - 1 if trained is not None else cpus)
        terminal.line(
            f"stream: ray: as asked; {workers} CPUs"
            + (f" and {gpus} GPUs" if gpus and trained is None else "")
        )
        yield StreamChoice("ray", "", workers, gpus if trained is None else 0)


def check_pictures(
    table: pa.Table, allow_leak: bool, max_bad: float, terminal: Terminal
) -> pa.Table:
    """Read every file of a category once; what is doubtful is shown. The rows whose pictures can be
    read.
    """
    from clsnf.data.checks import check_category

    def progress(done: int, total: int) -> None:
        terminal.progress("checking", done, total)

    report = check_category(table, allow_leak=allow_leak, max_bad=max_bad, progress=progress)
    for warning in report.warnings:
        terminal.line(f"warning: {warning}")
    return report.table
