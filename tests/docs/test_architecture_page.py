"""ARCHITECTURE.md names files and functions that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", PAGE)


def found(name: str) -> Path | None:
    """A path of the page: from the project's root, from the package, or a file's name alone."""
    for folder in (ROOT, ROOT / "clsnf", *(p for p in (ROOT / "clsnf").iterdir() if p.is_dir())):
        if (folder / name).exists():
            return folder / name
    return None


@pytest.mark.parametrize("name", sorted({c for c in CODE if re.fullmatch(r"[\w/]+(\.py|/)", c)}))
def test_every_path_on_the_page_is_there(name: str) -> None:
    # What a study leaves is no file of the project.
    assert name == "evidence/" or found(name) is not None


@pytest.mark.parametrize("reference", sorted({c for c in CODE if ".py: " in c}))
def test_every_function_on_the_page_is_in_its_file(reference: str) -> None:
    file, _, names = reference.partition(": ")
    path = found(file)
    assert path is not None
    text = path.read_text()
    for name in names.split(", "):
        for part in name.split("."):
            assert re.search(rf"^\s*((async )?def|class) {part}\b", text, re.MULTILINE), part
