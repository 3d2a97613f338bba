"""docs/watching.md names every option, every field of a result, and every address of a PLC."""

from __future__ import annotations

import re
from pathlib import Path

import click

from clsnf.cli import main
from clsnf.watching.output_modbus import Signals
from clsnf.watching.result import FIELDS
from clsnf.watching.status import CODES

PAGE = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_option_is_in_the_table() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+", section("Options")))
    options = [o for o in main.commands["watch"].params if isinstance(o, click.Option)]
    assert named == {name for o in options for name in (*o.opts, *o.secondary_opts)}


def test_every_option_that_the_page_uses_exists() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", section("Options")))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known


def test_every_field_of_a_result_is_in_the_table() -> None:
    rows = [line.split("|")[1] for line in section("Results").splitlines() if line[:3] == "| `"]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(FIELDS)


def test_the_addresses_of_the_plc_are_those_that_are_written() -> None:
    coils, registers = section("Modbus TCP").split("| register |")
    assert len(re.findall(r"^\| \d", coils, re.MULTILINE)) == len(Signals().coils)
    assert len(re.findall(r"^\| \d", registers, re.MULTILINE)) == len(Signals().registers)
    assert ", ".join(f"{code} {name}" for name, code in CODES.items()) in registers
