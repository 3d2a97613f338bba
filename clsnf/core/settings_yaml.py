"""The settings as YAML with their documentation: ``clsnf settings``, and the table in
``docs/settings.md``.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import yaml

from clsnf.core.config import DetectorSettings, to_dict


def settings_yaml(settings: DetectorSettings | None = None) -> str:
    """All settings of a detector with their values (None: the defaults), a comment before each."""
    return "".join(_lines(settings or DetectorSettings(), 0))


def _lines(settings: Any, indent: int) -> list[str]:
    pad = " " * indent
    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            about = (type(value).__doc__ or "").split("\n")[0]
            lines += [f"\n{pad}# {about}\n", f"{pad}{field.name}:\n", *_lines(value, indent + 2)]
        else:
            comment = textwrap.wrap(field.metadata["help"], 110)
            lines += [f"{pad}# {line}\n" for line in comment]
            shown = (
                yaml.safe_dump(to_dict(value), default_flow_style=True)
                .strip()
                .removesuffix("\n...")
                .strip()
            )
            lines.append(f"{pad}{field.name}: {shown}\n")
    return lines
