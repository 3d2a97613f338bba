"""``clsnf study --resume RUN``: what was asked before is asked again, with what is new.

An option that the user gives has precedence over the study's ``request.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.core.errors import DataError, SettingsError
from clsnf.core.uris import is_uri

if TYPE_CHECKING:
    from clsnf.results import DataSource, StoredRequest

# Options with the names of their fields in the request.
_REPEATED = (
    "textures",
    "device",
    "address",
    "allow_leak",
    "max_bad",
    "optuna_storage",
    "warm_start",
    "mlflow",
    "wandb",
    "notify",
)
_PATHS = ("textures", "warm_start")


class _Resume(click.ParamType):
    """True for ``--resume`` alone, else the folder or URI behind it."""

    name = "run"

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str | bool:
        return True if value is True else shared.location.convert(value, parameter, ctx)


resume_option = click.option(
    "--resume",
    type=_Resume(),
    is_flag=False,
    flag_value=True,
    metavar="[RUN]",
    help=(
        "Go on with the study in RUN, a folder or URI. What it was begun with is repeated; options "
        "may add trials, categories and test pictures. Alone: the study in --out, with all options "
        "said again."
    ),
)


def request_to_resume(options: dict[str, Any]) -> StoredRequest | None:
    """What the study of ``--resume RUN`` was asked for; None without RUN.

    `options` are completed: ``out``, and what the user did not give now.

    Raises:
        SettingsError, OutputError: the study can't be resumed like this.
    """
    run, out = options["resume"], options["out"]
    if run is None or run is True:
        if run and out is None:
            raise SettingsError(
                "--resume goes on with the study in a folder: say --resume RUN, or name it with "
                "--out."
            )
        return None
    if out is not None and _place(out) != _place(run):
        raise SettingsError(
            f"--resume {run} goes on in that folder, and --out names another, {out}: leave --out "
            "out."
        )
    from clsnf.study.stored_request import read_request

    stored = read_request(run)
    options["out"] = run
    source_of = click.get_current_context().get_parameter_source
    for name in _REPEATED:
        if source_of(name) is click.core.ParameterSource.DEFAULT:
            value = getattr(stored, name)
            options[name] = Path(value) if value is not None and name in _PATHS else value
            if name == "warm_start" and value is not None and not Path(value).is_dir():
                # Its points were written down when the study began: it may be gone.
                options[name] = None
    _ask_for_withheld(stored, options)
    return stored


def _ask_for_withheld(stored: StoredRequest, options: Mapping[str, Any]) -> None:
    """Say which options with a password must be given again.

    Raises:
        SettingsError: the storage of the trials is one of them.
    """
    for name in stored.withheld:
        if options[name] is not None:
            continue
        option = f"--{name.replace('_', '-')}"
        line = f"the study was begun with {option}, whose password is not stored"
        if name == "optuna_storage":
            raise SettingsError(f"{line[0].upper()}{line[1:]}: give it again.")
        click.echo(f"warning: {line}: without {option} URL it is told nothing now", err=True)


def _place(location: Path | str) -> str:
    return location.rstrip("/") if isinstance(location, str) else str(location.absolute())


def sources_to_resume(
    before: Sequence[DataSource],
    data: Path | str | None,
    normals: Path | None,
    categories: str | None,
) -> list[DataSource]:
    """Where the images of a resumed study are: its own categories, and those that are added.

    Args:
        before: the sources that the study was begun with.
        data, normals: a new place of its categories, or a place of new ones.
        categories: names with commas; those that the study does not have are added.

    Raises:
        DataError, SettingsError: images are gone, or a category is nowhere.
    """
    if not before and data is None and normals is None:
        raise SettingsError("The study was handed its images as tables: say --data FOLDER again.")
    names = shared.names_of(categories or "")
    places = {category: source for source in before for category in source.categories}
    if normals is not None:
        added = shared.data_source(data, normals, categories)
        places |= dict.fromkeys(added.categories, added)
    elif data is not None:
        there = shared.data_source(data, None, None)
        unknown = [name for name in names if name not in places and name != "all"]
        shared.choose_categories(there.categories, ",".join(unknown) or None, data)
        wanted = there.categories if not names or names == ["all"] else names
        places |= {name: there for name in wanted if name in there.categories}
        places |= {name: there for name in places if name in there.categories}
    else:
        for name in names:
            if name not in places and name != "all":
                places[name] = _source_with(before, name)
    return _grouped(places)


def _source_with(sources: Sequence[DataSource], category: str) -> DataSource:
    """The source that holds a category which the study does not have yet."""
    from clsnf.data.sets import list_categories

    for source in sources:
        place = source.location if is_uri(source.location) else Path(source.location)
        if not source.normals and category in list_categories(place):
            return source
    places = ", ".join(source.location for source in sources)
    raise DataError(
        f"{places} holds no category {category!r}: say with --data FOLDER where its pictures are."
    )


def _grouped(places: Mapping[str, DataSource]) -> list[DataSource]:
    """One source for each place, with the categories that are read from it."""
    from clsnf.results import DataSource

    grouped: dict[tuple[str, bool], list[str]] = {}
    for category, source in places.items():
        grouped.setdefault((source.location, source.normals), []).append(category)
    for location, _ in grouped:
        if not is_uri(location) and not Path(location).exists():
            gone = ", ".join(grouped.get((location, False)) or grouped[location, True])
            raise DataError(
                f"The pictures of {gone} are no longer in {location}: say with --data FOLDER "
                "where they are now."
            )
    return [
        DataSource(location, categories, normals)
        for (location, normals), categories in grouped.items()
    ]
