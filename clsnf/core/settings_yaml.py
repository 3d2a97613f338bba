"""Settings as YAML with their documentation, for ``clsnf settings`` and ``docs/settings.md``."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import yaml

from clsnf.core.config import DetectorSettings, to_dict

_WIDTH = 100


def settings_yaml(settings: DetectorSettings | None = None) -> str:
    """The settings of a detector (None: the defaults) as YAML, with a comment before each."""
    return "".join(_lines(settings or DetectorSettings(), 0))


def _lines(settings: Any, indent: int) -> list[str]:
    pad = " " * indent
    lines: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            about = (type(value).__doc__ or "").split("\n")[0]
            lines += [f"\n{pad}# {about}\n", f"{pad}{field.name}:\n", *_lines(value, indent + 2)]
        else:
            comment = textwrap.wrap(field.metadata["help"], _WIDTH - indent - len("# "))
            lines += [f"{pad}# {line}\n" for line in comment]
            flow = yaml.safe_dump({field.name: to_dict(value)}, default_flow_style=True, width=1e9)
            lines.append(f"{pad}{flow.strip()[1:-1]}\n")  # without the braces
    return lines
