"""``clsnf benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import data_options, path, setting_options
from clsnf.core.config import flattened
from clsnf.core.errors import ClsnfError, SettingsError, nearest
from clsnf.core.yaml import read_yaml_mapping

if TYPE_CHECKING:
    from clsnf.benchmark.request import Recipe


@main.command(short_help="Compare the method's five systems over categories and seeds.")
@data_options
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option(
    "--out",
    type=path,
    required=True,
    help="The benchmark's folder; a run in it that was interrupted goes on.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of seeds, from --seed on.",
)
@click.option(
    "--variants",
    type=path,
    help="A YAML file of changes to the settings: each is benchmarked beside the settings.",
)
@click.option(
    "--systems",
    help="Names with commas, of classifier, flow, fused, cflow and fused_unshared.  [default: all]",
)
@click.option(
    "--no-test", is_flag=True, help="Validation metrics only: the test images stay locked."
)
@setting_options
def benchmark(**options: Any) -> None:
    """Compare the method's five systems over categories and seeds.

    classifier, flow and fused share one finetuned backbone. cflow is the baseline on the pretrained
    backbone, and fused_unshared the ablation. Every system has three columns: the candidate that
    was selected on validation defects, the last epoch, and the best candidate on the test images,
    which only an oracle could choose. The authors' published metrics stand beside the method's.

    A variants file has a name for each variant, with the settings that it changes:

    \b
        shared_covariance: {flow: {covariance: shared}}
        more_epochs: {finetune: {joint_epochs: 16}}
    """
    categories_known = shared.preset_categories(options, options["categories"])
    variants = _variants(options["variants"])
    first = shared.settings_of(options, categories_known)
    tables, origin = shared.read_tables(options["data"], options["normals"], options["categories"])

    from clsnf.benchmark.request import BASE, BenchmarkRequest, category_of
    from clsnf.benchmark.run import run_benchmark
    from clsnf.cli.terminal import Terminal

    systems = _systems(options["systems"])
    recipes = {
        variant: {
            category_of(table): _recipe(options, category_of(table), changes) for table in tables
        }
        for variant, changes in {BASE: {}, **variants}.items()
    }
    terminal = Terminal()
    with terminal.live():
        terminal.backbone(first)
        request = BenchmarkRequest(
            tables=tables,
            recipes=recipes,
            seeds=range(first.seed, first.seed + options["seeds"]),
            out=options["out"].absolute(),
            textures=options["textures"],
            device=options["device"],
            test=not options["no_test"],
            allow_leak=options["allow_leak"],
            max_bad=options["max_bad"],
            origin=origin,
            systems=systems,
        )
        outcome = run_benchmark(request, terminal.line, terminal.progress)
    terminal.benchmark(outcome.cells, request.out)
    if outcome.failed:
        raise ClsnfError(
            f"{len(outcome.failed)} of the cells failed; run the same command again to go on with "
            "them."
        )


def _systems(names: str | None) -> tuple[str, ...]:
    """The systems that --systems names; all of them for None."""
    from clsnf.benchmark.systems import SYSTEMS

    if names is None:
        return tuple(SYSTEMS)
    systems = tuple(name.strip() for name in names.split(","))
    for name in systems:
        if name not in SYSTEMS:
            raise SettingsError(f"There is no system {name!r}.{nearest(name, SYSTEMS)}")
    return systems


def _recipe(options: dict[str, Any], category: str, changes: dict[str, Any]) -> Recipe:
    """Settings of a category under a variant's changes."""
    from clsnf.benchmark.request import Recipe
    from clsnf.paper.presets import preset_for

    settings = shared.settings_of(options, [category], changes=changes, announce=False)
    passes = settings.flow.passes
    # The authors train their baseline for another time; --set flow.passes sets both times.
    if options["preset"] == "paper":
        preset = preset_for(category)
        if passes == preset.overrides["flow.passes"]:
            passes = preset.baseline_passes
    return Recipe(settings, passes)


def _variants(file: Path | None) -> dict[str, dict[str, Any]]:
    """Name of a variant -> the settings that it changes, by dotted name."""
    if file is None:
        return {}
    found = read_yaml_mapping(file, "shared_covariance: {flow: {covariance: shared}}")
    for name, changes in found.items():
        if (
            not isinstance(changes, dict)
            or not str(name).replace("_", "").replace("-", "").isalnum()
            or name == "base"
        ):
            raise SettingsError(
                f"{file}: {name!r} must be a name (letters, digits, - and _; not base) with a "
                "mapping of settings."
            )
    return {str(name): flattened(changes) for name, changes in found.items()}
