"""``clsnf backbones``: what can serve, at what cost, and a trial of one."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clsnf.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["backbones", *arguments])


def rows(*arguments: str) -> dict[str, dict[str, object]]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in found}


def test_a_row_says_what_a_user_chooses_by() -> None:
    row = rows("resnet18")["resnet18"]
    assert row["kind"] == "pyramid"
    assert (row["strides"], row["channels"]) == ([4, 8, 16], [64, 128, 256])
    assert (row["canvas"], row["multiple"]) == ([256, 256], 16)
    assert row["parameters"] == 2782784
    assert row["flops"] == pytest.approx(3.66e9, rel=0.01)


def test_a_canvas_is_rounded_up_to_what_the_backbone_needs() -> None:
    row = rows("vit_small_patch14_dinov2", "--image-size", "256x300")["vit_small_patch14_dinov2"]
    assert row["kind"] == "transformer"
    assert (row["canvas"], row["multiple"]) == ([266, 308], 14)


def test_a_part_of_a_name_and_a_glob_find_the_same() -> None:
    assert list(rows("convnext_att")) == list(rows("convnext_att*")) != []


def test_the_table_names_what_differs_from_imagenet() -> None:
    done = run("vit_tiny_patch16_224")
    assert done.exit_code == 0
    header, row = done.stdout.splitlines()
    assert header.split()[:4] == ["name", "kind", "strides", "channels"]
    assert row.split()[0] == "vit_tiny_patch16_224"
    assert row.endswith("0.5, 0.5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet_of_nobody"], "No timm model matches 'resnet_of_nobody'"),
        (["--check", "resnet_18"], "Did you mean 'resnet18'"),
        (["--check", "resnet18", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--weights", "x.safetensors"], "--check"),
        (["vit", "--check", "resnet18"], "PATTERN"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_check_that_is_refused_says_where_and_why(tmp_path: Path) -> None:
    weights = tmp_path / "resnet18.safetensors"
    weights.write_bytes(b"no weights")
    done = run("--check", "resnet18", "--weights", str(weights), "--image-size", "64")
    assert done.exit_code == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("load      refused: ")
    assert "can't be read as weights" in line


@pytest.mark.slow
def test_a_check_prints_a_line_a_step() -> None:
    done = run("--check", "test_resnet", "--image-size", "64")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "load",
        "forward",
        "backward",
        "train",
        "save",
        "reload",
        "export",
        "test_resnet",
    ]
    assert all(" ok " in line and "MiB" in line for line in lines[:-1])
