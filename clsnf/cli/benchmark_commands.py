"""``clsnf benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clsnf.cli import options as shared
from clsnf.cli.group import main
from clsnf.cli.options import data_options, path, setting_options
from clsnf.core.config import flattened
from clsnf.core.errors import ClsnfError, SettingsError, nearest
from clsnf.core.yaml import read_yaml_mapping


@main.command(short_help="Compare the method's five systems over categories and seeds.")
@data_options
@click.option("--categories", help="Names with commas.  [default: all]")
@click.option(
    "--out",
    type=path,
    required=True,
    help="The benchmark's folder; one that was begun before goes on.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="How many seeds, from --seed on.",
)
@click.option(
    "--variants",
    type=path,
    help=(
        "A YAML file of changes to the settings, each benchmarked beside the settings as they are."
    ),
)
@click.option(
    "--systems",
    help="Names with commas, of classifier, flow, fused, cflow and fused_unshared.  [default: all]",
)
@click.option(
    "--no-test", is_flag=True, help="Validation figures alone: the test images stay locked."
)
@setting_options
def benchmark(**options: Any) -> None:
    """Compare the method's five systems over categories and seeds, beside the authors' published
    figures.

    classifier, flow and fused share one finetuned backbone; cflow is the baseline on the pretrained
    one, fused_unshared the ablation. For each there are three columns: what was selected on
    validation defects, what the last epoch gives, and what an oracle that looks at the test images
    would have given.

    A variants file names changes as --set does:

    \b
        shared_covariance: {flow: {covariance: shared}}
        more_epochs: {finetune: {joint_epochs: 16}}
    """
    categories_known = shared.preset_categories(options, options["categories"])
    variants = _variants(options["variants"])
    first = shared.settings_of(options, categories_known)
    tables, origin = shared.read_tables(options["data"], options["normals"], options["categories"])

    from clsnf.benchmark.run import BenchmarkRequest, Recipe, run_benchmark
    from clsnf.benchmark.systems import SYSTEMS
    from clsnf.benchmark.tables import BASE
    from clsnf.cli.terminal import Terminal
    from clsnf.paper.presets import preset_for

    systems = (
        tuple(SYSTEMS)
        if options["systems"] is None
        else tuple(s.strip() for s in options["systems"].split(","))
    )
    strange = [name for name in systems if name not in SYSTEMS]
    if strange:
        raise SettingsError(f"There is no system {strange[0]!r}.{nearest(strange[0], SYSTEMS)}")

    def recipe(category: str, changes: dict[str, Any]) -> Recipe:
        settings = shared.settings_of(options, [category], changes=changes, announce=False)
        # The authors train their baseline for as long as they say; a --set flow.passes is meant for
        # both.
        paper = (
            options["preset"] == "paper"
            and settings.flow.passes == preset_for(category).overrides["flow.passes"]
        )
        return Recipe(
            settings, preset_for(category).baseline_passes if paper else settings.flow.passes
        )

    names = [str(table["category"][0].as_py()) for table in tables]
    recipes = {
        variant: {name: recipe(name, changes) for name in names}
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


def _variants(file: Path | None) -> dict[str, dict[str, Any]]:
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
